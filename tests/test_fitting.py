"""Training from arrays in Python."""

import json

import numpy as np
import pytest

import resnet_flax
from resnet_flax import fit
from resnet_flax.data import arrays
from resnet_flax.errors import UserError
from tests import commands

SHORT = {"data.batch_size": 8, "train.cpu_devices": 1, "log.tensorboard": False}


def images(count, side=8):
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


LABELS = np.arange(24) % 3


@pytest.fixture(scope="module")
def trained(tmp_path_factory, compiled_for_once):
    """A run's directory, what `fit` returned, and its options."""
    directory = tmp_path_factory.mktemp("fit") / "run"
    options = {
        "test": (images(5), LABELS[:5]),
        "model": "resnet8",
        "total_steps": 4,
        "config": SHORT | {"data.split": "45k/5k"},
        "class_names": np.array(["x", "y", "z"]),
    }
    return directory, fit(images(24), LABELS, workdir=directory, **options), options


def test_a_net_trained_on_arrays_is_ready_to_use(trained):
    directory, net, _ = trained
    assert (net.class_names, net.size, net.training["steps"]) == (("x", "y", "z"), 8, 4)
    assert net.training["test_examples"] == 5
    assert net.training["test_error_at_best_validation"] is not None
    ((best, *others),) = net.predict(images(1)[0])
    assert best[0] in net.class_names
    assert len(others) == 2
    again = resnet_flax.load_pretrained(directory).predict(images(1)[0])
    assert again == [[best, *others]]


def test_the_same_call_reads_the_finished_run_and_other_arrays_are_refused(trained):
    directory, net, options = trained
    before = (directory / "result.json").read_bytes()
    assert fit(images(24), LABELS, workdir=directory, **options).sha256 == net.sha256
    assert (directory / "result.json").read_bytes() == before
    with pytest.raises(UserError, match="the data set arrays is not the one that the run"):
        fit(images(24) // 2, LABELS, workdir=directory, **options)


def test_the_configuration_is_the_papers_in_proportion(trained):
    config = json.loads((trained[0] / "config.json").read_text())
    assert config["optim.boundaries_steps"] == [2, 3]
    assert config["data.name"] == "arrays"


def test_evaluation_says_why_it_cannot_load_them(trained):
    done = commands.run("resnet_flax.main", "--mode=evaluate", f"--workdir={trained[0]}")
    assert done.returncode == 1
    assert "this run was trained on arrays in Python" in done.stderr


def test_without_test_images_a_tenth_of_each_class_is_held_out():
    data = arrays.load((images(60), np.arange(60) % 3))
    assert np.bincount(data.test.labels).tolist() == [2, 2, 2]
    assert np.bincount(data.train.labels).tolist() == [18, 18, 18]
    assert len(arrays.load((images(24), LABELS)).test) == 3  # At least one.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": images(24) / 255}, r"training images are float64 \[24, 8, 8, 3\], must be"),
        ({"images": images(24)[..., 0]}, r"uint8 \[24, 8, 8\], must be uint8 \[N, S, S, 3\]"),
        ({"images": images(24)[:, 1:]}, r"uint8 \[24, 7, 8, 3\]"),
        ({"labels": LABELS[1:]}, r"training labels are int64 \[23\], must be 24 integers"),
        ({"labels": LABELS / 2}, "training labels are float64"),
        ({"labels": LABELS - 1}, "none below 0"),
        ({"images": images(0), "labels": LABELS[:0]}, "must be at least one"),
        ({"labels": np.arange(24)}, "there are no test images"),
        ({"test": (images(3, 9), LABELS[:3])}, r"test images are \(9, 9, 3\), the training"),
        ({"class_names": ("a", "b")}, "class_names has 2 names, but the labels go to 2"),
        ({"model": "resnet21"}, "unknown model 'resnet21'"),
        ({"config": {"optim.rate": 1}}, "optim.rate"),
        ({"config": {"train.num_seeds": 2}}, "train.num_seeds is not for `fit`"),
        ({"config": {"data.name": "digits"}}, "data.name is not for `fit`"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, change, message):
    given = {"images": images(24), "labels": LABELS, "workdir": tmp_path / "run"} | change
    with pytest.raises(UserError, match=message):
        fit(given.pop("images"), given.pop("labels"), **given)
    assert not (tmp_path / "run").exists()
