"""Normalisation, ReLU and a 3x3 convolution as one GPU program, for the narrow nets of CIFAR.

cuDNN's tiles are made for 64 channels and more: at 16 it takes ten times as long as the memory
traffic. `programs` has others, written in Pallas (Triton), in which one block of threads takes one
image with all its channels:

- forwards it normalises, adds the shortcut, applies ReLU, writes the value, convolves it, and sums
  the result for the batch normalisation that follows;
- backwards it adds the gradient of those sums to the output's gradient, writes the total, convolves
  it back, masks it by ReLU, and sums it for the gradient of its own normalisation;
- the gradient of the convolution's kernel is summed in slices of the batch, in a fixed order: there
  are no atomics, so that a run is the same to the bit each time.

It reads what it has written itself, after a barrier. An image has at most 32 x 32 x 16 numbers and
stays in the cache. On a CPU, for tests, the programs are interpreted.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from resnet_flax.models import deferred
from resnet_flax.models.fused import programs
from resnet_flax.models.fused.programs import split

__all__ = ["convolve", "fits", "split"]


def fits(x: jax.Array | deferred.Convolved, kernel_shape: tuple[int, ...]) -> bool:
    """Whether `convolve` can compute the 3x3 convolution, padded by 1, of `x`."""
    return (
        isinstance(x, deferred.Normalized)
        and x.rectified
        and x.computed is None
        and x.y.dtype == jnp.bfloat16
        and kernel_shape[:2] == (3, 3)
        and all(channels in programs.TILES for channels in kernel_shape[2:])
    )


def convolve(x: deferred.Normalized, kernel: jax.Array, strides: int) -> deferred.Convolved:
    """The convolution of an `x` that `fits`; on the way, `x` is computed too.

    All is bfloat16: `x` [B, H, W, C], the kernel [3, 3, C, K] and the result [B, ceil(H / strides),
    …, K], which has sums over the same groups as `x`. `strides` is 1 or 2.
    """
    x.computed, y, sums = _convolve(strides, x, kernel)
    return deferred.Convolved(y, sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(strides, x, kernel):
    value, out, *totals = programs.forward(strides, x, kernel)
    # Each image's totals [B, K] to each group's [G, K].
    totals = (t.reshape(len(x.sums[0]), -1, t.shape[-1]) for t in totals)
    return value, out, deferred.add_up(*totals)


def _convolve_forward(strides, *arguments):
    x, kernel = jax.tree.map(lambda primal: primal.value, arguments)
    value, out, sums = _convolve(strides, x, kernel)
    return (value, out, sums), (x, kernel, value, out)


def _convolve_backward(strides, saved, gradients):
    x, kernel, value, out = saved
    of_value, of_out, of_sums = gradients
    # Nothing is read for a value that only this convolution uses.
    of_value = [] if _is_zero(of_value) else [of_value]
    of_out, *of_sums = (
        jnp.zeros(g.shape, g.dtype) if _is_zero(g) else g for g in (of_out, *of_sums)
    )
    of_out, y, *shortcut, first, second = programs.backward(
        strides, x, kernel, value, of_value, out, of_out, of_sums
    )
    sums, scale, bias = programs.finish(x, first, second)
    shortcut = shortcut[0] if shortcut else None
    of_x = dataclasses.replace(x, y=y, sums=sums, scale=scale, bias=bias, shortcut=shortcut)
    return of_x, programs.kernel_gradient(strides, value, of_out).astype(kernel.dtype)


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)


def _is_zero(gradient):
    return isinstance(gradient, jax.custom_derivatives.SymbolicZero)
