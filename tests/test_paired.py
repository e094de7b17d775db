"""Convolutions on pairs of pixels: those of the plain way, in values, gradients and nets."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import paired


def _plain(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


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


@pytest.mark.parametrize(("channels", "features"), [(3, 16), (16, 16), (5, 7), (1, 1)])
@pytest.mark.parametrize(("height", "width"), [(5, 6), (1, 2), (4, 4)])
def test_value_by_definition(channels, features, height, width):
    with jax.enable_x64(True):
        x, kernel = _draw((2, height, width, channels), (3, 3, channels, features))
        np.testing.assert_allclose(paired.convolve(x, kernel), _direct(x, kernel), atol=1e-12)


def test_gradients_are_those_of_the_plain_convolution():
    with jax.enable_x64(True):
        x, kernel, weight = _draw((3, 6, 8, 4), (3, 3, 4, 5), (3, 6, 8, 5))

        def objective(convolve, x, kernel):
            return jnp.sum(weight * jnp.sin(convolve(x, kernel)))

        ours, plain = (
            jax.grad(functools.partial(objective, convolve), argnums=(0, 1))(x, kernel)
            for convolve in (paired.convolve, _plain)
        )
        for a, b in zip(ours, plain, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-12)


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
def test_applies_to_narrow_3x3_convolutions_of_even_width_only(x, kernel, strides, expected):
    assert paired.applies(x, kernel, strides) is expected


@pytest.mark.parametrize(("name", "options"), [
    ("resnet8", {}),
    ("plain20", {"bn_group_size": 2}),
    ("resnet20_preact", {}),
    ("resnet20_bottleneck", {"remat": True}),
    ("resnet20_keras_v1", {}),
    ("highway20", {}),
    ("resnet20", {"scan": True}),
])  # fmt: skip
def test_nets_are_the_same_with_and_without(name, options):
    (images,) = _draw((4, 16, 16, 3), dtype=np.float32)
    plain = create_model(name, **options)
    variables = jax.jit(plain.init)(jax.random.key(3), images)

    def loss(model, params):
        variables_now = {**variables, "params": params}
        logits, new = model.apply(variables_now, images, train=True, mutable=["batch_stats"])
        return jnp.mean(jnp.square(logits)), (logits, new["batch_stats"])

    results = []
    for model in (plain, plain.clone(pair_pixels=True)):
        value = jax.jit(jax.value_and_grad(functools.partial(loss, model), has_aux=True))
        (_, outputs), grads = value(variables["params"])
        results.append((outputs, jax.jit(model.apply)(variables, images), grads))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        # Rounding grows on its way through batch normalisation over so few images. A bias before
        # it has no gradient but rounding.
        size = jnp.maximum(jnp.linalg.norm(one), 1e-3)
        distance = float(jnp.linalg.norm(one - other) / size)
        assert distance < 2e-3, distance


def test_it_is_really_used():
    (images,) = _draw((2, 16, 16, 3), dtype=np.float32)
    model = create_model("resnet8", pair_pixels=True)
    variables = model.init(jax.random.key(0), images)
    program = str(jax.make_jaxpr(functools.partial(model.apply, train=False))(variables, images))
    # The stem and the two convolutions of the first stage's only block.
    assert program.count("f32[3,4,16,32]") >= 2
    assert "f32[3,4,4,32]" in program


def test_several_nets_at_once():
    x, kernels = _draw((2, 4, 6, 3), (5, 3, 3, 3, 4), dtype=np.float32)
    together = jax.vmap(paired.convolve, in_axes=(None, 0))(x, kernels)
    one_by_one = jnp.stack([_plain(x, kernel) for kernel in kernels])
    np.testing.assert_allclose(together, one_by_one, atol=1e-5)
