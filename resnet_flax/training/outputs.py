"""What a trained net says of each example, and how strongly its layers respond."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from tqdm import tqdm

from resnet_flax.errors import UserError
from resnet_flax.models import blocks
from resnet_flax.models.layers import BatchNorm
from resnet_flax.models.resnet import ResNet
from resnet_flax.training import augment, steps
from resnet_flax.training.feed import Feed


def _each_batch(step: Callable, feed: Feed, batch_size: int, mesh, *arguments) -> Iterator[Any]:
    """`step(*arguments, resident, batch)` of each batch of a feed, on the host, with a bar."""

    def chunk(arguments, resident, batches):
        # On a CPU there is one batch at a time, see `feed`: XLA does less for loops there.
        if jax.tree.leaves(batches)[0].shape[0] == 1:
            out = step(*arguments, resident, jax.tree.map(lambda x: x[0], batches))
            return jax.tree.map(lambda x: x[None], out)
        return jax.lax.map(lambda batch: step(*arguments, resident, batch), batches)

    compiled = jax.jit(chunk, out_shardings=NamedSharding(mesh, PartitionSpec()))
    with tqdm(total=feed.size, unit=" images", disable=None, leave=False) as bar:
        for batches in feed.batches(batch_size):
            out = jax.device_get(compiled(arguments, feed.resident, batches))
            for i in range(len(jax.tree.leaves(out)[0])):
                bar.update(min(batch_size, feed.size - bar.n))
                yield jax.tree.map(lambda x, i=i: x[i], out)


def predict(
    model: ResNet,
    variables: Any,
    feed: Feed,
    *,
    sharding: NamedSharding,
    batch_size: int,
    ten_crops: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the classes for every example that can be read, in the data's order.

    Args:
      model: the net.
      variables: `{"params": …, "batch_stats": …}`.
      feed: the data.
      sharding: of a batch's first axis.
      batch_size: examples per batch.
      ten_crops: see `steps.make_eval_chunk`.

    Returns:
      float32 [N, K] and the labels, int32 [N].
    """
    logits_of = steps.make_predict(model, ten_crops)

    def step(variables, resident, batch):
        images, labels = steps.examples(resident, batch, sharding)
        return jax.nn.softmax(logits_of(variables, images, resident)), labels

    parts = list(_each_batch(step, feed, batch_size, sharding.mesh, variables))
    labels = np.concatenate([labels for _, labels in parts])
    return np.concatenate([p for p, _ in parts])[labels >= 0], labels[labels >= 0]


def response_layers(model: ResNet, name: str) -> list[str]:
    """The batch normalisations that follow the 3x3 convolutions of a net, in order [R, Fig. 7].

    Args:
      model: the net.
      name: what to call it in the message.

    Raises:
      UserError: in this net none stands between a 3x3 convolution and the addition or ReLU after.
    """
    if issubclass(model.block, blocks.BasicBlock):
        own = ("bn1", "bn2")
    elif issubclass(model.block, blocks.BottleneckBlock):
        own = ("bn2",)
    else:
        raise UserError(
            f"responses as in [R, Fig. 7] are taken after a 3x3 layer's batch normalisation and "
            f"before the addition or ReLU: {name} has its layers in another order"
        )
    layers = ["stem_bn"] if model.stem_kernel == 3 else []
    for stage, size in enumerate(model.stage_sizes, 1):
        for i in range(1, size + 1):
            layers += [f"stage{stage}_block{i}/{norm}" for norm in own]
    return layers


def response_deviations(
    model: ResNet,
    variables: Any,
    feed: Feed,
    *,
    layers: list[str],
    sharding: NamedSharding,
    batch_size: int,
) -> tuple[dict[str, float], int]:
    """Standard deviations of layers' outputs over all examples, positions and channels.

    Args:
      model: the net, not scanned.
      variables: `{"params": …, "batch_stats": …}` in the canonical layout.
      feed: the data.
      layers: names of batch normalisations, see `response_layers`.
      sharding: of a batch's first axis.
      batch_size: examples per batch.

    Returns:
      Deviations by layer, and the number of examples that went into them.
    """

    def is_wanted(module, method: str) -> bool:
        named = "/".join(module.path) in layers
        return isinstance(module, BatchNorm) and named and method == "__call__"

    def step(variables, resident, batch):
        images, labels = steps.examples(resident, batch, sharding)
        images = augment.normalize(images, resident["mean"], resident["std"])
        _, found = model.apply(
            variables,
            images,
            train=False,
            capture_intermediates=is_wanted,
            mutable=["intermediates"],
        )
        real = (labels >= 0).astype(jnp.float32)[:, None, None, None]
        moments = {}
        for layer in layers:
            place = found["intermediates"]
            for key in layer.split("/"):
                place = place[key]
            y = place["__call__"][0].astype(jnp.float32)
            count = jnp.sum(real) * y[0].size
            mean = jnp.sum(real * y) / jnp.maximum(count, 1)
            moments[layer] = count, mean, jnp.sum(real * jnp.square(y - mean))
        return moments, jnp.sum(labels >= 0)

    total, examples = dict.fromkeys(layers, (0.0, 0.0, 0.0)), 0
    for moments, here in _each_batch(step, feed, batch_size, sharding.mesh, variables):
        examples += int(here)
        for layer in layers:
            total[layer] = _add(total[layer], tuple(map(float, moments[layer])))
    return {k: float(np.sqrt(s / max(n, 1))) for k, (n, _, s) in total.items()}, examples


def _add(a, b):
    """Joins (count, mean, sum of squared deviations) of two parts (Chan et al. 1979)."""
    count = a[0] + b[0]
    if not count:
        return a
    step = b[1] - a[1]
    return count, a[1] + step * b[0] / count, a[2] + b[2] + step**2 * a[0] * b[0] / count
