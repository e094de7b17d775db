"""Residual blocks and their shortcuts.

A shortcut is a function `(block, x) -> array` from a block and its input [B, H, W, C] to what is
added to the block's branch: [B, H/s, W/s, out_features]. Layers that it makes belong to the block.
None stands for no shortcut: the block's output is its branch alone.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import deferred
from resnet_flax.models.layers import relu

Shortcut = Callable[["Block", jax.Array], jax.Array]


def identity(block: "Block", x: jax.Array) -> jax.Array:
    """The input itself, where the block keeps its shape."""
    return x


def pad_identity(block: "Block", x: jax.Array) -> jax.Array:
    """Option A [R §3.3]: every `strides`-th pixel, new channels filled with zeros, no parameters.

    The zeros go half before and half after the old channels, as in the PyTorch weights in
    circulation; any other place gives the same net up to a permutation of channels.
    """
    new = block.out_features - x.shape[-1]
    x = deferred.array(x)[:, :: block.strides, :: block.strides]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


def bare_projection(block: "Block", x: jax.Array) -> jax.Array:
    """1x1 convolution alone: the projection of the pre-activation nets [I]."""
    return block.conv(block.out_features, kernel=1, strides=block.strides, name="proj_conv")(x)


def projection(block: "Block", x: jax.Array) -> jax.Array:
    """Options B and C [R §3.3]: 1x1 convolution and batch normalisation."""
    return block.norm(name="proj_bn")(bare_projection(block, x))


class Block(nn.Module):
    """What all blocks share.

    Class attributes describe the nets made of a block: `expansion`, output channels over
    `features`, unless the net sets them; `weighted_layers` per block; `preactivation`, no ReLU
    follows the addition and the net ends in one; `stem_activation`, BN-ReLU follows the stem;
    `final_norm`, BN precedes the ReLU at the net's end; `ends_in_norm`, BN ends the branch, right
    before the addition; `draws`, training always draws random numbers.

    Random numbers are drawn in training from the rng collection `drop`. In evaluation, and where
    `drop` is not given, everything random is replaced by its expectation.

    Attributes:
      features: width of the block's 3x3 convolutions.
      out_features: output channels.
      conv: makes a convolution `conv(features, kernel=3, strides=1, name=…)`.
      norm: makes a batch normalisation `norm(name=…)`.
      shortcuts: used where the block changes the shape, and where it keeps it.
      strides: 1 or 2.
      is_first: whether it is the net's first block.
      stride_in_3x3: a bottleneck's stride sits in its 3x3 and not in its first 1x1 ("v1.5").
      last_scale_init: initialiser of the scale that ends the branch, where `ends_in_norm`.
      gate_bias: initial bias of a gate.
      train: whether to draw random numbers.
    """

    features: int
    out_features: int
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    shortcuts: tuple[Shortcut | None, Shortcut | None]
    strides: int = 1
    is_first: bool = False
    stride_in_3x3: bool = False
    last_scale_init: nn.initializers.Initializer = nn.initializers.ones
    gate_bias: float = -6.0
    train: bool = False

    expansion = 1
    weighted_layers = 2
    preactivation = False
    stem_activation = True
    final_norm = False
    ends_in_norm = False
    draws = False

    def changes_shape(self, x: jax.Array) -> bool:
        """Whether the block maps `x` to another shape."""
        return self.strides != 1 or x.shape[-1] != self.out_features

    def shortcut(self, x: jax.Array) -> jax.Array | None:
        """The shortcut's output for input `x`, or None."""
        changing, same = self.shortcuts
        function = changing if self.changes_shape(x) else same
        return function and deferred.array(function(self, x))

    def keep(self, probability: jax.typing.ArrayLike, shape: tuple[int, ...] = ()) -> jax.Array:
        """1 with `probability`, else 0, of `shape`; `probability` itself where nothing is drawn."""
        if self.train and self.has_rng("drop"):
            probability = jnp.asarray(probability, jnp.float32)
            return jax.random.bernoulli(self.make_rng("drop"), probability, shape)
        return jnp.asarray(probability)

    def drop(self, y: jax.Array, survival: jax.Array | None) -> jax.Array:
        """Stochastic depth (Huang et al. 2016, arXiv:1603.09382) of branch `y`.

        It survives for the whole batch with probability `survival` or is 0; None: it always does.
        """
        return y if survival is None else y * self.keep(survival).astype(y.dtype)

    def join(self, x: jax.Array, y: jax.Array, survival: jax.Array | None) -> jax.Array:
        """Adds the shortcut of input `x` to branch `y`."""
        y, shortcut = self.drop(y, survival), self.shortcut(x)
        return y if shortcut is None else y + shortcut


class BasicBlock(Block):
    """conv3-BN-ReLU-conv3-BN, shortcut, ReLU [R Fig. 5 left]."""

    ends_in_norm = True

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        y = self.conv(self.features, strides=self.strides, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, name="conv2")(y)
        y = self.norm(name="bn2", scale_init=self.last_scale_init)(y)
        return relu(self.join(x, y, survival))


class BottleneckBlock(Block):
    """conv1-BN-ReLU-conv3-BN-ReLU-conv1-BN, shortcut, ReLU [R Fig. 5 right]."""

    expansion = 4
    weighted_layers = 3
    ends_in_norm = True

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        s1, s2 = (1, self.strides) if self.stride_in_3x3 else (self.strides, 1)
        y = self.conv(self.features, kernel=1, strides=s1, name="conv1")(x)
        y = relu(self.norm(name="bn1")(y))
        y = self.conv(self.features, strides=s2, name="conv2")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(self.out_features, kernel=1, name="conv3")(y)
        y = self.norm(name="bn3", scale_init=self.last_scale_init)(y)
        return relu(self.join(x, y, survival))


class PreactBlock(Block):
    """What pre-activation blocks share: the first BN-ReLU, and the net's end."""

    preactivation = True
    stem_activation = False
    final_norm = True

    def activate(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The inputs of the shortcut and of the branch.

        The first BN-ReLU is shared by both where the shape changes, and in the first block of the
        net, whose input is a bare convolution's output [I, Appendix].
        """
        y = relu(self.norm(name="bn1")(x))
        return y if self.is_first or self.changes_shape(x) else x, y


class PreactBasicBlock(PreactBlock):
    """BN-ReLU-conv3-BN-ReLU-conv3, shortcut [I Fig. 4e]."""

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        x, y = self.activate(x)
        y = self.conv(self.features, strides=self.strides, name="conv1")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(self.features, name="conv2")(y)
        return self.join(x, y, survival)


class PreactBottleneckBlock(PreactBlock):
    """BN-ReLU-conv1-BN-ReLU-conv3-BN-ReLU-conv1, shortcut [I, Appendix]."""

    expansion = 4
    weighted_layers = 3

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        s1, s2 = (1, self.strides) if self.stride_in_3x3 else (self.strides, 1)
        x, y = self.activate(x)
        y = self.conv(self.features, kernel=1, strides=s1, name="conv1")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(self.features, strides=s2, name="conv2")(y)
        y = relu(self.norm(name="bn3")(y))
        y = self.conv(self.out_features, kernel=1, name="conv3")(y)
        return self.join(x, y, survival)
