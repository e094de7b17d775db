"""Highway nets: counts by their definition, and a forward pass written out a second time."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.errors import UserError
from resnet_flax.models import highway
from resnet_flax.tools import summary
from tests.test_config import load
from tests.test_models import ONCE, check_scanned_and_unrolled_agree, reference_conv

# Of [R]'s plain nets.
PLAIN = {20: 269_722, 32: 464_154, 44: 658_586, 56: 853_018, 110: 1_727_962}


@pytest.mark.parametrize("depth", PLAIN)
def test_counts_are_the_plain_net_s_and_a_gate_at_each_layer_that_keeps_its_shape(depth):
    layers = (depth - 2) // 3  # of each stage
    gates = [layers, layers - 1, layers - 1]
    weights = [9 * 16 * 16, 9 * 32 * 32, 9 * 64 * 64]
    biases = [16, 32, 64]
    total = summary.summarize(f"highway{depth}")
    assert total["parameters"] == PLAIN[depth] + sum(
        n * (w + b) for n, w, b in zip(gates, weights, biases, strict=True)
    )
    plain = summary.summarize(f"plain{depth}")
    assert total["weighted_layers"] == plain["weighted_layers"] == depth
    pixels = [32 * 32, 16 * 16, 8 * 8]
    extra = sum(n * w * p for n, w, p in zip(gates, weights, pixels, strict=True))
    assert total["multiply_adds"] == plain["multiply_adds"] + extra


def test_the_smallest_counts_written_down():
    """16 -> 16: 2,320 a gate; 32 -> 32: 9,248; 64 -> 64: 36,928."""
    want = 269_722 + 6 * 2_320 + 5 * 9_248 + 5 * 36_928
    assert want == 514_522 == summary.summarize("highway20")["parameters"]


def small(gate_bias):
    model = create_model("highway20", gate_bias=gate_bias)
    return model.clone(stage_sizes=(2, 2), widths=(4, 8))


def test_forward_pass_equals_one_written_out_in_numpy():
    model = small(0.0)
    abstract = jax.eval_shape(model.init, jax.random.key(1), jnp.zeros((1, 6, 6, 3)))
    rng = np.random.RandomState(0)
    # Kernels of mean 0, so that the gates are neither open nor shut; the rest positive.
    draw = lambda v: rng.randn(*v.shape) / 4 if len(v.shape) > 1 else rng.rand(*v.shape)  # noqa: E731
    variables = jax.tree.map(draw, abstract)
    params, stats = variables["params"], variables["batch_stats"]
    images = rng.randn(6, 6, 3)

    def layer(p, s, x, conv="conv1", bn="bn1", stride=1):
        y = reference_conv(x, p[conv]["kernel"], stride)
        y = (y - s[bn]["mean"]) / np.sqrt(s[bn]["var"] + 1e-5)
        return np.maximum(y * p[bn]["scale"] + p[bn]["bias"], 0)

    x, gates = layer(params, stats, images, "stem_conv", "stem_bn"), []
    for name, stride in (
        ("stage1_block1", 1),
        ("stage1_block2", 1),
        ("stage2_block1", 2),
        ("stage2_block2", 1),
    ):
        p, s = params[name], stats[name]
        h = layer(p, s, x, stride=stride)
        assert ("gate_conv" in p) == (stride == 1)
        if stride == 1:
            z = reference_conv(x, p["gate_conv"]["kernel"], 1) + p["gate_conv"]["bias"]
            t = 1 / (1 + np.exp(-z))
            gates.append(t)
            h = h * t + x * (1 - t)
        x = h
    want = x.mean(axis=(0, 1)) @ params["head"]["kernel"] + params["head"]["bias"]
    assert all(0.1 < np.mean(t) < 0.9 for t in gates)
    variables = jax.tree.map(jnp.float32, variables)
    got = jax.jit(model.apply, compiler_options=ONCE)(variables, jnp.float32(images)[None])[0]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_gates_begin_at_their_bias():
    init = jax.jit(small(-2.0).init, compiler_options=ONCE)
    params = init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    np.testing.assert_array_equal(params["stage2_block2"]["gate_conv"]["bias"], -2)


def test_a_shut_gate_passes_the_input_and_an_open_one_the_layer():
    x, y = jnp.full((1, 2, 2, 3), 5.0), jnp.full((1, 2, 2, 3), 7.0)
    for shut, want in ((-100.0, x), (100.0, y)):
        conv = lambda *args, shut=shut, **kwargs: lambda x: jnp.full_like(x, shut)  # noqa: E731
        got = highway.highway(x, y, 1, conv, None, gate_bias=0.0)
        np.testing.assert_array_equal(got, want)


def test_scanned_and_unrolled_agree():
    check_scanned_and_unrolled_agree(small(-1.0).clone(stage_sizes=(3, 2)))


def test_every_option_together_traces():
    model = create_model("highway20", dtype="bfloat16", bn_group_size=2, scan=True, remat=True)
    x = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    stages = jax.eval_shape(functools.partial(model.apply, features=True), variables, x)
    assert [s.shape for s in stages] == [(4, 32, 32, 16), (4, 16, 16, 32), (4, 8, 8, 64)]
    assert {s.dtype for s in stages} == {jnp.dtype("bfloat16")}
    assert {v.dtype for v in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_shortcuts_are_no_option():
    with pytest.raises(UserError, match="'highway32' has shortcuts of its own"):
        create_model("highway32", shortcut="A")


def test_the_config_compares_under_the_papers_recipe():
    for depth in PLAIN:
        ours, theirs = load("highway", f"highway{depth}"), load(f"resnet{depth}")
        assert ours.optim.warmup_rate == theirs.optim.warmup_rate
        ours.model.name = theirs.model.name
        ours.model.gate_bias = theirs.model.gate_bias
        for key in ("warmup_steps", "warmup_error"):
            ours.optim[key] = theirs.optim[key]
        assert ours == theirs
