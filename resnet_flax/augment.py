"""Augmentation and normalisation of uint8 images, inside the compiled step."""

import jax
import jax.numpy as jnp
import numpy as np

# What is divided by, where the mean of each pixel is subtracted.
_PIXEL_MEANS = {"pixel_mean": 1, "pixel_mean_255": 255}
# What an image is surrounded with, as `jnp.pad` calls it.
_FILLS = {"zero": "constant", "edge": "edge"}


def statistics(images: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """What `normalize` subtracts and divides by, from uint8 images [N, H, W, C].

    Args:
      images: the training set.
      kind: "pixel_mean": the mean of each pixel, and 1 ("the per-pixel mean subtracted" [R §4.1]);
        "pixel_mean_255": the mean of each pixel, and 255: pixel values from 0 to 1 less their mean;
        "channel": mean and standard deviation of each channel.

    Returns:
      float32 (mean, std), in units of pixel values 0 to 255: [H, W, C] and [1], or [C] and [C].

    Raises:
      ValueError: unknown kind.
    """
    if kind in _PIXEL_MEANS:
        mean = images.sum(axis=0, dtype=np.int64) / len(images)
        return mean.astype(np.float32), np.full(1, _PIXEL_MEANS[kind], np.float32)
    if kind == "channel":
        count = images[..., 0].size
        mean = images.sum(axis=(0, 1, 2), dtype=np.int64) / count
        # 64-bit sums of squares are exact: no second pass over a float copy of the data.
        square = np.square(images.astype(np.uint16)).sum(axis=(0, 1, 2), dtype=np.int64) / count
        return mean.astype(np.float32), np.sqrt(square - mean**2).astype(np.float32)
    raise ValueError(f"unknown normalization {kind!r}; known: {', '.join(_PIXEL_MEANS)}, channel")


def normalize(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """(images - mean) / std in float32; `images` uint8 [B, H, W, C], the others broadcast."""
    return (images.astype(jnp.float32) - mean) / std


def crop_and_mirror(
    key: jax.Array, images: jax.Array, *, pad: int, flip: bool, fill: str = "zero"
) -> jax.Array:
    """Random crop of the padded image or of its mirror image, drawn per image [R §4.2].

    The draws are a function of the key and of the position in the batch alone, so they do not
    depend on how a (global) batch is split over devices.

    Args:
      key: a typed PRNG key.
      images: normalised, [B, H, W, C]: zero stands for the mean.
      pad: pixels added on each side before cropping back to H x W; 0: no crop.
      flip: mirror each image with probability one half.
      fill: what is added: "zero", or "edge": the nearest pixel of the image. The latter is what
        Keras's generator does when it shifts an image, but for one thing: it draws shifts of
        fractions of a pixel and interpolates, here they are of whole pixels.

    Returns:
      [B, H, W, C], dtype of `images`.
    """
    batch, height, width, channels = images.shape
    offset_key, flip_key = jax.random.split(key)
    if flip:
        mirror = jax.random.bernoulli(flip_key, 0.5, (batch, 1, 1, 1))
        images = jnp.where(mirror, images[:, :, ::-1], images)
    if pad:
        offsets = jax.random.randint(offset_key, (batch, 2), 0, 2 * pad + 1)
        padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)), _FILLS[fill])

        def crop(image, offset):
            start = (offset[0], offset[1], 0)
            return jax.lax.dynamic_slice(image, start, (height, width, channels))

        images = jax.vmap(crop)(padded, offsets)
    return images
