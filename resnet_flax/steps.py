"""The compiled functions: training steps, evaluation, batch-norm statistics.

`resident` is what stays on the devices during a run: `images` uint8 [N, H, W, C], `labels` int32
[N], `mean` and `std` for `augment.normalize`, `key` a typed PRNG key. It is an argument, never a
closure, which would bake the data set into the program. What the host sends are positions in it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from resnet_flax import augment, optim
from resnet_flax.models.resnet import ResNet
from resnet_flax.state import TrainState

# Keys for re-estimating statistics are folded from here on: no training step reaches it.
_STATISTICS_KEYS = np.uint32(2**31)

# Folded into a step's key for what the net draws; 0 and 1 would be the halves that it splits into.
_DROP_KEY = 2


def _gather(resident, index, sharding):
    images = jnp.take(resident["images"], index, axis=0, mode="clip")
    images = jax.lax.with_sharding_constraint(images, sharding)
    labels = jnp.take(resident["labels"], index, axis=0, mode="clip")
    return augment.normalize(images, resident["mean"], resident["std"]), labels


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy of each example, float32 [B], of logits [B, K] and labels int32 [B].

    With `smoothing` s the target is (1 - s) on the label plus s / K on every class.
    """
    if smoothing:
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
        return optax.softmax_cross_entropy(logits, targets)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_train_chunk(
    model: ResNet,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    sharding: NamedSharding,
    pad: int,
    flip: bool,
    label_smoothing: float,
    ema_decay: float,
    fill: str = "zero",
    compiler_options: dict[str, str] | None = None,
) -> Callable[[TrainState, dict, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes `train_chunk(state, resident, indices)`: one training step per row of `indices`.

    Args:
      model: the net.
      optimizer: as from `optim.sgd`.
      sharding: of a batch's first axis.
      pad: pixels, see `augment.crop_and_mirror`.
      flip: likewise.
      fill: likewise.
      label_smoothing: see `cross_entropy`.
      ema_decay: share of the averaged weights kept at each step, 0: no average.
      compiler_options: of `jax.jit`.

    Returns:
      A jitted function from (state, resident, indices int32 [k, B]) to the next state and a dict of
      float32 [k]: `loss` (mean over the batch; NaN where the gradient or a batch statistic is not
      finite), `error` (0 to 1), `rate` (learning rate). All come out replicated. It donates the
      state. k = 1 runs without a loop: XLA's CPU backend is some 45 times slower at a convolution's
      gradient inside one.
    """

    def train_step(state: TrainState, index: jax.Array, resident: dict):
        images, labels = _gather(resident, index, sharding)
        key = jax.random.fold_in(resident["key"], state.step)
        images = augment.crop_and_mirror(key, images, pad=pad, flip=flip, fill=fill)
        rngs = {"drop": jax.random.fold_in(key, _DROP_KEY)} if model.draws else None

        def objective(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=rngs,
            )
            loss = jnp.mean(cross_entropy(logits, labels, label_smoothing))
            return loss, (logits, new["batch_stats"])

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (logits, batch_stats)), grads = gradient(state.params)
        error = jnp.mean(jnp.argmax(logits, axis=-1) != labels)
        # XLA's CPU backend takes max(NaN, 0) for 0: a net can be lost and its loss be finite.
        is_finite = jnp.isfinite(optax.tree.norm((grads, batch_stats)))
        loss = jnp.where(is_finite, loss, jnp.nan)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, error=error)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay:
            now = {"params": params, "batch_stats": batch_stats}
            ema = optax.incremental_update(now, ema, 1 - ema_decay)
        state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        return state, {"loss": loss, "error": error, "rate": optim.last_rate(opt_state)}

    def train_chunk(state, resident, indices):
        if indices.shape[0] == 1:
            state, sums = train_step(state, indices[0], resident)
            return state, jax.tree.map(lambda x: x[None], sums)
        return jax.lax.scan(lambda s, i: train_step(s, i, resident), state, indices)

    return jax.jit(
        train_chunk,
        donate_argnums=0,
        out_shardings=NamedSharding(sharding.mesh, PartitionSpec()),
        compiler_options=compiler_options,
    )


def make_eval_chunk(
    model: ResNet, *, sharding: NamedSharding
) -> Callable[[Any, dict, jax.Array], dict[str, jax.Array]]:
    """Makes `eval_chunk(variables, resident, indices)`: sums over the examples of all rows.

    Args:
      model: the net.
      sharding: of a batch's first axis.

    Returns:
      A jitted function of `{"params": …, "batch_stats": …}`, resident and indices int32 [k, B], in
      which -1 stands for "no example", to `loss`: float32 scalar, summed cross-entropy, and
      `confusion`: int32 [K, K], examples by (label, prediction).
    """

    def eval_step(variables, index, resident):
        images, labels = _gather(resident, index, sharding)
        logits = model.apply(variables, images, train=False)
        real = index >= 0
        loss = jnp.sum(jnp.where(real, cross_entropy(logits, labels), 0.0))
        classes = logits.shape[-1]
        cell = jnp.where(real, labels * classes + jnp.argmax(logits, axis=-1), classes**2)
        confusion = jnp.zeros(classes**2, jnp.int32).at[cell].add(1, mode="drop")
        return {"loss": loss, "confusion": confusion.reshape(classes, classes)}

    def eval_chunk(variables, resident, indices):
        if indices.shape[0] == 1:
            return eval_step(variables, indices[0], resident)
        sums = jax.lax.map(lambda i: eval_step(variables, i, resident), indices)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

    return jax.jit(eval_chunk, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))


def make_batch_statistics(
    model: ResNet, *, sharding: NamedSharding, pad: int, flip: bool, fill: str = "zero"
) -> Callable[[Any, dict, jax.Array, jax.Array], Any]:
    """Makes `batch_statistics(variables, resident, index, draw)`: `batch_stats` of one batch alone.

    Averaged over many training batches these replace the running statistics, as the authors of the
    paper did for testing.

    Args:
      model: the net.
      sharding: of a batch's first axis.
      pad: pixels, see `augment.crop_and_mirror`.
      flip: likewise.
      fill: likewise.

    Returns:
      A jitted function; `index` is int32 [B], `draw` an int32 scalar that numbers the batch.
    """
    fresh = model.clone(bn_momentum=0.0)

    def batch_statistics(variables, resident, index, draw):
        images, _ = _gather(resident, index, sharding)
        key = jax.random.fold_in(resident["key"], _STATISTICS_KEYS + draw.astype(jnp.uint32))
        images = augment.crop_and_mirror(key, images, pad=pad, flip=flip, fill=fill)
        _, new = fresh.apply(variables, images, train=True, mutable=["batch_stats"])
        return new["batch_stats"]

    return jax.jit(batch_statistics, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
