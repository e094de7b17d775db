"""Normalisation, ReLU and a 3x3 convolution in one kernel, for the narrow nets of CIFAR on a GPU.

cuDNN's tiles are made for 64 channels and more: at 16 it takes ten times as long as the memory
traffic. These are three kernels in Pallas (Triton). One program takes one image, all its channels:

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
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from resnet_flax.models import deferred

CHANNELS = (16, 32, 64)

# Pixels of a tile and warps of a program, by the width of its products.
TILES = {16: (256, 8), 32: (128, 4), 64: (64, 4)}
# Slices that a kernel's gradient is summed in, and pixels of their tiles.
SLICES = {16: (128, 128), 32: (128, 64), 64: (64, 64)}
# Asynchronous copies in flight.
_STAGES = 4


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
            at = _range(pl.next_power_of_2(size))
            part = triton.load(vector_ref.at[start + at], mask=at < size, other=0.0)
            triton.store(ref.at[at], part, mask=at < size)
            start += size

    return _launch(
        body, (1,), [((size,), vector.dtype) for size in sizes], [vector], warps=1, name="split"
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(options, y, sums, scale, bias, shortcut, kernel):
    body = _body(_forward_kernel, options, y.shape, len(sums[0]))
    below = (len(y), *(-(-side // options[1]) for side in y.shape[1:3]), kernel.shape[3])
    value, out, first, second = _launch(
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
    body = _body(_backward_kernel, options, y.shape, len(sums[0]))
    body = functools.partial(body, extra=len(of_value))
    of_out, of_y, first, second, *of_shortcut = _launch(
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
        rows = _range(pl.next_power_of_2(size))
        totals = [
            jnp.sum(_load(ref, group * size + rows, rows < size), axis=0)[None]
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
    a, b, of_scale, of_bias = _launch(body, (groups,), out, arrays, warps=4, name="finish")
    return (a, b), jnp.sum(of_scale, axis=0), jnp.sum(of_bias, axis=0)


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)


def _is_zero(gradient):
    return isinstance(gradient, jax.custom_derivatives.SymbolicZero)


def _given(x):
    return [] if x is None else [x]


def _body(kernel, options, shape, groups):
    """One of the two kernels below, with what is static of it."""
    epsilon, strides = options
    static = {"shape": shape, "groups": groups, "strides": strides, "epsilon": epsilon}
    return functools.partial(kernel, tile=TILES[shape[3]][0], **static)


def _by_output(kernel):
    """[3, 3, C, K] as [K, 9, C]."""
    return jnp.moveaxis(kernel, 3, 0).reshape(kernel.shape[3], 9, kernel.shape[2])


def _of_groups(groups, *of_images):
    """Arrays [B, C] summed over the images of each group: [G, C] each."""
    return deferred.add_up(*(x.reshape(groups, -1, x.shape[-1]) for x in of_images))


def _launch(body, grid, out, arrays, *, warps, name):
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


def _load(ref, rows, mask):
    """[tile, C] of an array [pixels, C]; zero where masked."""
    columns = _range(ref.shape[1])
    where = mask[:, None] & (columns < ref.shape[1])[None]
    return triton.load(ref.at[rows[:, None], columns[None]], mask=where, other=0.0)


def _store(ref, rows, mask, value):
    columns = _range(ref.shape[1])
    where = mask[:, None] & (columns < ref.shape[1])[None]
    triton.store(ref.at[rows[:, None], columns[None]], value.astype(ref.dtype), mask=where)


def _weights(ref, tap):
    """[K, C] of one tap."""
    outputs, _, channels = ref.shape
    return triton.load(ref.at[_range(outputs)[:, None], tap, _range(channels)[None]])


def _tiles(tile, sides, image, body, start):
    """Loops over the tiles of an image: `body(pixels, rows, is_inside, carry)`."""
    size = sides[0] * sides[1]

    def step(i, carry):
        pixels = i.astype(jnp.int32) * tile + _range(tile)
        return body(pixels, image * size + pixels, pixels < size, carry)

    return jax.lax.fori_loop(*_times(pl.cdiv(size, tile)), step, start)


def _range(count):
    return jnp.arange(count, dtype=jnp.int32)


def _times(count):
    """Bounds of a loop: whatever jax's default integers, 32 bits."""
    return np.int32(0), np.int32(count)


def _window(tap):
    """Row and column, 0 to 2, of tap 0 to 8."""
    tap = tap.astype(jnp.int32)  # Interpreted with 64 bits on, it has 64.
    row = jax.lax.div(tap, jnp.int32(3))
    return row, tap - 3 * row


def _add_sums(sums, a, b):
    return sums[0] + jnp.sum(a, axis=0), sums[1] + jnp.sum(b, axis=0)


def _zeros(*shape):
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


def _forward_kernel(
    y_ref, first_ref, second_ref, scale_ref, bias_ref, w_ref, *refs,
    shape, groups, strides, epsilon, tile, barrier,
):  # fmt: skip
    *shortcut_ref, value_ref, out_ref, new_first_ref, new_second_ref = refs
    image, (_, height, width, _) = pl.program_id(0), shape
    counted = (shape[0] // groups, *shape[1:])
    group = _group(image, shape, groups)
    factor, offset = _affine((first_ref, second_ref), scale_ref, bias_ref, group, counted, epsilon)
    below = -(-height // strides), -(-width // strides)
    outputs = w_ref.shape[0]

    def activate(pixels, rows, inside, carry):
        value = _load(y_ref, rows, inside).astype(jnp.float32) * factor + offset
        for ref in shortcut_ref:
            value += _load(ref, rows, inside).astype(jnp.float32)
        _store(value_ref, rows, inside, jnp.maximum(value, 0))
        return carry

    def convolve(pixels, rows, inside, sums):
        row, column = pixels // below[1] * strides - 1, pixels % below[1] * strides - 1

        def add_tap(tap, total):
            down, right = _window(tap)
            r, c = row + down, column + right
            within = inside & (r >= 0) & (r < height) & (c >= 0) & (c < width)
            x = _load(value_ref, image * height * width + r * width + c, within)
            return total + triton.dot(x, _weights(w_ref, tap), trans_b=True)

        total = jax.lax.fori_loop(*_times(9), add_tap, _zeros(tile, outputs)).astype(out_ref.dtype)
        _store(out_ref, rows, inside, total)
        total = total.astype(jnp.float32)
        return _add_sums(sums, total, jnp.square(total))

    _tiles(tile, (height, width), image, activate, 0)
    barrier()
    sums = _tiles(tile, below, image, convolve, (_zeros(outputs),) * 2)
    new_first_ref[image, :], new_second_ref[image, :] = sums


def _backward_kernel(
    of_out_ref, out_ref, of_first_ref, of_second_ref, w_ref, value_ref, y_ref,
    first_ref, second_ref, scale_ref, *refs,
    extra, shape, groups, strides, epsilon, tile, barrier,
):  # fmt: skip
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
        out = _load(out_ref, rows, inside).astype(jnp.float32)
        total = _load(of_out_ref, rows, inside).astype(jnp.float32) + first + 2 * second * out
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
            x = _load(total_ref, image * below[0] * below[1] + r * below[1] + c, within)
            return total + triton.dot(x, _weights(w_ref, tap))

        total = jax.lax.fori_loop(*_times(9), add_tap, _zeros(tile, channels))
        for ref in of_value_ref:
            total += _load(ref, rows, inside).astype(jnp.float32)
        total = jnp.where(_load(value_ref, rows, inside) > 0, total, 0)
        for ref in of_shortcut_ref:
            _store(ref, rows, inside, total)
        _store(of_y_ref, rows, inside, total * factor)
        y = _load(y_ref, rows, inside).astype(jnp.float32)
        return _add_sums(sums, total, total * y)

    _tiles(tile, below, image, add_sums, 0)
    barrier()
    sums = _tiles(tile, (height, width), image, convolve, (_zeros(channels),) * 2)
    new_first_ref[image, :], new_second_ref[image, :] = sums


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
            rows = (part * steps + step.astype(jnp.int32)) * tile + _range(tile)
            inside = rows < pixels
            (height, width), below = x.shape[1:3], of_out.shape[1:3]
            image, pixel = rows // (below[0] * below[1]), rows % (below[0] * below[1])
            r, c = pixel // below[1] * strides + down - 1, pixel % below[1] * strides - 1
            gradient = _load(of_out_ref, rows, inside)
            inside &= (r >= 0) & (r < height)
            new = []
            for right in range(3):
                within = inside & (c + right >= 0) & (c + right < width)
                value = _load(x_ref, (image * height + r) * width + c + right, within)
                new.append(sums[right] + triton.dot(gradient, value, trans_a=True))
            return tuple(new)

        sums = jax.lax.fori_loop(*_times(steps), add, (_zeros(outputs, channels),) * 3)
        k, c = _range(outputs)[:, None], _range(channels)[None]
        for right in range(3):
            triton.store(sums_ref.at[part, k, down, right, c], sums[right])

    sums = [((slices, outputs, 3, 3, channels), jnp.float32)]
    (parts,) = _launch(body, (slices, 3), sums, [x, of_out], warps=4, name="kernel_gradient")
    return jnp.moveaxis(jnp.sum(parts, axis=0), 0, 3)
