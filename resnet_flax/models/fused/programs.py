"""The GPU programs of `fused`, in Pallas (Triton).

`x` is a `deferred.Normalized` with ReLU. Inside a program an array [B, H, W, C] is [pixels, C].
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from resnet_flax.models import deferred

# Pixels of a tile and warps, by channels of the normalised array.
TILES = {16: (256, 8), 32: (128, 4), 64: (64, 4)}
# Slices in which a kernel's gradient is summed, and pixels of their tiles, by the wider channels.
_SLICES = {16: (128, 128), 32: (128, 64), 64: (64, 64)}
_STAGES = 4  # asynchronous copies in flight


def _launch(body, grid, out, arrays, *, warps, name):
    """Runs `body(barrier, *references)`; `out` has the shape and dtype of each result."""
    flat = [x.reshape(-1, x.shape[-1]) if x.ndim == 4 else x for x in arrays]
    shapes = [
        jax.ShapeDtypeStruct((math.prod(s[:3]), s[3]) if len(s) == 4 else s, d) for s, d in out
    ]

    def call(interpret, *flat):
        return pl.pallas_call(
            functools.partial(body, (lambda: None) if interpret else triton.debug_barrier),
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
    """[rows, C] of an array [pixels, C]; zero where masked."""
    columns = jnp.arange(ref.shape[1])
    return triton.load(ref.at[rows[:, None], columns[None]], mask=mask[:, None], other=0.0)


def _store(ref, rows, mask, value):
    columns = jnp.arange(ref.shape[1])
    triton.store(ref.at[rows[:, None], columns[None]], value.astype(ref.dtype), mask=mask[:, None])


def _tap(ref, tap):
    """The weights [K, C] of one tap."""
    outputs, _, channels = ref.shape
    return triton.load(ref.at[jnp.arange(outputs)[:, None], tap, jnp.arange(channels)[None]])


def _by_output(kernel):
    """[3, 3, C, K] as [K, 9, C]."""
    return jnp.moveaxis(kernel, 3, 0).reshape(kernel.shape[3], 9, kernel.shape[2])


def _tiles(tile, size, body, start):
    """Loops over the tiles of `size` pixels: `body(pixels, is_inside, carry)`."""

    def step(i, carry):
        pixels = i * tile + jnp.arange(tile)
        return body(pixels, pixels < size, carry)

    return jax.lax.fori_loop(0, pl.cdiv(size, tile), step, start)


def _taps(add, shape):
    """Sum of `add(tap, row, column)` over the window's nine taps; row and column are 0 to 2."""

    def step(tap, total):
        row = jax.lax.div(tap, 3)
        return total + add(tap, row, tap - 3 * row)

    return jax.lax.fori_loop(0, 9, step, jnp.zeros(shape, jnp.float32))


def _group_and_affine(x, image, sums_refs, scale_ref):
    """The group of an image, and the mean and the factor [1, C] that normalise it."""
    size = x.shape[0] // len(sums_refs[0])
    group = jax.lax.div(image, size)
    sums = [ref[group, :][None] for ref in sums_refs]
    mean, variance = deferred.mean_and_variance(sums, (size, *x.shape[1:]))
    return group, mean, jax.lax.rsqrt(variance + x.epsilon) * scale_ref[0, :][None]


def _add_sums(sums, a, b):
    return sums[0] + jnp.sum(a, axis=0), sums[1] + jnp.sum(b, axis=0)


def forward(strides, x, kernel):
    """The value of `x`, its convolution, and that one's sums and squares' sums by image [B, K]."""
    images, height, width, channels = x.shape
    outputs = kernel.shape[3]
    shortcut = [] if x.shortcut is None else [x.shortcut]
    below = -(-height // strides), -(-width // strides)
    tile, warps = TILES[channels]

    def body(barrier, y_ref, first_ref, second_ref, scale_ref, bias_ref, w_ref, *refs):
        *shortcut_ref, value_ref, out_ref, new_first_ref, new_second_ref = refs
        image = pl.program_id(0)
        start, start_below = image * height * width, image * below[0] * below[1]
        _, mean, factor = _group_and_affine(x, image, (first_ref, second_ref), scale_ref)
        offset = bias_ref[0, :][None] - mean * factor

        def activate(pixels, inside, carry):
            value = _load(y_ref, start + pixels, inside).astype(jnp.float32) * factor + offset
            for ref in shortcut_ref:
                value += _load(ref, start + pixels, inside).astype(jnp.float32)
            _store(value_ref, start + pixels, inside, jnp.maximum(value, 0))
            return carry

        def convolve(pixels, inside, sums):
            row, column = pixels // below[1] * strides - 1, pixels % below[1] * strides - 1

            def add(tap, down, right):
                r, c = row + down, column + right
                within = inside & (r >= 0) & (r < height) & (c >= 0) & (c < width)
                value = _load(value_ref, start + r * width + c, within)
                return triton.dot(value, _tap(w_ref, tap), trans_b=True)

            total = _taps(add, (tile, outputs)).astype(out_ref.dtype)
            _store(out_ref, start_below + pixels, inside, total)
            total = total.astype(jnp.float32)
            return _add_sums(sums, total, jnp.square(total))

        _tiles(tile, height * width, activate, 0)
        barrier()
        zeros = (jnp.zeros(outputs, jnp.float32),) * 2
        new = _tiles(tile, below[0] * below[1], convolve, zeros)
        new_first_ref[image, :], new_second_ref[image, :] = new

    totals = [((images, outputs), jnp.float32)] * 2
    return _launch(
        body,
        (images,),
        [(x.shape, x.y.dtype), ((images, *below, outputs), x.y.dtype), *totals],
        [x.y, *x.sums, x.scale[None], x.bias[None], _by_output(kernel), *shortcut],
        warps=warps,
        name="normalize_convolve",
    )


def backward(strides, x, kernel, value, of_value, out, of_out, of_sums):
    """Gradients of `forward` but for the kernel's and those that `finish` gives.

    `of_value` is a list of at most one array. Returns the total gradient of the output, the one of
    `x.y`, the shortcut's, where there is one, and the totals by image [B, C] that `finish` takes.
    """
    images, height, width, channels = x.shape
    below = out.shape[1:3]
    shortcut = [] if x.shortcut is None else [x.shortcut]
    tile, warps = TILES[channels]

    def body(
        barrier, of_out_ref, out_ref, of_first_ref, of_second_ref, w_ref, value_ref, y_ref,
        first_ref, second_ref, scale_ref, *refs
    ):  # fmt: skip
        of_value_ref, refs = refs[: len(of_value)], refs[len(of_value) :]
        total_ref, of_y_ref, *of_shortcut_ref, new_first_ref, new_second_ref = refs
        image = pl.program_id(0)
        start, start_below = image * height * width, image * below[0] * below[1]
        group, _, factor = _group_and_affine(x, image, (first_ref, second_ref), scale_ref)
        first, second = of_first_ref[group, :][None], of_second_ref[group, :][None]

        def add_sums(pixels, inside, carry):
            rows = start_below + pixels
            y = _load(out_ref, rows, inside).astype(jnp.float32)
            total = _load(of_out_ref, rows, inside).astype(jnp.float32) + first + 2 * second * y
            _store(total_ref, rows, inside, total)
            return carry

        def convolve(pixels, inside, sums):
            row, column = pixels // width + 1, pixels % width + 1

            def add(tap, down, right):
                r, c = row - down, column - right
                within = inside & (r >= 0) & (r < below[0] * strides) & (c >= 0)
                within &= c < below[1] * strides
                if strides > 1:
                    within &= (r % strides == 0) & (c % strides == 0)
                    r, c = r // strides, c // strides
                gradient = _load(total_ref, start_below + r * below[1] + c, within)
                return triton.dot(gradient, _tap(w_ref, tap))

            rows = start + pixels
            total = _taps(add, (tile, channels))
            for ref in of_value_ref:
                total += _load(ref, rows, inside).astype(jnp.float32)
            total = jnp.where(_load(value_ref, rows, inside) > 0, total, 0)
            for ref in of_shortcut_ref:
                _store(ref, rows, inside, total)
            _store(of_y_ref, rows, inside, total * factor)
            return _add_sums(sums, total, total * _load(y_ref, rows, inside).astype(jnp.float32))

        _tiles(tile, below[0] * below[1], add_sums, 0)
        barrier()
        zeros = (jnp.zeros(channels, jnp.float32),) * 2
        new = _tiles(tile, height * width, convolve, zeros)
        new_first_ref[image, :], new_second_ref[image, :] = new

    totals = [((images, channels), jnp.float32)] * 2
    return _launch(
        body,
        (images,),
        [*((a.shape, a.dtype) for a in (out, x.y, *shortcut)), *totals],
        [of_out, out, *of_sums, _by_output(kernel), value, x.y, *x.sums, x.scale[None], *of_value],
        warps=warps,
        name="convolve_backward",
    )


def finish(x, first, second):
    """`deferred.statistics_backward` of totals by image [B, C]."""
    groups = len(x.sums[0])
    size = len(first) // groups

    def body(_, first_ref, second_ref, a_ref, b_ref, scale_ref, *out_refs):
        group, rows = pl.program_id(0), jnp.arange(pl.next_power_of_2(size))
        totals = [
            jnp.sum(_load(ref, group * size + rows, rows < size), axis=0)[None]
            for ref in (first_ref, second_ref)
        ]
        sums = [ref[group, :][None] for ref in (a_ref, b_ref)]
        shape = size, *x.shape[1:]
        found = deferred.statistics_backward(
            sums, scale_ref[0, :], totals, shape, x.epsilon, again=lambda uses: uses
        )
        for ref, value in zip(out_refs, jax.tree.leaves(found), strict=True):
            ref[group, :] = value.reshape(-1)

    out = [(x.sums[0].shape, jnp.float32)] * 4
    arrays = [first, second, *x.sums, x.scale[None]]
    a, b, of_scale, of_bias = _launch(body, (groups,), out, arrays, warps=4, name="finish")
    return (a, b), jnp.sum(of_scale, axis=0), jnp.sum(of_bias, axis=0)


def kernel_gradient(strides, value, of_out):
    """float32 [3, 3, C, K] of the input [B, H, W, C] and the output's gradient [B, H', W', K]."""
    (_, height, width, channels), (_, *below, outputs) = value.shape, of_out.shape
    slices, tile = _SLICES[max(channels, outputs)]
    pixels = math.prod(of_out.shape[:3])
    slices = min(slices, pl.cdiv(pixels, tile))
    steps = pl.cdiv(pixels, tile * slices)

    def body(_, value_ref, of_out_ref, sums_ref):
        part, down = pl.program_id(0), pl.program_id(1)

        def add(step, sums):
            rows = (part * steps + step) * tile + jnp.arange(tile)
            image, pixel = rows // (below[0] * below[1]), rows % (below[0] * below[1])
            r, c = pixel // below[1] * strides + down - 1, pixel % below[1] * strides - 1
            gradient = _load(of_out_ref, rows, rows < pixels)
            inside = (rows < pixels) & (r >= 0) & (r < height)
            new = []
            for right in range(3):
                within = inside & (c + right >= 0) & (c + right < width)
                inputs = _load(value_ref, (image * height + r) * width + c + right, within)
                new.append(sums[right] + triton.dot(gradient, inputs, trans_a=True))
            return tuple(new)

        sums = (jnp.zeros((outputs, channels), jnp.float32),) * 3
        sums = jax.lax.fori_loop(0, steps, add, sums)
        k, c = jnp.arange(outputs)[:, None], jnp.arange(channels)[None]
        for right in range(3):
            triton.store(sums_ref.at[part, k, down, right, c], sums[right])

    sums = [((slices, outputs, 3, 3, channels), jnp.float32)]
    (parts,) = _launch(body, (slices, 3), sums, [value, of_out], warps=4, name="kernel_gradient")
    return jnp.moveaxis(jnp.sum(parts, axis=0), 0, 3)


def split(vector: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
    """Consecutive parts of a float32 vector, copied by one program."""

    def body(_, vector_ref, *part_refs):
        start = 0
        for ref, size in zip(part_refs, sizes, strict=True):
            at = jnp.arange(pl.next_power_of_2(size))
            part = triton.load(vector_ref.at[start + at], mask=at < size, other=0.0)
            triton.store(ref.at[at], part, mask=at < size)
            start += size

    out = [((size,), vector.dtype) for size in sizes]
    return _launch(body, (1,), out, [vector], warps=1, name="split")
