"""Batch normalisation over the global batch or over fixed groups of it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from resnet_flax.models import deferred


class BatchNorm(nn.Module):
    """Batch normalisation (Ioffe & Szegedy 2015) with float32 statistics.

    In training each channel is normalised by the mean and the biased variance of its own group of
    examples: the whole (global, all devices) batch, or consecutive groups of `group_size` examples,
    which is what several devices without synchronisation compute (the paper's two GPUs: 64). The
    groups are defined on the global batch, so they do not depend on the number of devices.

    Variables, all float32 [C]: `params/scale`, `params/bias`, `batch_stats/mean`, `…/var`.

    Attributes:
      train: normalise by the batch and update the running statistics, which otherwise normalise.
      momentum: share of the old running statistics kept at each step (PyTorch's 0.1 is 0.9 here).
      epsilon: added to the variance.
      group_size: examples per group, or None for the whole batch.
      dtype: dtype of the result; the arithmetic is float32 whatever it is.
      scale_init: initialiser of the scale.
      defer: in training, leave it to what uses the result to compute it, see `deferred`.
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    group_size: int | None = None
    dtype: DTypeLike = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    defer: bool = False

    @nn.compact
    def __call__(self, x: jax.Array | deferred.Convolved) -> jax.Array | deferred.Normalized:
        """Normalises `x` [B, H, W, C].

        Raises:
          ValueError: the batch does not divide into groups of `group_size`.
        """
        channels = x.shape[-1]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,), jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, (channels,), jnp.float32)
        scale = self.param("scale", self.scale_init, (channels,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        if not self.train:
            x = deferred.array(x)
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


def _mean(x: jax.Array) -> jax.Array:
    """Of each group [G, …, C]: [G, 1, 1, 1, C]."""
    return jnp.mean(x, axis=(1, 2, 3), keepdims=True)


# The derivative is written out because the one that follows from the value is slower: it takes
# several arrays of the size of x, this one x alone, and half as many sums.
@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _normalise(x, scale, bias, epsilon):
    """Float32 [G, B, H, W, C] normalised by group; means and variances [G, 1, 1, 1, C].

    `scale` and `bias` are [1, 1, 1, 1, C].
    """
    mean = _mean(x)
    # Two passes: E[x^2] - E[x]^2 cancels where the mean is large against the deviation.
    var = _mean(jnp.square(x - mean))
    factor = scale * jax.lax.rsqrt(var + epsilon)
    # One multiplication and one addition for each element. It is off by what a rounding of x is.
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
