"""Convolution, batch normalisation and ReLU."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from resnet_flax.models import cpu_convolution, deferred

# A plain normal, as published (arXiv:1502.01852): jax's kaiming_normal is truncated.
he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Conv(nn.Module):
    """k x k convolution, padded by (k - 1) // 2 on every side.

    `SAME` with stride 2 would pad on one side only: then the outputs would not line up with
    `x[:, ::2, ::2]`, nor with the weights that other frameworks publish.
    """

    features: int
    kernel: int = 3
    strides: int = 1
    dtype: DTypeLike = jnp.float32  # of the computation; parameters are float32
    kernel_init: nn.initializers.Initializer = he_normal
    bias_init: nn.initializers.Initializer | None = None  # None: no bias, as in the papers' nets
    same: bool = False  # pad as TensorFlow's `SAME` does, for the Keras nets
    cpu_convolutions: bool = False  # compute by `cpu_convolution`
    fused: bool = False  # compute by `fused` where that is possible

    @nn.compact
    def __call__(self, x: jax.Array | deferred.Convolved) -> jax.Array | deferred.Convolved:
        """Maps [B, H, W, C] to [B, ceil(H / strides), ceil(W / strides), features]."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        if self.fused and self.bias_init is None and not self.same:
            # Imported here: another version of jax may lack what it is written in.
            from resnet_flax.models import fused

            if fused.fits(x, shape):
                return fused.convolve(x, kernel, self.strides)
        x = deferred.array(x).astype(self.dtype)
        strides, pad = (self.strides, self.strides), (self.kernel - 1) // 2
        padding = ((pad, pad), (pad, pad))
        if self.same:
            padding = tuple(jax.lax.padtype_to_pads(x.shape[1:3], shape[:2], strides, "SAME"))
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


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) with float32 statistics.

    In training each channel is normalised by the mean and the biased variance of a batch-norm
    group: the whole (global, all devices) batch, or `group_size` consecutive examples, which is
    what several devices compute without synchronisation (the paper's two GPUs: 64). Groups are
    defined on the global batch, so they do not depend on the number of devices.

    Variables, all float32 [C]: `params/scale`, `params/bias`, `batch_stats/mean`, `…/var`.
    """

    train: bool  # normalise by the batch and update the running statistics; else normalise by these
    momentum: float = 0.9  # share of the old statistics kept at each step (PyTorch's 0.1 is 0.9)
    epsilon: float = 1e-5
    group_size: int | None = None  # None: the whole batch
    dtype: DTypeLike = jnp.float32  # of the result; the arithmetic is float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    defer: bool = False  # in training, return a `deferred.Normalized`

    @nn.compact
    def __call__(self, x: jax.Array | deferred.Convolved) -> jax.Array | deferred.Normalized:
        """Normalises `x` [B, H, W, C]; ValueError: B does not divide by `group_size`."""
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        if not self.train:
            factor = scale * jax.lax.rsqrt(running_var.value + self.epsilon)
            shift = bias - running_mean.value * factor
            factor, shift = (jax.lax.broadcast_to_rank(v, x.ndim) for v in (factor, shift))
            return (x.astype(jnp.float32) * factor + shift).astype(self.dtype)

        batch = x.shape[0]
        group = self.group_size or batch
        if batch % group:
            raise ValueError(
                f"batch of {batch} examples does not divide into groups of bn_group_size={group}"
            )
        if self.defer:
            sums = deferred.sums(x, batch // group)
            y = deferred.Normalized(deferred.array(x), sums, scale, bias, self.epsilon)
            mean, var = deferred.mean_and_variance(sums, x.shape)
        else:
            y = x.astype(jnp.float32).reshape(batch // group, group, *x.shape[1:])
            scale, bias = (jax.lax.broadcast_to_rank(v, y.ndim) for v in (scale, bias))
            y, mean, var = _normalise(y, scale, bias, self.epsilon)
            y = y.reshape(x.shape).astype(self.dtype)
        if not self.is_initializing():
            keep = self.momentum
            mean, var = (jnp.mean(v.reshape(-1, channels), axis=0) for v in (mean, var))
            running_mean.value = keep * running_mean.value + (1 - keep) * mean
            running_var.value = keep * running_var.value + (1 - keep) * var
        return y


def _mean(x):
    return jnp.mean(x, axis=(1, 2, 3), keepdims=True)


# The derivative is written out because jax's own is slower: it reads several arrays of the size
# of x, this one x alone, and takes twice as many sums.
@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _normalise(x, scale, bias, epsilon):
    """Float32 [G, B, H, W, C] normalised by group, and means and variances [G, 1, 1, 1, C]."""
    mean = _mean(x)
    # Two passes: E[x^2] - E[x]^2 cancels where the mean is large against the deviation.
    var = _mean(jnp.square(x - mean))
    factor = scale * jax.lax.rsqrt(var + epsilon)
    # One multiplication and one addition for each element; the error is that of rounding x.
    return x * factor + (bias - mean * factor), mean, var


@_normalise.defjvp
def _normalise_jvp(epsilon, primals, tangents):
    (x, scale, _), (dx, dscale, dbias) = primals, tangents
    y, mean, var = _normalise(*primals, epsilon)
    inverse = jax.lax.rsqrt(var + epsilon)
    factor = scale * inverse
    dmean = _mean(dx)
    half_dvar = _mean(x * dx) - mean * dmean
    dfactor = dscale * inverse - scale * inverse**3 * half_dvar
    # Not + factor * dx: XLA would keep the broadcast factor from the forward pass, at full size.
    dy = x * dfactor + (dbias - mean * dfactor - factor * dmean) - dx * -factor
    return (y, mean, var), (dy, dmean, 2 * half_dvar)


def relu(x: jax.Array | deferred.Normalized) -> jax.Array | deferred.Normalized:
    """max(x, 0), elementwise."""
    return x.relu() if isinstance(x, deferred.Normalized) else _relu(x)


@jax.custom_jvp
def _relu(x):
    """Value and derivative of `flax.linen.relu`, except that NaN passes a gradient.

    The derivative is taken from the result, so that the backward pass need not keep `x`. (From
    `y > 0` XLA would make `x > 0` again.)
    """
    return jnp.maximum(x, 0)


@_relu.defjvp
def _relu_jvp(primals, tangents):
    y = _relu(*primals)
    return y, jnp.where(y == 0, 0, tangents[0])
