"""Activations that are computed where they are used: fewer passes over memory on a GPU.

There a step is bound by the number of its kernels and by what they read and write. So a batch
normalisation returns a `Normalized`: a convolution's output and what normalises each channel.
Adding a shortcut and ReLU only take note. What uses the result computes it: `array`, in one pass,
or a convolution, on the way in (`kernels`).

The sums that a normalisation needs take one reduction each way. XLA would compute what follows from
them, a few numbers a channel, in kernels of its own where it has several uses; `_again` makes each
use compute it anew.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

_again = jax.lax.optimization_barrier


@dataclasses.dataclass(eq=False)
class Convolved:
    """A convolution's output that knows its sums.

    Attributes:
      y: [B, H, W, C].
      sums: see `sums`.
    """

    y: jax.Array
    sums: tuple[jax.Array, jax.Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value: (B, H, W, C)."""
        return self.y.shape

    def compute(self) -> jax.Array:
        """The output itself."""
        return self.y

    def __add__(self, other) -> jax.Array:
        return self.y + array(other)

    __radd__ = __add__


@dataclasses.dataclass(eq=False)
class Normalized:
    """Batch normalisation of `y`, plus `shortcut`, and ReLU where `rectified`, not computed yet.

    Attributes:
      y: [B, H, W, C].
      sums: of its pixels and of their squares, float32 [G, C], over G groups of B / G examples.
      scale: float32 [C].
      bias: likewise.
      epsilon: added to the variance.
      shortcut: [B, H, W, C] or None.
      rectified: whether ReLU follows.
      computed: the value, once something has computed it.
    """

    y: jax.Array
    sums: tuple[jax.Array, jax.Array]
    scale: jax.Array
    bias: jax.Array
    epsilon: float
    shortcut: jax.Array | None = None
    rectified: bool = False
    computed: jax.Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the value: (B, H, W, C)."""
        return self.y.shape

    def compute(self) -> jax.Array:
        """The value, in the dtype of `y`."""
        if self.computed is None:
            arguments = self.y, self.sums, self.scale, self.bias, self.shortcut
            self.computed = _normalize(self.epsilon, self.rectified, *arguments)
        return self.computed

    def relu(self) -> "Normalized":
        """With ReLU."""
        return dataclasses.replace(self, rectified=True, computed=None)

    def __add__(self, shortcut) -> "Normalized | jax.Array":
        if self.rectified or self.shortcut is not None:
            return self.compute() + array(shortcut)
        return dataclasses.replace(self, shortcut=array(shortcut), computed=None)

    __radd__ = __add__


def array(x: jax.Array | Convolved | Normalized) -> jax.Array:
    """The value of `x`, computed now if it was not before."""
    return x.compute() if isinstance(x, Convolved | Normalized) else x


def sums(x: jax.Array | Convolved, groups: int) -> tuple[jax.Array, jax.Array]:
    """Sums of each channel and of its squares in consecutive groups of examples: float32 [G, C]."""
    return x.sums if isinstance(x, Convolved) else _sums_of(groups, x)


def mean_and_variance(
    sums: tuple[jax.Array, jax.Array], shape: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Of each channel, float32 [G, C], from the `sums` of an array of this shape.

    The variance is a difference, as flax.linen has it: a second pass would cost more kernels.
    """
    mean, square = (s * (1 / _count(shape, sums)) for s in sums)
    return mean, jnp.maximum(square - jnp.square(mean), 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums_of(groups, x):
    y = _grouped(x, groups)
    return add_up(y, jnp.square(y))


def _sums_of_backward(groups, x, gradients):
    first, second = (g[:, None] for g in gradients)
    of_x = first + 2 * second * _grouped(x, groups)
    return (of_x.reshape(x.shape).astype(x.dtype),)


_sums_of.defvjp(lambda groups, x: (_sums_of(groups, x), x), _sums_of_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalize(epsilon, rectified, y, sums, scale, bias, shortcut):
    # Written in this order, XLA makes one kernel of it.
    mean, inverse = _mean_and_inverse(_again(sums), y.shape, epsilon)
    value = (_grouped(y, len(mean)) - mean) * inverse * scale[None, None] + bias[None, None]
    if shortcut is not None:
        value = value + _grouped(shortcut, len(mean))
    value = jnp.maximum(value, 0) if rectified else value
    # What uses it later reads it, and does not compute it again from what came before.
    return _again(value.reshape(y.shape).astype(y.dtype))


def _normalize_forward(epsilon, rectified, y, sums, scale, bias, shortcut):
    value = _normalize(epsilon, rectified, y, sums, scale, bias, shortcut)
    return value, (y, sums, scale, value if rectified else None, shortcut is not None)


def _normalize_backward(epsilon, rectified, saved, gradient):
    y, sums, scale, value, has_shortcut = saved
    if rectified:
        gradient = jnp.where(value > 0, gradient, 0)
    g = _grouped(gradient, len(sums[0]))
    totals = add_up(g, g * _grouped(y, len(g)))
    _, inverse = _mean_and_inverse(_again((sums, totals))[0], y.shape, epsilon)
    of_y = (g * inverse * scale[None, None]).reshape(y.shape).astype(y.dtype)
    of_rest = normalize_backward(sums, scale, totals, shape=y.shape, epsilon=epsilon)
    return of_y, *of_rest, gradient if has_shortcut else None


_normalize.defvjp(_normalize_forward, _normalize_backward)


def normalize_backward(sums, scale, totals, *, shape, epsilon, again=_again):
    """Gradients of `Normalized.sums`, `scale` and `bias`.

    Args:
      sums: float32 [G, C] each, of an array of `shape` and of its squares.
      scale: float32 [C].
      totals: float32 [G, C] each, of the gradient of the normalised array and of its product with
        the array.
      shape: (B, H, W, C).
      epsilon: added to the variance.
      again: see above; inside a kernel there is nothing to keep apart.
    """
    (sums_1, totals_1), (totals_2, sums_2) = again((sums, totals)), again((totals, sums))
    mean, inverse = (v[:, 0] for v in _mean_and_inverse(sums_1, shape, epsilon))
    first, second = totals_1
    share = scale[None] * inverse * (1 / _count(shape, sums))
    of_second = (second - mean * first) * jnp.square(inverse) * share * -0.5
    of_first = -first * share - 2 * mean * of_second
    mean, inverse = (v[:, 0] for v in _mean_and_inverse(sums_2, shape, epsilon))
    first, second = totals_2
    of_scale = jnp.sum((second - mean * first) * inverse, axis=0)
    return (of_first, of_second), of_scale, jnp.sum(first, axis=0)


def _mean_and_inverse(sums, shape, epsilon):
    """Mean and inverse deviation, float32 [G, 1, C]."""
    mean, var = mean_and_variance(sums, shape)
    return mean[:, None], jax.lax.rsqrt(var + epsilon)[:, None]


def _grouped(x, groups):
    """[B, H, W, C] as float32 [G, pixels, C]."""
    return x.astype(jnp.float32).reshape(groups, -1, x.shape[-1])


def add_up(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over the pixels of several [G, pixels, C], in one reduction: [G, C] each."""
    zeros = (np.float32(0),) * len(arrays)
    return jax.lax.reduce(arrays, zeros, lambda a, b: tuple(map(operator.add, a, b)), (1,))


def _count(shape, sums):
    """Pixels that a channel of an array of `shape` has in a group."""
    return np.float32(math.prod(shape[:-1]) // len(sums[0]))
