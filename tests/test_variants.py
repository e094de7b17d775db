"""Highway nets, the ablations of Identity Mappings and Keras's nets compute what they should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import ARCHITECTURES, blocks, variants
from resnet_flax.models.layers import BatchNorm, Conv
from tests.test_config import load
from tests.test_models import IMAGE, fill, jit, norm, reference_conv, small, variables_of


def relu(x):
    return np.maximum(x, 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_highway_net_equals_one_written_out_in_numpy():
    model = small("highway20", (2, 2), gate_bias=0.0)
    images = np.random.RandomState(0).randn(1, 6, 6, 3).astype(np.float32)
    variables = fill(model, images)
    params, stats = variables["params"], variables["batch_stats"]

    def layer(p, s, x, conv="conv1", bn="bn1", stride=1):
        return relu(norm(p[bn], s[bn], reference_conv(x, p[conv]["kernel"], stride)))

    x = layer(params, stats, images[0], "stem_conv", "stem_bn")
    for name in ("stage1_block1", "stage1_block2", "stage2_block1", "stage2_block2"):
        p, stride = params[name], 2 if name == "stage2_block1" else 1
        h = layer(p, stats[name], x, stride=stride)
        assert ("gate_conv" in p) == (stride == 1)
        if stride == 1:
            gate = p["gate_conv"]
            t = sigmoid(reference_conv(x, gate["kernel"], 1) + gate["bias"])
            assert 0.1 < np.mean(t) < 0.9
            h = h * t + x * (1 - t)
        x = h
    want = x.mean(axis=(0, 1)) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(jit(model.apply)(variables, images)[0], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options", "bias"),
    [("highway20", {}, -6.0), ("resnet110_exclusive_gating", {"gate_bias": -2.0}, -2.0)],
)
def test_gates_begin_at_their_bias(name, options, bias):
    model = small(name, (1,), **options)
    params = jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    np.testing.assert_array_equal(params["stage1_block1"]["gate_conv"]["bias"], bias)


def make_block(kind, *, train=False, features=4, strides=1, conv=Conv, **options):
    return kind(
        features=features,
        out_features=features,
        strides=strides,
        shortcuts=(blocks.pad_identity, blocks.identity),
        conv=conv,
        norm=functools.partial(BatchNorm, train=train),
        train=train,
        **options,
    )


def option_a(x):
    return np.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(
    "name",
    "constant_scaling exclusive_gating shortcut_gating bn_after_addition relu_before_addition "
    "relu_only_preact".split(),
)
def test_ablations_compute_their_figures(name, strides):
    kind = ARCHITECTURES[f"resnet110_{name}"].block
    x = np.random.RandomState(0).randn(2, 6, 6, 4).astype(np.float32)
    block = make_block(kind, strides=strides, features=4 * strides)
    variables = fill(block, x)
    p, s = variables["params"], variables["batch_stats"]

    def conv(name, x, strides=1):
        # The same module, held against a loop in test_models.
        return Conv(4 * block.strides, strides=strides).apply({"params": p[name]}, x)

    def bn(name, x):
        return norm(p[name], s[name], x)

    shortcut = option_a(x) if strides == 2 else x
    first = relu(x) if name == "relu_only_preact" else x
    y = conv("conv2", relu(bn("bn1", conv("conv1", first, strides))))
    if "gating" in name:
        gate = sigmoid(
            x[:, ::strides, ::strides] @ p["gate_conv"]["kernel"][0, 0] + p["gate_conv"]["bias"]
        )
    want = {
        "constant_scaling": lambda: relu(0.5 * shortcut + 0.5 * bn("bn2", y)),
        "exclusive_gating": lambda: relu((1 - gate) * shortcut + gate * bn("bn2", y)),
        "shortcut_gating": lambda: relu((1 - gate) * shortcut + bn("bn2", y)),
        "bn_after_addition": lambda: relu(bn("bn2", y + shortcut)),
        "relu_before_addition": lambda: relu(bn("bn2", y)) + shortcut,
        "relu_only_preact": lambda: bn("bn2", y) + (relu(shortcut) if strides == 2 else shortcut),
    }[name]()
    np.testing.assert_allclose(jit(block.apply)(variables, x), want, rtol=1e-4, atol=1e-4)


def test_a_closed_gate_is_not_rounded_away_in_bfloat16():
    zero = functools.partial(Conv, kernel_init=jax.nn.initializers.zeros)

    class Gated(variants.ExclusiveGatingBlock):
        @variants.nn.compact
        def __call__(self, x):
            return self._join(x, 1000 * x, None)

    x = jnp.full((1, 2, 2, 4), 8, jnp.bfloat16)
    out, _ = make_block(Gated, conv=zero).init_with_output(jax.random.key(0), x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(out), 8 * (1 + 999 * 0.00247262), rtol=0.01)


def test_relu_only_preactivation_has_one_more_relu_at_its_end():
    x = np.random.default_rng(1).standard_normal((2, 4, 4, 3), np.float32)
    model = small("resnet110_relu_only_preact", (1,))
    variables = fill(model, x)
    assert set(variables["params"]) == {"stem_conv", "stem_bn", "stage1_block1", "head"}
    apply = jit(model.apply, static_argnames="features")
    assert apply(variables, x, features=True)[-1].min() == 0


def test_dropout_is_on_the_shortcut_in_training_only():
    x = jnp.ones((64, 4, 4, 4))
    # The branch is 0: what comes out is the shortcut.
    options = {"last_scale_init": jax.nn.initializers.zeros}
    train, test = (
        make_block(variants.DropoutShortcutBlock, train=train, **options) for train in (True, False)
    )
    variables = jit(test.init)(jax.random.key(0), x)
    keys = jax.random.split(jax.random.key(3), 2)

    def run(block, *keys):
        def apply(key):
            return block.apply(variables, x, rngs={"drop": key}, mutable=["batch_stats"])[0]

        return np.asarray(jit(jax.vmap(apply))(jnp.stack(keys)))

    outs = run(train, *keys, keys[0])
    for out in outs[:2]:
        assert set(np.unique(out)) == {0, 1}
        assert abs(out.mean() - 0.5) < 0.05
        # Drawn for each value, not for each image or channel.
        assert 0.3 < out.mean(axis=0).min()
        assert 0.2 < out.mean(axis=(1, 2, 3)).min()
    assert abs(np.mean(outs[0] == outs[1]) - 0.5) < 0.05
    np.testing.assert_array_equal(outs[0], outs[2])
    np.testing.assert_array_equal(run(test, keys[0]), 0.5)
    np.testing.assert_array_equal(jit(test.apply)(variables, x), 0.5)


def keras_conv(p, x, stride=1):
    # TensorFlow's `same`, of an even side: what is missing, the smaller half first.
    missing = max(p["kernel"].shape[0] - stride, 0)
    pads = ((missing // 2, missing - missing // 2),) * 2
    y = jax.lax.conv_general_dilated(
        x, p["kernel"], (stride, stride), pads, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p["bias"]


@pytest.mark.parametrize("name", ["resnet20_keras_v1", "resnet56_keras_v2"])
def test_keras_nets_equal_their_description(name):
    model = small(name, (2, 2))
    images = np.random.RandomState(1).randn(2, 8, 8, 3).astype(np.float32)
    variables = fill(model, images)
    params, stats = variables["params"], variables["batch_stats"]

    def bn_relu(p, s, x):
        return relu(norm(p, s, x, 1e-3))

    y = bn_relu(params["stem_bn"], stats["stem_bn"], keras_conv(params["stem_conv"], images))
    for block in ("stage1_block1", "stage1_block2", "stage2_block1", "stage2_block2"):
        p, s, stride = params[block], stats[block], 2 if block == "stage2_block1" else 1
        if name.endswith("v1"):
            z = bn_relu(p["bn1"], s["bn1"], keras_conv(p["conv1"], y, stride))
            z = norm(p["bn2"], s["bn2"], keras_conv(p["conv2"], z), 1e-3)
            y = relu(z + (keras_conv(p["proj_conv"], y, 2) if stride == 2 else y))
        else:
            z = y if block == "stage1_block1" else bn_relu(p["bn1"], s["bn1"], y)
            z = bn_relu(p["bn2"], s["bn2"], keras_conv(p["conv1"], z, stride))
            z = keras_conv(p["conv3"], bn_relu(p["bn3"], s["bn3"], keras_conv(p["conv2"], z)))
            y = z + (keras_conv(p["proj_conv"], y, stride) if block.endswith("block1") else y)
    if name.endswith("v2"):
        y = bn_relu(params["final_bn"], stats["final_bn"], y)
    want = np.mean(y, axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
    np.testing.assert_allclose(jit(model.apply)(variables, images), want, rtol=1e-3, atol=1e-4)


def test_keras_kernels_are_truncated_and_biases_zero():
    model = small("resnet20_keras_v1", (1,)).clone(widths=(64,))
    params = jit(model.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))["params"]
    layer, std = params["stage1_block1"]["conv2"], np.sqrt(2 / (9 * 64))
    assert abs(np.std(layer["kernel"]) / std - 1) < 0.02
    assert np.abs(layer["kernel"]).max() < 2.3 * std
    np.testing.assert_array_equal(layer["bias"], 0)


@pytest.mark.parametrize("name", ["resnet56_keras_v2", "resnet110_dropout_shortcut"])
def test_every_option_together_traces(name):
    options = {"dtype": "bfloat16", "bn_group_size": 2, "remat": True, "scan": True}
    model = create_model(name, survival=0.5, **options)
    x = jax.ShapeDtypeStruct((4, *IMAGE.shape[1:]), jnp.float32)
    variables = variables_of(model, x)
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}

    def loss(params, stats, x, key):
        both = {"params": params, "batch_stats": stats}
        options = {"train": True, "mutable": ["batch_stats"], "rngs": {"drop": key}}
        out, new = model.apply(both, x, **options)
        return jnp.sum(out), new

    both = variables["params"], variables["batch_stats"]
    grads, new = jax.eval_shape(jax.grad(loss, has_aux=True), *both, x, jax.random.key(0))
    assert jax.tree.structure(grads) == jax.tree.structure(variables["params"])
    assert jax.tree.structure(new["batch_stats"]) == jax.tree.structure(variables["batch_stats"])
    stages = jax.eval_shape(functools.partial(model.apply, features=True), variables, x)
    assert [s.shape[:3] for s in stages] == [(4, side, side) for side in (32, 16, 8)]
    assert {s.dtype for s in stages} == {jnp.dtype("bfloat16")}


def test_the_highway_config_compares_under_the_papers_recipe():
    for depth in (20, 32, 44, 56, 110):
        ours, theirs = load(f"highway:highway{depth}"), load(f"resnet{depth}")
        assert ours.optim.warmup_rate == theirs.optim.warmup_rate
        ours.model.name = theirs.model.name
        ours.model.gate_bias = theirs.model.gate_bias
        for key in ("warmup_steps", "warmup_error"):
            ours.optim[key] = theirs.optim[key]
        assert ours == theirs
