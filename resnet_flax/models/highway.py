"""Highway nets (Srivastava et al. 2015, arXiv:1505.00387) in the layout of [R]'s plain nets.

`highway<6n+2>` is `plain<6n+2>` with a gate at each layer that keeps its input's shape: a layer
H(x) = ReLU(BN(conv3(x))) becomes y = H(x) T(x) + x (1 - T(x)). The first convolution of the net,
and those that change the shape (the first of stages 2 and 3), stay plain layers, as in that paper,
whose formula needs equal shapes. Unlike [R]'s shortcuts, which span two layers, each layer
has its own way past.

These are not the published Highway-19 (2.3M parameters) and Highway-32 (1.25M) that [R, Table 6]
quotes: those have the layers and widths of FitNets, max-pooling, and no batch normalisation. Their
test errors tell the order of magnitude and no more.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import deferred
from resnet_flax.models.activation import relu
from resnet_flax.models.blocks import Block, gate


class HighwayLayer(Block):
    """conv3-BN-ReLU, gated: one layer, where a residual block has two."""

    weighted_layers = 1

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, features]."""
        y = self.conv(self.features, strides=self.strides, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        return self.join(x, y, survival)


def highway(x, y, strides, conv, norm, *, gate_bias):
    """The layer's output `y` times T(x), its input `x` times 1 - T(x); shapes must agree.

    T(x) = sigmoid(W x + b), W a 3x3 convolution as the layer's own, b negative to begin with, so
    that the input passes.
    """
    del norm
    x, y = deferred.array(x), deferred.array(y)
    transform = gate(x, y.shape[-1], strides, conv, gate_bias, kernel=3)
    wide_x, wide_y = x.astype(jnp.float32), y.astype(jnp.float32)
    return (transform * wide_y + (1 - transform) * wide_x).astype(y.dtype)
