"""Parameters as two vectors: the same numbers, and training that does not differ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.devices import sharding
from resnet_flax.training import optim, packing, state
from tests.test_models import jit, small
from tests.test_steps import SGD, SMALL, TINY, Setup, assert_close, batches, make_rate

OPTIMIZERS = {
    "sgd": SGD,
    "masked": optim.sgd(make_rate(), weight_decay=0.01, nesterov=True, decay_norm_and_bias=False),
    "adam": optim.adam(make_rate(1e-3), weight_decay=0.01),
}


@functools.cache
def drawn_state(optimizer="sgd", model=SMALL):
    """A state whose numbers are all different."""
    abstract = jax.eval_shape(
        lambda: state.create_state(model, OPTIMIZERS[optimizer], seed=0, ema=True)
    )
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: np.asarray(random.standard_normal(x.shape) + 3, x.dtype), abstract
    )


@pytest.mark.parametrize(
    ("optimizer", "model"),
    [
        ("sgd", SMALL),
        ("masked", SMALL.clone(scan=True, stage_sizes=(3, 1))),
        ("adam", small("resnet20_keras_v1")),
    ],
)
def test_unpacking_is_the_inverse_to_the_bit(optimizer, model):
    full = drawn_state(optimizer, model)
    like = jax.eval_shape(lambda: full)
    again = jit(lambda packed: packing.unpack(packed, like))(jit(packing.pack)(full))
    assert jax.tree.structure(again) == jax.tree.structure(full)
    jax.tree.map(np.testing.assert_array_equal, full, again)
    assert {str(x.dtype) for x in jax.tree.leaves(again.params)} == {"float32"}


def test_a_vector_each_for_kernels_and_for_the_rest():
    full = drawn_state()
    packed = packing.pack(full)
    assert set(packed.params) == set(packed.ema) == {"kernel", "other"}
    assert set(packed.batch_stats) == {"other"}
    assert packed.step is full.step
    flat = jax.tree_util.tree_leaves_with_path(full.params)
    sizes = {True: 0, False: 0}
    for path, x in flat:
        sizes[path[-1].key == "kernel"] += x.size
    assert packed.params["kernel"].shape == (sizes[True],)
    assert packed.params["other"].shape == (sizes[False],)
    # The optimizer's state has vectors where it had parameters.
    vectors = [x.shape for x in jax.tree.leaves(packed.opt_state) if x.ndim]
    assert vectors == [(sizes[True],), (sizes[False],)]


def assert_same(one, other):
    """Of what comes from a chunk of steps, states and sums."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    one, other = jax.device_get((one, other))
    assert_close(one[0], other[0], rtol=2e-4, atol=2e-5)
    assert_close(one[1], other[1], rtol=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "devices", "model", "options"),
    [
        ("masked", 1, TINY.clone(defer=True), {"label_smoothing": 0.1, "ema_decay": 0.5}),
        ("adam", 2, TINY.clone(survival=0.5), {"color": True}),
        pytest.param("sgd", 1, TINY.clone(stage_sizes=(3,), scan=True), {}, marks=pytest.mark.slow),
    ],
)
def test_a_chunk_of_steps_is_the_same_packed(optimizer, devices, model, options):
    found = []
    for pack, count in ((False, 1), (True, devices)):
        setup = Setup(count, model, OPTIMIZERS[optimizer], pack=pack, **options)
        found.append(setup.train(setup.state(), batches(2)))
    assert int(found[0][0].step) == 2
    assert_same(*found)


@pytest.mark.slow
def test_several_nets_in_one_program_are_the_same_packed():
    found, index = [], [jnp.asarray(batches(2)), jnp.asarray(batches(2)[::-1].copy())]
    for pack in (False, True):
        setup = Setup(model=TINY, pack=pack)
        residents = [setup.resident, setup.resident | {"key": jax.random.key(3)}]
        found.append(setup.chunk([setup.state(seed) for seed in (0, 1)], residents, index))
    assert_same(*found)


class Poisoned:
    """A net in which one number of one array's gradient is not finite in bright steps."""

    def __init__(self, name, value):
        self.name, self.value = name, value

    def __getattr__(self, attribute):
        return getattr(SMALL, attribute)

    def apply(self, variables, images, **options):
        bright = jnp.min(images) > 1.9

        @jax.custom_vjp
        def poison(x, bright):
            return x

        def backward(bright, gradient):
            bad = gradient.ravel().at[-1].set(self.value).reshape(gradient.shape)
            return jnp.where(bright, bad, gradient), None

        poison.defvjp(lambda x, bright: (x, bright), backward)

        def choose(path, x):
            is_it = jax.tree_util.keystr(path, simple=True, separator="/") == self.name
            return poison(x, bright) if is_it else x

        params = jax.tree.map_with_path(choose, variables["params"])
        return SMALL.apply({**variables, "params": params}, images, **options)


@pytest.mark.parametrize(
    ("name", "value", "pack"),
    [
        ("stem_conv/kernel", np.nan, True),
        pytest.param("stage1_block1/bn1/scale", np.inf, True, marks=pytest.mark.slow),
        pytest.param("stage2_block1/conv2/kernel", np.inf, False, marks=pytest.mark.slow),
        pytest.param("head/bias", -np.inf, True, marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_is_not_finite_is_told_of_its_step(name, value, pack):
    setup = Setup(model=Poisoned(name, value), pad=0, pack=pack)
    images = np.asarray(setup.resident["images"]).copy()
    images[32:48] = 255
    resident = setup.resident | {"images": jax.device_put(images, setup.everywhere)}
    index = np.arange(64, dtype=np.int32).reshape(4, 16)
    _, (sums,) = setup.chunk([setup.state()], [resident], [sharding.put(index, setup.by_row)])
    assert list(np.isfinite(sums["loss"])) == [True, True, False, False]
    assert np.all(np.isfinite(sums["error"]))
