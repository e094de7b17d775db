"""`tools.ensemble` and `tools.responses`, on nets that have learned nothing."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import tqdm

from resnet_flax import data, models
from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.runs import environment, weights
from resnet_flax.tools import ensemble, responses
from resnet_flax.training import outputs, scoring, setup
from resnet_flax.training.trained import Loader
from tests.conftest import make_small_config

MEAN = np.zeros(3, np.float32)


def make_run(directory, seed, name="resnet8", **changes):
    """What a finished run of random weights and statistics leaves, as far as the tools read it."""
    config = make_small_config()
    config.model.name, config.seed = name, seed
    for key, value in changes.items():
        config.data[key] = value
    dataset = data.load("digits", split="all", seed=seed)
    run = setup.build(config, dataset, sharding.make_mesh(jax.devices()[:1], 16))
    directory.mkdir(parents=True)
    state = run.create_state()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = (dataset.train.images.astype("f") - run.mean) / run.std
    # The data's own statistics, and logits of mean 0: else all would be taken for one class.
    fresh = run.model.clone(bn_momentum=0.0)
    apply = functools.partial(fresh.apply, train=True, mutable=["batch_stats"])
    scores, stats = jax.jit(apply)(variables, images)
    params = jax.device_get(state.params)
    params["head"]["bias"] = -np.mean(scores, axis=0)
    environment = environment.describe(run.mesh)
    record.write_start(
        directory, config, run, step=0, environment=environment, init_weights=None,
        checkpoint_dir=str(directory / "checkpoints"),
    )  # fmt: skip
    content = weights.Weights(
        record.describe_model(run),
        {"params": params, **jax.device_get(stats)},
        run.mean,
        run.std,
        dataset.class_names,
        {"seed": seed, "config": json.loads((directory / "config.json").read_text())},
    )
    weights.save(directory / "weights.safetensors", content)
    return content


def logits(content, images, **kwargs):
    model = models.create_model(content.model["name"], 10, shortcut=content.model["shortcut"])
    normalised = (images.astype("f") - content.mean) / content.std
    return jax.jit(functools.partial(model.apply, **kwargs))(content.variables, normalised)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", split="all", seed=0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    first = make_run(folder / "a", 0, normalize="pixel_mean_255")
    # Other preprocessing and another net: each has its own.
    second = make_run(folder / "b", 1, normalize="channel")
    return folder, first, second


def test_an_ensemble_averages_probabilities(runs, digits, tmp_path, capsys):
    folder, first, second = runs
    ensemble.main([str(folder / "a"), str(folder / "b" / "weights.safetensors"), "--json",
                   f"--out={tmp_path}/ensemble.json"])  # fmt: skip
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((tmp_path / "ensemble.json").read_text())
    images, labels = digits.test.images, digits.test.labels
    each = [np.asarray(jax.nn.softmax(logits(c, images)), np.float64) for c in (first, second)]
    guesses = [p.argmax(1) for p in (*each, each[0] + each[1])]
    # Else little would be tested.
    assert all((guesses[2] != own).any() for own in guesses[:2])
    wrong = [int((g != labels).sum()) for g in guesses]
    assert [m["wrong"] for m in result["members"]] == wrong[:2]
    assert (result["wrong"], result["examples"]) == (wrong[2], 359)
    assert result["error"] == wrong[2] / 359
    assert result["mean_error"] == pytest.approx((wrong[0] + wrong[1]) / 2 / 359)
    assert [m["seed"] for m in result["members"]] == [0, 1]
    text = ensemble._text(result)
    assert f"({wrong[2]} of 359 wrong)" in text
    assert text.count("\n") == 2


def test_probabilities_of_every_example_in_order(runs, digits):
    folder, first, _ = runs
    trained = Loader().load(folder / "a")
    one = sharding.split(trained.run.mesh)
    # 359 examples in batches of 100: the last is filled up with nothing.
    given, labels = outputs.predict(
        trained.run.model, trained.variables(), trained.test_feed(), sharding=one, batch_size=100
    )
    np.testing.assert_array_equal(labels, digits.test.labels)
    expected = jax.nn.softmax(logits(first, digits.test.images))
    np.testing.assert_allclose(given, expected, atol=1e-5)


def test_outputs_and_classes_go_together_by_name(runs, tmp_path):
    folder, first, _ = runs
    right = scoring.score(None, None, str(folder / "a" / "weights.safetensors"))
    assert "wrong" in right
    order = np.roll(np.arange(10), 3)
    head = jax.tree.map(lambda x: np.asarray(x)[..., order], first.variables["params"]["head"])
    variables = first.variables | {"params": first.variables["params"] | {"head": head}}
    names = tuple(first.class_names[k] for k in order)
    content = dataclasses.replace(first, variables=variables, class_names=names)
    file = tmp_path / "rolled.safetensors"
    weights.save(file, content)
    found = scoring.score(None, None, str(file))
    assert found.splitlines()[1:] == right.splitlines()[1:]
    loaded = Loader().load(file).weights
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, first.variables)
    weights.save(file, dataclasses.replace(content, class_names=tuple("abcdefghij")))
    with pytest.raises(UserError, match="is of other classes .*: it lacks '0'"):
        scoring.score(None, None, str(file))


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
    given = weights.Weights({}, {"params": {"head": head}}, MEAN, MEAN, names, {})
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
    a = folder / "a"

    def refuse(message, *others):
        with pytest.raises(UserError, match=message):
            ensemble.evaluate([a, *others], Loader())

    refuse("at least two nets")
    refuse("are the same weights", a)
    refuse("absent does not exist", tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    refuse("holds no weights.safetensors: finish the run", tmp_path / "empty")
    other = weights.Weights(**vars(first) | {"class_names": tuple("abcdefghij")})
    weights.save(tmp_path / "other.safetensors", other)
    refuse("is of other classes", tmp_path / "other.safetensors")
    more = jax.tree.map(np.copy, first.variables)
    head = more["params"]["head"]
    head["kernel"] = np.pad(head["kernel"], ((0, 0), (0, 2)))
    head["bias"] = np.pad(head["bias"], (0, 2))
    names = tuple(map(str, range(12)))
    model = first.model | {"num_classes": 12}
    changed = vars(first) | {"variables": more, "model": model, "class_names": names}
    weights.save(tmp_path / "more.safetensors", weights.Weights(**changed))
    refuse("number of outputs: 12; the other's: 10", tmp_path / "more.safetensors")
    run = json.loads((a / "run.json").read_text())
    run["data"]["fingerprint"] = "0" * 64
    moved = tmp_path / "moved"
    shutil.copytree(a, moved)
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
    names = [layer["name"] for layer in content["layers"]]
    assert names == [
        "stem_bn", "stage1_block1/bn1", "stage1_block1/bn2", "stage2_block1/bn1",
        "stage2_block1/bn2", "stage3_block1/bn1", "stage3_block1/bn2",
    ]  # fmt: skip
    # All images at once here, in batches of 128 and a rest there.
    _, state = logits(
        first, digits.test.images, capture_intermediates=True, mutable=["intermediates"]
    )
    for layer in content["layers"]:
        place = state["intermediates"]
        for key in layer["name"].split("/"):
            place = place[key]
        (output,) = place["__call__"]
        expected = np.asarray(output, np.float64).std()
        assert layer["std"] == pytest.approx(expected, rel=1e-5)
    assert "7 layers" in capsys.readouterr().out


def test_bottlenecks_have_one_response_a_block_and_preactivation_none():
    def layers(name):
        return outputs.response_layers(models.create_model(name), name)

    assert len(layers("resnet110")) == 109
    assert len(layers("plain20")) == 19
    assert layers("resnet20_bottleneck")[:3] == [
        "stem_bn", "stage1_block1/bn2", "stage1_block2/bn2"
    ]  # fmt: skip
    # The first convolution of an ImageNet net is 7x7.
    assert layers("resnet18")[0] == "stage1_block1/bn1"
    for name in ("resnet20_preact", "resnet110_bn_after_addition", "resnet56_keras_v2"):
        with pytest.raises(UserError, match=f"{name} has its layers in another order"):
            layers(name)


def test_a_run_that_cannot_be_measured_does_not_stop_the_others(runs, tmp_path, capsys):
    folder, _, _ = runs
    unfinished, unwritable = tmp_path / "unfinished", tmp_path / "unwritable"
    unfinished.mkdir()
    shutil.copytree(folder / "a", unwritable, ignore=lambda *_: ["responses.json"])
    (unwritable / "responses.json").mkdir()
    several = [tmp_path / "absent", unfinished, unwritable, folder / "b"]
    with pytest.raises(UserError, match="3 of 4 runs could not be measured"):
        responses.main([str(path) for path in several])
    said = capsys.readouterr().err
    assert "absent is no directory of a run" in said
    assert "unfinished holds no weights.safetensors: finish the run" in said
    assert "unwritable/responses.json" in said
    assert (folder / "b" / "responses.json").exists()
