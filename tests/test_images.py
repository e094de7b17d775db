import collections
import concurrent.futures
import io
import itertools
import re
import struct
import subprocess
import warnings
import zlib
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageCms

from resnet_flax.data import images


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def scene(width=40, height=30):
    """A smooth picture whose four corners differ."""
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1)
    return Image.fromarray(np.stack([red, green, 255 - red / 2 - green / 2], -1).astype(np.uint8))


def decoded(content, **options):
    image = images.decode(content, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def distance(found, picture):
    """Mean difference of pixel values."""
    return np.abs(np.asarray(found).astype(int) - np.asarray(picture)).mean()


# The largest `distance` of each format from `scene`. GIF has 256 colours.
FORMATS = {
    **dict.fromkeys(["PNG", "BMP", "DIB", "TIFF", "PPM", "TGA", "PCX", "SGI", "ICO", "DDS"], 0),
    **dict.fromkeys(["IM", "JPEG2000"], 0),
    **{"JPEG": 3, "MPO": 3, "WEBP": 5, "AVIF": 5, "GIF": 9},
}


@pytest.mark.parametrize(("kind", "tolerance"), FORMATS.items())
def test_every_format_is_recognised_by_its_content(kind, tolerance):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow will drop IM.
        try:
            content = encode(scene(32, 32), kind)
        except (OSError, KeyError):
            pytest.skip(f"this Pillow does not write {kind}")
        assert distance(decoded(content), scene(32, 32)) <= tolerance


def test_greys_and_black_and_white():
    grey = scene().convert("L")
    expected = np.stack([np.asarray(grey)] * 3, -1)
    for kind, tolerance in (("PNG", 0), ("TIFF", 0), ("JPEG", 3)):
        assert distance(decoded(encode(grey, kind)), expected) <= tolerance
    bits = grey.convert("1", dither=Image.Dither.NONE)
    for kind in ("PNG", "TIFF", "PPM", "XBM"):
        found = decoded(encode(bits, kind))
        np.testing.assert_array_equal(found, np.where(expected >= 128, 255, 0), err_msg=kind)


def test_what_is_transparent_is_laid_over_white():
    white, opaque = [255] * 3, [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    colours = Image.fromarray(np.array([[[200, 100, 0, a] for a in (0, 51, 255)]], np.uint8))
    for kind, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        found = decoded(encode(colours, kind, **options))
        np.testing.assert_allclose(found, [[white, [244, 224, 204], [200, 100, 0]]], atol=1)
    palette = Image.new("P", (3, 1))
    palette.putpalette([value for colour in opaque for value in colour])
    palette.putdata([0, 1, 2])
    one_gone = [opaque[0], white, opaque[2]]
    rgb = Image.fromarray(np.uint8([[[1, 2, 3], [1, 2, 4]]]))
    cases = [
        (Image.fromarray(np.uint8([[[100, 0], [100, 255]]]), "LA"), {}, [white, [100] * 3]),
        (palette, {}, opaque),
        (palette, {"transparency": 1}, one_gone),
        (palette, {"transparency": 1, "kind": "GIF"}, one_gone),
        (palette, {"transparency": bytes([255, 0, 51])}, [opaque[0], white, [218, 220, 222]]),
        (Image.fromarray(np.uint8([[7, 8]])), {"transparency": 7}, [white, [8] * 3]),
        (rgb, {"transparency": (1, 2, 3)}, [white, [1, 2, 4]]),
    ]
    for image, options, expected in cases:
        np.testing.assert_allclose(decoded(encode(image, **options)), [expected], atol=1)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *, depth, colour, row=b"\0" * 30, more=b""):
    """A PNG of which Pillow cannot write the kind."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + data + chunk(b"IEND", b"")


DEEP = np.array([[0, 256, 32896, 65535]], np.uint16)
WIDE, REAL = DEEP.astype(np.int32), DEEP.astype(np.float32)
RAW = DEEP.astype(">u2").tobytes()
GREYS = {
    "png": encode(Image.fromarray(DEEP)),
    "tiff": encode(Image.fromarray(DEEP), "TIFF"),
    "pgm": b"P5 4 1 65535\n" + RAW,
    "big-endian": png(4, 1, depth=16, colour=0, row=RAW),
    "int32": encode(Image.fromarray(WIDE), "TIFF"),
    "wide": encode(Image.fromarray(WIDE * 1000 - 7), "TIFF"),
    "0..1": encode(Image.fromarray(REAL / 65535), "TIFF"),
    "0..255": encode(Image.fromarray(REAL / 257), "TIFF"),
    "any": encode(Image.fromarray(REAL - 1000), "TIFF"),
}


@pytest.mark.parametrize("name", GREYS)
def test_deep_greys_are_scaled_and_not_clipped(name):
    np.testing.assert_array_equal(decoded(GREYS[name]), [[[v] * 3 for v in (0, 1, 128, 255)]])


def test_other_deep_pixels():
    colours = np.array([0, 256, 32896, 65535, 7, 65535], ">u2").tobytes()
    found = decoded(png(2, 1, depth=16, colour=2, row=colours))
    np.testing.assert_allclose(found, [[[0, 1, 128], [255, 0, 255]]], atol=1)
    half = np.array([0, 0, 0, 32896], ">u2").tobytes()
    assert decoded(png(1, 1, depth=16, colour=6, row=half)).tolist() == [[[127] * 3]]
    grey, marked = np.array([256, 512], ">u2").tobytes(), chunk(b"tRNS", struct.pack(">H", 512))
    found = decoded(png(2, 1, depth=16, colour=0, row=grey, more=marked))
    assert found[0, :, 0].tolist() == [1, 255]
    for special in (np.nan, np.inf, -np.inf):
        values = np.array([[0.5, special, 1.0]], np.float32)
        found = decoded(encode(Image.fromarray(values), "TIFF"))
        assert found[0, :, 0].tolist() == [128, 0, 255]
    for value in (0, 65535):
        flat = Image.fromarray(np.full((2, 2), value, np.uint16))
        assert np.unique(decoded(encode(flat))).tolist() == [value // 257]
    assert np.unique(decoded(encode(Image.new("F", (2, 2), -3.0), "TIFF"))).tolist() == [0]


def test_other_colour_spaces():
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    others = [scene().convert("CMYK"), scene().convert("YCbCr")]
    others.append(ImageCms.profileToProfile(scene(), *profiles, outputMode="LAB"))
    contents = [encode(other, "TIFF") for other in others]
    contents.append(encode(others[0], "JPEG", quality=95))  # Inverted, as Adobe writes it.
    for content in contents:
        assert distance(decoded(content), scene()) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_is_applied(orientation):
    # How the sensor saw it: the opposite of what the tag asks a viewer to do.
    opposite = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    method = opposite.get(orientation, images._TRANSPOSE.get(orientation))
    stored = scene(64, 48) if method is None else scene(64, 48).transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
        found = decoded(encode(stored, kind, exif=exif))
        assert found.shape == (48, 64, 3)
        assert distance(found, scene(64, 48)) < 4
    damaged = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9
    assert decoded(encode(scene(), "JPEG", exif=damaged)).shape == (30, 40, 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(decoded(content), np.full((6, 8, 3), (255, 0, 0)))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (17, 3)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_odd_sizes(size, kind):
    content = encode(Image.new("RGB", size, (9, 90, 200)), kind)
    assert images.decode(content).size == size
    for options in ({}, {"at_least": (224, 224)}, {"at_least": (1, 1)}):
        found = decoded(content, **options)
        np.testing.assert_allclose(found, np.broadcast_to((9, 90, 200), found.shape), atol=4)


REDUCED = {
    (480, 480): (1000, 750),
    (100, 80): (125, 94),
    (126, 1): (250, 188),
    (1, 93): (125, 94),
    (1, 95): (250, 188),
    (2000, 2000): (1000, 750),
}


@pytest.mark.parametrize(("at_least", "size"), REDUCED.items())
@pytest.mark.parametrize("way", ["usual", "progressive", "turned"])
def test_jpeg_is_reduced_as_far_as_asked_and_no_further(at_least, size, way):
    exif, picture = Image.Exif(), scene(1000, 750)
    if way == "turned":
        exif[0x0112], picture = 6, picture.transpose(Image.Transpose.ROTATE_90)
    content = encode(picture, "JPEG", exif=exif, progressive=way == "progressive")
    image = images.decode(content, at_least=at_least)
    assert image.size == size
    assert distance(image, scene(1000, 750).resize(size, Image.Resampling.BOX)) < 2
    assert images.decode(encode(scene()), at_least=(2, 2)).size == (40, 30)


def refused(content):
    with pytest.raises(images.ImageError) as caught:
        images.decode(content)
    message = str(caught.value)
    assert 5 < len(message) < 300
    assert not re.search("\n|0x", message)
    return message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "JPEG2000"])
def test_truncated_files_are_refused(kind):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    content = encode(Image.fromarray(noise), kind)
    for share in (0.05, 0.5, 0.9):
        refused(content[: int(len(content) * share)])


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


def test_what_is_no_image_is_refused_and_no_program_is_run(monkeypatch):
    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program was run"))
    for content in (
        b"just a text file\n" * 50,
        b"",
        b"\0" * 1000,
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        POSTSCRIPT,
        b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(POSTSCRIPT)) + b"\0" * 18 + POSTSCRIPT,
    ):
        assert refused(content) == "it is not an image of a known format, or damaged"


def test_every_single_damaged_byte_is_survived():
    """Nothing but ImageError comes out, whatever is done to a file."""
    random, messages = np.random.RandomState(0), set()
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        content = np.frombuffer(encode(scene(9, 7), kind), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[random.randint(len(damaged))] = random.randint(256)
            try:
                decoded(damaged.tobytes())
            except images.ImageError as error:
                messages.add(str(error))
    assert len(messages) > 5
    assert not any("\n" in message for message in messages)


def test_images_that_claim_to_be_huge_are_refused_before_they_are_decoded():
    for width, height in ((10_001, 10_000), (60_000, 60_000), (2**31 - 1, 1)):
        assert "100,000,000" in refused(png(width, height, depth=8, colour=2))
    limit = png(10_000, 10_000, depth=8, colour=0)
    assert "100,000,000" not in refused(limit)  # Only that it is truncated.


def test_threads_decode_at_once_and_pillow_warns_of_nothing():
    animated = png(1, 1, depth=8, colour=0, row=b"\0", more=chunk(b"acTL", b"\0" * 8) * 2)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert len(list(pool.map(decoded, [animated] * 8))) == 8


def noisy(width, height):
    noise = np.random.RandomState(1).randint(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (100, 60), (333, 1000)])
def test_the_central_box_is_resize_then_crop(size):
    image = noisy(*size)
    found = images.crop_resized(image, images.central_box(*size, short_side=64, size=56), 56)
    assert (found.dtype, found.shape, found.flags.writeable) == (np.uint8, (56, 56, 3), True)
    whole = [64 * side // min(size) for side in size]
    resized = np.asarray(image.resize(whole, Image.Resampling.BILINEAR)).astype(int)
    left, top = (round((side - 56) / 2) for side in whole)
    expected, shifted = (resized[y : y + 56, left : left + 56] for y in (top, top + 1))
    assert np.abs(found - expected).max() <= 2
    assert distance(found, expected) < 0.05
    assert distance(found, shifted) > 3  # The tolerance tells a pixel apart.


def test_known_boxes():
    # 500 x 375 becomes 341 x 256; round(117 / 2) = 58 is cut off at the left, 16 at the top.
    box = images.central_box(500, 375, short_side=256, size=224)
    x, y = 500 / 341, 375 / 256
    assert box == pytest.approx((58 * x, 16 * y, 282 * x, 240 * y))
    image, box = noisy(64, 64), images.central_box(64, 64, short_side=64, size=64)
    assert box == (0, 0, 64, 64)
    np.testing.assert_array_equal(images.crop_resized(image, box, 64), np.asarray(image))
    with pytest.raises(ValueError, match="crop of 224 pixels is larger than a shorter side of 200"):
        images.central_box(500, 375, short_side=200, size=224)


def test_random_boxes_reach_both_ends():
    random = mock.Mock()
    random.random.side_effect = [0] * 3 + [1 - 2**-53] * 3
    low, high = (
        images.random_box(random, 500, 375, short_sides=(256, 480), size=224) for _ in range(2)
    )
    assert low == pytest.approx((0, 0, 224 * 500 / 341, 224 * 375 / 256))
    assert high == pytest.approx((416 * 500 / 640, 256 * 375 / 480, 500, 375))


def test_random_boxes_are_uniform():
    draws, random = 20_000, np.random.RandomState(3)
    boxes = np.array([
        images.random_box(random, 1000, 1000, short_sides=(8, 11), size=6) for _ in range(draws)
    ])  # fmt: skip
    sides = boxes[:, 2] - boxes[:, 0]
    np.testing.assert_allclose(sides, boxes[:, 3] - boxes[:, 1])
    short_sides = np.rint(6 * 1000 / sides).astype(int)
    corners = np.rint(boxes[:, :2] * short_sides[:, None] / 1000).astype(int)
    counts = collections.Counter(zip(short_sides.tolist(), *corners.T.tolist(), strict=True))
    for side in range(8, 12):
        expected = draws / 4 / (side - 5) ** 2
        for place in itertools.product([side], range(side - 5), range(side - 5)):
            assert abs(counts.pop(place) - expected) < 5 * expected**0.5
    assert not counts


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (20_000, 30)])
def test_boxes_of_any_image_lie_inside_it(size):
    image, random = Image.new("RGB", size, (1, 2, 3)), np.random.RandomState(0)
    boxes = [images.random_box(random, *size, short_sides=(256, 480), size=224) for _ in range(50)]
    boxes.append(images.central_box(*size, short_side=256, size=224))
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= size[0] + 1e-6
        assert 0 <= top < bottom <= size[1] + 1e-6
    for box in boxes[-3:]:
        found = images.crop_resized(image, box, 224)
        np.testing.assert_array_equal(found, np.broadcast_to((1, 2, 3), (224, 224, 3)))
