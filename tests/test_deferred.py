"""Activations that are computed where they are used: nets train as without, to rounding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import deferred
from tests.test_models import distance, fill, jit, run_once, small
from tests.test_steps import SMALL, Setup, assert_same_run, run


def draw(model, shape=(4, 6, 6, 3)):
    images = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    return fill(model, images), images


SLOW = [
    ("resnet20_bottleneck", (1,), {"bn_group_size": 4, "stride_in_3x3": True}),
    ("resnet8", (1, 1), {}),
    ("plain20", (1, 1), {"bn_group_size": 4}),
    ("resnet18", (1,), {}),
    ("resnet20_preact", (1, 1), {"shortcut": "A"}),
    ("resnet47_preact", (1, 1), {"shortcut": "C"}),
    ("resnet20_keras_v1", (1, 1), {}),
    ("resnet56_keras_v2", (1, 1), {}),
    ("resnet110_bn_after_addition", (1, 1), {}),
    ("resnet110_relu_before_addition", (1, 1), {}),
    ("resnet110_constant_scaling", (1, 1), {}),
    ("resnet110_exclusive_gating", (1, 1), {}),
]


@pytest.mark.parametrize(
    ("name", "sizes", "options"),
    [
        ("resnet8", (1,), {"shortcut": "C", "bn_group_size": 2}),
        ("resnet20_preact", (1, 1), {"bn_group_size": 2}),
        ("highway20", (2,), {}),
        *(pytest.param(*net, marks=pytest.mark.slow) for net in SLOW),
    ],
)
def test_a_net_trains_as_without(name, sizes, options):
    plain = small(name, sizes, **options)
    both = draw(plain, (4, 16, 16, 3) if name == "resnet18" else (4, 6, 6, 3))
    net = plain.clone(defer=True)
    assert net.defers
    assert distance(*(run_once(model, *both) for model in (plain, net))) < 2e-4


@pytest.mark.parametrize("name", ["resnet18", "resnet110_relu_only_preact"])
def test_features_are_arrays(name):
    model = small(name, (2,), defer=True)
    variables, images = draw(model)
    options = {"train": True, "features": True, "mutable": ["batch_stats"]}
    (found,), _ = jax.eval_shape(functools.partial(model.apply, **options), variables, images)
    assert isinstance(found, jax.ShapeDtypeStruct)


@pytest.mark.parametrize("name", ["resnet8", "resnet20_preact"])
def test_evaluation_is_the_same_program(name):
    plain = small(name)
    both = draw(plain)
    models = plain, plain.clone(defer=True, fused=True)
    assert len({str(jax.make_jaxpr(model.apply)(*both)) for model in models}) == 1


@pytest.mark.parametrize(
    "options", [{"scan": True}, {"remat": True}, {"survival": 0.5}, {"scan": True, "remat": True}]
)
def test_nets_that_cannot_defer_train_as_without(options):
    plain = small("resnet8", **options)
    net = plain.clone(defer=True, fused=True)
    assert not net.defers
    assert not net.uses_fused
    variables, images = draw(plain)

    def program(model):
        rngs = {"drop": jax.random.key(0)}
        train = lambda v, x: model.apply(v, x, True, mutable=["batch_stats"], rngs=rngs)  # noqa: E731
        return str(jax.make_jaxpr(train)(variables, images))

    assert program(plain) == program(net)


def test_which_nets_defer():
    assert not create_model("resnet110_dropout_shortcut", defer=True).defers
    assert not create_model("resnet20").defers
    assert not create_model("resnet20", fused=True).uses_fused
    assert create_model("resnet20", defer=True, fused=True).uses_fused


@pytest.mark.slow
def test_eight_devices_equal_one():
    model = SMALL.clone(stage_sizes=(1,), widths=(8,), defer=True, bn_group_size=4)
    one, eight = (Setup(count, model=model) for count in (1, 8))
    assert_same_run(run(one, 1), run(eight, 1))


def reference(y, groups, scale, bias, epsilon, shortcut, rectified):
    """`deferred.Normalized.compute` by its definition."""
    y64 = y.astype(jnp.float64)
    parts = y64.reshape(groups, -1, y.shape[-1])
    mean, var = parts.mean(axis=1, keepdims=True), parts.var(axis=1, keepdims=True)
    value = ((parts - mean) / jnp.sqrt(var + epsilon) * scale + bias).reshape(y.shape)
    value = value if shortcut is None else value + shortcut
    return jnp.maximum(value, 0) if rectified else value


@pytest.mark.parametrize(
    ("groups", "has_shortcut", "rectified"), [(1, False, False), (3, True, False), (3, True, True)]
)
def test_gradients_by_definition(groups, has_shortcut, rectified):
    random = np.random.default_rng(3)
    with jax.enable_x64(True):
        shape = (6, 4, 5, 7)
        y, shortcut, weight = (
            jnp.asarray(random.standard_normal(shape) + 0.3, jnp.float32) for _ in range(3)
        )
        scale, bias = jnp.asarray(random.standard_normal((2, 7)), jnp.float32)
        arguments = [y, scale, bias, *[shortcut] * has_shortcut]

        def ours(y, scale, bias, shortcut=None):
            sums = deferred.sums(y, groups)
            x = deferred.Normalized(y, sums, scale, bias, 1e-3)
            x = x if shortcut is None else x + shortcut
            x = x.relu() if rectified else x
            assert x.shape == shape
            return jnp.sum(weight * x.compute())

        def theirs(y, scale, bias, shortcut=None):
            value = reference(y, groups, scale, bias, 1e-3, shortcut, rectified)
            return jnp.sum(weight * value)

        with jax.numpy_rank_promotion("allow"):
            numbers = range(len(arguments))
            found, want = (jit(jax.value_and_grad(f, numbers))(*arguments) for f in (ours, theirs))
        for a, b in zip(*map(jax.tree.leaves, (want, found)), strict=True):
            assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)


def normalized():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 4)), jnp.float32)
    return deferred.Normalized(x, deferred.sums(x, 1), jnp.ones(4), jnp.zeros(4), 1e-5)


def test_what_is_added_after_relu_is_not_rectified():
    x, one = normalized(), jnp.ones((2, 3, 3, 4))
    np.testing.assert_allclose(x.relu() + one, x.relu().compute() + 1)
    np.testing.assert_allclose(deferred.array((x + one) + one), x.compute() + 2, rtol=1e-5)
    value = x.compute()
    both = deferred.array((x + x.relu().compute()).relu())
    np.testing.assert_allclose(both, np.maximum(value + np.maximum(value, 0), 0), rtol=1e-5)


def test_what_was_computed_is_kept_but_for_what_follows():
    x = normalized()
    value = x.compute()
    assert x.compute() is deferred.array(x) is value
    assert float(x.relu().compute().min()) == 0 > float(value.min())
    np.testing.assert_allclose((x + value).compute(), 2 * value, rtol=1e-5)
