"""Normalisation, ReLU and a 3x3 convolution in one kernel, for the narrow nets of CIFAR on a GPU.

cuDNN's tiles are made for 64 channels and more: at 16 it takes ten times as long as the memory
traffic. These are kernels in Pallas (Triton). One program takes one image, all its channels:

- forwards it normalises, adds the shortcut, applies ReLU, writes that, convolves it, and sums the
  result for the batch normalisation that follows;
- backwards it adds what comes through those sums to the gradient, writes that, convolves it back,
  masks it by ReLU, and sums it for the gradient of its own normalisation;
- the kernel's gradient is summed in slices of the batch, in a fixed order: there are no atomics, so
  that a run is the same to the bit each time.

A program reads what it has written itself, after a barrier. An image has at most 32 x 32 x 16
numbers: it stays in the cache. On a CPU, for tests, the kernels are interpreted.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from resnet_flax.models import deferred
from resnet_flax.models.kernels import programs

CHANNELS = (16, 32, 64)

# Pixels of a tile and warps of a program, by the width of its products.
TILES = {16: (256, 8), 32: (128, 4), 64: (64, 4)}
# Slices that a kernel's gradient is summed in, and pixels of their tiles.
SLICES = {16: (128, 128), 32: (128, 64), 64: (64, 64)}


def fits(x, kernel_shape: tuple[int, ...]) -> bool:
    """Whether `convolve` can compute the 3x3 convolution, padded by 1, of `x`."""
    return (
        isinstance(x, deferred.Normalized)
        and x.rectified
        and x.computed is None
        and x.y.dtype == jnp.bfloat16
        and kernel_shape[:2] == (3, 3)
        and all(channels in CHANNELS for channels in kernel_shape[2:])
    )


def convolve(x: deferred.Normalized, kernel: jax.Array, strides: int) -> deferred.Convolved:
    """The convolution of `x`, which is computed on the way.

    Args:
      x: [B, H, W, C], bfloat16, see `fits`.
      kernel: bfloat16 [3, 3, C, K].
      strides: 1 or 2.

    Returns:
      bfloat16 [B, ceil(H / strides), …, K], with its sums over the same groups.
    """
    x.computed, y, sums = _convolve(
        (x.epsilon, strides), x.y, x.sums, x.scale, x.bias, x.shortcut, kernel
    )
    return deferred.Convolved(y, sums)


def split(vector: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Consecutive parts of a float32 vector, all copied by one kernel."""

    def body(vector_ref, *part_refs, barrier):
        del barrier
        start = 0
        for ref in part_refs:
            (size,) = ref.shape
            at = programs.positions(pl.next_power_of_2(size))
            part = triton.load(vector_ref.at[start + at], mask=at < size, other=0.0)
            triton.store(ref.at[at], part, mask=at < size)
            start += size

    return programs.launch(
        body, (1,), [((size,), vector.dtype) for size in sizes], [vector], warps=1, name="split"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options, y, sums, scale, bias, shortcut, kernel):
    body = _body(programs.forward_kernel, options, y.shape, len(sums[0]))
    below = (len(y), *(-(-side // options[1]) for side in y.shape[1:3]), kernel.shape[3])
    value, out, first, second = programs.launch(
        body,
        (len(y),),
        [(y.shape, y.dtype), (below, y.dtype), *[((len(y), kernel.shape[3]), jnp.float32)] * 2],
        [y, *sums, scale[None], bias[None], _by_output(kernel), *_given(shortcut)],
        warps=TILES[y.shape[3]][1],
        name="normalize_convolve",
    )
    return value, out, _of_groups(len(sums[0]), first, second)


def _convolve_forward(options, *arguments):
    y, sums, scale, bias, shortcut, kernel = jax.tree.map(lambda x: x.value, arguments)
    value, out, new = _convolve(options, y, sums, scale, bias, shortcut, kernel)
    return (value, out, new), (y, sums, scale, value, out, shortcut is not None, kernel)


def _convolve_backward(options, saved, gradients):
    y, sums, scale, value, out, has_shortcut, kernel = saved
    of_value, of_out, of_sums = gradients
    # Of what nothing else uses: nothing is read then.
    of_value = [] if _is_zero(of_value) else [of_value]
    of_out, *of_sums = (
        jnp.zeros(x.shape, x.dtype) if _is_zero(x) else x for x in (of_out, *of_sums)
    )
    body = _body(programs.backward_kernel, options, y.shape, len(sums[0]))
    body = functools.partial(body, extra=len(of_value))
    of_out, of_y, first, second, *of_shortcut = programs.launch(
        body,
        (len(y),),
        [
            (out.shape, y.dtype),
            (y.shape, y.dtype),
            *[((len(y), y.shape[3]), jnp.float32)] * 2,
            *[(y.shape, y.dtype)] * has_shortcut,
        ],
        [of_out, out, *of_sums, _by_output(kernel), value, y, *sums, scale[None], *of_value],
        warps=TILES[y.shape[3]][1],
        name="convolve_backward",
    )
    of_sums, of_scale, of_bias = _finish(first, second, sums, scale, y.shape, options[0])
    of_kernel = _kernel_gradient(value, of_out, options[1]).astype(kernel.dtype)
    of_shortcut = of_shortcut[0] if has_shortcut else None
    return of_y, of_sums, of_scale, of_bias, of_shortcut, of_kernel


def _finish(first, second, sums, scale, shape, epsilon):
    """See `deferred.normalize_backward`, of totals [B, C] of the images, in one kernel."""
    groups = len(sums[0])
    size = len(first) // groups

    def body(first_ref, second_ref, a_ref, b_ref, scale_ref, *out_refs, barrier):
        del barrier
        group = pl.program_id(0)
        rows = programs.positions(pl.next_power_of_2(size))
        totals = [
            jnp.sum(programs.load(ref, group * size + rows, rows < size), axis=0)[None]
            for ref in (first_ref, second_ref)
        ]
        found = deferred.normalize_backward(
            [a_ref[group, :][None], b_ref[group, :][None]],
            scale_ref[0, :],
            totals,
            shape=(size, *shape[1:]),
            epsilon=epsilon,
            again=lambda x: x,
        )
        for ref, value in zip(out_refs, jax.tree.leaves(found), strict=True):
            ref[group, :] = value.reshape(-1)

    out = [(sums[0].shape, jnp.float32)] * 4
    arrays = [first, second, *sums, scale[None]]
    a, b, of_scale, of_bias = programs.launch(body, (groups,), out, arrays, warps=4, name="finish")
    return (a, b), jnp.sum(of_scale, axis=0), jnp.sum(of_bias, axis=0)


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)


def _is_zero(gradient):
    return isinstance(gradient, jax.custom_derivatives.SymbolicZero)


def _given(x):
    return [] if x is None else [x]


def _body(kernel, options, shape, groups):
    """One of the two kernels of `programs`, with what is static of it."""
    epsilon, strides = options
    static = {"shape": shape, "groups": groups, "strides": strides, "epsilon": epsilon}
    return functools.partial(kernel, tile=TILES[shape[3]][0], **static)


def _by_output(kernel):
    """[3, 3, C, K] as [K, 9, C]."""
    return jnp.moveaxis(kernel, 3, 0).reshape(kernel.shape[3], 9, kernel.shape[2])


def _of_groups(groups, *of_images):
    """Arrays [B, C] summed over the images of each group: [G, C] each."""
    return deferred.add_up(*(x.reshape(groups, -1, x.shape[-1]) for x in of_images))


def _kernel_gradient(x, of_out, strides):
    """float32 [3, 3, C, K] of input x [B, H, W, C] and the output's gradient [B, H', W', K]."""
    (*_, channels), (*_, outputs) = x.shape, of_out.shape
    slices, tile = SLICES[max(channels, outputs)]
    pixels = math.prod(of_out.shape[:3])
    slices = min(slices, pl.cdiv(pixels, tile))
    steps = pl.cdiv(pixels, tile * slices)

    def body(x_ref, of_out_ref, sums_ref, *, barrier):
        del barrier
        part, down = pl.program_id(0), pl.program_id(1)

        def add(step, sums):
            rows = (part * steps + step.astype(jnp.int32)) * tile + programs.positions(tile)
            inside = rows < pixels
            (height, width), below = x.shape[1:3], of_out.shape[1:3]
            image, pixel = rows // (below[0] * below[1]), rows % (below[0] * below[1])
            r, c = pixel // below[1] * strides + down - 1, pixel % below[1] * strides - 1
            gradient = programs.load(of_out_ref, rows, inside)
            inside &= (r >= 0) & (r < height)
            new = []
            for right in range(3):
                within = inside & (c + right >= 0) & (c + right < width)
                value = programs.load(x_ref, (image * height + r) * width + c + right, within)
                new.append(sums[right] + triton.dot(gradient, value, trans_a=True))
            return tuple(new)

        sums = jax.lax.fori_loop(
            *programs.times(steps), add, (programs.zeros(outputs, channels),) * 3
        )
        k, c = programs.positions(outputs)[:, None], programs.positions(channels)[None]
        for right in range(3):
            triton.store(sums_ref.at[part, k, down, right, c], sums[right])

    sums = [((slices, outputs, 3, 3, channels), jnp.float32)]
    (parts,) = programs.launch(
        body, (slices, 3), sums, [x, of_out], warps=4, name="kernel_gradient"
    )
    return jnp.moveaxis(jnp.sum(parts, axis=0), 0, 3)
