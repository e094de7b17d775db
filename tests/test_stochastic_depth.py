"""Stochastic depth (Huang et al. 2016): who survives, how often, and what stands in at test."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax import create_model
from resnet_flax.models.blocks import BasicBlock, PreactBasicBlock
from tests.test_models import fill, jit
from tests.test_steps import TINY, Setup, assert_close, batches
from tests.test_variants import make_block


def test_survival_falls_linearly_over_all_blocks():
    stages = create_model("resnet110", survival=0.5).survivals()
    assert [len(stage) for stage in stages] == [18, 18, 18]
    want = [1 - block / 54 * 0.5 for block in range(1, 55)]
    np.testing.assert_allclose(np.concatenate(stages), want, rtol=1e-6)
    # The paper expects (3 * 54 - 1) / 4 blocks.
    assert round(sum(want)) == 40
    assert set(np.concatenate(create_model("resnet110").survivals())) == {None}


def test_only_nets_that_draw_ask_for_random_numbers():
    assert not create_model("resnet20").draws
    assert create_model("resnet20", survival=0.9).draws
    assert create_model("resnet110_dropout_shortcut").draws


def test_at_test_a_branch_is_scaled_by_its_survival():
    x = np.random.default_rng(1).standard_normal((2, 6, 6, 4), np.float32)
    block = make_block(PreactBasicBlock)
    variables = fill(block, x)
    branch = jit(block.apply)(variables, x) - x
    got = jit(block.apply)(variables, x, np.float32(0.25))
    np.testing.assert_allclose(got, x + 0.25 * branch, rtol=1e-4, atol=1e-5)
    # Where there is a ReLU after the addition, what is dropped leaves the ReLU of the input.
    post = make_block(BasicBlock)
    almost_dropped = jit(post.apply)(fill(post, x), x, np.float32(1e-9))
    np.testing.assert_allclose(almost_dropped, np.maximum(x, 0), atol=1e-6)


def counting_net(**options):
    """A net whose every output is 1 plus the number of blocks that took part.

    All convolutions are 0 and the last bias of each branch is 1, the stem's too.
    """
    model = create_model("resnet20", num_classes=0, survival=0.5, **options)
    model = model.clone(stage_sizes=(8,), widths=(4,))
    x = jnp.ones((3, 4, 4, 3))
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), abstract)
    params = variables["params"]
    params["stem_bn"]["bias"] += 1
    for name in params:
        if name.startswith("stage"):
            params[name]["bn2"]["bias"] += 1

    def survivors(key):
        out, _ = model.apply(variables, x, train=True, rngs={"drop": key}, mutable=["batch_stats"])
        return out - 1

    return model, variables, x, survivors


@pytest.mark.parametrize("options", [{}, {"scan": True, "remat": True}])
def test_blocks_drop_on_their_own_and_as_often_as_they_should(options):
    model, variables, x, survivors = counting_net(**options)
    counts = np.asarray(jit(jax.vmap(survivors))(jax.random.split(jax.random.key(5), 1000)))
    # A block is there for the whole batch or for none of it.
    assert (counts == counts[:, :1, :1]).all()
    counts = counts[:, 0, 0]
    assert set(counts) <= set(range(9))
    p = np.concatenate(model.survivals())
    np.testing.assert_allclose(p, 1 - np.arange(1, 9) / 16, rtol=1e-6)
    # Independent of each other: then variances add up; they would be 8 times that together.
    variance = (p * (1 - p)).sum()
    assert abs(counts.mean() - p.sum()) < 4 * np.sqrt(variance / 1000)
    assert abs(counts.var() / variance - 1) < 0.2

    # In evaluation, and in training without random numbers, the expectation.
    @jit
    def expected(key):
        apply = functools.partial(model.apply, variables, x)
        training, _ = apply(train=True, mutable=["batch_stats"])
        return apply(), apply(rngs={"drop": key}), training

    for out in expected(jax.random.key(0)):
        np.testing.assert_allclose(out - 1, p.sum(), rtol=1e-5)


def test_draws_are_a_function_of_seed_and_step_whatever_the_devices_and_chunks():
    index = np.concatenate([batches(1)] * 3)

    model = TINY.clone(stage_sizes=(2,), survival=0.3)
    one, eight = (Setup(devices, model, pad=0, flip=False) for devices in (1, 8))

    def train(setup, chunks):
        current, losses = setup.state(), []
        for rows in np.split(index, chunks):
            current, sums = setup.train(current, rows)
            losses += list(np.asarray(sums["loss"]))
        return losses, jax.device_get(current.params)

    (want, params), (found, other) = train(one, 3), train(eight, 1)
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(found, want, rtol=1e-3)
    assert_close(params, other, rtol=2e-3, atol=2e-4)
    # And something is drawn: with another seed, which draws nothing else, the losses are others.
    one.resident = one.resident | {"key": jax.device_put(jax.random.key(3), one.everywhere)}
    assert np.abs(np.subtract(train(one, 3)[0], want)).max() > 1e-3
