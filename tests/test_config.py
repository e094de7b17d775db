import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from resnet_flax import config as config_lib
from resnet_flax import data
from resnet_flax.config import base_config, flatten, resolve_steps
from resnet_flax.data import streaming as streamed
from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES, get_architecture
from resnet_flax.training import inputs, setup
from resnet_flax.validation import validate
from tests.conftest import ROOT

CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py"))
PAPER = [
    *(f"resnet{d}" for d in (20, 32, 44, 56, 110, 1202)),
    *(f"plain{d}" for d in (20, 32, 44, 56, 110)),
    "resnet47_bottleneck",
    "resnet110_preact",
    "resnet164_preact",
]
IMAGENET = [*(f"resnet{d}" for d in (18, 34, 50, 101, 152)), "plain18", "plain34"]


def load(name, *args):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*args)


def test_the_promised_configs_are_there():
    assert {*PAPER, "quickstart", "cifar10_short", "modern"} <= set(CONFIGS)
    assert {"keras", "identity_mappings", "highway", "finetune_folder", *IMAGENET} <= set(CONFIGS)


@pytest.mark.parametrize("depth", [110, 1202])
def test_stochastic_depth_has_its_papers_schedule(depth):
    c = load(f"resnet{depth}_stochastic_depth")
    assert (c.model.name, c.model.survival) == (f"resnet{depth}", 0.5)
    steps = resolve_steps(c, 45_000)
    assert steps.train.total_steps == round(500 * 45_000 / 128)
    assert steps.optim.boundaries_steps == tuple(round(e * 45_000 / 128) for e in (250, 375))
    assert bool(c.optim.warmup_error) == (depth == 1202)


@pytest.mark.parametrize("name", CONFIGS)
def test_durations_of_the_configs_are_in_steps(name):
    """So that `--config.train.total_steps=100` means what it says with every one of them."""
    for key, value in flatten(load(name)).items():
        if key.endswith(("_epochs", "_examples")) and key != "eval.bn_examples":
            assert not value, key


def test_modern_takes_a_net():
    assert load("modern", "resnet56").model.name == "resnet56"


@pytest.mark.parametrize("name", ["resnet56_keras_v1", "resnet56_keras_v2"])
def test_keras_recipe_is_the_example_s(name):
    c = load("keras", name)
    assert c.model.name == name
    steps = resolve_steps(c, 50_000)
    assert steps.train.total_steps == 200 * 1562.5
    rate = setup.optim.make_schedule(
        "piecewise",
        learning_rate=c.optim.learning_rate,
        total_steps=steps.train.total_steps,
        boundaries=steps.optim.boundaries_steps,
        decay_factors=c.optim.decay_factors,
    )
    for epoch, want in ((0, 1e-3), (80, 1e-3), (81, 1e-4), (121, 1e-5), (161, 1e-6), (181, 5e-7)):
        assert float(rate((epoch + 0.5) * 1562.5)) == pytest.approx(want)


def test_a_net_s_own_shortcut_can_be_recorded():
    for architecture in ARCHITECTURES.values():
        config = base_config()
        config.model.shortcut = architecture.shortcut
        validate(config)


def test_zero_init_last_reaches_the_net():
    config = base_config()
    config.model.num_classes = 10
    assert not setup.make_model(config, "cpu").zero_init_last
    config.model.zero_init_last = True
    assert setup.make_model(config, "cpu").zero_init_last
    config.model.name = "plain20"
    with pytest.raises(UserError, match="'plain20' has no branches that end in batch norm"):
        setup.make_model(config, "cpu")


@pytest.mark.parametrize("name", CONFIGS)
def test_the_dtype_is_the_platform_s_own(name):
    assert load(name).model.dtype == "auto"


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_what_is_fast_goes_by_the_platform(platform, dtype):
    config = base_config()
    config.model.num_classes = 10
    model = setup.make_model(config, platform)
    assert model.dtype == jnp.dtype(dtype)
    assert model.cpu_convolutions == (platform == "cpu")
    assert model.defer == model.defers == (platform == "gpu")
    # Until they were measured.
    assert not model.fused
    config.model.dtype = "float32"
    assert setup.make_model(config, platform).dtype == jnp.float32


def test_kernels_everywhere_if_they_must_be():
    config = base_config()
    config.model.num_classes = 10
    for choice, used in (("auto", False), ("always", True), ("never", False)):
        config.model.kernels = choice
        validate(config)
        for platform in ("cpu", "gpu", "tpu"):
            model = setup.make_model(config, platform)
            assert model.fused == model.uses_fused == used
            assert model.defers == (used or platform == "gpu")


@pytest.mark.parametrize("name", PAPER)
def test_paper_configs_are_the_papers_recipe(name):
    c = load(name)
    assert c.model.name == name
    assert (c.data.batch_size, c.train.total_steps) == (128, 64_000)
    assert c.optim.boundaries_steps == (32_000, 48_000)
    o = c.optim
    assert (o.learning_rate, o.momentum, o.weight_decay) == (0.1, 0.9, 1e-4)
    assert not o.nesterov
    assert o.label_smoothing == 0
    assert (c.data.pad, c.data.flip, c.data.normalize) == (4, True, "pixel_mean")
    deep = name in ("resnet110", "resnet1202", "plain110") or name.endswith("preact")
    assert bool(o.warmup_steps or o.warmup_error) == deep


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_configs_are_the_papers_recipe(name):
    c = load(name)
    assert c.model.name == name
    assert (c.data.name, c.data.batch_size, c.train.total_steps) == ("imagenet2012", 256, 600_000)
    assert (c.optim.learning_rate, c.optim.momentum, c.optim.weight_decay) == (0.1, 0.9, 1e-4)
    assert (c.data.color, c.data.flip, c.data.pad, c.data.normalize) == (
        True, True, 0, "pixel_mean",
    )  # fmt: skip
    assert inputs.make_geometry(c) == streamed.Geometry(224, (256, 480), 224, 256)
    c.eval.crops = 10
    assert inputs.make_geometry(c) == streamed.Geometry(224, (256, 480), 256, 256)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_validates_and_traces(name):
    config = load(name)
    validate(config)
    config = resolve_steps(config, 50_000)
    if config.model.name == "auto":
        config.model.name, config.data.pad = "resnet50", 0  # As the run would resolve them.
    config.model.num_classes = 10
    mesh = sharding.make_mesh(jax.devices()[:1], config.data.batch_size)
    # Equal blocks as one: in another form a thousand layers take as long as all other nets.
    model = setup.make_model(config, "cpu").clone(scan=True)
    run = setup.Setup(config, None, mesh, model, None, None)
    side = get_architecture(config.model.name).image_size
    state = run.abstract_state(image_shape=(side, side, 3))
    chunk = 3, config.data.batch_size
    resident = {
        "mean": jax.ShapeDtypeStruct((side, side, 3), jnp.float32),
        "std": jax.ShapeDtypeStruct((1,), jnp.float32),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    if config.data.name in data.STREAMED:
        batches = {
            "images": jax.ShapeDtypeStruct((*chunk, side, side, 3), jnp.uint8),
            "labels": jax.ShapeDtypeStruct(chunk, jnp.int32),
        }
    else:
        batches = jax.ShapeDtypeStruct(chunk, jnp.int32)
        resident["images"] = jax.ShapeDtypeStruct((50_000, side * side * 3), jnp.uint8)
        resident["labels"] = jax.ShapeDtypeStruct((50_000,), jnp.int32)
    after, sums = jax.eval_shape(run.make_train_chunk(), state, resident, batches)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {k: v.shape for k, v in sums.items()} == {"loss": (3,), "error": (3,), "rate": (3,)}


def changed(**changes):
    config = base_config()
    for key, value in changes.items():
        section, _, name = key.partition("__")
        (config[section] if name else config)[name or section] = value
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__total_steps": 0}, "config.train.total_steps=0 must be a positive duration"),
        ({"train__total_steps": -5}, "total_steps=-5 must be a positive"),
        ({"eval__every_epochs": -1.0}, "eval.every_epochs=-1.0 must be a positive"),
        ({"optim__boundaries_steps": (48_000, 32_000)}, "rising order"),
        ({"optim__boundaries_steps": (0, 32_000)}, "must be a positive duration"),
        ({"optim__learning_rate": -0.1}, "learning_rate=-0.1 must lie in"),
        ({"optim__learning_rate": float("nan")}, "must be finite"),
        ({"optim__momentum": 1.0}, "momentum=1.0 must lie in"),
        ({"data__batch_size": 0}, "batch_size=0 must lie in"),
        ({"model__survival": 0.0}, "survival=0.0 must lie in"),
        ({"model__bn_group_size": 48}, "bn_group_size=48 does not divide"),
        ({"model__dtype": "float16"}, "must be one of auto, float32, bfloat16"),
        ({"model__kernels": "yes"}, "kernels='yes' must be one of auto, always, never"),
        ({"optim__schedule": "linear"}, "must be one of piecewise, cosine"),
        ({"seed": -1}, "seed=-1 must lie in"),
        ({"train__total_steps": 3_000_000_000}, "below 2147483648"),
        ({"optim__boundaries_epochs": (1.0, float("inf"))}, "positive duration"),
        ({"optim__warmup_error": 0.8, "optim__warmup_steps": 5}, "exclude each other"),
        ({"optim__warmup_error": 0.8, "optim__warmup_rate": 0.0}, "would never end"),
        ({"optim__decay_factors": (0.1,)}, "must be as many as the boundaries"),
        ({"optim__decay_factors": (0.1, 0.0)}, "must be above 0"),
        ({"optim__name": "adam", "optim__nesterov": True}, "goes with config.optim.name=sgd"),
        ({"optim__warmup_linear": True}, "warmup_linear needs"),
        ({"data__short_sides": (480, 256)}, "short_sides=(480, 256) must be two numbers"),
        ({"data__short_sides": (256,)}, "must be two numbers"),
        ({"eval__crops": 5}, "eval.crops=5 must be one of 1, 10"),
        ({"data__workers": -2}, "workers=-2 must lie in"),
    ],
)
def test_wrong_values_are_named(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        validate(changed(**changes))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("train.total_steps", "1e3", 1000),
        ("train.total_steps", "1.5", None),
        ("train.total_steps", "True", None),
        ("train.total_steps", "inf", None),
        ("optim.learning_rate", "1", 1.0),
        ("optim.learning_rate", "fast", None),
        ("data.flip", "FALSE", False),
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


def test_unknown_keys_get_the_nearest_name():
    config = base_config()
    with config.unlocked():
        config.optim.lerning_rate = 0.1
    with pytest.raises(
        UserError, match=r"optim\.lerning_rate.*did you mean 'optim\.learning_rate'"
    ):
        validate(config)
    assert config_lib.nearest_key("batch_size") == "data.batch_size"
    assert config_lib.nearest_key("zzzzzz") is None


def test_wrong_types_are_named():
    config = base_config()
    with config.ignore_type():
        config.train.total_steps = "many"
    with pytest.raises(UserError, match="total_steps='many' is of type str, must be int"):
        validate(config)


def test_durations_resolve_to_steps():
    config = changed(
        train__total_epochs=2.0, eval__every_examples=2560, optim__boundaries_epochs=(1, 1.5)
    )
    validate(config)
    resolved = resolve_steps(config, 50_000)
    assert resolved.train.total_steps == 781
    assert resolved.eval.every_steps == 20
    assert resolved.optim.boundaries_steps == (391, 586)
    assert resolve_steps(resolved, 50_000) == resolved
    assert config.train.total_steps == 64_000


def test_durations_that_make_no_sense():
    with pytest.raises(UserError, match="not both"):
        resolve_steps(changed(train__total_epochs=1.0, train__total_examples=5), 50_000)
    with pytest.raises(UserError, match=r"eval\.every: 1 is shorter than one step"):
        resolve_steps(changed(eval__every_examples=1), 50_000)
    with pytest.raises(UserError, match="makes the steps"):
        resolve_steps(changed(optim__boundaries_epochs=(0.02, 0.0201)), 50_000)


def test_flatten_lists_every_key_once():
    flat = flatten(base_config())
    assert flat["model.name"] == "resnet20"
    assert flat["seed"] == 0
    assert {
        "model.shortcut", "model.num_classes", "model.dtype", "model.bn_group_size", "data.name",
        "data.data_dir", "data.split", "data.batch_size", "train.total_steps",
        "optim.learning_rate", "optim.momentum", "optim.weight_decay", "checkpoint.every_steps",
        "eval.every_steps",
    } <= set(flat)  # fmt: skip
    assert config_lib.OPERATIONAL_KEYS <= set(flat)
