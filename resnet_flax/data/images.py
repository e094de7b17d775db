"""Decodes images of any kind, and cuts resized squares out of them."""

import functools
import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageCms

from resnet_flax.errors import first_line

MAX_PIXELS = 100_000_000
"""Larger images are refused: decoded, they take 300 MB and more."""

# EPS is decoded by Ghostscript, and IPTC may hold an EPS; Pillow has no decoder for the others.
_REFUSED = {"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
_ORIENTATION = 0x0112  # the EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Pillow warns of what is odd but readable. Not at each call: filters are not safe in threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels from the upper left corner of an image."""


class ImageError(ValueError):
    """Bytes that cannot be decoded; the message is one short line that says why."""


def decode(content: bytes, *, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes an image file of any size, mode and format that Pillow reads, as mode RGB.

    The EXIF orientation is applied. Of an animation the first frame is taken. Transparent pixels
    are laid over white. CMYK is converted without colour profiles. Greys of more than 8 bits are
    scaled, not clipped: integers that fit into 16 bits by 1/257; floats in 0..1 by 255; floats in
    0..255 not at all; all others from their own smallest and largest value.

    A JPEG at least twice as large as `at_least`, (width, height), is decoded at 1/2, 1/4 or 1/8 of
    its size, several times as fast, and is still that large or larger.

    Raises:
      ImageError: the content is not an image, is damaged or truncated, is PostScript, or has more
        than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(io.BytesIO(content), formats=_formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")
            # MPO is several JPEGs in one file.
            if at_least is not None and image.format in ("JPEG", "MPO"):
                turned = _orientation(image) >= 5
                image.draft(None, at_least[::-1] if turned else at_least)
            return upright_rgb(image)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"it has more than {MAX_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError("it is not an image of a known format, or damaged") from error
    except Exception as error:  # Decoders raise anything on damaged files.
        raise ImageError(f"it cannot be decoded: {first_line(error)}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """An opened image of any mode as `decode` returns it."""
    image.load()
    method = _TRANSPOSE.get(_orientation(image))
    decoded = _rgb(image)
    return decoded if method is None else decoded.transpose(method)


@functools.cache
def _formats() -> tuple[str, ...]:
    """Pillow's names of the formats to try, the likeliest first."""
    Image.init()
    return ("JPEG", "PNG", *(f for f in Image.ID if f not in {"JPEG", "PNG", *_REFUSED}))


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # The EXIF data are damaged; the image is still good.
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode == "LAB":
        profiles = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))
        return ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> np.ndarray:
    values = np.asarray(image)
    clean = np.where(np.isfinite(values), values, 0).astype(np.float64)
    low, high = clean.min(), clean.max()
    if image.mode != "F" and low >= 0 and high <= 65535:
        low, high = 0, 65535
    elif image.mode == "F" and low >= 0 and high <= 255:
        low, high = 0, 1 if high <= 1 else 255
    result = np.round((clean - low) * (255 / (high - low))) if high > low else np.zeros_like(clean)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        result[values == transparent] = 255
    return result.astype(np.uint8)


def crop_resized(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Resizes the part `box` of an RGB image to uint8 [size, size, 3], bilinear with antialiasing.

    Corners of the box may lie between pixels.
    """
    left, top, right, bottom = box
    # Rounding may have put a corner outside by a hair, which Pillow refuses.
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=inside))


def central_box(width: int, height: int, *, short_side: int, size: int) -> Box:
    """The part of an image that "resize the shorter side, then crop the centre" shows.

    `crop_resized` then does both in one step. `size` is in pixels of the resized image. Sizes and
    places are rounded as by torchvision's Resize and CenterCrop.

    Raises:
      ValueError: `size` is larger than `short_side`.
    """
    return _box(width, height, short_side, size, lambda spare: round(spare / 2))


def random_box(
    random: np.random.RandomState,
    width: int,
    height: int,
    *,
    short_sides: tuple[int, int],
    size: int,
) -> Box:
    """Draws the part of an image to train on.

    "The image is resized with its shorter side randomly sampled in [256, 480] for scale
    augmentation. A 224x224 crop is randomly sampled" [R §3.4]. All whole numbers in that range,
    and all whole pixels that the crop can begin at, are equally likely.

    Raises:
      ValueError: `size` is larger than the drawn shorter side.
    """

    def below(count: int) -> int:
        return int(random.random() * count)

    smallest, largest = short_sides
    short_side = smallest + below(largest - smallest + 1)
    return _box(width, height, short_side, size, lambda spare: below(spare + 1))


def _box(width: int, height: int, short_side: int, size: int, place: Callable[[int], int]) -> Box:
    """`place` gives the crop's first pixel in the resized image from the number of spare ones."""
    if size > short_side:
        raise ValueError(f"a crop of {size} pixels is larger than a shorter side of {short_side}")
    shorter = min(width, height)
    resized = width * short_side // shorter, height * short_side // shorter
    left, top = (place(side - size) for side in resized)
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, (left + size) * x, (top + size) * y
