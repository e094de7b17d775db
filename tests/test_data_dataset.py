import hashlib
import re

import numpy as np
import pytest

from resnet_flax import data
from resnet_flax.data import dataset
from resnet_flax.errors import UserError

DIGITS = "d262b64f8f99b49fe9e988b02097ba7ee03d4de3b2ce54d54344e4b021819119"


def examples(size=60, *, seed=0):
    images = np.random.RandomState(seed).randint(0, 256, (size, 4, 4, 3)).astype(np.uint8)
    images[5:9] = images[5]  # The same image under several labels, and twice under one.
    return images, np.arange(size) % 3


def pairs(images, labels):
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    return list(zip(digests, labels.tolist(), strict=True))


def test_the_canonical_order_depends_on_nothing_but_the_examples():
    images, labels = examples()
    expected = dataset.canonical(images, labels)
    assert expected.labels.dtype == np.int32
    assert pairs(expected.images, expected.labels) == sorted(pairs(images, labels))
    for seed in range(3):
        order = np.random.RandomState(seed).permutation(len(labels))
        found = dataset.canonical(np.asfortranarray(images[order]), labels[order].astype(np.int64))
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)


def test_the_fingerprint_sees_every_pixel_label_shape_and_split():
    train, test = dataset.canonical(*examples()), dataset.canonical(*examples(30, seed=1))

    def changed(split, name):
        arrays = {"images": split.images.copy(), "labels": split.labels.copy()}
        arrays[name].flat[-1] ^= 1
        return dataset.Split(**arrays)

    wide = dataset.Split(images=train.images.reshape(-1, 2, 8, 3), labels=train.labels)
    splits = [(train, test), (test, train), (wide, test)]
    splits += [(changed(train, name), test) for name in ("images", "labels")]
    splits += [(train, changed(test, name)) for name in ("images", "labels")]
    assert len({dataset.fingerprint(*pair) for pair in splits}) == 7


def test_the_draw_is_balanced_complete_and_the_same_for_ever():
    kept, drawn = dataset.hold_out(np.arange(40) % 2, parts=10, seed=3)
    assert drawn.tolist() == [4, 9, 19, 28]
    assert kept.tolist() == sorted(set(range(40)) - set(drawn.tolist()))
    labels = dataset.canonical(*examples(300)).labels
    kept, drawn = dataset.hold_out(labels, parts=5, seed=0)
    assert np.bincount(labels[drawn]).tolist() == [20] * 3
    assert np.bincount(labels[kept]).tolist() == [80] * 3


def test_a_tenth_is_held_out_by_seed():
    train, test = dataset.canonical(*examples(300)), dataset.canonical(*examples(30, seed=1))
    whole = dataset.Dataset("some", train, None, test, ("a", "b", "c"), "fingerprint")
    assert dataset.for_seed(whole, "all", 1) is whole
    draws = set()
    for seed in (1, 2):
        found = dataset.for_seed(whole, "45k/5k", seed)
        assert found.fingerprint == "fingerprint"
        assert all(type(position) is int for position in found.validation_draw)
        assert (len(found.train), len(found.validation)) == (270, 30)
        together = pairs(found.train.images, found.train.labels)
        together += pairs(found.validation.images, found.validation.labels)
        assert sorted(together) == pairs(train.images, train.labels)
        assert found.train.whole is found.validation.whole is train  # Nothing is copied.
        draws.add(found.validation_draw)
    assert len(draws) == 2


def test_the_digits():
    digits = data.load("digits")
    first, second = (data.load("digits", split="45k/5k", seed=seed) for seed in (0, 1))
    assert (digits.name, digits.class_names) == ("digits", tuple("0123456789"))
    assert (len(digits.train), digits.validation, len(digits.test)) == (1438, None, 359)
    for split in (digits.train, digits.test):
        assert split.images.shape[1:] == (32, 32, 3)
        assert (split.images.min(), split.images.max()) == (0, 255)
        blocks = split.images.reshape(-1, 8, 4, 8, 4, 3)
        assert (blocks == blocks[:, :, :1, :, :1, :1]).all()
    share = np.bincount(digits.test.labels) / np.bincount(digits.train.labels)
    assert abs(share - 0.25).max() < 0.01
    assert digits.fingerprint == first.fingerprint == second.fingerprint == DIGITS
    np.testing.assert_array_equal(first.test.images, second.test.images)
    assert (len(first.train), len(first.validation)) == (1295, 143)
    assert first.validation_draw != second.validation_draw


def test_an_unknown_name_is_answered_with_the_nearest():
    for name, hint in (
        ("cifar", " (did you mean 'cifar10'?)"),
        ("CIFAR-100", " (did you mean 'cifar100'?)"),
        ("xyz", ""),
    ):
        known = "the known ones are cifar10, cifar100, digits, folder, imagenet2012"
        with pytest.raises(UserError, match=re.escape(f"data set {name!r}{hint}; {known}")):
            data.load(name)


def test_the_spellings_of_a_split(tmp_path):
    found = [dataset.check_split(s) for s in ("all", "50k", "45k/5k", "45k", "45k5k")]
    assert found == ["all"] * 2 + ["45k/5k"] * 3
    for name in data.NAMES:
        with pytest.raises(UserError, match="config.data.split is 'ALL'.*'all'.*'50k'.*'45k/5k'"):
            data.load(name, split="ALL", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []
