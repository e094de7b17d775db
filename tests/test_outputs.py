"""`tools.ensemble` and `tools.responses`."""

import dataclasses
import functools
import json
import shutil

import flax.traverse_util
import jax
import numpy as np
import pytest
import tqdm

from resnet_flax import data, models
from resnet_flax.errors import UserError
from resnet_flax.runs import weights
from resnet_flax.tools import ensemble, responses
from resnet_flax.training import outputs, scoring
from resnet_flax.training.trained import Loader


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", split="all", seed=0)


@functools.cache
def compiled(name, shortcut, **options):
    model = models.create_model(name, 10, shortcut=shortcut)
    return jax.jit(functools.partial(model.apply, **options))


def logits(content, images, **options):
    net = compiled(content.model["name"], content.model["shortcut"], **options)
    return net(content.variables, (images.astype("f") - content.mean) / content.std)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, digits, undisturbed):
    """A run `a`, a file `b.safetensors` with another preprocessing, and the weights of both."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(undisturbed().directory, folder / "a")
    config = json.loads((folder / "a" / "config.json").read_text())
    # The last batch of 359 examples is filled up with nothing.
    config |= {"eval.batch_size": 100, "train.cpu_devices": 1}
    (folder / "a" / "config.json").write_text(json.dumps(config))
    first = weights.load(folder / "a" / "weights.safetensors")
    random = np.random.RandomState(0)
    second = dataclasses.replace(
        first,
        variables=jax.tree.map(lambda x: x * random.uniform(0.5, 1.5, x.shape).astype("f"),
                               first.variables),
        mean=np.full(3, 99, np.float32),
        std=np.full(3, 60, np.float32),
        training=first.training | {"seed": 1},
    )  # fmt: skip
    for content, path in ((first, "a/weights.safetensors"), (second, "b.safetensors")):
        # Logits of mean 0: else all would be taken for one class.
        bias = content.variables["params"]["head"]["bias"]
        bias -= np.mean(logits(content, digits.test.images), axis=0)
        weights.save(folder / path, content)
    return folder, first, second


def test_an_ensemble_averages_probabilities(runs, digits, tmp_path, capsys, monkeypatch):
    folder, *contents = runs
    nets = [str(folder / "a"), str(folder / "b.safetensors")]
    given, original = [], outputs.probabilities
    monkeypatch.setattr(outputs, "probabilities", lambda n: given.append(original(n)) or given[-1])
    ensemble.main([*nets, "--json", f"--out={tmp_path}/ensemble.json"])
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "ensemble.json").read_text())
    images, labels = digits.test.images, digits.test.labels
    each = [np.asarray(jax.nn.softmax(logits(c, images)), np.float64) for c in contents]
    guesses = [p.argmax(1) for p in (*each, each[0] + each[1])]
    # Else little would be tested.
    assert all((guesses[2] != own).any() for own in guesses[:2])
    wrong = [int((g != labels).sum()) for g in guesses]
    assert [m["wrong"] for m in result["members"]] == wrong[:2]
    assert (result["wrong"], result["examples"]) == (wrong[2], 359)
    assert result["error"] == wrong[2] / 359
    assert result["mean_error"] == pytest.approx((wrong[0] + wrong[1]) / 2 / 359)
    assert [m["seed"] for m in result["members"]] == [0, 1]
    monkeypatch.setattr(ensemble, "evaluate", lambda *_: result)
    ensemble.main(nets)
    text = capsys.readouterr().out
    assert f"({wrong[2]} of 359 wrong)" in text
    assert text.count("\n") == 3
    # In order, and each example once.
    for (found, known), expected in zip(given, each, strict=True):
        np.testing.assert_array_equal(known, labels)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_outputs_and_classes_go_together_by_name(runs, tmp_path):
    folder, first, _ = runs
    right = scoring.score(None, None, str(folder / "a" / "weights.safetensors"))
    order = np.roll(np.arange(10), 3)
    head = jax.tree.map(lambda x: np.asarray(x)[..., order], first.variables["params"]["head"])
    variables = first.variables | {"params": first.variables["params"] | {"head": head}}
    names = tuple(first.class_names[k] for k in order)
    content = dataclasses.replace(first, variables=variables, class_names=names)
    weights.save(tmp_path / "rolled.safetensors", content)
    found = scoring.score(None, None, str(tmp_path / "rolled.safetensors"))
    found, right = (scoring.describe(s).splitlines() for s in (found, right))
    assert found[1:] == right[1:]


@pytest.mark.parametrize(
    ("names", "classes", "order"),
    [
        ("cat dog", "dog cat", [1, 0]),
        ("cat dog eel", "dog cat", [1, 0, 2]),
        ("0 1 2", "0 2 1", [0, 2, 1]),
        ("0 1 2", "ant bee cat", [0, 1, 2]),
        ("0 1 2", "ant bee", None),
        ("cat dog", "0 1", None),
        ("cat dog", "cat eel", None),
    ],
)
def test_classes_are_matched_by_name(names, classes, order):
    names, classes = tuple(names.split()), tuple(classes.split())
    head = {"kernel": np.arange(2.0 * len(names)).reshape(2, -1), "bias": np.arange(len(names))}
    given = weights.Weights({}, {"params": {"head": head}}, np.zeros(3), np.ones(3), names, {})
    if order is None:
        with pytest.raises(UserError, match="w is of other classes"):
            weights.for_classes(given, classes, "w")
        return
    found = weights.for_classes(given, classes, "w")
    assert found.variables["params"]["head"]["bias"].tolist() == order
    assert found.variables["params"]["head"]["kernel"][0].tolist() == order
    assert found.class_names[: len(classes)] in (classes, names)


def test_nets_that_do_not_go_together_are_refused(runs, tmp_path):
    folder, first, _ = runs
    a, file, moved = folder / "a", tmp_path / "other.safetensors", tmp_path / "moved"

    def refuse(message, *others, **changes):
        weights.save(file, dataclasses.replace(first, **changes))
        with pytest.raises(UserError, match=message):
            ensemble.evaluate([a, *others], Loader())

    refuse("at least two nets")
    refuse("are the same weights", a)
    refuse("is of other classes .*: it lacks '0'", file, class_names=tuple("abcdefghij"))
    head = first.variables["params"]["head"]
    head = {name: np.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, 2),)) for name, x in head.items()}
    refuse(
        "number of outputs: 12; the other's: 10",
        file,
        variables=first.variables | {"params": first.variables["params"] | {"head": head}},
        model=first.model | {"num_classes": 12},
        class_names=tuple(map(str, range(12))),
    )
    shutil.copytree(a, moved)
    run = json.loads((a / "run.json").read_text())
    run["data"]["fingerprint"] = "0" * 64
    (moved / "run.json").write_text(json.dumps(run))
    refuse("is not the one that the run in", moved)


def test_responses_are_the_deviations_after_batch_normalisation(runs, digits, capsys, monkeypatch):
    folder, first, _ = runs
    bars = []

    def make_bar(**options):
        bars.append(tqdm.tqdm(**options | {"disable": False}))
        return bars[-1]

    monkeypatch.setattr(outputs, "tqdm", make_bar)
    responses.main([str(folder / "a")])
    assert [bar.n for bar in bars] == [359]
    content = json.loads((folder / "a" / "responses.json").read_text())
    assert content["images"] == 359
    assert [layer["name"] for layer in content["layers"]] == [
        "stem_bn", "stage1_block1/bn1", "stage1_block1/bn2", "stage2_block1/bn1",
        "stage2_block1/bn2", "stage3_block1/bn1", "stage3_block1/bn2",
    ]  # fmt: skip
    # All images at once here, in batches of 100 and a rest there.
    _, state = logits(
        first, digits.test.images, capture_intermediates=True, mutable="intermediates"
    )
    found = flax.traverse_util.flatten_dict(state["intermediates"], sep="/")
    for layer in content["layers"]:
        expected = np.asarray(found[f"{layer['name']}/__call__"][0], np.float64).std()
        assert layer["std"] == pytest.approx(expected, rel=1e-5)
    assert "7 layers" in capsys.readouterr().out


def test_bottlenecks_have_one_response_a_block_and_preactivation_none():
    def layers(name):
        return outputs.response_layers(models.create_model(name), name)

    assert len(layers("resnet110")) == 109
    assert len(layers("plain20")) == 19
    assert layers("resnet20_bottleneck")[:2] == ["stem_bn", "stage1_block1/bn2"]
    # The first convolution of an ImageNet net is 7x7.
    assert layers("resnet18")[0] == "stage1_block1/bn1"
    for name in ("resnet20_preact", "resnet110_bn_after_addition", "resnet56_keras_v2"):
        with pytest.raises(UserError, match=f"{name} has its layers in another order"):
            layers(name)


def test_a_run_that_cannot_be_measured_does_not_stop_the_others(runs, tmp_path, capsys):
    folder, _, _ = runs
    good, bad = tmp_path / "good", tmp_path / "unwritable"
    for copy in (good, bad):
        shutil.copytree(folder / "a", copy, ignore=lambda *_: ["responses.json"])
    (bad / "responses.json").mkdir()
    with pytest.raises(UserError, match="3 of 4 runs could not be measured"):
        responses.main([str(path) for path in (tmp_path / "absent", tmp_path, bad, good)])
    said = capsys.readouterr().err
    assert "absent is no directory of a run" in said
    assert "holds no weights.safetensors: finish the run" in said
    assert f"cannot write {bad}/responses.json" in said
    assert (good / "responses.json").exists()
