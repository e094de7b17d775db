import io
import pathlib
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

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


# What each format must give of `scene`: 0 for lossless ones, else a mean difference. GIF has 256
# colours.
FORMATS = {
    **dict.fromkeys(["PNG", "BMP", "DIB", "TIFF", "PPM", "TGA", "PCX", "SGI", "ICO", "DDS"], 0),
    **dict.fromkeys(["IM", "JPEG2000"], 0),
    **{"JPEG": 3, "MPO": 3, "WEBP": 5, "AVIF": 5, "GIF": 9},
}


@pytest.mark.parametrize(("kind", "tolerance"), FORMATS.items())
def test_every_format_is_recognised_by_its_content(kind, tolerance):
    picture = scene(32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Pillow will drop IM.
        try:
            content = encode(picture, kind)
        except (OSError, KeyError):
            pytest.skip(f"this Pillow does not write {kind}")
    found = decoded(content)
    assert found.shape == (32, 32, 3)
    difference = np.abs(found.astype(int) - np.asarray(picture))
    assert difference.mean() <= tolerance


def test_greys_and_black_and_white():
    grey = scene().convert("L")
    expected = np.stack([np.asarray(grey)] * 3, -1)
    np.testing.assert_array_equal(decoded(encode(grey)), expected)
    np.testing.assert_array_equal(decoded(encode(grey, "TIFF")), expected)
    assert np.abs(decoded(encode(grey, "JPEG", quality=95)).astype(int) - expected).max() < 10
    bits = grey.convert("1", dither=Image.Dither.NONE)
    for kind in ("PNG", "TIFF", "PPM", "XBM"):
        np.testing.assert_array_equal(
            decoded(encode(bits, kind)), np.where(expected >= 128, 255, 0), err_msg=kind
        )


def test_what_is_transparent_is_laid_over_white():
    colours = np.array([[[200, 100, 0, a] for a in (0, 51, 255)]], np.uint8)
    expected = [[[255, 255, 255], [244, 224, 204], [200, 100, 0]]]
    for content in (
        encode(Image.fromarray(colours)),
        encode(Image.fromarray(colours), "TIFF"),
        encode(Image.fromarray(colours), "WEBP", lossless=True),
    ):
        np.testing.assert_allclose(decoded(content), expected, atol=1)
    grey = Image.fromarray(np.array([[[100, 0], [100, 255]]], np.uint8), "LA")
    np.testing.assert_array_equal(decoded(encode(grey)), [[[255] * 3, [100] * 3]])


def test_transparency_of_a_palette_and_of_one_colour():
    palette = Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    opaque = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    np.testing.assert_array_equal(decoded(encode(palette))[0], opaque)
    one = [[10, 20, 30], [255, 255, 255], [70, 80, 90]]
    for content in (encode(palette, transparency=1), encode(palette, "GIF", transparency=1)):
        np.testing.assert_array_equal(decoded(content)[0], one)
    alphas = decoded(encode(palette, transparency=bytes([255, 0, 51])))[0]
    np.testing.assert_allclose(alphas, [opaque[0], [255] * 3, [218, 220, 222]], atol=1)
    grey = Image.fromarray(np.array([[7, 8]], np.uint8))
    np.testing.assert_array_equal(decoded(encode(grey, transparency=7))[0], [[255] * 3, [8] * 3])
    colour = Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8))
    content = encode(colour, transparency=(1, 2, 3))
    np.testing.assert_array_equal(decoded(content)[0], [[255] * 3, [1, 2, 4]])


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *, depth, colour, rows, more=b""):
    """A PNG of which Pillow cannot write the kind."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    body = chunk(b"IHDR", header) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_deep_greys_are_scaled_and_not_clipped():
    deep = np.array([[0, 256, 32896, 65535]], np.uint16)
    expected = np.array([[0, 1, 128, 255]])
    wide, real = deep.astype(np.int32), deep.astype(np.float32)
    cases = {
        "png": encode(Image.fromarray(deep)),
        "tiff": encode(Image.fromarray(deep), "TIFF"),
        "pgm": b"P5 4 1 65535\n" + deep.astype(">u2").tobytes(),
        "big-endian": png(4, 1, depth=16, colour=0, rows=[deep.astype(">u2").tobytes()]),
        "int32": encode(Image.fromarray(wide), "TIFF"),
        "wide": encode(Image.fromarray(wide * 1000 - 7), "TIFF"),
        "0..1": encode(Image.fromarray(real / 65535), "TIFF"),
        "0..255": encode(Image.fromarray(real / 257), "TIFF"),
        "any": encode(Image.fromarray(real - 1000), "TIFF"),
    }
    for name, content in cases.items():
        found = decoded(content)
        assert found.shape == (1, 4, 3), name
        np.testing.assert_array_equal(found[..., 1], expected, err_msg=name)


def test_deep_colours_and_deep_transparency():
    values = np.array([0, 256, 32896, 65535, 7, 65535], ">u2")
    found = decoded(png(2, 1, depth=16, colour=2, rows=[values.tobytes()]))
    np.testing.assert_allclose(found, [[[0, 1, 128], [255, 0, 255]]], atol=1)
    half = np.array([0, 0, 0, 32896], ">u2")
    assert (
        decoded(png(1, 1, depth=16, colour=6, rows=[half.tobytes()])).ravel().tolist() == [127] * 3
    )
    grey, marked = np.array([256, 512], ">u2"), chunk(b"tRNS", struct.pack(">H", 512))
    found = decoded(png(2, 1, depth=16, colour=0, rows=[grey.tobytes()], more=marked))
    assert found[0, :, 0].tolist() == [1, 255]


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers_are_black(special):
    values = np.array([[0.5, special, 1.0]], np.float32)
    found = decoded(encode(Image.fromarray(values), "TIFF"))
    assert found[0, :, 0].tolist() == [128, 0, 255]


def test_flat_deep_images():
    for value in (0, 65535):
        flat = Image.fromarray(np.full((2, 2), value, np.uint16))
        assert np.unique(decoded(encode(flat))).tolist() == [value // 257]
    assert np.unique(decoded(encode(Image.new("F", (2, 2), -3.0), "TIFF"))).tolist() == [0]


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces(mode):
    picture = scene()
    if mode == "LAB":
        from PIL import ImageCms

        profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
        other = ImageCms.profileToProfile(picture, *profiles, outputMode="LAB")
    else:
        other = picture.convert(mode)
    found = decoded(encode(other, "TIFF")).astype(int)
    assert np.abs(found - np.asarray(picture)).mean() < 3


@pytest.mark.parametrize("transform", [0, 2])
def test_cmyk_jpegs_as_adobe_writes_them(transform):
    # Pillow writes what Adobe does: inverted, with a marker that says so. 2 is YCCK, which Pillow
    # does not write; only the marker is changed, so that the decoder must take the other way.
    content = encode(scene().convert("CMYK"), "JPEG", quality=95)
    at = content.index(b"Adobe") + 11
    assert content[at] in (0, 2)
    written = content[at]
    content = content[:at] + bytes([transform]) + content[at + 1 :]
    found = decoded(content).astype(int)
    difference = np.abs(found - np.asarray(scene())).mean()
    assert difference < 3 if transform == written else difference > 20


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_exif_orientation_is_applied(orientation, kind):
    upright = scene(64, 48)
    # How the sensor saw it: the opposite of what the tag asks a viewer to do.
    opposite = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    method = opposite.get(orientation, images._TRANSPOSE.get(orientation))
    stored = upright if method is None else upright.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decoded(encode(stored, kind, exif=exif))
    assert found.shape == (48, 64, 3)
    assert np.abs(found.astype(int) - np.asarray(upright)).mean() < 4


def test_a_turned_jpeg_is_reduced_by_its_turned_size():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encode(scene(800, 200), "JPEG", exif=exif)
    assert images.decode(content).size == (200, 800)
    assert images.decode(content, at_least=(100, 100)).size == (100, 400)
    assert images.decode(content, at_least=(50, 400)).size == (100, 400)
    assert images.decode(content, at_least=(50, 401)).size == (200, 800)


def test_damaged_exif_does_no_harm():
    content = encode(scene(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 9)
    assert decoded(content).shape == (30, 40, 3)


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
    for options in ({}, {"at_least": (224, 224)}, {"at_least": (1, 1)}):
        found = decoded(content, **options)
        np.testing.assert_allclose(found, np.broadcast_to((9, 90, 200), found.shape), atol=4)
        assert "at_least" in options or found.shape == (size[1], size[0], 3)


def test_a_large_photograph():
    content = encode(Image.new("RGB", (8000, 6000), (9, 90, 200)), "JPEG")
    image = images.decode(content, at_least=(480, 480))
    assert image.size == (1000, 750)
    assert images.decode(content).size == (8000, 6000)


@pytest.mark.parametrize(
    ("at_least", "size"),
    [
        ((480, 480), (1000, 750)),
        ((100, 80), (125, 94)),
        ((126, 1), (250, 188)),
        ((1, 93), (125, 94)),
        ((1, 95), (250, 188)),
        ((1000, 750), (1000, 750)),
        ((2000, 2000), (1000, 750)),
        ((1, 1), (125, 94)),
    ],
)
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_reduced_as_far_as_asked_and_no_further(at_least, size, progressive):
    content = encode(scene(1000, 750), "JPEG", progressive=progressive)
    image = images.decode(content, at_least=at_least)
    assert image.size == size
    expected = scene(1000, 750).resize(size, Image.Resampling.BOX)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 2
    assert images.decode(encode(scene(100, 75)), at_least=(2, 2)).size == (100, 75)  # PNG


@pytest.mark.parametrize("at_least", [(0, 5), (5, -1)])
def test_at_least_nothing_is_refused(at_least):
    with pytest.raises(ValueError, match="both must be positive") as caught:
        images.decode(encode(scene()), at_least=at_least)
    assert not isinstance(caught.value, images.ImageError)


def refused(content):
    with pytest.raises(images.ImageError) as caught:
        images.decode(content)
    message = str(caught.value)
    assert 5 < len(message) < 300
    assert "\n" not in message
    assert "0x" not in message
    return message


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "JPEG2000"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncated_files_are_refused(kind, share):
    noise = np.random.RandomState(0).randint(0, 256, (64, 64, 3)).astype(np.uint8)
    content = encode(Image.fromarray(noise), kind)
    refused(content[: int(len(content) * share)])


def test_what_is_no_image_is_refused():
    known = "it is not an image of a known format, or damaged"
    assert refused(b"just a text file\n" * 50) == known
    assert refused(b"") == known
    assert refused(b"\0" * 1000) == known
    assert refused(b"\x89PNG\r\n\x1a\n") == known
    assert refused(b"<svg xmlns='http://www.w3.org/2000/svg'/>") == known
    refused(b"\xff\xd8\xff" + b"\0" * 100)


def test_every_single_damaged_byte_is_survived():
    """Nothing but ImageError comes out, whatever is done to a file."""
    random, messages = np.random.RandomState(0), set()
    small = scene(9, 7)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        content = np.frombuffer(encode(small, kind), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[random.randint(len(damaged))] = random.randint(256)
            try:
                assert images.decode(damaged.tobytes()).mode == "RGB"
            except images.ImageError as error:
                messages.add(str(error))
    assert len(messages) > 5
    assert not any("\n" in message for message in messages)


def test_images_that_claim_to_be_huge_are_refused_before_they_are_decoded():
    for width, height in ((10_001, 10_000), (60_000, 60_000), (2**31 - 1, 1)):
        bomb = png(width, height, depth=8, colour=2, rows=[b"\0" * 30])
        assert "100,000,000" in refused(bomb)
    limit = png(10_000, 10_000, depth=8, colour=0, rows=[b"\0" * 30])
    assert "100,000,000" not in refused(limit)  # Only that it is truncated.


@pytest.mark.parametrize("binary", [False, True])
def test_postscript_is_refused_and_no_program_is_run(binary, monkeypatch):
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    if binary:
        content = b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, len(content)) + b"\0" * 18 + content
    for name in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, lambda *a, **k: pytest.fail("a program was run"))
    assert refused(content) == "it is PostScript, which is not read"
    monkeypatch.setattr(images, "_POSTSCRIPT", ())
    refused(content)


def test_no_warning_of_pillow_is_shown_and_others_are():
    huge = png(9_999, 9_999, depth=1, colour=0, rows=[b"\0" * 10])  # Pillow warns of its size.
    animated = png(1, 1, depth=8, colour=0, rows=[b"\0"], more=chunk(b"acTL", b"\0" * 8) * 2)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        refused(huge)
        decoded(animated)
        assert shown == []
        with Image.open(io.BytesIO(animated)) as image:
            image.load()
        assert shown  # Such a file would have warned, and still does elsewhere.


def test_threads_leave_the_warning_filters_as_they_were():
    content, before = encode(scene(200, 200)), list(warnings.filters)
    failures = []

    def work():
        for _ in range(30):
            try:
                images.decode(content)
            except Exception as error:
                failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert warnings.filters == before


def test_importing_it_does_not_import_jax():
    code = (
        "import sys, types; package = types.ModuleType('resnet_flax')\n"
        f"package.__path__ = [{str(pathlib.Path(images.__file__).parents[1])!r}]\n"
        "sys.modules['resnet_flax'] = package\n"
        "data = types.ModuleType('resnet_flax.data')\n"
        f"data.__path__ = [{str(pathlib.Path(images.__file__).parent)!r}]\n"
        "sys.modules['resnet_flax.data'] = data\n"
        "import resnet_flax.data.images\n"
        "assert not {'jax', 'tensorflow', 'tensorflow_datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def resized_then_cropped(image, *, short_side, left, top, size):
    """The usual two steps."""
    scale = short_side / min(image.size)
    whole = tuple(max(short_side, int(side * scale + 1e-9)) for side in image.size)
    resized = image.resize(whole, Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def noisy(width, height):
    noise = np.random.RandomState(1).randint(0, 256, (height, width, 3))
    return Image.fromarray(noise.astype(np.uint8))


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (256, 256), (100, 60), (333, 1000)])
def test_the_central_box_is_resize_then_crop(size):
    image = noisy(*size)
    box = images.central_box(*size, short_side=64, size=56)
    whole = [max(64, 64 * side // min(size)) for side in size]
    left, top = (round((side - 56) / 2) for side in whole)
    expected = resized_then_cropped(image, short_side=64, left=left, top=top, size=56)
    found = images.crop_resized(image, box, 56)
    assert found.dtype == np.uint8
    assert found.shape == (56, 56, 3)
    assert found.flags.writeable
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 2
    assert difference.mean() < 0.05
    shifted = resized_then_cropped(image, short_side=64, left=left, top=top + 1, size=56)
    assert np.abs(found.astype(int) - shifted).mean() > 3  # The tolerance tells a pixel apart.


def test_the_corners_are_resize_then_crop():
    image = noisy(120, 90)
    for across, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        box = images.short_side_box(120, 90, short_side=48, size=32, across=across, down=down)
        expected = resized_then_cropped(
            image, short_side=48, left=across * 32, top=down * 16, size=32
        )
        found = images.crop_resized(image, box, 32)
        assert np.abs(found.astype(int) - expected).max() <= 2
    assert box[2:] == pytest.approx((120, 90))


def test_the_whole_of_a_square_image_is_left_alone():
    image = noisy(64, 64)
    box = images.central_box(64, 64, short_side=64, size=64)
    np.testing.assert_array_equal(images.crop_resized(image, box, 64), np.asarray(image))


def test_known_boxes():
    # 500 x 375 becomes 341 x 256; round(117 / 2) = 58 is cut off at the left, 16 at the top.
    box = images.central_box(500, 375, short_side=256, size=224)
    x, y = 500 / 341, 375 / 256
    assert box == pytest.approx((58 * x, 16 * y, 282 * x, 240 * y))
    assert images.central_box(10, 10, short_side=256, size=256) == (0, 0, 10, 10)


class Counting:
    """Gives the numbers it is told to."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def test_random_boxes_reach_both_ends():
    almost = 1 - 2**-53
    low = images.random_box(Counting(0, 0, 0), 500, 375, short_sides=(256, 480), size=224)
    assert low == pytest.approx((0, 0, 224 * 500 / 341, 224 * 375 / 256))
    high = images.random_box(
        Counting(almost, almost, almost), 500, 375, short_sides=(256, 480), size=224
    )
    assert high == pytest.approx((416 * 500 / 640, 256 * 375 / 480, 500, 375))


@pytest.mark.parametrize("random", [np.random.RandomState(3), np.random.default_rng(3)])
def test_random_boxes_are_uniform(random):
    draws = 20_000
    boxes = np.array([
        images.random_box(random, 1000, 1000, short_sides=(8, 11), size=6) for _ in range(draws)
    ])  # fmt: skip
    sides = boxes[:, 2] - boxes[:, 0]
    np.testing.assert_allclose(sides, boxes[:, 3] - boxes[:, 1])
    short_sides = np.rint(6 * 1000 / sides).astype(int)
    values, counts = np.unique(short_sides, return_counts=True)
    assert values.tolist() == [8, 9, 10, 11]
    assert np.abs(counts / draws - 1 / 4).max() < 0.015
    lefts = np.rint(boxes[:, :2] * short_sides[:, None] / 1000).astype(int)
    for value in values:
        for column in (0, 1):
            places, counts = np.unique(lefts[short_sides == value, column], return_counts=True)
            assert places.tolist() == list(range(value - 6 + 1))
            assert np.abs(counts / counts.sum() - 1 / len(places)).max() < 0.03
    together = lefts[short_sides == 11]
    assert abs(np.corrcoef(together.T)[0, 1]) < 0.05


def test_a_random_box_is_resize_then_crop():
    image = noisy(90, 70)
    for seed in range(5):
        box = images.random_box(np.random.RandomState(seed), 90, 70, short_sides=(40, 60), size=32)
        short_side = round(32 * 70 / (box[3] - box[1]))
        x, y = (short_side * 90 // 70) / 90, short_side / 70
        expected = resized_then_cropped(
            image, short_side=short_side, left=round(box[0] * x), top=round(box[1] * y), size=32
        )
        found = images.crop_resized(image, box, 32)
        assert np.abs(found.astype(int) - expected).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (20_000, 30)])
def test_boxes_of_any_image_lie_inside_it(size):
    image = Image.new("RGB", size, (1, 2, 3))
    random = np.random.RandomState(0)
    boxes = [images.random_box(random, *size, short_sides=(256, 480), size=224) for _ in range(50)]
    boxes.append(images.central_box(*size, short_side=256, size=224))
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= size[0] + 1e-6
        assert 0 <= top < bottom <= size[1] + 1e-6
    for box in boxes[-3:]:
        found = images.crop_resized(image, box, 224)
        np.testing.assert_array_equal(found, np.broadcast_to((1, 2, 3), (224, 224, 3)))


def test_crops_larger_than_the_image_are_refused():
    with pytest.raises(ValueError, match="crop of 224 pixels is larger than a shorter side of 200"):
        images.central_box(500, 375, short_side=200, size=224)
    random = np.random.RandomState(0)
    for _ in range(5):  # Not only where the draw is small.
        with pytest.raises(ValueError, match="crop of 300 pixels is larger .* of 256"):
            images.random_box(random, 500, 375, short_sides=(256, 480), size=300)
    with pytest.raises(ValueError, match="must not be above"):
        images.random_box(random, 500, 375, short_sides=(480, 256), size=224)
