"""Layer by layer: output shape, trainable parameters, multiply-adds."""

import dataclasses
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models.blocks import Conv
from resnet_flax.models.norm import BatchNorm
from resnet_flax.models.resnet import ResNet


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of a net, for one image.

    Attributes:
      name: as in the canonical layout, "stage1_block1/conv1".
      kind: "Conv", "BatchNorm" or "Dense".
      shape: of the output, (H, W, C) or (C,).
      parameters: trainable ones.
      multiply_adds: of convolutions and dense layers, as the paper counts "FLOPs" [R Table 1];
        0 for the rest.
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
    found: dict[tuple[str, ...], Layer] = {}

    def note(next_fun, args, kwargs, context):
        out = next_fun(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and isinstance(module, (Conv, BatchNorm, nn.Dense)):
            params = module.variables["params"]
            multiply_adds = 0
            if not isinstance(module, BatchNorm):
                positions = math.prod(out.shape[1:-1])
                multiply_adds = positions * params["kernel"].size
            found[module.path] = Layer(
                "/".join(module.path),
                "Conv" if isinstance(module, Conv) else type(module).__name__,
                tuple(out.shape[1:]),
                sum(p.size for p in jax.tree.leaves(params)),
                multiply_adds,
            )
        return out

    # Scanned, a thousand layers trace in a moment; equal blocks are copied afterwards.
    image = jnp.zeros((1, image_size, image_size, 3))
    with nn.intercept_methods(note):
        jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), image)
    rows = []
    pending: list[Layer] = []
    for layer in [*found.values(), None]:
        match = layer and re.match(r"stage(\d+)_rest/", layer.name)
        if pending and not (match and pending[0].name.startswith(match[0])):
            rows += _copies(pending, model.stage_sizes)
            pending = []
        if match:
            pending.append(layer)
        elif layer:
            rows.append(layer)
    return rows


def _copies(block: list[Layer], stage_sizes: tuple[int, ...]) -> list[Layer]:
    stage = re.match(r"stage(\d+)", block[0].name)[1]
    return [
        dataclasses.replace(x, name=x.name.replace("_rest/", f"_block{b}/", 1))
        for b in range(2, stage_sizes[int(stage) - 1] + 1)
        for x in block
    ]
