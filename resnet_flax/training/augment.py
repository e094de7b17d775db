"""Augmentation and normalisation of uint8 images, inside the compiled step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# What images are divided by after the mean of each pixel is subtracted.
_PIXEL_MEANS = {"pixel_mean": 1, "pixel_mean_255": 255}
# Means and deviations of the channels of ImageNet's training images, as published nets use them.
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Principal components of the colours of ImageNet's pixels, 0 to 1: standard deviations, and
# directions as rows of (red, green, blue).
_COLOR_DEVIATIONS = (0.2175, 0.0188, 0.0045)
_COLOR_DIRECTIONS = (
    (-0.5675, -0.5808, -0.5836),
    (0.7192, -0.0045, -0.6948),
    (0.4009, -0.8140, 0.4203),
)
_COLOR_STRENGTH = 0.1
_FILLS = {"zero": "constant", "edge": "edge"}  # `jnp.pad`'s names
_MOST_SELECTED = 16  # the widest border that `_crop_by_selects` is for


def statistics(images: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The mean and deviation for `normalize`, float32, from training images uint8 [N, H, W, C].

    Kinds are "pixel_mean": the mean of each pixel [H, W, C], and [1] ("the per-pixel mean
    subtracted" [R §4.1]); "pixel_mean_255": the same mean, and [255]; "channel": mean and standard
    deviation of each channel [C]; "imagenet": these of ImageNet, whatever the images.
    """
    if kind == "imagenet":
        return tuple(np.array(values, np.float32) * 255 for values in _IMAGENET)
    if kind in _PIXEL_MEANS:
        mean = images.sum(axis=0, dtype=np.int64) / len(images)
        return mean.astype(np.float32), np.full(1, _PIXEL_MEANS[kind], np.float32)
    if kind == "channel":
        count = images[..., 0].size
        mean = images.sum(axis=(0, 1, 2), dtype=np.int64) / count
        # Sums of squares are exact in 64 bits: no second pass over a float copy of the data.
        square = np.square(images.astype(np.uint16)).sum(axis=(0, 1, 2), dtype=np.int64) / count
        return mean.astype(np.float32), np.sqrt(square - mean**2).astype(np.float32)
    raise ValueError(f"unknown normalization {kind!r}")


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """(images - mean) / std in float32; `images` [B, H, W, C], the others broadcast."""
    mean, std = (jax.lax.broadcast_to_rank(v, images.ndim) for v in (mean, std))
    return (images.astype(jnp.float32) - mean) / std


def draw_crops(key: jax.Array, batch: int, *, pad: int, flip: bool) -> dict[str, jax.Array]:
    """Draws what `crop_and_mirror` does to each image of a batch [R §4.2].

    With `pad`, the border in pixels, `offsets`: int32 [B, 2], 0 to 2 * pad. With `flip`, `mirror`:
    bool [B, 1, 1, 1], with probability one half. A draw depends on the key and the position in the
    (global) batch, not on how the batch is split over devices.
    """
    offset_key, flip_key = jax.random.split(key)
    draws = {}
    if flip:
        draws["mirror"] = jax.random.bernoulli(flip_key, jnp.float32(0.5), (batch, 1, 1, 1))
    if pad:
        draws["offsets"] = jax.random.randint(offset_key, (batch, 2), 0, 2 * pad + 1, jnp.int32)
    return draws


def crop_and_mirror(
    images: jax.Array, draws: dict[str, jax.Array], *, pad: int, fill: str = "zero"
) -> jax.Array:
    """Mirrors, pads and crops normalised images [B, H, W, C], in which zero is the mean [R §4.2].

    `draws` come from `draw_crops` with the same `pad`. `fill` "edge" adds the nearest pixel, as in
    Keras's generator (whose shifts are fractions of a pixel, and interpolated).
    """
    if "mirror" in draws:
        images = jnp.where(draws["mirror"], images[:, :, ::-1], images)
    if "offsets" in draws:
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), _FILLS[fill])
        by_slices = functools.partial(_crop_by_slices, shape=images.shape[1:])
        by_selects = functools.partial(_crop_by_selects, shape=images.shape[1:])
        # A TPU slices at varying offsets image by image, in half the time of a ResNet-20 step. On
        # a CPU selects take five times as long as slices.
        tpu = by_selects if pad <= _MOST_SELECTED else by_slices
        images = jax.lax.platform_dependent(padded, draws["offsets"], tpu=tpu, default=by_slices)
    return images


def _crop_by_slices(padded, offsets, *, shape):
    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], jnp.int32(0)), shape)

    return jax.vmap(crop)(padded, offsets)


def _crop_by_selects(padded, offsets, *, shape):
    """The same pixels: rows, then columns, are selected from 2 * pad + 1 slices of the batch."""
    out = padded
    for axis in (1, 2):
        source, size = out, shape[axis - 1]
        for i in range(source.shape[axis] - size + 1):
            here = offsets[:, axis - 1, None, None, None] == i
            part = jax.lax.slice_in_dim(source, i, i + size, axis=axis)
            out = jnp.where(here, part, out) if i else part
    return out


def color_shift(key: jax.Array, batch: int) -> jax.Array:
    """Random colours to add to images: float32 [batch, 1, 1, 3], in pixel values 0 to 255.

    "The standard color augmentation in [21] is used" [R §3.4]: a normal draw along each principal
    component of ImageNet's colours, of 0.1 times its deviation (Krizhevsky et al. 2012, §4.1).
    """
    draws = _COLOR_STRENGTH * jax.random.normal(key, (batch, 3), jnp.float32)
    along = draws * jnp.array([_COLOR_DEVIATIONS], jnp.float32)
    return 255 * (along @ jnp.array(_COLOR_DIRECTIONS, jnp.float32))[:, None, None]


def ten_crops(images: jax.Array, size: int) -> jax.Array:
    """[B, 10, size, size, C]: corners, centre and mirror images of [B, H, W, C] [R §3.4]."""
    bottom, right = images.shape[1] - size, images.shape[2] - size
    corners = (0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)
    parts = jnp.stack([images[:, y : y + size, x : x + size] for y, x in corners], axis=1)
    return jnp.concatenate([parts, parts[..., ::-1, :]], axis=1)
