"""The kernels for a GPU, interpreted: values and gradients by their definition, and nets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import blocks, deferred, kernels
from tests.test_deferred import distance, draw, results
from tests.test_models import ONCE
from tests.test_packing import make_chunk
from tests.test_steps import SHAPE, Setup, batches

EPSILON = 1e-3


@jax.custom_jvp
def rounded(x):
    """To bfloat16, as if it were not."""
    return x.astype(jnp.bfloat16).astype(jnp.float64)


rounded.defjvp(lambda primals, tangents: (rounded(*primals), tangents[0]))


def definition(groups, strides, y, scale, bias, kernel, shortcut=None):
    """Value, convolution and sums, in float64 but for the rounding of what is stored."""
    parts = y.astype(jnp.float64).reshape(groups, -1, y.shape[-1])
    mean, var = parts.mean(axis=1, keepdims=True), parts.var(axis=1, keepdims=True)
    value = ((parts - mean) / jnp.sqrt(var + EPSILON) * scale + bias).reshape(y.shape)
    value = value if shortcut is None else value + shortcut.astype(jnp.float64)
    value = rounded(jnp.maximum(value, 0))
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
    out = kernels.convolve(x, kernel, strides)
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


def gradients(function, used, arguments):
    """What the function computes, and the gradients of a weighted sum of the `used` parts."""

    def loss(*arguments):
        parts = function(*arguments)
        total = jnp.zeros((), jnp.float64)
        random = np.random.default_rng(1)
        for i, part in enumerate(parts):
            weight = random.standard_normal(part.shape)
            # Sums are over many numbers.
            weight *= [0.3, 1, 0.1, 0.03][i]
            if i in used:
                total += jnp.sum(part.astype(jnp.float64) * weight)
        return total, parts

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        value = jax.grad(loss, tuple(range(len(arguments))), has_aux=True)
        return jax.jit(value, compiler_options=ONCE)(*arguments)


ALL = (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("shape", "outputs", "strides", "groups", "has_shortcut", "used"),
    [
        ((3, 7, 9, 16), 16, 1, 1, True, ALL),
        ((2, 20, 14, 16), 16, 1, 2, False, (1, 2, 3)),
        ((4, 8, 8, 16), 32, 2, 2, True, (1,)),
        ((1, 7, 9, 16), 32, 2, 1, False, ALL),
        ((5, 5, 3, 32), 32, 1, 5, True, (0, 1)),
        ((3, 6, 5, 32), 64, 2, 1, False, (1, 2)),
        ((2, 9, 9, 64), 64, 1, 1, True, ALL),
        ((3, 4, 4, 64), 16, 1, 3, False, (0,)),
    ],
)
def test_values_and_gradients_by_definition(shape, outputs, strides, groups, has_shortcut, used):
    arguments = arguments_of(shape, outputs, has_shortcut)
    assert kernels.fits(
        deferred.Normalized(arguments[0], (), None, None, EPSILON, rectified=True),
        arguments[3].shape,
    )
    want, found = (
        gradients(functools.partial(f, groups, strides), used, arguments)
        for f in (definition, ours)
    )
    assert [x.dtype for x in found[0]] == [x.dtype for x in arguments]
    assert [str(x.dtype) for x in found[1]] == ["bfloat16"] * 2 + ["float32"] * 2
    for a, b in zip(*map(jax.tree.leaves, (want, found)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.linalg.norm(a - b) <= 0.006 * np.linalg.norm(a)


def test_it_is_the_same_to_the_bit_each_time():
    arguments = arguments_of((3, 9, 7, 16), 32, True)
    function = functools.partial(ours, 1, 2)
    first, second = (gradients(function, ALL, arguments) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_only_what_is_made_for_a_gpu_calls_its_compiler():
    arguments = arguments_of((2, 5, 6, 16), 16, True)
    traced = jax.jit(functools.partial(ours, 1, 1)).trace(*arguments)
    for platform, calls in (("cpu", False), ("cuda", True)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("triton" in text) == calls
        # Interpreted, a kernel is a loop over its programs.
        assert ("stablehlo.while" in text) != calls


def test_several_at_once_equal_one_by_one():
    arguments = arguments_of((2, 5, 6, 16), 16, True)
    both = [jnp.stack([x, 2 * x]) for x in arguments]

    def value(*arguments):
        def loss(*arguments):
            parts = ours(1, 1, *arguments)
            return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in parts)

        return jax.value_and_grad(loss, tuple(range(5)))(*arguments)

    together = jax.jit(jax.vmap(value), compiler_options=ONCE)(*both)
    for i in range(2):
        alone = jax.jit(value, compiler_options=ONCE)(*(x[i] for x in both))
        mine = jax.tree.map(lambda x, i=i: x[i], together)
        assert distance(alone, mine) < 0.01


def test_what_the_kernels_can_compute():
    y = jnp.zeros((2, 4, 4, 16), jnp.bfloat16)
    x = deferred.Normalized(y, (), jnp.ones(16), jnp.ones(16), EPSILON, rectified=True)
    replace = functools.partial(deferred.dataclasses.replace, x)
    for outputs in (16, 32, 64):
        assert kernels.fits(x, (3, 3, 16, outputs))
    assert kernels.fits(replace(shortcut=y), (3, 3, 16, 16))
    for shape in ((1, 1, 16, 16), (7, 7, 16, 16), (3, 3, 16, 128), (3, 3, 3, 16), (3, 3, 16, 8)):
        assert not kernels.fits(x, shape)
    for other in (
        y,
        deferred.Convolved(y, ()),
        replace(y=y.astype(jnp.float32)),
        replace(rectified=False),
        replace(computed=y),
    ):
        assert not kernels.fits(other, (3, 3, 16, 16))


def test_padding_on_one_side_is_left_to_others():
    y = jnp.ones((2, 4, 4, 16), jnp.bfloat16)
    x = deferred.Normalized(y, deferred.sums(y, 1), jnp.ones(16), jnp.ones(16), EPSILON).relu()
    variables = {"params": {"kernel": jnp.ones((3, 3, 16, 16))}}
    plain = blocks.Conv(16, strides=2, same=True, dtype=jnp.bfloat16)
    found = plain.clone(kernels=True).apply(variables, x)
    np.testing.assert_array_equal(found, plain.apply(variables, x.compute()))


def test_a_vector_is_split_to_the_bit():
    vector = jax.random.normal(jax.random.key(0), (100,))
    parts = jax.jit(lambda x: kernels.split(x, [1, 16, 33, 50]))(vector)
    assert [p.shape for p in parts] == [(1,), (16,), (33,), (50,)]
    np.testing.assert_array_equal(jnp.concatenate(parts), vector)


def small(name, stages, **options):
    """With widths for which there are kernels."""
    model = create_model(name, dtype="bfloat16", defer=True, **options)
    return model.clone(stage_sizes=(1,) * stages, widths=(16, 32)[:stages])


@pytest.mark.parametrize(
    ("name", "stages", "options", "count"),
    [
        ("resnet8", 2, {"bn_group_size": 2}, 4),
        ("resnet20_preact", 2, {}, 4),
        ("resnet20_bottleneck", 1, {}, 1),
        ("plain20", 1, {}, 2),
    ],
)
def test_a_net_trains_as_without(name, stages, options, count):
    plain = small(name, stages, **options)
    net = plain.clone(kernels=True)
    variables, images = draw(plain, (4, *SHAPE))
    program = jax.make_jaxpr(lambda x: net.apply(variables, x, True, mutable=["batch_stats"]))
    # One for a CPU and one for other devices.
    assert str(program(images)).count("name=normalize_convolve") == 2 * count
    exact, rough, found = (
        results(m, variables, images) for m in (plain.clone(dtype=jnp.float32), plain, net)
    )
    # As near to float32 as without them.
    assert distance(exact, found) < 1.5 * distance(exact, rough) + 0.01


def test_a_packed_chunk_of_steps():
    model = small("resnet8", 1, kernels=True)
    setup = Setup(model=model, batch=4)
    setup.chunk = make_chunk(setup, True)
    index = batches(2, 4)
    chunked, sums = setup.train(setup.state(), index)
    single, losses = setup.state(), []
    for row in index:
        single, part = setup.train(single, row[None])
        losses.append(part["loss"][0])
    np.testing.assert_allclose(sums["loss"], losses, rtol=0.02)
    assert distance(*jax.device_get((single.params, chunked.params))) < 0.02
