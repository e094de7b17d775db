"""Convolutions written the way XLA's CPU backend computes them fast; see results/performance.md.

Two things are different from what jax makes of `conv_general_dilated` and its derivatives:

- A 3x3 convolution of 16 channels, as in the first stage of the CIFAR nets, reaches less than half
  of a core's speed: the fast kernels begin at 32. Two pixels of 16 channels side by side are one of
  32, that sees a window of 3x4: a third more products, with zeros, and still less time.
- Derivatives are convolutions with permuted dimensions, for which there are no fast kernels. XLA
  transposes their operands first, but not inside of loops, where a training step then takes 17
  times as long. Here they are transposed from the start.
"""

import functools

import jax
import jax.numpy as jnp

# Wider layers fill the fast kernels by themselves.
_MOST_CHANNELS = 16

_LAYOUT = ("NHWC", "HWIO", "NHWC")

Padding = tuple[tuple[int, int], tuple[int, int]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x: jax.Array, kernel: jax.Array, strides: int, padding: Padding) -> jax.Array:
    """Convolution: that of `jax.lax.conv_general_dilated`, but for rounding.

    Args:
      x: [B, H, W, C], floating.
      kernel: [h, w, C, D], of the same dtype.
      strides: of the window, both ways.
      padding: pixels above and below, left and right; less than h and w.

    Returns:
      [B, (H + padding - h) // strides + 1, …, D]. Its reverse-mode derivatives are defined, its
      forward-mode ones are not.
    """
    if in_pairs(x.shape, kernel.shape, strides, padding):
        return _in_pairs(x, kernel)
    return _plain(x, kernel, padding, window_strides=(strides, strides))


def _plain(x, kernel, padding, window_strides=(1, 1), **dilation):
    return jax.lax.conv_general_dilated(
        x, kernel, window_strides, padding, dimension_numbers=_LAYOUT, **dilation
    )


def in_pairs(
    x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], strides: int, padding: Padding
) -> bool:
    """Whether `convolve` computes pairs of pixels."""
    *window, channels, features = kernel_shape
    narrow = max(channels, features) <= _MOST_CHANNELS
    usual = (window, strides, padding) == ([3, 3], 1, ((1, 1), (1, 1)))
    return usual and narrow and x_shape[2] % 2 == 0


def _in_pairs(x, kernel):
    batch, height, width, channels = x.shape
    # The stem's 3 channels are much slower than 4.
    extra = -channels % 4
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, extra), (0, 0)))
    # The left pixel sees the first three columns of the window, the right one the last three.
    left, right = (
        jnp.pad(kernel, ((0, 0), columns, (0, 0), (0, 0))) for columns in ((0, 1), (1, 0))
    )
    pairs = _plain(x, jnp.concatenate([left, right], axis=-1), ((1, 1), (1, 1)), (1, 2))
    return pairs.reshape(batch, height, width, -1)


def _forward(x, kernel, strides, padding):
    return convolve(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, saved, gradient):
    x, kernel = saved
    sides = range(2)
    spread = [(gradient.shape[1 + i] - 1) * strides + 1 for i in sides]  # With gaps for strides.

    # Of the input: the gradient, spread out, with the mirrored kernel.
    before = [kernel.shape[i] - 1 - padding[i][0] for i in sides]
    around = tuple(
        (before[i], x.shape[1 + i] + kernel.shape[i] - 1 - spread[i] - before[i]) for i in sides
    )
    mirrored = kernel[::-1, ::-1].swapaxes(2, 3)
    if strides == 1:
        of_x = convolve(gradient, mirrored, 1, around)
    else:
        of_x = _plain(gradient, mirrored, around, lhs_dilation=(strides, strides))

    # Of the kernel: the input, with the gradient as the kernel and examples as channels.
    around = tuple(
        (padding[i][0], spread[i] + kernel.shape[i] - 1 - x.shape[1 + i] - padding[i][0])
        for i in sides
    )
    of_kernel = _plain(
        x.transpose(3, 1, 2, 0),
        gradient.transpose(1, 2, 0, 3),
        around,
        rhs_dilation=(strides, strides),
    )
    return of_x, of_kernel.transpose(1, 2, 0, 3)


convolve.defvjp(_forward, _backward)
