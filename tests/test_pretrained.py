"""Published weights: those of recorded runs, checked when they are loaded, and what they do."""

import hashlib
import json
import pickle
import shutil
import subprocess
import sys
import tomllib

import jax
import numpy as np
import pytest
from PIL import Image

import resnet_flax
from resnet_flax import create_model, pretrained
from resnet_flax.errors import UserError
from resnet_flax.runs import published, weights
from resnet_flax.tools import publish
from tests.conftest import ROOT
from tests.test_convert import random_variables

INDEX = published.read_index()


def small_weights(**changes):
    """Random weights of an 8-layer net for 8x8 images of three classes."""
    values = {
        "model": {"name": "resnet8", "shortcut": "A", "num_classes": 3, "stride_in_3x3": False},
        "variables": random_variables(create_model("resnet8", 3)),
        "mean": np.full((8, 8, 3), 120, np.float32),
        "std": np.full(1, 64, np.float32),
        "class_names": ("ant", "bee", "cat"),
        "training": {},
    }
    return weights.Weights(**values | changes)


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.safetensors"
    weights.save(path, small_weights())
    return path


def test_names_that_are_not_published(tmp_path):
    def refused(message, source):
        with pytest.raises(UserError, match=message):
            resnet_flax.load_pretrained(source)

    refused(r"no weights are published for resnet32; published: .*\(8\.58 % on cif", "resnet32")
    refused(r"did you mean 'resnet20'\?", "resnet20x")
    refused("no published weights are called 'nothing'; published: plain20 ", "nothing")
    refused("weights file no/such.safetensors does not exist; pub", "no/such.safetensors")
    refused("holds no weights.safetensors: finish the run first", tmp_path)
    (tmp_path / "seed0").mkdir()
    (tmp_path / "seed0" / "weights.safetensors").touch()
    refused("name one of its runs, .*/seed0$", tmp_path)
    refused("seed0/weights.safetensors cannot be read: no safetensors", tmp_path / "seed0")


def test_a_changed_file_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "FOLDER", tmp_path)
    shutil.copy(ROOT / "resnet_flax/pretrained/index.json", tmp_path)
    with pytest.raises(UserError, match="is missing: install the package again"):
        resnet_flax.load_pretrained("resnet20")
    source = ROOT / "resnet_flax/pretrained/resnet20.safetensors"
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    (tmp_path / source.name).write_bytes(content)
    with pytest.raises(UserError, match=r"is damaged: its SHA-256 is .*, not 9239064cb2c3"):
        resnet_flax.load_pretrained("resnet20")


@pytest.mark.parametrize("name", INDEX)
def test_what_is_published_is_what_was_recorded(name):
    entry = INDEX[name]
    result = json.loads((ROOT / entry["results"] / "result.json").read_text())
    net = resnet_flax.load_pretrained(name)
    assert entry["test_error"] == result["test_error_last"]
    assert list(net.class_names) == result["class_names"]
    for key in ("model", "seed", "steps", "commit", "test_loss_last"):
        assert net.training[key] == result[key]
    assert repr(net) == f"Pretrained({name!r}, size=32, 10 classes)"
    assert sum(x.size for x in jax.tree.leaves(net.variables["params"])) == entry["parameters"]
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(net.variables))


def test_docs_and_installation_have_what_is_published():
    inside = (ROOT / "docs/weights.md").read_text().split("published -->")[1]
    rows = []
    for name, entry in INDEX.items():
        run = f"[{entry['results'].split('/', 1)[1]}](../{entry['results']})"
        rows.append(f"| `{name}` | {100 * entry['test_error']:.2f} % | {run} |")
    assert [line for line in inside.splitlines() if line.startswith("| `")] == rows
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["resnet_flax.pretrained"]
    assert patterns == ["index.json", "*.safetensors"]
    files = [entry["file"] for entry in INDEX.values()]
    assert sorted(files) == sorted(p.name for p in published.FOLDER.glob("*.safetensors"))
    assert sum((published.FOLDER / f).stat().st_size for f in files) <= publish.MOST_BYTES


def test_importing_the_package_reads_no_images():
    code = "import sys, resnet_flax; assert 'PIL' not in sys.modules; resnet_flax.load_pretrained"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="load_pretrain'"):
        resnet_flax.load_pretrain  # noqa: B018


def test_probabilities_are_those_of_the_net(weights_file):
    net = resnet_flax.load_pretrained(weights_file)
    assert net.sha256 == hashlib.sha256(weights_file.read_bytes()).hexdigest()
    # More than a batch, and not a multiple of one.
    crops = np.random.RandomState(0).randint(0, 256, (41, 8, 8, 3), np.uint8)
    got = net.probabilities(crops)
    model = create_model("resnet8", 3)
    variables, normalized = small_weights().variables, (crops.astype(np.float32) - 120) / 64
    logits = jax.jit(model.apply)(variables, normalized)
    np.testing.assert_allclose(got, jax.nn.softmax(logits), atol=1e-5)
    np.testing.assert_allclose(jax.jit(net.logits)(crops), logits, atol=1e-4)
    assert net.probabilities(crops[:0]).shape == (0, 3)
    for wrong in (crops[:, :4], crops[0], crops.astype(np.float32)):
        with pytest.raises(ValueError, match=r"must be uint8 \[N"):
            net.probabilities(wrong)


def test_predict_takes_one_image_or_many_of_any_kind(weights_file, tmp_path):
    net = resnet_flax.load_pretrained(str(weights_file))
    big, file = np.random.RandomState(1).randint(0, 256, (8, 16, 3), np.uint8), tmp_path / "big.png"
    image = Image.fromarray(big)
    image.save(file)
    row = net.probabilities(big[None, :, 4:12])[0]  # The central square.
    order = sorted(range(3), key=lambda k: -row[k])
    want = [(("ant", "bee", "cat")[k], pytest.approx(row[k], abs=1e-6)) for k in order]
    content, opaque = file.read_bytes(), np.dstack([big, np.full((8, 16), 255, np.uint8)])
    for one in (big, content, file, str(file), image, jax.numpy.asarray(big), opaque):
        assert net.predict(one) == [want]
    grey = big[..., 0]
    [want_grey] = net.predict(np.dstack([grey] * 3))
    for one in (grey, grey[..., None], Image.fromarray(grey)):
        assert net.predict(one) == [want_grey]
    both = net.predict(np.stack([big, np.dstack([grey] * 3)]))
    assert both == net.predict([content, grey])
    assert both[0] == want
    assert net.predict([big, content], top=2) == [want[:2], want[:2]]
    assert net.predict([]) == []
    cloudpickle = pytest.importorskip("cloudpickle")
    assert pickle.loads(cloudpickle.dumps(net)).predict(big) == [want]  # After it has compiled.
    for wrong, message in (
        (tmp_path / "no.png", "no.png cannot be read: there is no such file"),
        (tmp_path, "cannot be read: it is not a file"),
        (weights_file, "net.safetensors cannot be read: "),
        (b"", "an image cannot be read: "),
        (big / 2, r"it is float64 \[8, 16, 3\]: give pixel values 0 to 255 as uint8"),
        (big[..., :2], r"it is uint8 \[8, 16, 2\]: give"),
        (big[:0], r"it is uint8 \[0, 16, 3\]: give"),
        (3, "it is a int, and no path, image or array"),
        ([None], "it is a NoneType"),
    ):
        with pytest.raises(UserError, match=message):
            net.predict(wrong)


def test_sizes_are_those_of_the_net_s_training():
    def sizes(**changes):
        net = pretrained.assemble("x", small_weights(**changes), "")
        return net.size, net.short_side

    of_channels = {"mean": np.zeros(3, np.float32), "std": np.ones(3, np.float32)}
    imagenet = {
        "model": {"name": "resnet18", "num_classes": 3},
        "variables": random_variables(create_model("resnet18", 3)),
        **of_channels,
    }
    assert sizes() == (8, 8)
    assert sizes(**of_channels) == (32, 32)
    assert sizes(**of_channels, training={"config": {"data.image_size": 48}}) == (48, 48)
    assert sizes(**imagenet) == (224, 256)
    folder = {"data.name": "folder", "data.image_size": 64, "data.eval_short_side": 80}
    assert sizes(**imagenet, training={"config": folder}) == (64, 80)
    cifar = {"data.name": "cifar10", "data.image_size": 0}
    assert sizes(**imagenet, training={"config": cifar}) == (32, 32)
    assert sizes(training={"config": {"data.image_size": "big", "data.name": ["x"]}}) == (8, 8)


def test_files_that_contradict_themselves():
    for changes, message in (
        ({"class_names": ("ant", "bee")}, "has 2 class names, but its net 3 outputs"),
        ({"model": {"name": "resnet9"}}, "unknown model 'resnet9'"),
        ({"model": {"name": "resnet8", "dropout": 1}}, "describes no net of this version"),
        ({"model": {"name": "resnet8", "num_classes": "3"}}, "describes no net of this version"),
        ({"model": {"name": "resnet20", "num_classes": 3}}, "it lacks .*stage1_block2"),
        ({"model": {"name": "resnet8"}}, r"head/bias is float32 \[3\], but float32 \[10\] here"),
        ({"mean": np.zeros((8, 9, 3), np.float32)}, "expects images of another shape"),
        ({"std": np.zeros(1, np.float32)}, "expects images of another shape"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained.assemble("x", small_weights(**changes), "")
    assert pretrained.assemble("x", small_weights(class_names=()), "").class_names[2] == "2"


def test_files_with_metadata_of_the_wrong_kind(tmp_path):
    path = tmp_path / "w.safetensors"
    for changes in ({"model": {}}, {"model": ["name"]}, {"class_names": 3}, {"training": "long"}):
        weights.save(path, small_weights(**changes))
        with pytest.raises(UserError, match="is damaged: its metadata are of the wrong types"):
            weights.load(path)


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A recorded run, its weights, and an empty folder of published ones."""
    results, folder = tmp_path / "results/made_up", tmp_path / "published"
    results.mkdir(parents=True)
    folder.mkdir()
    training = {"model": "resnet8", "shortcut": "A", "data": "digits", "seed": 0, "steps": 5,
                "test_error_last": 0.25, "commit": "abc"}  # fmt: skip
    config = {"optim.learning_rate": 0.1}
    result = training | {"class_names": ["ant", "bee", "cat"], "test_confusion_last": [[1]]}
    for name, content in (("result", result), ("run", {}), ("config", config)):
        (results / f"{name}.json").write_text(json.dumps(content))
    (results / "metrics.jsonl").touch()
    weights.save(tmp_path / "w.safetensors", small_weights(training=training | {"config": config}))
    monkeypatch.setattr(published, "FOLDER", folder)
    return results, tmp_path / "w.safetensors", folder


def test_publish_writes_a_file_and_a_line_of_the_index(recorded, monkeypatch, capsys):
    results, file, folder = recorded
    publish.main([str(results), f"--weights={file}", "--name=resnet8_new"])
    assert "published resnet8_new: 25.00 % test error" in capsys.readouterr().out
    path = folder / "resnet8_new.safetensors"
    assert path.read_bytes() == file.read_bytes()
    entry = published.read_index()["resnet8_new"]
    assert entry["results"] == "results/made_up"
    assert entry["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(UserError, match="published already, from results/made_up"):
        publish.publish(results, file, "resnet8_new")
    publish.publish(results, file, "resnet8_new", replace=True)
    monkeypatch.setattr(publish, "MOST_BYTES", 2 * path.stat().st_size - 1)
    with pytest.raises(UserError, match="would have more than"):
        publish.publish(results, file, "resnet8_more")
    assert sorted(p.name for p in folder.iterdir()) == ["index.json", path.name]
    assert list(published.read_index()) == ["resnet8_new"]


def test_weights_of_another_run_are_not_published(recorded):
    results, file, folder = recorded

    def refused(message, name="resnet8_new", where=results):
        with pytest.raises(UserError, match=message):
            publish.publish(where, file, name)
        assert not list(folder.iterdir())

    for name in ("resnet8-new", "resnet20_new", "resnet8/../../x"):
        refused("must be of small letters", name)
    outside = results.parent.parent / "elsewhere"
    shutil.copytree(results, outside)
    refused("does not lie in results/", where=outside)
    for name, key, value, message in (
        ("result", "commit", "def", "its commit is 'abc', the run's 'def'"),
        ("result", "test_error_last", 0.2500001, "its test_error_last is 0.25,"),
        ("result", "class_names", ["a", "b", "c"], "its class_names is"),
        ("config", "optim.learning_rate", 0.2, "its optim.learning_rate is 0.1, the run's 0.2"),
    ):
        path = results / f"{name}.json"
        old = path.read_text()
        path.write_text(json.dumps(json.loads(old) | {key: value}))
        refused(message)
        path.write_text(old)
    (results / "metrics.jsonl").unlink()
    refused("holds no metrics.jsonl")
