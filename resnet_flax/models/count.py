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
    """One layer of a net, for one image."""

    name: str  # in the canonical layout, "stage1_block1/conv1"
    kind: str  # "Conv", "BatchNorm" or "Dense"
    shape: tuple[int, ...]  # of the output, (H, W, C) or (C,)
    parameters: int
    multiply_adds: int  # the paper's "FLOPs" [R Table 1]; 0 for "BatchNorm"


def layers(model: ResNet, image_size: int) -> list[Layer]:
    """Every layer with parameters in the order of computation, for `image_size` pixels squared."""
    found: dict[str, Layer] = {}

    def note(next_fun, args, kwargs, context):
        out, module = next_fun(*args, **kwargs), context.module
        if context.method_name == "__call__" and isinstance(module, Conv | BatchNorm | nn.Dense):
            params, shape = module.variables["params"], out.shape[1:]
            kernel = params["kernel"].size if "kernel" in params else 0
            name, size = "/".join(module.path), sum(p.size for p in jax.tree.leaves(params))
            products = math.prod(shape[:-1]) * kernel
            found[name] = Layer(name, type(module).__name__, shape, size, products)
        return out

    # Scanned, a thousand layers trace in a moment; equal blocks are copied afterwards.
    image = jnp.zeros((1, image_size, image_size, 3))
    with nn.intercept_methods(note):
        jax.eval_shape(model.clone(scan=True).init, jax.random.key(0), image)
    rows = []
    for stage, group in itertools.groupby(found.values(), _scanned_stage):
        group = list(group)
        for block in range(2, model.stage_sizes[stage - 1] + 1) if stage else [1]:
            names = [x.name.replace("_rest/", f"_block{block}/", 1) for x in group]
            rows += [dataclasses.replace(x, name=n) for x, n in zip(group, names, strict=True)]
    return rows


def _scanned_stage(layer: Layer) -> int:
    """Its number, from 1; 0 for a layer of an unrolled block."""
    stage, rest, _ = layer.name.partition("_rest/")
    return int(stage.removeprefix("stage")) if rest else 0
