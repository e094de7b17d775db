"""Activations that are computed where they are used: nets train as without, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import deferred
from tests.test_models import ONCE, distance, fill, jit, run_once, small
from tests.test_steps import SMALL, Setup, batches


def draw(model, shape=(4, 6, 6, 3)):
    images = jnp.asarray(np.random.default_rng(1).standard_normal(shape), jnp.float32)
    return fill(model, images), images


def assert_trains_as_without(plain, shape=(4, 6, 6, 3), **options):
    net = plain.clone(defer=True)
    assert net.defers
    both = draw(plain, shape)
    one, other = (run_once(model, *both, **options) for model in (plain, net))
    assert distance(one, other) < 2e-4


SLOW = [
    ("resnet8", {}),
    ("plain20", {"bn_group_size": 4}),
    ("resnet20_preact", {"shortcut": "A"}),
    ("resnet47_preact", {"shortcut": "C"}),
    ("resnet20_keras_v1", {}),
    ("resnet56_keras_v2", {}),
    ("resnet110_bn_after_addition", {}),
    ("resnet110_relu_before_addition", {}),
    ("resnet110_constant_scaling", {}),
    ("resnet110_exclusive_gating", {}),
]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet8", {"shortcut": "C", "bn_group_size": 2}),
        ("resnet20_bottleneck", {"bn_group_size": 4, "stride_in_3x3": True}),
        ("resnet20_preact", {"bn_group_size": 2}),
        ("highway20", {}),
        *(pytest.param(*net, marks=pytest.mark.slow) for net in SLOW),
    ],
)
def test_a_net_trains_as_without(name, options):
    assert_trains_as_without(small(name, (1, 2) if name == "highway20" else (1, 1), **options))


def test_a_net_with_a_pool_after_its_stem():
    assert_trains_as_without(small("resnet18", (1,)).clone(widths=(4,)), (4, 16, 16, 3))


def test_features_are_arrays():
    model = small("resnet110_relu_only_preact", (2,)).clone(widths=(4,))
    assert_trains_as_without(model, features=True)


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


def test_eight_devices_equal_one():
    losses, statistics = [], []
    for devices in (1, 8):
        model = SMALL.clone(stage_sizes=(1,), widths=(8,), defer=True, bn_group_size=4)
        setup = Setup(devices, model=model, compiler_options=ONCE)
        state, sums = setup.train(setup.state(), batches(1))
        losses.append(float(sums["loss"][0]))
        statistics.append(jax.device_get(state.batch_stats))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert distance(*statistics) < 1e-4


def test_several_nets_at_once_equal_one_by_one():
    model = small("resnet8", (1,), defer=True, bn_group_size=2).clone(widths=(4,))
    variables, images = draw(model)
    both = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), (variables, images))
    together = jax.vmap(lambda v, x: run_once(model, v, x))(*both)
    for i in range(2):
        alone = run_once(model, *jax.tree.map(lambda x, i=i: x[i], both))
        assert distance(alone, jax.tree.map(lambda x, i=i: x[i], together)) < 2e-4


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


def test_arrays_are_their_own_values():
    x = np.ones((2, 3, 3, 4), np.float32)
    assert deferred.array(x) is x
    y = deferred.Convolved(jnp.asarray(x), (jnp.ones((1, 4)), jnp.ones((1, 4))))
    assert deferred.array(y) is y.y
    assert deferred.sums(y, 1) is y.sums
    assert y.shape == x.shape
    np.testing.assert_array_equal(y + x, 2 * x)
