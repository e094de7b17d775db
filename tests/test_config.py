"""The keys of the configuration and their values; the recipes of `configs/` are the papers'."""

import re
import runpy

import jax
import jax.numpy as jnp
import pytest

from resnet_flax import config as config_lib
from resnet_flax import data, main
from resnet_flax.config import base_config, flatten, resolve_steps, validate
from resnet_flax.data import streaming
from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.models import get_architecture
from resnet_flax.training import inputs, optim, setup
from tests.conftest import ROOT

# Every file with its usual net, and the paper's nets that are an argument.
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
CIFAR = [
    *(f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)),
    *(f"paper:resnet{depth}" for depth in (20, 110, 1202)),
    *(f"paper:plain{depth}" for depth in (20, 32, 44, 56, 110)),
    "paper:resnet47_bottleneck", "identity_mappings:resnet110_preact",
    "identity_mappings:resnet164_preact",
]  # fmt: skip
IMAGENET = [f"imagenet:resnet{depth}" for depth in (18, 34, 50, 101, 152)]
IMAGENET += ["imagenet:plain18", "imagenet:plain34"]


def load(name):
    file, colon, argument = name.partition(":")
    get_config = runpy.run_path(f"{ROOT}/configs/{file}.py")["get_config"]
    return get_config(*[argument] if colon else [])


def changed(**changes):
    config = base_config()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        (config[section] if name else config)[name or section] = value
    return config


@pytest.mark.parametrize("name", [*FILES, *CIFAR, *IMAGENET])
def test_every_config_is_valid_and_counts_in_steps(name):
    """So that `--config.train.total_steps=100` means what it says with every one of them."""
    config = load(name)
    validate(config)
    assert config.model.dtype == "auto"
    for key, value in flatten(config).items():
        if key.endswith(("_epochs", "_examples")) and key != "eval.bn_examples":
            assert not value, key


@pytest.mark.parametrize("name", CIFAR)
def test_the_papers_recipe_on_cifar(name):
    c, net = load(name), name.rpartition(":")[2]
    assert (c.model.name, c.data.batch_size, c.train.total_steps) == (net, 128, 64_000)
    o = c.optim
    assert (o.boundaries_steps, o.learning_rate, o.momentum) == ((32_000, 48_000), 0.1, 0.9)
    assert (o.weight_decay, o.nesterov, o.label_smoothing) == (1e-4, False, 0)
    assert (c.data.pad, c.data.flip, c.data.normalize) == (4, True, "pixel_mean")
    by_steps = net == "plain110" or net.endswith("preact")
    assert o.warmup_steps == (400 if by_steps else 0)
    assert o.warmup_error == (0.8 if net in ("resnet110", "resnet1202") else 0)


@pytest.mark.parametrize("name", IMAGENET)
def test_the_papers_recipe_on_imagenet(name):
    c = load(name)
    assert (c.model.name, c.data.name) == (name.rpartition(":")[2], "imagenet2012")
    assert (c.data.batch_size, c.train.total_steps) == (256, 600_000)
    assert (c.optim.learning_rate, c.optim.momentum, c.optim.weight_decay) == (0.1, 0.9, 1e-4)
    d = c.data
    assert (d.color, d.flip, d.pad, d.normalize) == (True, True, 0, "pixel_mean")
    assert inputs.make_geometry(c) == streaming.Geometry(224, (256, 480), 224, 256)
    c.eval.crops = 10
    assert inputs.make_geometry(c) == streaming.Geometry(224, (256, 480), 256, 256)


@pytest.mark.parametrize("depth", [110, 1202])
def test_stochastic_depth_has_its_papers_schedule(depth):
    c = load(f"stochastic_depth:resnet{depth}")
    assert (c.model.name, c.model.survival) == (f"resnet{depth}", 0.5)
    assert c.train.total_steps == round(500 * 45_000 / 128)
    assert c.optim.boundaries_steps == tuple(round(e * 45_000 / 128) for e in (250, 375))
    assert bool(c.optim.warmup_error) == (depth == 1202)


def test_the_keras_recipe_is_the_example_s():
    c = load("keras:resnet56_keras_v2")
    o, steps = c.optim, c.train.total_steps
    assert (c.model.name, steps) == ("resnet56_keras_v2", 200 * 1562.5)
    given = {"boundaries": o.boundaries_steps, "decay_factors": o.decay_factors}
    rate = optim.make_schedule(
        "piecewise", learning_rate=o.learning_rate, total_steps=steps, **given
    )
    for epoch, want in ((0, 1e-3), (80, 1e-3), (81, 1e-4), (121, 1e-5), (161, 1e-6), (181, 5e-7)):
        assert float(rate((epoch + 0.5) * 1562.5)) == pytest.approx(want)


def test_old_names_of_configs_are_answered_with_the_new_ones():
    for old, new in [
        ("plain20", "paper.py:plain20"),
        ("resnet110_preact", "identity_mappings.py:resnet110_preact"),
        ("resnet50", "imagenet.py:resnet50"),
        ("resnet1202_stochastic_depth", "stochastic_depth.py:resnet1202"),
    ]:
        message = f"configs/{old}.py is now --config=configs/{new}"
        with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
            main._locate(f"configs/{old}.py")


# The others differ from resnet20 or resnet110 in nothing but the net's name.
@pytest.mark.parametrize("name", sorted({*FILES} - {f"resnet{d}" for d in (32, 44, 56, 1202)}))
def test_every_config_traces(name):
    config = resolve_steps(load(name), 50_000)
    if config.model.name == "auto":
        config.model.name, config.data.pad = "resnet50", 0  # As the run would resolve them.
    config.model.num_classes = 10
    mesh = sharding.make_mesh(jax.devices()[:1], config.data.batch_size)
    model = setup.make_model(config, "cpu")
    model = model.clone(stage_sizes=(1,) * len(model.stage_sizes), scan=False)
    run = setup.Setup(config, None, mesh, model, None, None)
    side = get_architecture(config.model.name).image_size
    state = run.abstract_state()
    array, chunk = jax.ShapeDtypeStruct, (3, config.data.batch_size)
    resident = {
        "mean": array((side, side, 3), jnp.float32),
        "std": array((1,), jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    batches = labels = array(chunk, jnp.int32)
    if config.data.name in data.STREAMED:
        batches = {"images": array((*chunk, side, side, 3), jnp.uint8), "labels": labels}
    else:
        resident["images"] = array((50_000, side * side * 3), jnp.uint8)
        resident["labels"] = array((50_000,), jnp.int32)
    (after,), (sums,) = jax.eval_shape(run.make_train_chunk(), [state], [resident], [batches])
    forms = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (state, after)]
    assert forms[0] == forms[1]
    assert {k: v.shape for k, v in sums.items()} == {"loss": (3,), "error": (3,), "rate": (3,)}


def test_zero_init_last_reaches_the_net():
    config = changed(model__num_classes=10)
    assert not setup.make_model(config, "cpu").zero_init_last
    config.model.zero_init_last = True
    assert setup.make_model(config, "cpu").zero_init_last
    config.model.name = "plain20"
    with pytest.raises(UserError, match="'plain20' has no branches that end in batch norm"):
        setup.make_model(config, "cpu")


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_what_is_fast_goes_by_the_platform(platform, dtype):
    config = changed(model__num_classes=10)
    model = setup.make_model(config, platform)
    assert model.dtype == jnp.dtype(dtype)
    assert model.cpu_convolutions == (platform == "cpu")
    assert model.defer == model.defers == (platform == "gpu")
    config.model.dtype = "float32"
    assert setup.make_model(config, platform).dtype == jnp.float32
    # Kernels of our own are used nowhere until they were measured, or everywhere.
    for choice, used in (("auto", False), ("always", True), ("never", False)):
        config.model.kernels = choice
        model = setup.make_model(config, platform)
        assert model.fused == model.uses_fused == used
        assert model.defers == (used or platform == "gpu")


WRONG = [
    ({"train__total_steps": 0}, "config.train.total_steps=0 must be a positive duration"),
    ({"train__total_steps": -5}, "total_steps=-5 must be a positive"),
    ({"eval__every_epochs": -1.0}, "eval.every_epochs=-1.0 must be a positive"),
    ({"optim__boundaries_steps": (48_000, 32_000)}, "rising order"),
    ({"optim__boundaries_steps": (0, 32_000)}, "must be a positive duration"),
    ({"optim__learning_rate": -0.1}, "learning_rate=-0.1 must lie in (0, 1000000]"),
    ({"optim__learning_rate": float("nan")}, "must be finite"),
    ({"optim__momentum": 1.0}, "momentum=1.0 must lie in [0, 1)"),
    ({"data__batch_size": 0}, "batch_size=0 must lie in [1, inf)"),
    ({"model__survival": 0.0}, "survival=0.0 must lie in (0, 1]"),
    ({"model__bn_group_size": 48}, "bn_group_size=48 does not divide"),
    ({"model__dtype": "float16"}, "must be one of auto, float32, bfloat16"),
    ({"model__kernels": "yes"}, "kernels='yes' must be one of auto, always, never"),
    ({"seed": -1}, "seed=-1 must lie in"),
    ({"seed": 2**31 - 1, "train__num_seeds": 2}, "num_seeds=2 makes the seed 2147483648"),
    ({"train__total_steps": 3_000_000_000}, "below 2147483648"),
    ({"optim__boundaries_epochs": (1.0, float("inf"))}, "positive duration"),
    ({"optim__warmup_error": 0.8, "optim__warmup_steps": 5}, "exclude each other"),
    ({"optim__warmup_error": 0.8, "optim__warmup_rate": 0.0}, "would never end"),
    ({"optim__decay_factors": (0.1,)}, "must be as many as the boundaries"),
    ({"optim__decay_factors": (0.1, 0.0)}, "must be above 0"),
    ({"optim__decay_factors": ("a", 0.1)}, "is of type tuple, must be tuple of numbers"),
    ({"optim__name": "adam", "optim__nesterov": True}, "goes with config.optim.name=sgd"),
    ({"optim__warmup_linear": True}, "warmup_linear needs"),
    ({"data__short_sides": (480, 256)}, "short_sides=(480, 256) must be two numbers"),
    ({"data__short_sides": (256,)}, "must be two numbers"),
    ({"eval__crops": 5}, "eval.crops=5 must be one of 1, 10"),
    ({"data__workers": -2}, "workers=-2 must lie in"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        validate(changed(**changes))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.total_steps", "1e3", 1000),
        *(("train.total_steps", text, None) for text in ("1.5", "True", "inf")),
        ("optim.learning_rate", "1", 1.0),
        ("optim.learning_rate", "fast", None),
        *(("data.flip", text, False) for text in ("FALSE", "0", "f")),
        ("data.flip", "True", True),
        ("data.flip", "maybe", None),
        ("optim.boundaries_steps", "3,4", (3, 4)),
        ("optim.boundaries_steps", "3", (3,)),
        ("optim.boundaries_steps", "()", ()),
        ("optim.boundaries_steps", "'a',3", None),
        ("data.data_dir", "1e3", "1e3"),
    ],
)
def test_values_given_as_text(key, text, value):
    if value is None:
        with pytest.raises(UserError, match=re.escape(f"--config.{key}={text} must be ")):
            config_lib.parse(key, text)
    else:
        found = config_lib.parse(key, text)
        assert (found, type(found)) == (value, type(value))


def test_unknown_keys_and_wrong_types_are_named():
    config = base_config()
    with config.unlocked():
        config.optim.lerning_rate = 0.1
    with pytest.raises(UserError, match=r"lerning_rate .*did you mean --config.optim.learning_ra"):
        validate(config)
    for key, message in [
        ("zzzzzz", "zzzzzz is no config key$"),
        ("batch_size", r"did you mean --config.data.batch_size\?"),
        ("optim", "--config.optim is a section of the config, not a key"),
    ]:
        with pytest.raises(UserError, match=message):
            config_lib.parse(key, "3")
    config = base_config()
    with config.ignore_type():
        config.train.total_steps = "many"
    with pytest.raises(UserError, match="total_steps='many' is of type str, must be int"):
        validate(config)
    config = base_config()
    del config.log.tensorboard
    with pytest.raises(UserError, match=r"config lacks 'log.tensorboard': start from"):
        validate(config)


def test_durations_resolve_to_steps():
    config = changed(
        train__total_epochs=2.0, eval__every_examples=2560, optim__boundaries_epochs=(1, 1.5)
    )
    validate(config)
    resolved = resolve_steps(config, 50_000)
    assert (resolved.train.total_steps, resolved.eval.every_steps) == (781, 20)
    assert resolved.optim.boundaries_steps == (391, 586)
    assert resolve_steps(resolved, 50_000) == resolved
    assert config.train.total_steps == 64_000
    for wrong, message in [
        ({"train__total_epochs": 1.0, "train__total_examples": 5}, "not both"),
        ({"eval__every_examples": 1}, r"eval\.every: 1 is shorter than one step"),
        ({"optim__boundaries_epochs": (0.02, 0.0201)}, "makes the steps"),
    ]:
        with pytest.raises(UserError, match=message):
            resolve_steps(changed(**wrong), 50_000)


def test_flatten_lists_every_key_once():
    flat = flatten(base_config())
    assert (flat["model.name"], flat["seed"]) == ("resnet20", 0)
    assert len(flat) == 71
    assert set(flat) >= config_lib.OPERATIONAL_KEYS
