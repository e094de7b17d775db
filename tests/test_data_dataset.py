import hashlib
import warnings

import numpy as np
import pytest

from resnet_flax import data
from resnet_flax.data import dataset, streamed
from resnet_flax.errors import UserError

DIGITS = "d262b64f8f99b49fe9e988b02097ba7ee03d4de3b2ce54d54344e4b021819119"


def example_split(size=60, *, classes=3, seed=0):
    random = np.random.RandomState(seed)
    images = random.randint(0, 256, (size, 4, 4, 3)).astype(np.uint8)
    labels = np.arange(size) % classes
    images[5:9] = images[5]  # The same image under several labels, and twice under one.
    return images, labels


def test_the_canonical_order_depends_on_nothing_but_the_examples():
    images, labels = example_split()
    expected = dataset.canonical(images, labels)
    for seed in range(5):
        order = np.random.RandomState(seed).permutation(len(labels))
        found = dataset.canonical(images[order], labels[order].astype(np.int64))
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)
    assert expected.labels.dtype == np.int32
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in expected.images]
    pairs = list(zip(digests, expected.labels.tolist(), strict=True))
    assert pairs == sorted(pairs)
    # The pairs of image and label are those that went in.
    assert sorted(zip(map(bytes, images), labels, strict=True)) == sorted(
        zip(map(bytes, expected.images), expected.labels, strict=True)
    )


def test_the_canonical_order_does_not_depend_on_the_layout_in_memory():
    images, labels = example_split()
    by_columns = np.asfortranarray(images)
    np.testing.assert_array_equal(
        dataset.canonical(by_columns, labels).images, dataset.canonical(images, labels).images
    )


def test_the_fingerprint_sees_every_pixel_label_shape_and_split():
    train = dataset.canonical(*example_split())
    test = dataset.canonical(*example_split(30, seed=1))

    def changed(split, **changes):
        arrays = {"images": split.images.copy(), "labels": split.labels.copy()}
        for name, change in changes.items():
            change(arrays[name])
        return dataset.Split(**arrays)

    def flip(array):
        array.flat[-1] ^= 1

    wide = dataset.Split(images=train.images.reshape(-1, 2, 8, 3), labels=train.labels)
    found = {
        dataset.fingerprint(train, test),
        dataset.fingerprint(test, train),
        dataset.fingerprint(changed(train, images=flip), test),
        dataset.fingerprint(changed(train, labels=flip), test),
        dataset.fingerprint(train, changed(test, images=flip)),
        dataset.fingerprint(train, changed(test, labels=flip)),
        dataset.fingerprint(wide, test),
    }
    assert len(found) == 7
    assert dataset.fingerprint(changed(train), changed(test)) in found


@pytest.mark.parametrize("parts", [5, 10])
def test_a_draw_is_balanced_disjoint_complete_and_seeded(parts):
    split = dataset.canonical(*example_split(300))
    draws = [dataset.balanced_draw(split.labels, parts=parts, seed=seed) for seed in (0, 1, 0)]
    assert draws[0].tolist() == draws[2].tolist() != draws[1].tolist()
    for draw in draws:
        assert draw.tolist() == sorted(set(draw.tolist()))
        kept, held_out = dataset.divide(split, draw)
        assert np.bincount(held_out.labels).tolist() == [100 // parts] * 3
        assert np.bincount(kept.labels).tolist() == [100 - 100 // parts] * 3
        both = np.concatenate([kept.images, held_out.images])
        assert sorted(map(bytes, both)) == sorted(map(bytes, split.images))
        np.testing.assert_array_equal(held_out.images, split.images[draw])


def test_the_draw_is_the_same_for_ever():
    labels = np.arange(40) % 2
    assert dataset.balanced_draw(labels, parts=10, seed=3).tolist() == [4, 9, 19, 28]


def assembled(**changes):
    arguments = {
        "train": dataset.canonical(*example_split(300)),
        "test": dataset.canonical(*example_split(30, seed=1)),
        "class_names": ("a", "b", "c"),
        "split": "45k/5k",
        "seed": 0,
        **changes,
    }
    return dataset.assemble("some", **arguments)


def test_the_fingerprint_does_not_depend_on_the_draw():
    whole, first, second = assembled(split="all"), assembled(seed=1), assembled(seed=2)
    assert whole.fingerprint == first.fingerprint == second.fingerprint
    assert whole.validation is None
    assert whole.validation_draw is None
    assert (len(whole.train), len(first.train), len(first.validation)) == (300, 270, 30)
    np.testing.assert_array_equal(
        first.validation.images, whole.train.images[list(first.validation_draw)]
    )
    assert all(type(position) is int for position in first.validation_draw)
    assert first.validation_draw != second.validation_draw


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, None, True, "0"])
def test_a_wrong_seed_is_named(seed):
    with pytest.raises(UserError, match="the data seed is "):
        assembled(seed=seed)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int32)),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, np.int32)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int64)),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int32)),
    ],
)
def test_a_split_of_wrong_arrays_is_refused(images, labels):
    with pytest.raises(ValueError, match="must be"):
        dataset.Split(images=images, labels=labels)


def test_the_digits():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        digits = data.load("digits")
    assert digits.name == "digits"
    assert digits.class_names == tuple("0123456789")
    assert (len(digits.train), len(digits.test)) == (1438, 359)
    assert digits.validation is None
    assert digits.fingerprint == DIGITS
    for split in (digits.train, digits.test):
        assert split.images.shape[1:] == (32, 32, 3)
        assert split.images.min() == 0
        assert split.images.max() == 255
        blocks = split.images.reshape(-1, 8, 4, 8, 4, 3)
        assert (blocks == blocks[:, :, :1, :, :1, :1]).all()
    share = np.bincount(digits.test.labels) / np.bincount(digits.train.labels)
    assert abs(share - 0.25).max() < 0.01


def test_the_digits_are_split_by_seed_and_their_test_set_is_not():
    first, second = (data.load("digits", split="45k/5k", seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert first.validation_draw != second.validation_draw
    assert len(first.validation) == len(first.validation_draw) == 143
    assert len(first.train) + len(first.validation) == 1438
    assert first.fingerprint == second.fingerprint == DIGITS


def test_names():
    assert data.NAMES == ("cifar10", "cifar100", "digits", "folder", "imagenet2012")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar", "cifar10"),
        ("CIFAR-100", "cifar100"),
        ("digit", "digits"),
        ("xyz", None),
        (7, None),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, hint):
    with pytest.raises(UserError) as caught:
        data.load(name)
    message = str(caught.value)
    assert repr(name) in message
    assert "cifar10, cifar100, digits, folder, imagenet2012" in message
    assert (f"did you mean {hint!r}" in message) == (hint is not None)
    assert ("did you mean" in message) == (hint is not None)


@pytest.mark.parametrize("name", data.NAMES)
@pytest.mark.parametrize("split", ["45k-5k", "ALL", "", None, 45, []])
def test_an_unknown_split_is_answered_with_the_known_ones(name, split, tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.split is .*'all'.*'50k'.*'45k/5k'"):
        data.load(name, split=split, data_dir=tmp_path, geometry=streamed.Geometry(8, (8, 8), 8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("alias", ["45k", "45k5k"])
def test_the_spellings_of_a_split(alias):
    expected = data.load("digits", split="45k/5k", seed=4).validation_draw
    assert data.load("digits", split=alias, seed=4).validation_draw == expected
    assert data.load("digits", split="50k").validation is None
