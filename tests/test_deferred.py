"""Activations that are computed where they are used: nets train as without, to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models import ablations, deferred
from tests.test_models import ONCE
from tests.test_steps import SHAPE, SMALL, Setup, batches


def small(name, **options):
    """A net in which one block changes the shape and one does not."""
    model = create_model(name, **options)
    widths = model.out_widths and (16, 32)
    return model.clone(stage_sizes=(2, 1), widths=(4, 8), out_widths=widths)


def draw(model, shape=(8, *SHAPE)):
    """Variables, all different, and images."""
    random = np.random.default_rng(0)
    images = jnp.asarray(random.standard_normal(shape), jnp.float32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), images)

    def value(path, x):
        size = np.sqrt(2 / np.prod(x.shape[:-1])) if path[-1].key == "kernel" else 0.1
        drawn = size * random.standard_normal(x.shape)
        return jnp.asarray(1 + drawn if path[-1].key in ("scale", "var") else drawn, x.dtype)

    return jax.tree_util.tree_map_with_path(value, abstract), images


def results(model, variables, images, **options):
    """Outputs and running statistics, and the gradients of parameters and images."""

    def loss(params, images):
        out, new = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            mutable=["batch_stats"],
            **options,
        )
        # Each number has a weight of its own.
        parts = [x * jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in jax.tree.leaves(out)]
        return sum(map(jnp.sum, parts)), (out, new)

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    return jax.jit(gradient, compiler_options=ONCE)(variables["params"], images)


def distance(one, other):
    """How far the arrays are from their counterparts, at most, in parts of their size."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    found = [0.0]
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # A bias before a normalisation has no gradient but rounding.
        found.append(np.linalg.norm(a - b) / max(np.linalg.norm(a), 0.1))
    return max(found)


NETS = [
    ("resnet8", {}),
    ("resnet8", {"shortcut": "C", "bn_group_size": 2}),
    ("plain20", {"bn_group_size": 4}),
    ("resnet20_bottleneck", {"bn_group_size": 4, "stride_in_3x3": True}),
    ("resnet20_preact", {"bn_group_size": 2}),
    ("resnet20_preact", {"shortcut": "A"}),
    ("resnet47_preact", {"shortcut": "C"}),
    ("highway20", {}),
    ("resnet20_keras_v1", {}),
    ("resnet56_keras_v2", {}),
    *((f"resnet110_{kind}", {}) for kind in ablations.BLOCKS if kind != "dropout_shortcut"),
    ("resnet110_constant_scaling", {}),
]


@pytest.mark.parametrize(("name", "options"), NETS)
def test_a_net_trains_as_without(name, options):
    plain = small(name, **options)
    net = plain.clone(defer=True)
    assert net.defers
    variables, images = draw(plain)
    found = [results(model, variables, images) for model in (plain, net)]
    assert distance(*found) < 2e-4


@pytest.mark.parametrize("name", ["resnet8", "resnet20_preact"])
def test_evaluation_is_the_same_program(name):
    plain = small(name)
    variables, images = draw(plain)
    programs = [
        jax.make_jaxpr(model.apply)(variables, images)
        for model in (plain, plain.clone(defer=True, kernels=True))
    ]
    assert str(programs[0]) == str(programs[1])


def test_a_net_with_a_pool_after_its_stem():
    plain = small("resnet18", num_classes=3)
    variables, images = draw(plain, (4, 16, 16, 3))
    found = [results(m, variables, images) for m in (plain, plain.clone(defer=True))]
    assert distance(*found) < 2e-4


@pytest.mark.parametrize("name", ["resnet20_preact", "resnet110_relu_only_preact"])
def test_features_are_arrays(name):
    plain = small(name)
    variables, images = draw(plain)
    found = [
        results(model, variables, images, features=True)
        for model in (plain, plain.clone(defer=True))
    ]
    assert [x.shape for x in found[1][1][0]] == [(8, 8, 8, 4), (8, 4, 4, 8)]
    assert distance(*found) < 2e-4


@pytest.mark.parametrize(
    "options", [{"scan": True}, {"remat": True}, {"survival": 0.5}, {"scan": True, "remat": True}]
)
def test_nets_that_cannot_defer_train_as_without(options):
    plain = small("resnet8", **options)
    net = plain.clone(defer=True, kernels=True)
    assert not net.defers
    assert not net.uses_kernels
    variables, images = draw(plain)
    rngs = {"drop": jax.random.key(0)}
    programs = [
        jax.make_jaxpr(lambda v, x, m=m: m.apply(v, x, True, mutable=["batch_stats"], rngs=rngs))
        for m in (plain, net)
    ]
    assert str(programs[0](variables, images)) == str(programs[1](variables, images))


def test_nets_with_dropout_do_not_defer():
    assert not create_model("resnet110_dropout_shortcut", defer=True).defers
    assert not create_model("resnet20").defers
    assert not create_model("resnet20", kernels=True).uses_kernels
    assert create_model("resnet20", defer=True, kernels=True).uses_kernels


@pytest.mark.parametrize("group", [None, 4])
def test_eight_devices_equal_one(group):
    losses, statistics = [], []
    for devices in (1, 8):
        model = SMALL.clone(defer=True, bn_group_size=group)
        setup = Setup(devices, model=model, compiler_options=ONCE)
        state, sums = setup.train(setup.state(), batches(1))
        losses.append(float(sums["loss"][0]))
        statistics.append(jax.device_get(state.batch_stats))
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert distance(*statistics) < 1e-4


def test_several_nets_at_once_equal_one_by_one():
    model = small("resnet8", defer=True, bn_group_size=4)
    variables, images = draw(model)
    both = jax.tree.map(lambda x: jnp.stack([x, 1.5 * x]), (variables, images))
    together = jax.vmap(lambda v, x: results(model, v, x))(*both)
    for i in range(2):
        alone = results(model, *jax.tree.map(lambda x, i=i: x[i], both))
        assert distance(alone, jax.tree.map(lambda x, i=i: x[i], together)) < 2e-4


def reference(y, groups, scale, bias, epsilon, shortcut, rectified):
    """`deferred.Normalized.compute` by its definition."""
    y64 = y.astype(jnp.float64)
    parts = y64.reshape(groups, -1, y.shape[-1])
    mean, var = parts.mean(axis=1, keepdims=True), parts.var(axis=1, keepdims=True)
    value = ((parts - mean) / jnp.sqrt(var + epsilon) * scale + bias).reshape(y.shape)
    value = value if shortcut is None else value + shortcut
    return jnp.maximum(value, 0) if rectified else value


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("has_shortcut", [False, True])
@pytest.mark.parametrize("rectified", [False, True])
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
            found, want = (jax.value_and_grad(f, numbers)(*arguments) for f in (ours, theirs))
        for a, b in zip(*map(jax.tree.leaves, (want, found)), strict=True):
            assert np.linalg.norm(a - b) < 1e-5 * np.linalg.norm(a)


def normalized():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 3, 4)), jnp.float32)
    return deferred.Normalized(x, deferred.sums(x, 1), jnp.ones(4), jnp.zeros(4), 1e-5)


def test_what_is_added_after_relu_is_not_rectified():
    x, one = normalized(), jnp.ones((2, 3, 3, 4))
    np.testing.assert_allclose(x.relu() + one, x.relu().compute() + 1)
    np.testing.assert_allclose(deferred.array((x + one) + one), x.compute() + 2, rtol=1e-5)
    np.testing.assert_allclose(deferred.array(one + x), x.compute() + 1, rtol=1e-5)
    np.testing.assert_allclose(
        deferred.array((x + x.relu()).relu()),
        np.maximum(x.compute() + np.maximum(x.compute(), 0), 0),
        rtol=1e-5,
    )


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
    np.testing.assert_array_equal(jnp.asarray(x) + y, 2 * x)
