"""The 1,797 handwritten digits that come with scikit-learn, enlarged to CIFAR's image size."""

import importlib.util
import pathlib

import numpy as np

from resnet_flax.data import dataset


def load() -> dataset.Dataset:
    """The digits, without a validation split.

    scikit-learn's `load_digits` has 8x8 images with values 0..16, the test part of UCI's "Optical
    Recognition of Handwritten Digits". Each pixel becomes a block of 4x4, scaled to 0..255, in
    three equal channels. A class-balanced fifth is the test set.
    """
    # The file that `load_digits` reads, without the two seconds that importing sklearn takes.
    package = pathlib.Path(importlib.util.find_spec("sklearn").origin).parent
    file = package / "datasets/data/digits.csv.gz"
    table = np.loadtxt(file, delimiter=",")
    small = np.rint(table[:, :64].reshape(-1, 8, 8, 1) * (255.0 / 16.0)).astype(np.uint8)
    images = small.repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    everything = dataset.canonical(images, table[:, 64].astype(int))
    # The test set is the same for every run.
    kept, drawn = dataset.hold_out(everything.labels, parts=5, seed=0)
    train, test = everything.take(kept), everything.take(drawn)
    names = tuple(map(str, range(10)))
    fingerprint = dataset.fingerprint(train, test)
    return dataset.Dataset("digits", train, None, test, names, fingerprint)
