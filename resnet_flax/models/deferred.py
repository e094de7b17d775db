"""Activations that are computed where they are used: fewer passes over memory on a GPU.

On a GPU the number of programs it launches, and the memory that they read and write, bound a
training step. So batch normalisation returns a `Normalized`: a convolution's output and what
normalises each channel. Adding a shortcut and ReLU are only noted in it. `array` computes it, in
one pass, or the convolution that reads it does (`fused`).

One reduction takes both sums that a normalisation needs, forwards and backwards. XLA would compute
the few numbers per channel that follow from the sums in a program of its own where they have
several uses; `_again` makes each use recompute them.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np

Sums = tuple[jax.Array, jax.Array]

_again = jax.lax.optimization_barrier


@dataclasses.dataclass(eq=False)
class Convolved:
    """A convolution's output [B, H, W, C] and its sums over G groups of B / G examples."""

    y: jax.Array
    sums: Sums  # of pixels and of their squares, float32 [G, C]

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, H, W, C)."""
        return self.y.shape

    def compute(self) -> jax.Array:
        """The value [B, H, W, C], in the dtype of `y`."""
        return self.y

    def __add__(self, other: jax.Array) -> jax.Array:
        return self.y + other


@jax.tree_util.register_dataclass
@dataclasses.dataclass(eq=False)
class Normalized(Convolved):
    """The batch normalisation of `y`, plus a shortcut, and then ReLU, not computed yet."""

    scale: jax.Array  # float32 [C], as the bias
    bias: jax.Array
    epsilon: float = dataclasses.field(metadata={"static": True})
    shortcut: jax.Array | None = None  # [B, H, W, C]
    rectified: bool = dataclasses.field(default=False, metadata={"static": True})  # ReLU follows
    computed = None  # the value, once something has computed it; no field: not part of the pytree

    def compute(self) -> jax.Array:
        """The value, computed once."""
        if self.computed is None:
            self.computed = _compute(self)
        return self.computed

    def relu(self) -> "Normalized":
        """The same with ReLU."""
        return dataclasses.replace(self, rectified=True)

    def __add__(self, shortcut: jax.Array) -> "Normalized | jax.Array":
        if self.rectified or self.shortcut is not None:
            return self.compute() + shortcut
        return dataclasses.replace(self, shortcut=shortcut)


def array(x: jax.Array | Convolved) -> jax.Array:
    """The value of `x`, computed now if it was not before."""
    return x.compute() if isinstance(x, Convolved) else x


def sums(x: jax.Array | Convolved, groups: int) -> Sums:
    """Sums of each channel and of its squares in consecutive groups of examples: float32 [G, C]."""
    return x.sums if type(x) is Convolved else _sums_of(groups, array(x))


def mean_and_variance(sums: Sums, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each channel, float32 [G, C], from the `sums` of an array of `shape`."""
    # The variance is a difference, as in flax.linen: a second pass would cost more launches.
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


@jax.custom_vjp
def _compute(x: Normalized) -> jax.Array:
    # Written in this order, XLA makes one program of it.
    mean, inverse = _mean_and_inverse(_again(x.sums), x.shape, x.epsilon)
    value = (_grouped(x.y, len(mean)) - mean) * inverse * x.scale[None, None] + x.bias[None, None]
    if x.shortcut is not None:
        value = value + _grouped(x.shortcut, len(mean))
    value = jnp.maximum(value, 0) if x.rectified else value
    # Later uses read it instead of computing it again.
    return _again(value.reshape(x.shape).astype(x.y.dtype))


def _compute_forward(x):
    value = _compute(x)
    return value, (x, value)


def _compute_backward(saved, gradient):
    x, value = saved
    if x.rectified:
        gradient = jnp.where(value > 0, gradient, 0)
    g = _grouped(gradient, len(x.sums[0]))
    totals = add_up(g, g * _grouped(x.y, len(g)))
    _, inverse = _mean_and_inverse(_again((x.sums, totals))[0], x.shape, x.epsilon)
    y = (g * inverse * x.scale[None, None]).reshape(x.shape).astype(x.y.dtype)
    sums, scale, bias = statistics_backward(x.sums, x.scale, totals, x.shape, x.epsilon)
    shortcut = None if x.shortcut is None else gradient
    return (dataclasses.replace(x, y=y, sums=sums, scale=scale, bias=bias, shortcut=shortcut),)


_compute.defvjp(_compute_forward, _compute_backward)


def statistics_backward(sums, scale, totals, shape, epsilon, again=_again):
    """Gradients with respect to the `sums`, `scale` and `bias` of an array of `shape`.

    `totals`, float32 [G, C] each, are of the gradient of the normalised array and of its product
    with the array. `again` separates two uses of its argument; inside one GPU program it is the
    identity.
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
    mean, var = mean_and_variance(sums, shape)
    return mean[:, None], jax.lax.rsqrt(var + epsilon)[:, None]


def _grouped(x, groups):
    """[B, H, W, C] as float32 [G, pixels, C]."""
    return x.astype(jnp.float32).reshape(groups, -1, x.shape[-1])


def add_up(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Sums over the pixels of several [G, pixels, C], [G, C] each, in one reduction."""
    zeros = (np.float32(0),) * len(arrays)
    return jax.lax.reduce(arrays, zeros, lambda a, b: tuple(map(operator.add, a, b)), (1,))


def _count(shape, sums):
    return np.float32(math.prod(shape[:-1]) // len(sums[0]))
