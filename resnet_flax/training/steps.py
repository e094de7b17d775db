"""The compiled functions: training steps, evaluation, batch-norm statistics.

`resident` stays on the devices during a run: `mean` and `std` for `augment.normalize`, `key`, a
typed PRNG key, and, of a data set in memory, `images` uint8 [N, H * W * C] and `labels` int32 [N];
`mean` is [H, W, C] then. (One row per image: a TPU would lay out [N, H, W, C] anew at every call.)
It is an argument, never a closure, which would bake the data set into the program.

The host sends a `batch` for each step: int32 [B], positions in the resident data set, or, of
streamed images, a dict of `images` uint8 [B, H, W, C] and `labels` int32 [B]. For a chunk of k
steps each array has an axis k in front.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from resnet_flax.data.streaming import UNREADABLE
from resnet_flax.models.resnet import ResNet
from resnet_flax.training import augment, optim, packing
from resnet_flax.training.state import TrainState

# Keys for re-estimating statistics are folded from here on: no training step reaches it.
_STATISTICS_KEYS = np.uint32(2**31)

# Folded into a step's key for what the net draws, and for colours; 0 and 1 would give the two keys
# that it is split into.
_DROP_KEY, _COLOR_KEY = 2, 3

_GUESSES = 5  # of a top-5 error


def examples(resident, batch, sharding):
    """uint8 images [B, H, W, C], and labels int32 [B]: negative where there is no example."""
    if "images" not in resident:
        return batch["images"], batch["labels"]
    images = jnp.take(resident["images"], batch, axis=0, mode="clip")
    images = images.reshape(-1, *resident["mean"].shape)
    labels = jnp.take(resident["labels"], batch, axis=0, mode="clip")
    images = jax.lax.with_sharding_constraint(images, sharding)
    return images, jnp.where(batch < 0, -1, labels)


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
    color: bool = False,
    pack: bool = False,
    compiler_options: dict[str, str] | None = None,
) -> Callable:
    """Makes `train_chunk(states, residents, batches)`: one training step for each of `batches`.

    Args:
      model: the net.
      optimizer: from `optim.sgd` or `optim.adam`.
      sharding: of a batch's first axis.
      pad: border of the random crops in pixels; this, `flip` and `fill`: see `augment`.
      flip: whether to mirror half of the images.
      label_smoothing: see `cross_entropy`.
      ema_decay: fraction of the averaged weights kept at each step, 0: no average.
      fill: what surrounds an image.
      color: whether to shift each image's colours.
      pack: keep parameters as `packing.pack` does inside a loop of steps, faster on a GPU.
      compiler_options: of `jax.jit`.

    Returns:
      A jitted function. Each argument is a list with one entry per net: the nets are independent
      branches of the program. It returns the next states, having donated the old ones, and for each
      net a dict of float32 [k] for the k steps: `loss` (mean over the batch; NaN if the gradient or
      a batch statistic is not finite), `error` (0 to 1), `rate` (learning rate). The maximum of a
      fourth argument, `wishes`, becomes the first net's `wish`. k = 1 runs without a loop: XLA's
      CPU backend optimises less inside a loop.
    """

    def draw(key, step, size):
        key = jax.random.fold_in(key, step)
        draws = {"crops": augment.draw_crops(key, size, pad=pad, flip=flip)}
        if color:
            draws["color"] = augment.color_shift(jax.random.fold_in(key, _COLOR_KEY), size)
        if model.draws:
            draws["rngs"] = {"drop": jax.random.fold_in(key, _DROP_KEY)}
        return draws

    if model.uses_fused:
        # XLA would copy each part of a vector that a program of ours reads.
        from resnet_flax.models.fused import split
    else:
        split = packing.slices

    def cast_kernels(params):
        """The convolutions' kernels as the net computes with them; None for all else."""
        return jax.tree.map(lambda x: x.astype(model.dtype) if x.ndim == 4 else None, params)

    def train_step(carry, inputs, resident, like):
        (state, kernels), (batch, draws) = carry, inputs
        params, batch_stats = state.params, state.batch_stats
        if like is not None:
            params = packing.unpack(params, like.params, split)
            params = jax.tree.map(lambda x, k: x if k is None else k, params, kernels)
            batch_stats = packing.unpack(batch_stats, like.batch_stats)
        images, labels = examples(resident, batch, sharding)
        if color:
            images = images.astype(jnp.float32) + draws["color"]
        images = augment.normalize(images, resident["mean"], resident["std"])
        images = augment.crop_and_mirror(images, draws["crops"], pad=pad, fill=fill)

        def objective(params):
            logits, new = model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs=draws.get("rngs"),
            )
            loss = jnp.mean(cross_entropy(logits, labels, label_smoothing))
            return loss, (logits, new["batch_stats"])

        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (logits, batch_stats)), grads = gradient(params)
        if like is not None:
            grads, batch_stats = packing.pack(grads), packing.pack(batch_stats)
        error = jnp.mean(jnp.argmax(logits, axis=-1) != labels)
        # XLA's CPU backend takes max(NaN, 0) for 0: a net can be lost and its loss be finite.
        is_finite = jnp.isfinite(optax.tree.norm((grads, batch_stats)))
        loss = jnp.where(is_finite, loss, jnp.nan)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, error=error)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema_decay:
            now = {"params": params, "batch_stats": batch_stats}
            now = now if like is None else packing.pack(now)
            ema = optax.incremental_update(now, ema, 1 - ema_decay)
        state = TrainState(state.step + 1, params, batch_stats, opt_state, ema)
        if like is not None:
            kernels = cast_kernels(packing.unpack(params, like.params))
        return (state, kernels), jnp.stack([loss, error, optim.last_rate(opt_state)])

    def train_chunk(states, residents, batches, wishes=None):
        length, size = jax.tree.leaves(batches[0])[0].shape[:2]
        offsets = jnp.arange(length, dtype=jnp.int32)
        # Before the loop: inside, XLA would draw a crop's offsets again for each of its pixels.
        draws = [
            jax.vmap(functools.partial(draw, size=size), (None, 0))(r["key"], s.step + offsets)
            for s, r in zip(states, residents, strict=True)
        ]
        like, carries = None, [(state, None) for state in states]
        if pack and length > 1:
            like = jax.eval_shape(lambda: states[0])
            carries = [(packing.pack(state), cast_kernels(state.params)) for state in states]

        def step(carries, inputs):
            each = zip(carries, *inputs, residents, strict=True)
            done = [train_step(c, (b, d), resident, like) for c, b, d, resident in each]
            return [carry for carry, _ in done], [sums for _, sums in done]

        if length == 1:
            carries, sums = step(carries, jax.tree.map(lambda x: x[0], (batches, draws)))
            sums = [x[None] for x in sums]
        else:
            carries, sums = jax.lax.scan(step, carries, (batches, draws))
        states = [state if like is None else packing.unpack(state, like) for state, _ in carries]
        names = "loss", "error", "rate"
        sums = [{name: x[:, i] for i, name in enumerate(names)} for x in sums]
        if wishes is not None:
            sums[0]["wish"] = jnp.max(wishes)
        return states, sums

    return jax.jit(
        train_chunk,
        donate_argnums=0,
        out_shardings=NamedSharding(sharding.mesh, PartitionSpec()),
        compiler_options=compiler_options,
    )


def make_predict(model: ResNet, ten_crops: int = 0) -> Callable[[Any, jax.Array, dict], jax.Array]:
    """Makes `predict(variables, images, resident)`: logits [B, K] of uint8 images [B, H, W, C].

    With `ten_crops`, see `make_eval_chunk`, they are logarithms of the averaged probabilities.
    """

    def predict(variables, images, resident):
        if ten_crops:
            images = augment.ten_crops(images, ten_crops)
        images = augment.normalize(images, resident["mean"], resident["std"])
        if not ten_crops:
            return model.apply(variables, images, train=False)
        logits = model.apply(variables, images.reshape(-1, *images.shape[2:]), train=False)
        each = jax.nn.log_softmax(logits).reshape(*images.shape[:2], -1)
        return jax.nn.logsumexp(each, axis=1) - np.log(each.shape[1])

    return predict


@functools.lru_cache(maxsize=8)
def make_eval_chunk(
    model: ResNet, *, sharding: NamedSharding, ten_crops: int = 0
) -> Callable[[Any, dict, Any], dict[str, jax.Array]]:
    """Makes `eval_chunk(variables, resident, batches)`: sums over the examples of all batches.

    The net's probabilities are averaged over the `augment.ten_crops` of each image, of `ten_crops`
    pixels a side; 0 scores the whole image. `sharding` is the one of a batch's first axis.

    Returns:
      A jitted function of `{"params": …, "batch_stats": …}`, resident and batches of k steps, in
      which a negative position or label stands for "no example". It returns `loss` (float32, summed
      cross-entropy), `confusion` (int32 [K, K], examples by label and prediction), `top5_wrong`
      (int32, examples whose label is none of the five likeliest) and `unreadable` (int32, examples
      whose images cannot be read, counted in none of the others).
    """
    predict = make_predict(model, ten_crops)

    def eval_step(variables, batch, resident):
        images, labels = examples(resident, batch, sharding)
        logits = predict(variables, images, resident)
        real = labels >= 0
        known = jnp.maximum(labels, 0)
        loss = jnp.sum(jnp.where(real, cross_entropy(logits, known), 0.0))
        classes = logits.shape[-1]
        cell = jnp.where(real, known * classes + jnp.argmax(logits, axis=-1), classes**2)
        confusion = jnp.zeros(classes**2, jnp.int32).at[cell].add(1, mode="drop")
        _, guesses = jax.lax.top_k(logits, min(_GUESSES, classes))
        missed = real & jnp.all(guesses != known[:, None], axis=-1)
        return {
            "loss": loss,
            "confusion": confusion.reshape(classes, classes),
            "top5_wrong": jnp.sum(missed, dtype=jnp.int32),
            "unreadable": jnp.sum(labels == UNREADABLE, dtype=jnp.int32),
        }

    def eval_chunk(variables, resident, batches):
        if len(jax.tree.leaves(batches)[0]) == 1:
            return eval_step(variables, jax.tree.map(lambda x: x[0], batches), resident)
        sums = jax.lax.map(lambda b: eval_step(variables, b, resident), batches)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

    return jax.jit(eval_chunk, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))


@functools.lru_cache(maxsize=8)
def make_batch_statistics(
    model: ResNet, *, sharding: NamedSharding, pad: int, flip: bool, fill: str = "zero"
) -> Callable[[Any, dict, Any, jax.Array], Any]:
    """Makes `batch_statistics(variables, resident, batch, draw)`: `batch_stats` of one batch alone.

    Averaged over many training batches these replace the running statistics, as the authors of the
    paper did for testing. `draw`, an int32 scalar, numbers the batch. See `make_train_chunk`.
    """
    fresh = model.clone(bn_momentum=0.0)

    def batch_statistics(variables, resident, batch, draw):
        images, _ = examples(resident, batch, sharding)
        images = augment.normalize(images, resident["mean"], resident["std"])
        key = jax.random.fold_in(resident["key"], _STATISTICS_KEYS + draw.astype(jnp.uint32))
        crops = augment.draw_crops(key, len(images), pad=pad, flip=flip)
        images = augment.crop_and_mirror(images, crops, pad=pad, fill=fill)
        _, new = fresh.apply(variables, images, train=True, mutable=["batch_stats"])
        return new["batch_stats"]

    return jax.jit(batch_statistics, out_shardings=NamedSharding(sharding.mesh, PartitionSpec()))
