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
    """The convolution of `x` [B, H, W, C], which is computed on the way; `fits` says of which.

    All is bfloat16: the kernel [3, 3, C, K] and the result [B, ceil(H / strides), …, K], which has
    sums over the same groups as `x`. `strides` is 1 or 2.
    """
    x.computed, y, sums = _convolve(
        (x.epsilon, strides), x.y, x.sums, x.scale, x.bias, x.shortcut, kernel
    )
    return deferred.Convolved(y, sums)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options, y, sums, scale, bias, shortcut, kernel):
    value, out, *totals = programs.forward(options, y, sums, scale, bias, shortcut, kernel)
    # Each image's totals [B, K] to each group's [G, K].
    totals = (x.reshape(len(sums[0]), -1, x.shape[-1]) for x in totals)
    return value, out, deferred.add_up(*totals)


def _convolve_forward(options, *arguments):
    y, sums, scale, bias, shortcut, kernel = jax.tree.map(lambda x: x.value, arguments)
    value, out, new = _convolve(options, y, sums, scale, bias, shortcut, kernel)
    return (value, out, new), (y, sums, scale, value, out, shortcut is not None, kernel)


def _convolve_backward(options, saved, gradients):
    y, sums, scale, value, out, has_shortcut, kernel = saved
    of_value, of_out, of_sums = gradients
    # Nothing is read for a value that only this convolution uses.
    of_value = [] if _is_zero(of_value) else [of_value]
    of_out, *of_sums = (
        jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x for x in (of_out, *of_sums)
    )
    of_out, of_y, first, second, *of_shortcut = programs.backward(
        options, y, sums, scale, kernel, value, of_value, out, of_out, of_sums, has_shortcut
    )
    of_rest = programs.finish(options, first, second, sums, scale, y.shape)
    of_kernel = programs.kernel_gradient(options, value, of_out).astype(kernel.dtype)
    return of_y, *of_rest, of_shortcut[0] if has_shortcut else None, of_kernel


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)


def _is_zero(gradient):
    return isinstance(gradient, jax.custom_derivatives.SymbolicZero)
