import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_flax.training import augment


def images(count=64):
    # Every pixel of an image has its own value, none of them 0: a crop tells where it is from.
    one = np.arange(1, 6 * 6 * 2 + 1, dtype=np.float32).reshape(6, 6, 2)
    return np.stack([one] * count)


def crop_and_mirror(key, batch, *, pad, flip, fill="zero"):
    draws = augment.draw_crops(key, len(batch), pad=pad, flip=flip)
    return augment.crop_and_mirror(batch, draws, pad=pad, fill=fill)


def possible_crops(image, pad, mode="constant"):
    height, width, _ = image.shape
    for mirrored in (False, True):
        source = image[:, ::-1] if mirrored else image
        padded = np.pad(source, ((pad, pad), (pad, pad), (0, 0)), mode)
        for y in range(2 * pad + 1):
            for x in range(2 * pad + 1):
                yield (y, x, mirrored), padded[y : y + height, x : x + width]


def test_every_crop_is_one_of_the_papers_and_every_one_of_them_occurs():
    batch = images(3000)
    out = np.asarray(crop_and_mirror(jax.random.key(0), batch, pad=2, flip=True))
    names = {crop.tobytes(): name for name, crop in possible_crops(batch[0], 2)}
    assert len(names) == 50
    counts = {}
    for image in out:
        name = names[np.ascontiguousarray(image).tobytes()]
        counts[name] = counts.get(name, 0) + 1
    # 60 of each are expected, with a standard deviation of 7.7.
    assert len(counts) == 50
    assert min(counts.values()) > 25
    assert max(counts.values()) < 95


def test_edge_fill_repeats_the_nearest_pixel():
    batch = images(300)
    out = np.asarray(crop_and_mirror(jax.random.key(0), batch, pad=2, flip=True, fill="edge"))
    names = {crop.tobytes() for _, crop in possible_crops(batch[0], 2, "edge")}
    assert {np.ascontiguousarray(image).tobytes() for image in out} <= names


def lowered(pad, platform):
    draws = augment.draw_crops(jax.random.key(0), 8, pad=pad, flip=True)
    crop = jax.jit(functools.partial(augment.crop_and_mirror, pad=pad))
    return crop.trace(jnp.asarray(images(8)), draws).lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("fill", ["zero", "edge"])
@pytest.mark.parametrize(("height", "width", "pad"), [(32, 32, 4), (5, 7, 2), (7, 5, 1), (3, 4, 9)])
def test_crops_of_a_tpu_are_the_same_to_the_bit(monkeypatch, height, width, pad, fill):
    batch = np.random.RandomState(0).standard_normal((40, height, width, 3)).astype(np.float32)
    batch[0, 0] = -0.0, np.inf, np.nan
    key = jax.random.key(pad)
    slices = crop_and_mirror(key, batch, pad=pad, flip=True, fill=fill)
    monkeypatch.setattr(augment, "_crop_by_slices", augment._crop_by_selects)
    selects = crop_and_mirror(key, batch, pad=pad, flip=True, fill=fill)
    assert selects.dtype == np.float32
    np.testing.assert_array_equal(*(np.asarray(x).view(np.int32) for x in (selects, slices)))
    # Several nets together, each with draws of its own.
    both = jnp.stack([batch, 2 * batch])
    keys = jax.random.split(key)
    each = functools.partial(crop_and_mirror, pad=pad, flip=True, fill=fill)
    monkeypatch.undo()
    slices = jnp.stack([each(*x) for x in zip(keys, both, strict=True)])
    monkeypatch.setattr(augment, "_crop_by_slices", augment._crop_by_selects)
    np.testing.assert_array_equal(jax.vmap(each)(keys, both), slices)


def test_only_a_tpu_selects_and_none_where_the_border_is_wide():
    for platform, pad, sliced in (("cpu", 2, 1), ("cuda", 2, 1), ("tpu", 2, 0), ("tpu", 17, 1)):
        assert ("gather" in lowered(pad, platform).as_text()) == sliced, (platform, pad)
    # The choice is made before it runs.
    assert " conditional(" not in lowered(2, "cpu").compile().as_text()


def test_draws_do_not_depend_on_the_batch_around_an_image():
    key = jax.random.key(1)
    a = crop_and_mirror(key, images(64), pad=2, flip=True)
    b = crop_and_mirror(key, images(64) * 2, pad=2, flip=True)
    np.testing.assert_array_equal(a * 2, b)


def test_nothing_asked_nothing_done():
    out = crop_and_mirror(jax.random.key(0), images(4), pad=0, flip=False)
    np.testing.assert_array_equal(out, images(4))


def test_one_sided_options():
    flipped = crop_and_mirror(jax.random.key(0), images(64), pad=0, flip=True)
    kinds = {np.asarray(i).tobytes() for i in flipped}
    assert kinds == {images(1)[0].tobytes(), np.ascontiguousarray(images(1)[0][:, ::-1]).tobytes()}


def test_statistics_are_exact():
    rng = np.random.RandomState(0)
    data = rng.randint(0, 256, (50, 4, 4, 3)).astype(np.uint8)
    mean, std = augment.statistics(data, "pixel_mean")
    np.testing.assert_allclose(mean, data.astype(np.float64).mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(std, [1])
    unit_mean, std = augment.statistics(data, "pixel_mean_255")
    np.testing.assert_array_equal(mean, unit_mean)
    np.testing.assert_array_equal(std, [255])
    mean, std = augment.statistics(data, "channel")
    np.testing.assert_allclose(mean, data.astype(np.float64).mean(axis=(0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(std, data.astype(np.float64).std(axis=(0, 1, 2)), rtol=1e-6)
    assert mean.dtype == std.dtype == np.float32
    with pytest.raises(ValueError, match="unknown normalization 'none'"):
        augment.statistics(data, "none")


def test_normalize_subtracts_then_divides_in_float32():
    out = augment.normalize(jnp.full((1, 1, 1, 2), 10, jnp.uint8), np.float32([4, 20]), 2.0)
    np.testing.assert_array_equal(out, [[[[3, -5]]]])
    assert out.dtype == jnp.float32


def test_colours_shift_along_the_principal_components():
    shift = np.asarray(augment.color_shift(jax.random.key(0), 20_000))
    assert shift.shape == (20_000, 1, 1, 3)
    covariance = np.cov(shift[:, 0, 0].T / 255)
    values, vectors = np.linalg.eigh(covariance)
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


def test_imagenet_statistics_are_the_usual_ones():
    mean, std = augment.statistics(np.zeros((1, 2, 2, 3), np.uint8), "imagenet")
    np.testing.assert_allclose(mean, [123.675, 116.28, 103.53], rtol=1e-6)
    np.testing.assert_allclose(std, [58.395, 57.12, 57.375], rtol=1e-6)
