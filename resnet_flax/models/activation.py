"""The rectifier."""

import jax
import jax.numpy as jnp

from resnet_flax.models import deferred


def relu(x: jax.Array | deferred.Normalized) -> jax.Array | deferred.Normalized:
    """max(x, 0), elementwise, of [B, H, W, C]; see `deferred` for what is not computed yet."""
    return x.relu() if isinstance(x, deferred.Normalized) else _relu(x)


@jax.custom_jvp
def _relu(x: jax.Array) -> jax.Array:
    """max(x, 0), elementwise.

    Values and derivatives are those of `flax.linen.relu` (but at NaN, where a gradient passes here
    and not there), and the derivative is taken from the result: then what went in need not be kept
    for the backward pass, and XLA computes it and the maximum in one go. (It would rewrite `y > 0`
    to `x > 0`.)
    """
    return jnp.maximum(x, 0)


@_relu.defjvp
def _relu_jvp(primals, tangents):
    y = _relu(*primals)
    return y, jnp.where(y == 0, 0, tangents[0])
