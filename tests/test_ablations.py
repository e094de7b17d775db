"""The nets that Identity Mappings compares with: counts, and what each block computes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.models import ARCHITECTURES, ablations, blocks
from resnet_flax.models.norm import BatchNorm
from resnet_flax.tools import summary
from tests.test_models import ONCE, check_scanned_and_unrolled_agree

ORIGINAL = 1_727_962
# A 1x1 convolution at each of 54 shortcuts.
CONVOLUTIONS = 18 * 16 * 16 + 16 * 32 + 17 * 32 * 32 + 32 * 64 + 17 * 64 * 64
BIASES = 18 * (16 + 32 + 64)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("constant_scaling", ORIGINAL),
        ("exclusive_gating", ORIGINAL + CONVOLUTIONS + BIASES),
        ("shortcut_gating", ORIGINAL + CONVOLUTIONS + BIASES),
        ("conv_shortcut", ORIGINAL + CONVOLUTIONS),
        ("dropout_shortcut", ORIGINAL),
        ("bn_after_addition", ORIGINAL),
        ("relu_before_addition", ORIGINAL),
        ("relu_only_preact", ORIGINAL),
    ],
)
def test_counts(name, count):
    assert summary.summarize(f"resnet110_{name}")["parameters"] == count


class Joined(nn.Module):
    shortcut: blocks.Shortcut
    strides: int

    @nn.compact
    def __call__(self, x, y):
        return self.shortcut(x, y, self.strides, blocks.Conv, None)


@pytest.fixture
def pair():
    rng = np.random.RandomState(0)
    x, y = rng.randn(2, 6, 6, 4), rng.randn(2, 3, 3, 8)
    return x.astype(np.float32), y.astype(np.float32)


def option_a(x):
    return np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))


def test_constant_scaling_halves_both(pair):
    x, y = pair
    same = ablations.constant_scaling(x, 3 * x, 1, None, None)
    np.testing.assert_allclose(same, 2 * x, rtol=1e-6)
    changed = ablations.constant_scaling(x, y, 2, None, None)
    np.testing.assert_allclose(changed, (option_a(x) + y) / 2, rtol=1e-6)


@pytest.mark.parametrize("bias", [-6.0, 0.0])
@pytest.mark.parametrize("exclusive", [False, True])
def test_gates(pair, exclusive, bias):
    x, y = pair
    function = ablations.exclusive_gating if exclusive else ablations.shortcut_gating
    joined = Joined(functools.partial(function, gate_bias=bias), 2)
    params = joined.init(jax.random.key(0), x, y)["params"]["gate_conv"]
    np.testing.assert_array_equal(params["bias"], bias)
    for scale in (0, 1):
        kernel = scale * params["kernel"]
        z = np.einsum("bhwc,cd->bhwd", x[:, ::2, ::2], kernel[0, 0]) + bias
        gate = 1 / (1 + np.exp(-z))
        if scale == 0:
            np.testing.assert_allclose(gate, 0.5 if bias == 0 else 0.00247262, rtol=1e-4)
        want = (1 - gate) * option_a(x) + (gate * y if exclusive else y)
        got = joined.apply({"params": {"gate_conv": {**params, "kernel": kernel}}}, x, y)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_gate_bias_is_an_option():
    def biases(**options):
        model = create_model("resnet110_exclusive_gating", **options)
        model = model.clone(stage_sizes=(1, 1), widths=(4, 8))
        init = jax.jit(model.init, compiler_options=ONCE)
        params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
        return {float(b) for b in params["stage2_block1"]["gate_conv"]["bias"]}

    assert biases() == {-6.0}
    assert biases(gate_bias=-2.0) == {-2.0}


def test_a_closed_gate_is_not_rounded_away_in_bfloat16():
    x = jnp.full((1, 2, 2, 4), 8, jnp.bfloat16)
    function = functools.partial(ablations.exclusive_gating, gate_bias=-6.0)
    conv = functools.partial(blocks.Conv, kernel_init=nn.initializers.zeros)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x, 1000 * x, 1, conv, None)

    out, _ = Net().init_with_output(jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), 8 * (1 + 999 * 0.00247262), rtol=0.01)


def test_conv_shortcut_is_a_bare_one_everywhere():
    layers = [row["name"] for row in summary.summarize("resnet110_conv_shortcut")["layers"]]
    assert sum(name.endswith("proj_conv") for name in layers) == 54
    assert not any("proj_bn" in name for name in layers)
    with pytest.raises(UserError, match="shortcuts of its own"):
        create_model("resnet110_conv_shortcut", shortcut="C")


def make_block(kind, *, train=False, features=4, strides=1, **options):
    return kind(
        features=features,
        out_features=features,
        strides=strides,
        is_first=False,
        shares_activation=strides == 2,
        shortcut=blocks.pad_identity,
        conv=blocks.Conv,
        norm=functools.partial(BatchNorm, train=train),
        train=train,
        **options,
    )


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("name", ["bn_after_addition", "relu_before_addition", "relu_only_preact"])
def test_orders(name, strides):
    rng = np.random.RandomState(0)
    x = rng.randn(2, 6, 6, 4).astype(np.float32)
    block = make_block(ablations.BLOCKS[name], strides=strides, features=4 * strides)
    abstract = jax.eval_shape(block.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: np.float32(rng.rand(*v.shape) + 0.1), abstract)
    p, s = variables["params"], variables["batch_stats"]

    def conv(name, x, strides=1):
        # The same module, held against a loop in test_models.
        return blocks.Conv(4 * block.strides, strides=strides).apply({"params": p[name]}, x)

    def norm(name, x):
        scale = p[name]["scale"] / np.sqrt(s[name]["var"] + 1e-5)
        return (x - s[name]["mean"]) * scale + p[name]["bias"]

    relu = jax.nn.relu
    shortcut = option_a(x) if strides == 2 else x
    if name == "relu_only_preact":
        y = norm("bn2", conv("conv2", relu(norm("bn1", conv("conv1", relu(x), strides)))))
        want = y + (relu(shortcut) if strides == 2 else shortcut)
    else:
        y = conv("conv2", relu(norm("bn1", conv("conv1", x, strides))))
        want = relu(norm("bn2", y + shortcut))
        if name == "relu_before_addition":
            want = relu(norm("bn2", y)) + shortcut
    np.testing.assert_allclose(block.apply(variables, x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*ablations.BLOCKS, "exclusive_gating", "shortcut_gating"])
def test_nets_end_in_something_not_negative(name):
    """As behind a ReLU: ReLU-only pre-activation has one more at its end."""
    model = create_model(f"resnet110_{name}").clone(stage_sizes=(1, 1), widths=(4, 8))
    x = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    variables = jax.jit(model.init, compiler_options=ONCE)(jax.random.key(0), x)
    assert ("final_bn" in variables["params"], "stem_bn" in variables["params"]) == (False, True)
    outputs = jax.jit(model.apply, static_argnames="features", compiler_options=ONCE)(
        variables, x, features=True
    )
    assert outputs[-1].min() >= 0


def test_dropout_is_on_the_shortcut_in_training_only():
    zeros = nn.initializers.zeros
    x = jnp.ones((64, 4, 4, 4))
    kind = ablations.DropoutShortcutBlock
    # The branch is 0: what comes out is the shortcut.
    train = make_block(kind, train=True, last_scale_init=zeros)
    test = make_block(kind, train=False, last_scale_init=zeros)
    variables = test.init(jax.random.key(0), x)
    keys = jax.random.split(jax.random.key(3), 2)

    def run(block, key):
        return np.asarray(block.apply(variables, x, rngs={"drop": key}, mutable=["batch_stats"])[0])

    outs = [run(train, key) for key in keys]
    for out in outs:
        assert set(np.unique(out)) == {0, 1}
        assert abs(out.mean() - 0.5) < 0.05
        # Drawn for each value, not for each image or channel.
        assert 0.3 < out.mean(axis=0).min()
        assert 0.2 < out.mean(axis=(1, 2, 3)).min()
    assert abs(np.mean(outs[0] == outs[1]) - 0.5) < 0.05
    np.testing.assert_array_equal(run(train, keys[0]), outs[0])
    np.testing.assert_array_equal(run(test, keys[0]), 0.5)
    np.testing.assert_array_equal(test.apply(variables, x), 0.5)


@pytest.mark.parametrize("name", ["exclusive_gating", "dropout_shortcut", "relu_only_preact"])
def test_scanned_and_unrolled_agree(name):
    model = create_model(f"resnet110_{name}").clone(stage_sizes=(3, 2), widths=(4, 8))
    check_scanned_and_unrolled_agree(model)


VARIANTS = [name for name in ARCHITECTURES if "keras" in name or ARCHITECTURES[name].block.draws]
VARIANTS += [f"resnet110_{name}" for name in ("exclusive_gating", "relu_only_preact")]


@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_together_traces(name):
    options = {"dtype": "bfloat16", "bn_group_size": 2, "survival": 0.5, "remat": True}
    model = create_model(name, scan=True, **options)
    x = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def loss(params, stats, x, key):
        out, new = model.apply(
            {"params": params, "batch_stats": stats},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"drop": key},
        )
        return jnp.sum(out), new

    both = variables["params"], variables["batch_stats"]
    grads, new = jax.eval_shape(jax.grad(loss, has_aux=True), *both, x, jax.random.key(0))
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    stages = jax.eval_shape(functools.partial(model.apply, features=True), variables, x)
    assert {s.dtype for s in stages} == {jnp.dtype("bfloat16")}
