"""Layer by layer: output shape, trainable parameters, multiply-adds."""

import dataclasses
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models.layers import BatchNorm, Conv
from resnet_flax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a net, for one image.

    Attributes:
      name: as in the canonical layout, "stage1_block1/conv1".
      kind: "Conv", "BatchNorm" or "Dense".
      shape: of the output, (H, W, C) or (C,).
      parameters: trainable ones.
      multiply_adds: of convolutions and dense layers, the paper's "FLOPs" [R Table 1]; else 0.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


def layers(model: ResNet, image_size: int) -> list[Layer]:
    """Every layer of a net that has parameters, in the order of the computation.

    Args:
      model: the net.
      image_size: side of a square image of 3 channels, pixels.
    """
    found: dict[str, Layer] = {}

    def note(next_fun, args, kwargs, context):
        out, module = next_fun(*args, **kwargs), context.module
        if context.method_name == "__call__" and isinstance(module, Conv | BatchNorm | nn.Dense):
            params, shape = module.variables["params"], out.shape[1:]
            kernel = params["kernel"].size if "kernel" in params else 0
            found["/".join(module.path)] = Layer(
                "/".join(module.path),
                type(module).__name__,
                shape,
                sum(p.size for p in jax.tree.leaves(params)),
                math.prod(shape[:-1]) * kernel,
            )
        return out

    # Scanned, a thousand layers trace in a moment; equal blocks are copied afterwards.
    image = jnp.zeros((1, image_size, image_size, 3))
    with nn.intercept_methods(note):
        jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), image)
    rows = []
    for stage, group in itertools.groupby(found.values(), _scanned_stage):
        group = list(group)
        for block in range(2, model.stage_sizes[stage - 1] + 1) if stage else (None,):
            rows += [
                dataclasses.replace(x, name=x.name.replace("_rest/", f"_block{block}/", 1))
                for x in group
            ]
    return rows


def _scanned_stage(layer: Layer) -> int:
    """Its number, from 1; 0 for a layer of an unrolled block."""
    stage, rest, _ = layer.name.partition("_rest/")
    return int(stage.removeprefix("stage")) if rest else 0
