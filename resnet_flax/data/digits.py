"""The 1,797 handwritten digits that come with scikit-learn, enlarged to CIFAR's image size."""

import numpy as np

from resnet_flax.data import dataset

_SIDE = 32  # pixels
_TEST_PARTS, _TEST_SEED = 5, 0  # The test set is the same fifth for every run.


def load(name: str, *, split: str, seed: int, **unused) -> dataset.Dataset:
    """Loads scikit-learn's `load_digits`, 8x8 images with values 0..16.

    They are the test part of UCI's "Optical Recognition of Handwritten Digits". Each pixel becomes
    a block of 4x4, scaled to 0..255, in three equal channels. A class-balanced fifth is the test
    set.
    """
    # Takes a second to import, and only this data set needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    factor = _SIDE // small.shape[1]
    grey = small.repeat(factor, axis=1).repeat(factor, axis=2)
    everything = dataset.canonical(np.repeat(grey[..., None], 3, axis=-1), bunch.target)
    kept, drawn = dataset.hold_out(everything.labels, parts=_TEST_PARTS, seed=_TEST_SEED)
    train, test = everything.take(kept), everything.take(drawn)
    class_names = tuple(map(str, bunch.target_names))
    return dataset.assemble(name, train, test, class_names, split=split, seed=seed)
