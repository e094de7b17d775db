"""Decodes images of any kind, and cuts resized squares out of them.

Nothing here knows of data sets. [R] is Deep Residual Learning for Image Recognition.
"""

import contextlib
import functools
import io
import threading
import warnings
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from PIL import Image, ImageCms

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused: decoded, one would fill 300 MB and more."""

# EPS is decoded by running Ghostscript; IPTC may hold an EPS; for the rest Pillow has no decoder.
_REFUSED = frozenset({"EPS", "IPTC", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"})
_POSTSCRIPT = (b"%!PS", b"\xc5\xd0\xd3\xc6")  # how EPS begins
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

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels from the upper left corner of an image."""


class ImageError(ValueError):
    """Bytes that cannot be decoded; the message is one short line that says why."""


class Random(Protocol):
    """`np.random.Generator` and `np.random.RandomState` both are one."""

    def random(self) -> float:
        """Returns a number from 0 to 1, 1 excluded."""


def decode(content: bytes, *, at_least: tuple[int, int] | None = None) -> Image.Image:
    """Decodes an image of any size, mode and format that Pillow reads.

    The EXIF orientation is applied; of an animation the first frame is taken; what is transparent
    is laid over white; CMYK is converted as Pillow does, without colour profiles. Greys of more
    than 8 bits are scaled, not clipped: 16 bits by 1/257; wider integers likewise where they fit
    into 16 bits, and floats by 255 where they lie in 0..1, or not at all where in 0..255; anything
    else from its own smallest and largest value.

    Args:
      content: of the file.
      at_least: width and height, in pixels, that are enough. A JPEG that is at least twice as wide
        and as high is then decoded at 1/2, 1/4 or 1/8 of its size, still at least this large both
        ways, which is several times as fast. Pixel values differ a little from those of a full
        decode that is resized. Other formats, and smaller images, are decoded as they are.

    Returns:
      An image of mode RGB, loaded.

    Raises:
      ImageError: the content is no image, is damaged or truncated, is of a format that only
        another program can decode (EPS), or has more than `MAX_PIXELS` pixels.
      ValueError: `at_least` is not positive.
    """
    if at_least is not None and min(at_least) < 1:
        raise ValueError(f"at_least is {at_least}; both must be positive")
    with _opened(content) as image:
        # The reader of JPEG; MPO is several of them in one file.
        if at_least is not None and image.format in ("JPEG", "MPO"):
            turned = _orientation(image) >= 5
            image.draft(None, at_least[::-1] if turned else at_least)
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as `decode` returns it."""
    image.load()
    method = _TRANSPOSE.get(_orientation(image))
    decoded = _rgb(image)
    return decoded if method is None else decoded.transpose(method)


def is_common_jpeg(content: bytes) -> bool:
    """Says whether an image is a JPEG of greys or RGB, which every reader of JPEG decodes alike.

    Only the beginning is looked at.

    Raises:
      ImageError: as `decode` does, but for damage further on.
    """
    with _opened(content) as image:
        return image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB")


@contextlib.contextmanager
def _opened(content: bytes) -> Iterator[Image.Image]:
    """Opens an image, and makes an ImageError of whatever goes wrong inside."""
    if content[:4] in _POSTSCRIPT:
        raise ImageError("it is PostScript, which is not read")
    try:
        with _QUIET, Image.open(io.BytesIO(content), formats=formats()) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")
            yield image
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"it has more than {MAX_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise ImageError("it is not an image of a known format, or damaged") from error
    except Exception as error:  # Damaged files make decoders raise anything.
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ImageError(f"it cannot be decoded: {reason}") from error


def crop_resized(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """Resizes a part of an image, computing no more than that part.

    Args:
      image: of mode RGB.
      box: the part, in the image's own pixels; its corners may lie between them.
      size: of the result, in pixels, both ways.

    Returns:
      uint8 [size, size, 3], bilinear, with antialiasing where it shrinks.
    """
    left, top, right, bottom = box
    # Rounding may have put a corner outside by a hair, which Pillow refuses.
    inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR, box=inside))


def short_side_box(
    width: int, height: int, *, short_side: int, size: int, across: float, down: float
) -> Box:
    """Returns the part of an image that "resize the shorter side, then crop" would show.

    With it `crop_resized` does both in one step, and an image of 1 x 5000 pixels does not have to
    become one of 256 x 1,280,000. Sizes and places are rounded to whole pixels of the resized
    image, as by torchvision's Resize and CenterCrop. The 10 crops of [R §3.4] are those with
    `across` and `down` both one half, and each of them 0 or 1, and their mirror images.

    Args:
      width: of the image, in pixels.
      height: likewise.
      short_side: that the image would be resized to.
      size: of the crop, in pixels of the resized image, at most `short_side`.
      across: where the crop lies: 0 at the left, 1 at the right.
      down: 0 at the top, 1 at the bottom.

    Returns:
      The box, in pixels of the image as it is.

    Raises:
      ValueError: the crop is larger than the resized image.
    """
    resized = _resized(width, height, short_side=short_side, size=size)
    left, top = round(across * (resized[0] - size)), round(down * (resized[1] - size))
    return _box(width, height, resized=resized, left=left, top=top, size=size)


def central_box(width: int, height: int, *, short_side: int, size: int) -> Box:
    """Returns the `short_side_box` at the centre, the usual one to test with."""
    return short_side_box(width, height, short_side=short_side, size=size, across=0.5, down=0.5)


def random_box(
    random: Random, width: int, height: int, *, short_sides: tuple[int, int], size: int
) -> Box:
    """Draws the part of an image to train on.

    "The image is resized with its shorter side randomly sampled in [256, 480] for scale
    augmentation. A 224x224 crop is randomly sampled" [R §3.4]. All whole numbers in that range,
    and all whole pixels that the crop can begin at, are equally likely.

    Args:
      random: three numbers are drawn from it.
      width: of the image, in pixels.
      height: likewise.
      short_sides: the smallest and the largest size of the shorter side, both included.
      size: of the crop, in pixels of the resized image, at most the smallest of them.

    Returns:
      The box, in pixels of the image as it is.

    Raises:
      ValueError: the crop is larger than the resized image can be, or the range is empty.
    """
    smallest, largest = short_sides
    if smallest > largest:
        raise ValueError(f"short_sides is {short_sides}; the first must not be above the second")
    _resized(width, height, short_side=smallest, size=size)  # Fails always, or never.
    short_side = smallest + _below(random, largest - smallest + 1)
    resized = _resized(width, height, short_side=short_side, size=size)
    left, top = (_below(random, side - size + 1) for side in resized)
    return _box(width, height, resized=resized, left=left, top=top, size=size)


class _Quiet:
    """Keeps Pillow's warnings, and no others, from being shown while any thread is inside.

    The standard context manager restores the wrong filters where threads overlap.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._inside = 0
        self._saved = None

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._saved = warnings.catch_warnings()
                self._saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._inside += 1

    def __exit__(self, *exception):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._saved.__exit__(None, None, None)


_QUIET = _Quiet()


@functools.cache
def formats() -> tuple[str, ...]:
    """Returns Pillow's names of the formats to try, the most likely first."""
    Image.init()
    return ("JPEG", "PNG", *(f for f in Image.ID if f not in {"JPEG", "PNG", *_REFUSED}))


def _orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation, 1 where there is none or it cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Cameras write all kinds of EXIF; the image is still good.
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """Converts a loaded image of any mode to RGB."""
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
    """Scales greys of more than 8 bits to uint8 [H, W]; `decode` says how."""
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


def _below(random: Random, count: int) -> int:
    """Draws a whole number from 0 to `count` - 1."""
    return int(random.random() * count)


def _resized(width: int, height: int, *, short_side: int, size: int) -> tuple[int, int]:
    """Returns the width and height of an image whose shorter side is made `short_side`."""
    if size > short_side:
        raise ValueError(f"a crop of {size} pixels is larger than a shorter side of {short_side}")
    if width <= height:
        return short_side, short_side * height // width
    return short_side * width // height, short_side


def _box(
    width: int, height: int, *, resized: tuple[int, int], left: int, top: int, size: int
) -> Box:
    """Takes a square of a resized image back to the image as it was."""
    x, y = width / resized[0], height / resized[1]
    return left * x, top * y, (left + size) * x, (top + size) * y
