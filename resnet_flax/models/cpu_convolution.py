"""Convolutions written the way XLA's CPU backend computes them fast; see results/performance.md.

XLA's fast code begins at 32 channels: a 3x3 convolution of 16, as in the first stage of the CIFAR
nets, reaches less than half of a core's speed. Here two adjacent pixels of 16 channels are one of
32, with a window of 3x4: a third more products, with zeros, and still less time.

Derivatives are convolutions with permuted dimensions, for which there is no fast code. XLA
transposes their operands first, but not inside loops, where a training step then takes 17 times as
long. Here they are transposed from the start.
"""

import functools

import jax
import jax.numpy as jnp

_MOST_CHANNELS = 16  # wider layers are fast as they are

Padding = tuple[tuple[int, int], tuple[int, int]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, strides: int, padding: Padding) -> jax.Array:
    """`jax.lax.conv_general_dilated`, up to rounding and without forward-mode derivatives.

    `x` is [B, H, W, C], `kernel` [h, w, C, D], of one floating dtype. `padding`, above and below,
    left and right, is less than h and w. Returns [B, (H + padding - h) // strides + 1, …, D].
    """
    if in_pairs(x.shape, kernel.shape, strides, padding):
        return _in_pairs(x, kernel)
    return _plain(x, kernel, padding, window_strides=(strides, strides))


def _plain(x, kernel, padding, window_strides=(1, 1), **dilation):
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), **dilation
    )


def in_pairs(x_shape, kernel_shape, strides: int, padding: Padding) -> bool:
    """Whether `convolve` computes pairs of pixels."""
    *window, channels, features = kernel_shape
    is_narrow = max(channels, features) <= _MOST_CHANNELS
    is_usual = (window, strides, padding) == ([3, 3], 1, ((1, 1), (1, 1)))
    return is_usual and is_narrow and x_shape[2] % 2 == 0


def _in_pairs(x, kernel):
    # The stem's 3 channels are much slower than 4.
    extra = -x.shape[3] % 4
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra)))
    # The left pixel sees the first three columns of the window, the right one the last three.
    sides = (0, 1), (1, 0)
    left, right = (jnp.pad(kernel, ((0, 0), side, (0, extra), (0, 0))) for side in sides)
    pairs = _plain(x, jnp.concatenate([left, right], axis=-1), ((1, 1), (1, 1)), (1, 2))
    return pairs.reshape(*x.shape[:3], -1)


def _forward(x, kernel, strides, padding):
    return convolve(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, gradient):
    x, kernel = saved
    # Height and width of the gradient with gaps for the strides.
    spread = [(side - 1) * strides + 1 for side in gradient.shape[1:3]]
    before = [kernel.shape[i] - 1 - padding[i][0] for i in (0, 1)]

    # For the input: the gradient, spread out, with the mirrored kernel.
    around = tuple(
        (before[i], x.shape[1 + i] + kernel.shape[i] - 1 - spread[i] - before[i]) for i in (0, 1)
    )
    mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
    if strides == 1:
        of_x = convolve(gradient, mirrored, 1, around)
    else:
        of_x = _plain(gradient, mirrored, around, lhs_dilation=(strides, strides))

    # For the kernel: the input, with the gradient as the kernel and examples as channels.
    around = tuple((padding[i][0], spread[i] + before[i] - x.shape[1 + i]) for i in (0, 1))
    x, gradient = x.transpose(3, 1, 2, 0), gradient.transpose(1, 2, 0, 3)
    of_kernel = _plain(x, gradient, around, rhs_dilation=(strides, strides))
    return of_x, of_kernel.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
