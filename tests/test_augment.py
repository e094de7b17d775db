import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.training import augment
from tests.test_models import jit


def images(count=64):
    # Every pixel of an image has its own value, none of them 0: a crop tells where it is from.
    return np.stack([np.arange(1, 6 * 6 * 2 + 1, dtype=np.float32).reshape(6, 6, 2)] * count)


def cropping(pad, flip, fill="zero"):
    def crop(key, batch):
        draws = augment.draw_crops(key, len(batch), pad=pad, flip=flip)
        return augment.crop_and_mirror(batch, draws, pad=pad, fill=fill)

    return crop


def crop_and_mirror(batch, **options):
    return np.asarray(jit(cropping(**options))(jax.random.key(0), batch))


@pytest.mark.parametrize(("fill", "mode"), [("zero", "constant"), ("edge", "edge")])
def test_every_crop_is_one_of_the_papers_and_every_one_of_them_occurs(fill, mode):
    batch, crops = images(3000), set()
    for source in (batch[0], batch[0][:, ::-1]):
        padded = np.pad(source, ((2, 2), (2, 2), (0, 0)), mode)
        crops |= {padded[y : y + 6, x : x + 6].tobytes() for y in range(5) for x in range(5)}
    out = crop_and_mirror(batch, pad=2, flip=True, fill=fill)
    counts = collections.Counter(np.ascontiguousarray(image).tobytes() for image in out)
    assert counts.keys() == crops
    # 60 of each are expected, with a standard deviation of 7.7.
    assert 25 < min(counts.values()) <= max(counts.values()) < 95


@pytest.mark.parametrize("fill", ["zero", "edge"])
@pytest.mark.parametrize(("height", "width", "pad"), [(5, 7, 2), (3, 4, 5)])
def test_crops_of_a_tpu_are_the_same_to_the_bit(monkeypatch, height, width, pad, fill):
    batch = np.random.RandomState(0).standard_normal((20, height, width, 3)).astype(np.float32)
    batch[0, 0] = -0.0, np.inf, np.nan
    # Several nets together, each with draws of its own.
    both, keys = np.stack([batch, 2 * batch]), jax.random.split(jax.random.key(pad))
    one = jit(cropping(pad, True, fill))
    slices = [one(*x) for x in zip(keys, both, strict=True)]
    monkeypatch.setattr(augment, "_crop_by_slices", augment._crop_by_selects)
    selects = jit(jax.vmap(cropping(pad, True, fill)))(keys, both)
    np.testing.assert_array_equal(*(np.asarray(x).view(np.int32) for x in (selects, slices)))


def test_only_a_tpu_selects_and_none_where_the_border_is_wide():
    def lowered(pad, platform):
        crop = jax.jit(cropping(pad, True))
        traced = crop.trace(jax.random.key(0), images(8))
        return traced.lower(lowering_platforms=(platform,))

    for platform, pad, sliced in (("cpu", 2, 1), ("cuda", 2, 1), ("tpu", 2, 0), ("tpu", 17, 1)):
        assert ("gather" in lowered(pad, platform).as_text()) == sliced, (platform, pad)
    # The choice is made before it runs.
    assert " conditional(" not in lowered(2, "cpu").compile().as_text()


def test_one_sided_options():
    out = crop_and_mirror(images(4), pad=0, flip=False)
    np.testing.assert_array_equal(out, images(4))
    kinds = {x.tobytes() for x in crop_and_mirror(images(), pad=0, flip=True)}
    assert kinds == {images(1)[0].tobytes(), np.ascontiguousarray(images(1)[0][:, ::-1]).tobytes()}


def test_statistics_are_exact():
    data = np.random.RandomState(0).randint(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    wide = data.astype(np.float64)
    expected = {
        "pixel_mean": (wide.mean(axis=0), [1]),
        "pixel_mean_255": (wide.mean(axis=0), [255]),
        "channel": (wide.mean(axis=(0, 1, 2)), wide.std(axis=(0, 1, 2))),
        "imagenet": ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
    }
    for kind, pair in expected.items():
        found = augment.statistics(data, kind)
        assert found[0].dtype == found[1].dtype == np.float32
        for value, right in zip(found, pair, strict=True):
            np.testing.assert_allclose(value, right, rtol=1e-6)
    with pytest.raises(ValueError, match="unknown normalization 'none'"):
        augment.statistics(data, "none")


def test_normalize_subtracts_then_divides_in_float32():
    out = augment.normalize(jnp.full((1, 1, 1, 2), 10, jnp.uint8), np.float32([4, 20]), 2.0)
    np.testing.assert_array_equal(out, [[[[3, -5]]]])
    assert out.dtype == jnp.float32


def test_colours_shift_along_the_principal_components():
    shift = np.asarray(augment.color_shift(jax.random.key(0), 20_000))
    assert shift.shape == (20_000, 1, 1, 3)
    values, vectors = np.linalg.eigh(np.cov(shift[:, 0, 0].T / 255))
    np.testing.assert_allclose(np.sqrt(values[::-1]), [0.02175, 0.00188, 0.00045], rtol=0.03)
    assert abs(vectors[:, -1] @ [-0.5675, -0.5808, -0.5836]) > 0.999
    np.testing.assert_allclose(shift.mean(axis=(0, 1, 2)), 0, atol=0.1)


def test_ten_crops_are_corners_centre_and_their_mirror_images():
    images = np.arange(2 * 6 * 8 * 3).reshape(2, 6, 8, 3)
    got = np.asarray(augment.ten_crops(images, 4))
    assert got.shape == (2, 10, 4, 4, 3)
    np.testing.assert_array_equal(got[:, 3], images[:, 2:, 4:])
    np.testing.assert_array_equal(got[:, 4], images[:, 1:5, 2:6])
    np.testing.assert_array_equal(got[:, 5:], got[:, :5, :, ::-1])
