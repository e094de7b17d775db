"""The GPU programs, interpreted: values and gradients by their definition, and nets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import deferred, fused, layers
from tests.test_deferred import draw, reference
from tests.test_models import distance, jit, run_once
from tests.test_steps import SHAPE, Setup, batches

EPSILON = 1e-3


@jax.custom_jvp
def rounded(x):
    """To bfloat16, as if it were not."""
    return x.astype(jnp.bfloat16).astype(jnp.float64)


rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))


def definition(groups, strides, y, scale, bias, kernel, shortcut=None):
    """Value, convolution and sums, in float64 but for the rounding of what is stored."""
    value = rounded(reference(y, groups, scale, bias, EPSILON, shortcut, True))
    out = jax.lax.conv_general_dilated(
        value,
        kernel.astype(jnp.float64),
        (strides, strides),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    out = rounded(out)
    flat = out.reshape(groups, -1, out.shape[-1])
    return value, out, flat.sum(axis=1), jnp.square(flat).sum(axis=1)


def ours(groups, strides, y, scale, bias, kernel, shortcut=None):
    x = deferred.Normalized(y, deferred.sums(y, groups), scale, bias, EPSILON)
    x = (x if shortcut is None else x + shortcut).relu()
    out = fused.convolve(x, kernel, strides)
    assert deferred.array(x) is x.computed
    return x.computed, out.y, *out.sums


def arguments_of(shape, outputs, has_shortcut):
    random = np.random.default_rng(0)
    channels = shape[-1]
    y, shortcut = random.standard_normal((2, *shape)) + 0.3
    kernel = random.standard_normal((3, 3, channels, outputs)) / np.sqrt(4.5 * channels)
    scale, bias = 1 + 0.2 * random.standard_normal(channels), random.standard_normal(channels)
    bfloat16 = [jnp.asarray(x, jnp.bfloat16) for x in (y, kernel, shortcut)]
    y, kernel, shortcut = bfloat16
    scale, bias = (jnp.asarray(x, jnp.float32) for x in (scale, bias))
    return [y, scale, bias, kernel, *[shortcut] * has_shortcut]


def make_gradients(function, used, count):
    """A function to what `function` computes and the gradients of a weighted sum of some parts."""
    exact = jnp.float64 if function.func is definition else jnp.float32

    def loss(*arguments):
        parts = function(*arguments)
        total = jnp.zeros((), exact)
        random = np.random.default_rng(1)
        # Sums are over many numbers.
        for i, (part, size) in enumerate(zip(parts, (0.3, 1, 0.1, 0.03), strict=True)):
            weight = jnp.asarray(size * random.standard_normal(part.shape), exact)
            if i in used:
                total += jnp.sum(part.astype(exact) * weight)
        return total, parts

    return jit(jax.grad(loss, tuple(range(count)), has_aux=True))


ALL = (0, 1, 2, 3)
SLOW = [
    ((2, 9, 9, 64), 64, 1, 2, True, (1,)),
    ((2, 20, 14, 16), 16, 1, 2, False, (1, 2, 3)),
    ((4, 8, 8, 16), 32, 2, 2, True, (1,)),
    ((1, 7, 9, 16), 32, 2, 1, False, ALL),
    ((5, 5, 3, 32), 32, 1, 5, True, (0, 1)),
    ((3, 4, 4, 64), 16, 1, 3, False, (0,)),
]


@pytest.mark.parametrize(
    ("shape", "outputs", "strides", "groups", "has_shortcut", "used"),
    [
        ((3, 7, 9, 16), 16, 1, 3, True, ALL),
        # More pixels than a tile has.
        ((2, 12, 11, 32), 64, 2, 1, False, (1, 2, 3)),
        *(pytest.param(*layer, marks=pytest.mark.slow) for layer in SLOW),
    ],
)
def test_values_and_gradients_by_definition(shape, outputs, strides, groups, has_shortcut, used):
    arguments = arguments_of(shape, outputs, has_shortcut)
    x = deferred.Normalized(arguments[0], (), None, None, EPSILON, rectified=True)
    assert fused.fits(x, arguments[3].shape)
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        function = functools.partial(definition, groups, strides)
        want = make_gradients(function, used, len(arguments))(*arguments)
    function = functools.partial(ours, groups, strides)
    function = make_gradients(function, used, len(arguments))
    found, again = (function(*arguments) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, found, again)
    assert [x.dtype for x in found[0]] == [x.dtype for x in arguments]
    assert [str(x.dtype) for x in found[1]] == ["bfloat16"] * 2 + ["float32"] * 2
    for a, b in zip(*map(jax.tree.leaves, (want, found)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= 0.006 * np.linalg.norm(a)


def test_only_what_is_made_for_a_gpu_calls_its_compiler():
    arguments = arguments_of((2, 5, 6, 16), 16, True)
    traced = jax.jit(functools.partial(ours, 1, 1)).trace(*arguments)
    for platform, calls in (("cpu", False), ("cuda", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("triton" in text) == calls
        # Interpreted, it is a loop over the images.
        assert ("stablehlo.while" in text) != calls


def test_what_fits():
    y = jnp.zeros((2, 4, 4, 16), jnp.bfloat16)
    x = deferred.Normalized(y, (), jnp.ones(16), jnp.ones(16), EPSILON, rectified=True)
    replace = functools.partial(deferred.dataclasses.replace, x)
    for outputs in (16, 32, 64):
        assert fused.fits(x, (3, 3, 16, outputs))
    assert fused.fits(replace(shortcut=y), (3, 3, 16, 16))
    for shape in ((1, 1, 16, 16), (7, 7, 16, 16), (3, 3, 16, 128), (3, 3, 3, 16), (3, 3, 16, 8)):
        assert not fused.fits(x, shape)
    computed = replace()
    computed.computed = y
    for other in (
        y,
        deferred.Convolved(y, ()),
        replace(y=y.astype(jnp.float32)),
        replace(rectified=False),
        computed,
    ):
        assert not fused.fits(other, (3, 3, 16, 16))


def test_padding_on_one_side_is_left_to_others():
    y = jnp.ones((2, 4, 4, 16), jnp.bfloat16)
    x = deferred.Normalized(y, deferred.sums(y, 1), jnp.ones(16), jnp.ones(16), EPSILON).relu()
    variables = {"params": {"kernel": jnp.ones((3, 3, 16, 16))}}
    plain = layers.Conv(16, strides=2, same=True, dtype=jnp.bfloat16)
    found = jit(plain.clone(fused=True).apply)(variables, x)
    np.testing.assert_array_equal(found, jit(plain.apply)(variables, x.compute()))


def test_a_vector_is_split_to_the_bit():
    vector = jax.random.normal(jax.random.key(0), (100,))
    parts = jit(lambda x: fused.split(x, [1, 16, 33, 50]))(vector)
    assert [p.shape for p in parts] == [(1,), (16,), (33,), (50,)]
    np.testing.assert_array_equal(jnp.concatenate(parts), vector)


def small(name, stages, **options):
    """With widths that fit."""
    model = create_model(name, dtype="bfloat16", defer=True, **options)
    return model.clone(stage_sizes=(1,) * stages, widths=(16, 32)[:stages])


@pytest.mark.parametrize(
    ("name", "stages", "options", "count"),
    [
        ("resnet8", 1, {"bn_group_size": 2}, 2),
        pytest.param("resnet8", 2, {}, 4, marks=pytest.mark.slow),
        pytest.param("resnet20_preact", 2, {}, 4, marks=pytest.mark.slow),
        pytest.param("resnet20_bottleneck", 1, {}, 1, marks=pytest.mark.slow),
        pytest.param("plain20", 1, {}, 2, marks=pytest.mark.slow),
    ],
)
def test_a_net_trains_as_without(name, stages, options, count):
    plain = small(name, stages, **options)
    net = plain.clone(fused=True)
    variables, images = draw(plain, (4, *SHAPE))
    program = jax.make_jaxpr(lambda x: net.apply(variables, x, True, mutable=["batch_stats"]))
    # One for a CPU and one for other devices.
    assert str(program(images)).count("name=normalize_convolve") == 2 * count
    exact, rough, found = (
        run_once(m, variables, images) for m in (plain.clone(dtype=jnp.float32), plain, net)
    )
    # As near to float32 as without them.
    assert distance(exact, found) < 1.5 * distance(exact, rough) + 0.01


@pytest.mark.slow
def test_a_packed_chunk_of_steps():
    model = small("resnet8", 1, fused=True)
    setup = Setup(model=model, batch=4, pack=True)
    index = batches(2, 4)
    chunked, sums = setup.train(setup.state(), index)
    single, losses = setup.state(), []
    for row in index:
        single, part = setup.train(single, row[None])
        losses.append(part["loss"][0])
    np.testing.assert_allclose(sums["loss"], losses, rtol=0.02)
    assert distance(*jax.device_get((single.params, chunked.params))) < 0.02
