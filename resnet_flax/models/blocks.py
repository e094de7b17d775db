"""Residual blocks and their shortcuts.

A shortcut is a function of a block and its input [B, H, W, C]. It returns what the block adds to
its branch, [B, H/s, W/s, out_features]; the layers it makes belong to the block. With None in its
place the output is the branch alone.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import deferred
from resnet_flax.models.layers import relu

Shortcut = Callable[["Block", jax.Array], jax.Array]


def identity(block: "Block", x: jax.Array) -> jax.Array:
    """For blocks that keep the shape."""
    return x


def pad_identity(block: "Block", x: jax.Array) -> jax.Array:
    """Option A [R §3.3]: every `strides`-th pixel, new channels filled with zeros, no parameters.

    Half of the zeros go before the old channels and half after them, as in the PyTorch weights in
    circulation; any other place gives the same net up to a permutation of channels.
    """
    new = block.out_features - x.shape[-1]
    x = deferred.array(x)[:, :: block.strides, :: block.strides]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2)))


def bare_projection(block: "Block", x: jax.Array) -> jax.Array:
    """1x1 convolution without batch normalisation."""
    return block.conv(block.out_features, kernel=1, strides=block.strides, name="proj_conv")(x)


def projection(block: "Block", x: jax.Array) -> jax.Array:
    """Options B and C [R §3.3]: 1x1 convolution and, but for pre-activation nets [I], BN."""
    y = bare_projection(block, x)
    return y if block.preactivation else block.norm(name="proj_bn")(y)


class Block(nn.Module):
    """What all blocks share. Each adds what comes before, after or in place of these steps.

    Training draws random numbers from the rng collection `drop`. In evaluation, and without `drop`,
    everything random is replaced by its expectation.
    """

    features: int  # width of the 3x3 convolutions
    out_features: int
    conv: Callable[..., nn.Module]  # conv(features, kernel=3, strides=1, name=…)
    norm: Callable[..., nn.Module]  # norm(name=…), batch normalisation
    shortcuts: tuple[Shortcut | None, Shortcut | None]  # where the shape changes, and elsewhere
    strides: int = 1
    is_first: bool = False  # of the net
    stride_in_3x3: bool = False  # of a bottleneck, instead of in its first 1x1 ("v1.5")
    last_scale_init: nn.initializers.Initializer = nn.initializers.ones  # if `ends_in_norm`
    gate_bias: float = -6.0  # initial
    train: bool = False

    kernels = (3, 3)  # of the branch's convolutions
    expansion = 1  # output channels over `features`, unless the net sets them
    preactivation = False  # no ReLU follows the addition, and the net ends in one
    norm_first = False  # BN precedes each convolution instead of following it, and ends the net
    stem_activation = True  # BN-ReLU follows the stem
    ends_in_norm = False  # BN ends the branch, right before the addition
    draws = False  # training always draws random numbers

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        x, y = self._activate(x)
        return self._end(self._join(x, self._branch(y), survival))

    def _activate(self, x):
        """The inputs of the shortcut and of the branch."""
        return x, x

    def _branch(self, x):
        """The convolutions, with BN-ReLU between them."""
        strided = 2 if self.stride_in_3x3 and len(self.kernels) == 3 else 1
        for i, kernel in enumerate(self.kernels, 1):
            if i > 1:
                x = relu(self.norm(name=f"bn{i if self.norm_first else i - 1}")(x))
            features = self.out_features if i == len(self.kernels) else self.features
            strides = self.strides if i == strided else 1
            x = self.conv(features, kernel=kernel, strides=strides, name=f"conv{i}")(x)
        return x

    def _last_norm(self, x):
        name = f"bn{len(self.kernels)}"
        return self.norm(name=name, scale_init=self.last_scale_init)(x)

    def _join(self, x, y, survival):
        """Adds the shortcut of `x` to the branch's output."""
        y, shortcut = self._drop(y, survival), self._shortcut(x)
        return y if shortcut is None else y + shortcut

    def _end(self, x):
        return x if self.preactivation else relu(x)

    def _changes_shape(self, x):
        return self.strides != 1 or x.shape[-1] != self.out_features

    def _shortcut(self, x):
        changing, same = self.shortcuts
        function = changing if self._changes_shape(x) else same
        return function and deferred.array(function(self, x))

    def _keep(self, probability, shape=()):
        """1 with `probability`, else 0, of `shape`; `probability` itself where nothing is drawn."""
        if self.train and self.has_rng("drop"):
            probability = jnp.asarray(probability, jnp.float32)
            return jax.random.bernoulli(self.make_rng("drop"), probability, shape)
        return jnp.asarray(probability)

    def _drop(self, y, survival):
        """Stochastic depth (Huang et al. 2016, arXiv:1603.09382), for the whole batch at once."""
        return y if survival is None else y * self._keep(survival).astype(y.dtype)


class BasicBlock(Block):
    """conv3-BN-ReLU-conv3-BN, shortcut, ReLU [R Fig. 5 left]."""

    ends_in_norm = True

    def _branch(self, x):
        return self._last_norm(super()._branch(x))


class BottleneckBlock(BasicBlock):
    """conv1-BN-ReLU-conv3-BN-ReLU-conv1-BN, shortcut, ReLU [R Fig. 5 right]."""

    kernels = (1, 3, 1)
    expansion = 4


class PreactBasicBlock(Block):
    """BN-ReLU-conv3-BN-ReLU-conv3, shortcut [I Fig. 4e]."""

    preactivation = True
    norm_first = True
    stem_activation = False

    def _activate(self, x):
        # The shortcut shares the first BN-ReLU where the shape changes, and in the first block of
        # the net, whose input is a bare convolution's output [I, Appendix].
        y = relu(self.norm(name="bn1")(x))
        return y if self.is_first or self._changes_shape(x) else x, y


class PreactBottleneckBlock(PreactBasicBlock):
    """BN-ReLU-conv1-BN-ReLU-conv3-BN-ReLU-conv1, shortcut [I, Appendix]."""

    kernels = (1, 3, 1)
    expansion = 4
