"""3x3 convolutions with few channels, computed as pairs of neighbouring pixels.

XLA's CPU backend reaches less than half of a core's speed where a convolution has 16 channels, as
in the first stage of the CIFAR nets: its fast kernels begin at 32. Two pixels of 16 channels side
by side are one of 32, that sees a window of 3x4: a third more products, with zeros, and still less
time. See results/performance.md.
"""

import jax
import jax.numpy as jnp

# Wider layers fill the fast kernels by themselves.
_MOST_CHANNELS = 16

_LAYOUT = ("NHWC", "HWIO", "NHWC")


def applies(x_shape: tuple[int, ...], kernel_shape: tuple[int, ...], strides: int) -> bool:
    """Whether `convolve` is defined, and worth it, for these.

    Args:
      x_shape: [B, H, W, C].
      kernel_shape: [h, w, C, D].
      strides: of the window.
    """
    *window, channels, features = kernel_shape
    narrow = max(channels, features) <= _MOST_CHANNELS
    return window == [3, 3] and strides == 1 and narrow and x_shape[2] % 2 == 0


@jax.custom_vjp
def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution of stride 1, padded by 1 on every side: that of `blocks.Conv`, but for rounding.

    Args:
      x: [B, H, W, C], W even.
      kernel: [3, 3, C, D].

    Returns:
      [B, H, W, D]. Its reverse-mode derivatives are defined, its forward-mode ones are not.
    """
    return _convolve(x, kernel)


def _convolve(x, kernel):
    batch, height, width, channels = x.shape
    # The stem's 3 channels are much slower than 4.
    extra = -channels % 4
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra)))
    kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, extra), (0, 0)))
    y = jax.lax.conv_general_dilated(
        x, _pair(kernel), (1, 2), ((1, 1), (1, 1)), dimension_numbers=_LAYOUT
    )
    return y.reshape(batch, height, width, -1)


def _pair(kernel: jax.Array) -> jax.Array:
    """The same weights for two pixels: [3, 3, C, D] to [3, 4, C, 2 D].

    The left one sees the first three columns of the window, the right one the last three.
    """
    left, right = (
        jnp.pad(kernel, ((0, 0), columns, (0, 0), (0, 0))) for columns in ((0, 1), (1, 0))
    )
    return jnp.concatenate([left, right], axis=-1)


def _forward(x, kernel):
    return _convolve(x, kernel), (x, kernel)


def _backward(saved, gradient):
    x, kernel = saved

    def plain(kernel):
        padding = ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=_LAYOUT)

    # The kernel's gradient is a sum over all pixels, which pairs do not help.
    (kernel_gradient,) = jax.linear_transpose(plain, kernel)(gradient)
    return _convolve(gradient, kernel[::-1, ::-1].swapaxes(2, 3)), kernel_gradient


convolve.defvjp(_forward, _backward)
