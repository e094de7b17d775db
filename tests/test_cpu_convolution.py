"""Convolutions in the way of a CPU: those of the plain way, in values, gradients and nets."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import cpu_convolution
from tests.test_models import distance, fill, run_once, small

ONE = ((1, 1), (1, 1))


def _plain(x, kernel, strides=1, padding=ONE):
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _ours(x, kernel, strides=1, padding=ONE):
    return cpu_convolution.convolve(x, kernel, strides, padding)


def _draw(*shapes, dtype=np.float64):
    random = np.random.default_rng(7)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def _direct(x, kernel):
    """The convolution by its definition, a term at a time, in float64."""
    x = np.pad(np.asarray(x), ((0, 0), (1, 1), (1, 1), (0, 0)))
    batch, height, width, _ = x.shape
    out = np.zeros((batch, height - 2, width - 2, kernel.shape[-1]))
    for i in range(3):
        for j in range(3):
            part = x[:, i : i + height - 2, j : j + width - 2]
            out += np.einsum("bhwc,cd->bhwd", part, np.asarray(kernel[i, j]))
    return out


@pytest.mark.parametrize(("channels", "features"), [(3, 16), (16, 16), (5, 7), (17, 4)])
@pytest.mark.parametrize(("height", "width"), [(5, 6), (1, 2), (4, 3)])
def test_value_by_definition(channels, features, height, width):
    with jax.enable_x64(True):
        x, kernel = _draw((2, height, width, channels), (3, 3, channels, features))
        np.testing.assert_allclose(_ours(x, kernel), _direct(x, kernel), atol=1e-12)


@pytest.mark.parametrize(("window", "strides", "padding"), [
    ((3, 3), 1, ONE),
    ((3, 3), 2, ONE),
    ((3, 3), 2, ((0, 1), (0, 1))),  # TensorFlow's SAME.
    ((1, 1), 1, ((0, 0), (0, 0))),
    ((1, 1), 2, ((0, 0), (0, 0))),
    ((7, 7), 2, ((3, 3), (3, 3))),
    ((2, 3), 3, ((1, 0), (2, 1))),
])  # fmt: skip
@pytest.mark.parametrize("side", [(6, 8), (5, 7)])
def test_gradients_are_those_of_the_plain_convolution(window, strides, padding, side):
    with jax.enable_x64(True):
        x, kernel = _draw((3, *side, 4), (*window, 4, 5))
        (weight,) = _draw(_plain(x, kernel, strides, padding).shape)

        def objective(convolve, x, kernel):
            return jnp.sum(weight * jnp.sin(convolve(x, kernel, strides, padding)))

        ours, plain = (
            jax.value_and_grad(functools.partial(objective, convolve), argnums=(0, 1))(x, kernel)
            for convolve in (_ours, _plain)
        )
        for a, b in zip(*map(jax.tree.leaves, (ours, plain)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-11)


@pytest.mark.parametrize(
    ("x", "kernel", "strides", "expected"),
    [
        ((8, 32, 32, 16), (3, 3, 16, 16), 1, True),
        ((8, 32, 32, 3), (3, 3, 3, 16), 1, True),
        ((8, 32, 32, 16), (3, 3, 16, 32), 1, False),
        ((8, 32, 32, 16), (3, 3, 16, 16), 2, False),
        ((8, 32, 33, 16), (3, 3, 16, 16), 1, False),
        ((8, 32, 32, 16), (1, 1, 16, 16), 1, False),
        ((8, 32, 32, 3), (7, 7, 3, 16), 1, False),
    ],
)
def test_narrow_3x3_convolutions_of_even_width_are_in_pairs(x, kernel, strides, expected):
    pad = (kernel[0] - 1) // 2
    padding = ((pad, pad), (pad, pad))
    assert cpu_convolution.in_pairs(x, kernel, strides, padding) is expected
    assert not cpu_convolution.in_pairs(x, kernel, strides, ((0, 1), (0, 1)))


@pytest.mark.parametrize("name", ["resnet20", "resnet20_bottleneck", "resnet20_keras_v1"])
def test_no_convolution_of_a_training_step_has_permuted_dimensions(name):
    # XLA's CPU backend has fast kernels for these alone, and transposes others outside loops only.
    usual = "[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]"
    (images,) = _draw((2, 16, 16, 3), dtype=np.float32)

    def layouts(model):
        def loss(variables):
            return jnp.sum(model.apply(variables, images, train=True, mutable=["batch_stats"])[0])

        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        program = jax.jit(jax.grad(loss, allow_int=True)).lower(variables).as_text()
        return set(re.findall(r"dim_numbers = (\S.*?->\[.*?\])", program))

    plain = create_model(name, scan=True)
    assert len(layouts(plain)) > 1
    assert layouts(plain.clone(cpu_convolutions=True)) == {usual}


@pytest.mark.parametrize(("name", "options"), [
    ("resnet20_keras_v1", {"bn_group_size": 2}),
    ("resnet20_bottleneck", {"remat": True}),
    pytest.param("resnet20_preact", {"scan": True}, marks=pytest.mark.slow),
    pytest.param("highway20", {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_nets_are_the_same_with_and_without(name, options):
    (images,) = _draw((4, 8, 8, 3), dtype=np.float32)
    plain = small(name, **options)
    variables = fill(plain, images)
    found = [run_once(plain.clone(cpu_convolutions=on), variables, images) for on in (False, True)]
    # Rounding grows on its way through batch normalisation over so few images.
    assert distance(*found) < 2e-3


def test_it_is_really_used():
    (images,) = _draw((2, 16, 16, 3), dtype=np.float32)
    model = create_model("resnet8", cpu_convolutions=True)
    program = str(jax.make_jaxpr(model.apply)(fill(model, images), images))
    # The stem and the two convolutions of the first stage's only block.
    assert program.count("f32[3,4,16,32]") >= 2
    assert "f32[3,4,4,32]" in program


def test_several_nets_at_once():
    x, kernels = _draw((2, 4, 6, 3), (5, 3, 3, 3, 4), dtype=np.float32)
    together = jax.vmap(_ours, in_axes=(None, 0))(x, kernels)
    one_by_one = jnp.stack([_plain(x, kernel) for kernel in kernels])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
