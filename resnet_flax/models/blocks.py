"""Residual blocks and shortcuts.

A shortcut is a function `(x, y, strides, conv, norm) -> array` that joins a block's input `x`
[B, H, W, C] and its residual branch `y` [B, H/s, W/s, D]; `conv` and `norm` make the layers of one
that has parameters. Called inside a block, such layers belong to the block.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from resnet_flax.models import cpu_convolution, deferred
from resnet_flax.models.activation import relu

Shortcut = Callable[..., jax.Array]

# A plain normal, as published (arXiv:1502.01852): jax's kaiming_normal is truncated.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Conv(nn.Module):
    """k x k convolution, padded by (k - 1) // 2 on every side.

    `SAME` with stride 2 would pad on one side only: then the outputs would not line up with
    `x[:, ::2, ::2]`, nor with the weights that other frameworks publish.

    Attributes:
      features: channels of the output.
      kernel: k.
      strides: of the window, both ways.
      dtype: of the computation; parameters are float32.
      kernel_init: initialiser of the kernel.
      bias_init: initialiser of a bias; None: there is none, as in the papers' nets.
      same: pad as TensorFlow's and XLA's `SAME` does all the same, for the Keras nets.
      cpu_convolutions: compute by `cpu_convolution.convolve`, faster on a CPU.
      kernels: compute by `kernels.convolve` where that can, faster on a GPU.
    """

    features: int
    kernel: int = 3
    strides: int = 1
    dtype: jax.typing.DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = he_normal
    bias_init: nn.initializers.Initializer | None = None
    same: bool = False
    cpu_convolutions: bool = False
    kernels: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), features]."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        pad = (self.kernel - 1) // 2
        strides, padding = (self.strides, self.strides), ((pad, pad), (pad, pad))
        if self.same:
            padding = tuple(jax.lax.padtype_to_pads(x.shape[1:3], shape[:2], strides, "SAME"))
        kernel = kernel.astype(self.dtype)
        if self.kernels and self.bias_init is None and not self.same:
            # Only here: another jax may not have what they are written in.
            from resnet_flax.models import kernels

            if kernels.fits(x, shape):
                return kernels.convolve(x, kernel, self.strides)
        x = deferred.array(x).astype(self.dtype)
        if self.cpu_convolutions:
            y = cpu_convolution.convolve(x, kernel, self.strides, padding)
        else:
            y = jax.lax.conv_general_dilated(
                x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        if self.bias_init is None:
            return y
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        return y + jax.lax.broadcast_to_rank(bias.astype(self.dtype), y.ndim)


def no_shortcut(x, y, strides, conv, norm):
    """The plain net's: the branch alone."""
    del x, strides, conv, norm
    return y


def identity(x, y, strides, conv, norm):
    """The input itself; shapes must agree."""
    del strides, conv, norm
    return y + deferred.array(x)


def option_a(x: jax.Array, strides: int, channels: int) -> jax.Array:
    """`pad_identity` before the addition: [B, H, W, C] to [B, H/s, W/s, channels]."""
    new = channels - x.shape[-1]
    widths = ((0, 0), (0, 0), (0, 0), (new // 2, new - new // 2))
    return jnp.pad(x[:, ::strides, ::strides], widths)


def pad_identity(x, y, strides, conv, norm):
    """Option A [R §3.3]: every `strides`-th pixel, new channels filled with zeros, no parameters.

    The zeros go half before and half after the old channels, as in the PyTorch weights in
    circulation; any other place gives the same net up to a renaming of channels.
    """
    del conv, norm
    return option_a(deferred.array(x), strides, y.shape[-1]) + y


def projection(x, y, strides, conv, norm):
    """Options B and C [R §3.3]: 1x1 convolution and batch normalisation."""
    x = conv(y.shape[-1], kernel=1, strides=strides, name="proj_conv")(x)
    return norm(name="proj_bn")(x) + y


def bare_projection(x, y, strides, conv, norm):
    """1x1 convolution alone: the projection of the pre-activation nets [I]."""
    del norm
    return conv(y.shape[-1], kernel=1, strides=strides, name="proj_conv")(x) + y


def gate(
    x: jax.Array,
    features: int,
    strides: int,
    conv: Callable[..., nn.Module],
    bias: float,
    kernel: int = 1,
) -> jax.Array:
    """sigmoid(W x + b), float32 [B, H/s, W/s, features]; W is a convolution, b begins at `bias`."""
    bias_init = nn.initializers.constant(bias)
    layer = conv(features, kernel=kernel, strides=strides, bias_init=bias_init, name="gate_conv")
    # Not in bfloat16, where 1 - g would be 1 for as long as g is below 0.002.
    return jax.nn.sigmoid(layer(x).astype(jnp.float32))


class Block(nn.Module):
    """What all blocks share.

    Class attributes say what kind of net a block makes: `expansion`, the output's width over that
    of the 3x3 convolutions, where the net does not say otherwise; `weighted_layers` in a block;
    `preactivation`, no ReLU after the addition: the net has one at its end; `stem_activation`, the
    net has BN-ReLU after its stem; `final_norm`, it has BN before the ReLU at its end;
    `ends_in_norm`, so does the branch, right before the addition; `draws`, training draws random
    numbers whatever the options.

    What is random is drawn in training from the collection `drop` of random numbers; at test, and
    where that is not given, everything stands at its expectation.

    Attributes:
      features: width of the block's 3x3 convolutions.
      out_features: channels of the output.
      strides: 1 or 2.
      is_first: whether it is the net's first block.
      shares_activation: whether a pre-activation block's first BN-ReLU feeds its shortcut too.
      shortcut: how input and branch are joined.
      conv: makes a convolution `conv(features, kernel=3, strides=1, name=…)`.
      norm: makes a normalisation `norm(name=…)`.
      stride_in_3x3: a bottleneck's stride sits in its 3x3 and not in its first 1x1 ("v1.5").
      last_scale_init: initialiser of the scale that ends the branch, where `ends_in_norm`.
      train: whether to draw.
    """

    features: int
    out_features: int
    strides: int
    is_first: bool
    shares_activation: bool
    shortcut: Shortcut
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    stride_in_3x3: bool = False
    last_scale_init: nn.initializers.Initializer = nn.initializers.ones
    train: bool = False

    expansion = 1
    weighted_layers = 2
    preactivation = False
    stem_activation = True
    final_norm = False
    ends_in_norm = False
    draws = False

    def keep(self, probability: jax.typing.ArrayLike, shape: tuple[int, ...]) -> jax.Array:
        """1 with `probability` and else 0, [*shape]; where nothing is drawn, `probability`, []."""
        if self.train and self.has_rng("drop"):
            probability = jnp.asarray(probability, jnp.float32)
            return jax.random.bernoulli(self.make_rng("drop"), probability, shape)
        return jnp.asarray(probability)

    def join(self, x, y, survival):
        """Applies the shortcut to input `x` and branch `y`.

        Where there is a `survival`, a scalar probability, the branch is dropped for the whole batch
        else, and at test scaled by it: stochastic depth (Huang et al. 2016, arXiv:1603.09382).
        """
        if survival is not None:
            y = y * self.keep(survival, ()).astype(y.dtype)
        return self.shortcut(x, y, self.strides, self.conv, self.norm)


class BasicBlock(Block):
    """conv3-BN-ReLU-conv3-BN, shortcut, ReLU [R Fig. 5 left]."""

    ends_in_norm = True

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, features]."""
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


class PreactBasicBlock(Block):
    """BN-ReLU-conv3-BN-ReLU-conv3, shortcut [I Fig. 4e].

    The first BN-ReLU is shared by branch and shortcut where the shape changes, and in the first
    block of the net, whose input is a bare convolution's output [I, Appendix].
    """

    preactivation = True
    stem_activation = False
    final_norm = True

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, features]."""
        y = relu(self.norm(name="bn1")(x))
        x = y if self.shares_activation else x
        y = self.conv(self.features, strides=self.strides, name="conv1")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(self.features, name="conv2")(y)
        return self.join(x, y, survival)


class PreactBottleneckBlock(Block):
    """BN-ReLU-conv1-BN-ReLU-conv3-BN-ReLU-conv1, shortcut [I, Appendix]."""

    expansion = 4
    weighted_layers = 3
    preactivation = True
    stem_activation = False
    final_norm = True

    @nn.compact
    def __call__(self, x: jax.Array, survival: jax.Array | None = None) -> jax.Array:
        """Maps [B, H, W, C] to [B, H/s, W/s, out_features]."""
        s1, s2 = (1, self.strides) if self.stride_in_3x3 else (self.strides, 1)
        y = relu(self.norm(name="bn1")(x))
        x = y if self.shares_activation else x
        y = self.conv(self.features, kernel=1, strides=s1, name="conv1")(y)
        y = relu(self.norm(name="bn2")(y))
        y = self.conv(self.features, strides=s2, name="conv2")(y)
        y = relu(self.norm(name="bn3")(y))
        y = self.conv(self.out_features, kernel=1, name="conv3")(y)
        return self.join(x, y, survival)
