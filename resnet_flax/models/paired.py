"""3x3 convolutions with few channels, computed on pairs of neighbouring pixels.

XLA's CPU backend reaches less than half of a core's speed where a convolution has 16 channels, as
in the first stage of the CIFAR nets: its fast kernels begin at 32. Two pixels of 16 channels side
by side are one of 32, and with them the 3x3 window becomes one of 3x2: a third more products, most
of them with zero, and still less time. See results/performance.md.
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
    features = kernel.shape[-1]
    # One zero on each side: every output pair then lies on two input pairs.
    x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))
    x = x.reshape(batch, height, width // 2 + 1, 2 * channels)
    y = jax.lax.conv_general_dilated(
        x, _pair(kernel), (1, 1), ((1, 1), (0, 0)), dimension_numbers=_LAYOUT
    )
    return y.reshape(batch, height, width, features)


def _pair(kernel: jax.Array) -> jax.Array:
    """The same weights for pairs: [3, 3, C, D] to [3, 2, 2 C, 2 D].

    Of an output pair the pixel q (0, 1) sees the pixel 2 s + p of the two input pairs s (0, 1),
    each of pixels p (0, 1), through column 2 s + p - q of the window, where there is one.
    """
    height, _, channels, features = kernel.shape
    columns = jnp.pad(kernel, ((0, 0), (1, 1), (0, 0), (0, 0)))  # Column j of the window at j + 1.
    seen = [columns[:, 1 - q : 5 - q] for q in range(2)]  # Each [3, 4, C, D].
    paired = jnp.stack(seen, axis=3)  # [3, 4, C, 2, D]
    return paired.reshape(height, 2, 2 * channels, 2 * features)


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
