"""The outputs of a trained net for each test example, and the responses of its layers."""

from collections.abc import Callable, Iterator
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.models.layers import BatchNorm
from resnet_flax.models.resnet import ResNet
from resnet_flax.training import augment, feed, steps
from resnet_flax.training.trained import Trained


def _each_batch(step: Callable, trained: Trained, variables: Any) -> Iterator[Any]:
    """`step(variables, images, labels, resident)` of each test batch, on the host; shows a bar."""
    test, mesh = trained.run.eval_feeds["test"], trained.run.mesh

    def compute(variables, resident, batch):
        examples = steps.examples(resident, batch, sharding.split(mesh))
        return step(variables, *examples, resident)

    compiled = jax.jit(compute, out_shardings=sharding.replicated(mesh))
    batch_size = trained.run.config.eval.batch_size
    with tqdm(total=test.size, unit=" images", disable=None, leave=False) as bar:
        for batch in feed.one_by_one(test.batches(batch_size)):
            yield jax.device_get(compiled(variables, test.resident, batch))
            bar.update(min(batch_size, test.size - bar.n))


def probabilities(trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities, float32 [N, K], and labels, int32 [N], of the test examples in order.

    Unreadable examples are left out.
    """
    run = trained.run
    logits_of = steps.make_predict(run.model, run.ten_crops)

    def step(variables, images, labels, resident):
        return jax.nn.softmax(logits_of(variables, images, resident)), labels

    batches = _each_batch(step, trained, trained.variables(scanned=run.model.scan))
    found, labels = map(np.concatenate, zip(*batches, strict=True))
    return found[labels >= 0], labels[labels >= 0]


def response_layers(model: ResNet, name: str) -> list[str]:
    """The batch normalisations that follow the 3x3 convolutions of a net, in order [R, Fig. 7].

    Raises:
      UserError: the net, called `name`, has its layers in another order.
    """
    kind = model.block
    if kind.preactivation or not kind.ends_in_norm:
        raise UserError(
            f"responses as in [R, Fig. 7] are taken after a 3x3 layer's batch normalisation and "
            f"before the addition or ReLU: {name} has its layers in another order"
        )
    own = [f"bn{i}" for i, kernel in enumerate(kind.kernels, 1) if kernel == 3]
    return ["stem_bn"] * (model.stem_kernel == 3) + [
        f"stage{stage}_block{block}/{norm}"
        for stage, size in enumerate(model.stage_sizes, 1)
        for block in range(1, size + 1)
        for norm in own
    ]


def response_deviations(trained: Trained) -> tuple[dict[str, float], int]:
    """Standard deviation of each response over test examples, positions and channels.

    Returns those of the `response_layers`, and the number of examples. Raises a `UserError` if the
    net has no such layers.
    """
    model = trained.run.model.clone(scan=False)
    layers = response_layers(model, trained.run.config.model.name)

    def is_response(module, method: str) -> bool:
        named = "/".join(module.path) in layers
        return isinstance(module, BatchNorm) and named and method == "__call__"

    def step(variables, images, labels, resident):
        images = augment.normalize(images, resident["mean"], resident["std"])
        capture = {"capture_intermediates": is_response, "mutable": ["intermediates"]}
        _, found = model.apply(variables, images, train=False, **capture)
        found = flax.traverse_util.flatten_dict(found["intermediates"], sep="/")
        real = (labels >= 0).astype(jnp.float32)[:, None, None, None]
        means, variances = [], []
        for layer in layers:
            y = found[f"{layer}/__call__"][0].astype(jnp.float32)
            count = jnp.maximum(jnp.sum(real) * y[0].size, 1)
            means.append(jnp.sum(real * y) / count)
            variances.append(jnp.sum(real * jnp.square(y - means[-1])) / count)
        return jnp.sum(labels >= 0), jnp.stack(means), jnp.stack(variances)

    batches = zip(*_each_batch(step, trained, trained.variables()), strict=True)
    counts, means, variances = (np.array(x, np.float64) for x in batches)
    examples = int(counts.sum())
    share = counts / max(examples, 1)
    # Law of total variance: within batches and between them.
    total = share @ (variances + np.square(means - share @ means))
    return dict(zip(layers, np.sqrt(total).tolist(), strict=True)), examples
