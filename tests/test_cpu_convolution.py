"""Convolutions in the way of a CPU: those of the plain way, in values, gradients and nets."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import cpu_convolution
from tests.test_models import distance, fill, jit, run_once, small

ONE = ((1, 1), (1, 1))


def draw(*shapes, dtype=np.float64):
    random = np.random.default_rng(7)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def plain_convolve(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (strides, strides), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize(("side", "kernel", "strides", "padding"), [
    ((6, 8), (3, 3, 4, 5), 1, ONE),
    ((5, 6), (3, 3, 3, 16), 1, ONE),
    ((1, 2), (3, 3, 16, 16), 1, ONE),
    ((4, 3), (3, 3, 5, 7), 1, ONE),
    ((5, 6), (3, 3, 17, 4), 1, ONE),
    ((6, 8), (3, 3, 4, 5), 2, ONE),
    ((5, 7), (3, 3, 4, 5), 2, ONE),
    ((6, 8), (3, 3, 4, 5), 2, ((0, 1), (0, 1))),  # TensorFlow's SAME.
    ((5, 7), (1, 1, 4, 5), 2, ((0, 0), (0, 0))),
    ((6, 8), (7, 7, 4, 5), 2, ((3, 3), (3, 3))),
    ((5, 7), (2, 3, 4, 5), 3, ((1, 0), (2, 1))),
])  # fmt: skip
def test_values_and_gradients_are_the_plain_convolution_s(side, kernel, strides, padding):
    with jax.enable_x64(True):
        x, kernel = draw((3, *side, kernel[2]), kernel)
        (weight,) = draw(plain_convolve(x, kernel, strides, padding).shape)

        def run(convolve):
            def objective(x, kernel):
                y = convolve(x, kernel, strides, padding)
                return jnp.sum(weight * jnp.sin(y)), y

            return jit(jax.grad(objective, argnums=(0, 1), has_aux=True))(x, kernel)

        found = run(cpu_convolution.convolve), run(plain_convolve)
        for a, b in zip(*map(jax.tree.leaves, found), strict=True):
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
    (images,) = draw((2, 16, 16, 3), dtype=np.float32)

    def layouts(model):
        def loss(variables):
            return jnp.sum(model.apply(variables, images, train=True, mutable=["batch_stats"])[0])

        variables = jax.eval_shape(model.init, jax.random.key(0), images)
        program = jax.jit(jax.grad(loss, allow_int=True)).lower(variables).as_text()
        return set(re.findall(r"dim_numbers = (\S.*?->\[.*?\])", program))

    plain = create_model(name).clone(stage_sizes=(1, 1), widths=(16, 32))
    assert len(layouts(plain)) > 1
    assert layouts(plain.clone(cpu_convolutions=True)) == {usual}


@pytest.mark.parametrize(("name", "options"), [
    ("resnet20_keras_v1", {"bn_group_size": 2}),
    pytest.param("resnet20_bottleneck", {"remat": True}, marks=pytest.mark.slow),
    pytest.param("resnet20_preact", {"scan": True}, marks=pytest.mark.slow),
    pytest.param("highway20", {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_nets_are_the_same_with_and_without(name, options):
    (images,) = draw((4, 8, 8, 3), dtype=np.float32)
    plain = small(name, **options)
    variables = fill(plain, images)
    found = [run_once(plain.clone(cpu_convolutions=on), variables, images) for on in (False, True)]
    # Rounding grows on its way through batch normalisation over so few images.
    assert distance(*found) < 2e-3
