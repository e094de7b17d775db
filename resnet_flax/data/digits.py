"""The 1,797 handwritten digits that come with scikit-learn, enlarged to CIFAR's image size."""

import numpy as np

from resnet_flax.data import dataset

_SIDE = 32  # pixels
_TEST_PARTS, _TEST_SEED = 5, 0  # The test set is the same fifth for every run.


def load() -> tuple[dataset.Split, dataset.Split, tuple[str, ...]]:
    """The training set, the test set and the names of the classes.

    scikit-learn's `load_digits` has 8x8 images with values 0..16, the test part of UCI's "Optical
    Recognition of Handwritten Digits". Each pixel becomes a block of 4x4, scaled to 0..255, in
    three equal channels. A class-balanced fifth is the test set.
    """
    # Takes a second to import, and only this data set needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    factor = _SIDE // small.shape[1]
    grey = small.repeat(factor, axis=1).repeat(factor, axis=2)
    everything = dataset.canonical(np.repeat(grey[..., None], 3, axis=-1), bunch.target)
    kept, drawn = dataset.hold_out(everything.labels, parts=_TEST_PARTS, seed=_TEST_SEED)
    return everything.take(kept), everything.take(drawn), tuple(map(str, bunch.target_names))
