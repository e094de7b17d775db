"""The parts of `kernels` that are written in Pallas: how a kernel is run, and two of them."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from resnet_flax.models import deferred

# Asynchronous copies in flight.
_STAGES = 4


def launch(body, grid, out, arrays, *, warps, name):
    """Runs a kernel on arrays of which [B, H, W, C] are handed over as [pixels, C].

    `out` has the shape and dtype of each result.
    """
    flat = [x.reshape(-1, x.shape[-1]) if x.ndim == 4 else x for x in arrays]
    shapes = [
        jax.ShapeDtypeStruct((math.prod(s[:3]), s[3]) if len(s) == 4 else s, d) for s, d in out
    ]

    def call(interpret, *flat):
        return pl.pallas_call(
            functools.partial(body, barrier=(lambda: None) if interpret else triton.debug_barrier),
            grid=grid,
            out_shape=shapes,
            compiler_params=triton.CompilerParams(num_warps=warps, num_stages=_STAGES),
            interpret=interpret,
            name=name,
        )(*flat)

    found = jax.lax.platform_dependent(
        *flat, cpu=functools.partial(call, True), default=functools.partial(call, False)
    )
    return [x.reshape(shape) for x, (shape, _) in zip(found, out, strict=True)]


def load(ref, rows, mask):
    """[tile, C] of an array [pixels, C]; zero where masked."""
    columns = positions(ref.shape[1])
    where = mask[:, None] & (columns < ref.shape[1])[None]
    return triton.load(ref.at[rows[:, None], columns[None]], mask=where, other=0.0)


def _store(ref, rows, mask, value):
    columns = positions(ref.shape[1])
    where = mask[:, None] & (columns < ref.shape[1])[None]
    triton.store(ref.at[rows[:, None], columns[None]], value.astype(ref.dtype), mask=where)


def _weights(ref, tap):
    """[K, C] of one tap."""
    outputs, _, channels = ref.shape
    return triton.load(ref.at[positions(outputs)[:, None], tap, positions(channels)[None]])


def _tiles(tile, sides, image, body, start):
    """Loops over the tiles of an image: `body(pixels, rows, is_inside, carry)`."""
    size = sides[0] * sides[1]

    def step(i, carry):
        pixels = i.astype(jnp.int32) * tile + positions(tile)
        return body(pixels, image * size + pixels, pixels < size, carry)

    return jax.lax.fori_loop(*times(pl.cdiv(size, tile)), step, start)


def positions(count):
    """0 to count - 1, int32."""
    return jnp.arange(count, dtype=jnp.int32)


def times(count):
    """Bounds of a loop: whatever jax's default integers, 32 bits."""
    return np.int32(0), np.int32(count)


def _window(tap):
    """Row and column, 0 to 2, of tap 0 to 8."""
    tap = tap.astype(jnp.int32)  # Interpreted with 64 bits on, it has 64.
    row = jax.lax.div(tap, jnp.int32(3))
    return row, tap - 3 * row


def _add_sums(sums, a, b):
    return sums[0] + jnp.sum(a, axis=0), sums[1] + jnp.sum(b, axis=0)


def zeros(*shape):
    """Float32 zeros."""
    return jnp.zeros(shape, jnp.float32)


def _affine(sums_refs, scale_ref, bias_ref, group, shape, epsilon):
    """Factor and offset [1, C] of a group's images."""
    sums = [ref[group, :][None] for ref in sums_refs]
    bias = 0 if bias_ref is None else bias_ref[0, :][None]
    mean, variance = deferred.mean_and_variance(sums, shape)
    factor = jax.lax.rsqrt(variance + epsilon) * scale_ref[0, :][None]
    return factor, bias - mean * factor


def _group(image, shape, groups):
    return jax.lax.div(image, jnp.int32(shape[0] // groups))


def forward_kernel(
    y_ref, first_ref, second_ref, scale_ref, bias_ref, w_ref, *refs,
    shape, groups, strides, epsilon, tile, barrier,
):  # fmt: skip
    """Normalises, adds, applies ReLU, convolves and sums one image, see `kernels`."""
    *shortcut_ref, value_ref, out_ref, new_first_ref, new_second_ref = refs
    image, (_, height, width, _) = pl.program_id(0), shape
    counted = (shape[0] // groups, *shape[1:])
    group = _group(image, shape, groups)
    factor, offset = _affine((first_ref, second_ref), scale_ref, bias_ref, group, counted, epsilon)
    below = -(-height // strides), -(-width // strides)
    outputs = w_ref.shape[0]

    def activate(pixels, rows, inside, carry):
        value = load(y_ref, rows, inside).astype(jnp.float32) * factor + offset
        for ref in shortcut_ref:
            value += load(ref, rows, inside).astype(jnp.float32)
        _store(value_ref, rows, inside, jnp.maximum(value, 0))
        return carry

    def convolve(pixels, rows, inside, sums):
        row, column = pixels // below[1] * strides - 1, pixels % below[1] * strides - 1

        def add_tap(tap, total):
            down, right = _window(tap)
            r, c = row + down, column + right
            within = inside & (r >= 0) & (r < height) & (c >= 0) & (c < width)
            x = load(value_ref, image * height * width + r * width + c, within)
            return total + triton.dot(x, _weights(w_ref, tap), trans_b=True)

        total = jax.lax.fori_loop(*times(9), add_tap, zeros(tile, outputs)).astype(out_ref.dtype)
        _store(out_ref, rows, inside, total)
        total = total.astype(jnp.float32)
        return _add_sums(sums, total, jnp.square(total))

    _tiles(tile, (height, width), image, activate, 0)
    barrier()
    sums = _tiles(tile, below, image, convolve, (zeros(outputs),) * 2)
    new_first_ref[image, :], new_second_ref[image, :] = sums


def backward_kernel(
    of_out_ref, out_ref, of_first_ref, of_second_ref, w_ref, value_ref, y_ref,
    first_ref, second_ref, scale_ref, *refs,
    extra, shape, groups, strides, epsilon, tile, barrier,
):  # fmt: skip
    """The gradients of `forward_kernel` but for the kernel's, of one image, see `kernels`."""
    of_value_ref, refs = refs[:extra], refs[extra:]
    total_ref, of_y_ref, new_first_ref, new_second_ref, *of_shortcut_ref = refs
    image, (_, height, width, _) = pl.program_id(0), shape
    counted = (shape[0] // groups, *shape[1:])
    group = _group(image, shape, groups)
    factor, _ = _affine((first_ref, second_ref), scale_ref, None, group, counted, epsilon)
    first, second = of_first_ref[group, :][None], of_second_ref[group, :][None]
    below = -(-height // strides), -(-width // strides)
    channels = w_ref.shape[2]

    def add_sums(pixels, rows, inside, carry):
        out = load(out_ref, rows, inside).astype(jnp.float32)
        total = load(of_out_ref, rows, inside).astype(jnp.float32) + first + 2 * second * out
        _store(total_ref, rows, inside, total)
        return carry

    def convolve(pixels, rows, inside, sums):
        row, column = pixels // width + 1, pixels % width + 1

        def add_tap(tap, total):
            down, right = _window(tap)
            r, c = row - down, column - right
            within = inside & (r >= 0) & (r < below[0] * strides) & (c >= 0)
            within &= c < below[1] * strides
            if strides > 1:
                within &= (r % strides == 0) & (c % strides == 0)
                r, c = r // strides, c // strides
            x = load(total_ref, image * below[0] * below[1] + r * below[1] + c, within)
            return total + triton.dot(x, _weights(w_ref, tap))

        total = jax.lax.fori_loop(*times(9), add_tap, zeros(tile, channels))
        for ref in of_value_ref:
            total += load(ref, rows, inside).astype(jnp.float32)
        total = jnp.where(load(value_ref, rows, inside) > 0, total, 0)
        for ref in of_shortcut_ref:
            _store(ref, rows, inside, total)
        _store(of_y_ref, rows, inside, total * factor)
        y = load(y_ref, rows, inside).astype(jnp.float32)
        return _add_sums(sums, total, total * y)

    _tiles(tile, below, image, add_sums, 0)
    barrier()
    sums = _tiles(tile, (height, width), image, convolve, (zeros(channels),) * 2)
    new_first_ref[image, :], new_second_ref[image, :] = sums
