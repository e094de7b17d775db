"""The 1,797 handwritten digits that come with scikit-learn, grown to the size of CIFAR's images."""

import numpy as np

from resnet_flax.data import dataset

SIDE = 32  # pixels
TEST_PARTS = 5  # One in five is the test set.
TEST_SEED = 0  # Fixed: the test set must be the same for every run.


def load(name: str, *, split: str, seed: int, **unused) -> dataset.Dataset:
    """Loads the digits; nothing is downloaded.

    Source: scikit-learn's `load_digits`, the test part of the UCI "Optical Recognition of
    Handwritten Digits" set: 8x8 images with values 0..16. Each pixel becomes a block of 4x4, its
    value is scaled to 0..255, and the one channel is repeated three times. A class-balanced fifth
    is the test set.

    Args:
      name: of the data set, "digits".
      split: a key of `dataset.SPLIT_NAMES`.
      seed: of the held-out draw.
      **unused: what `resnet_flax.data.load` passes on for data sets that come from elsewhere.

    Returns:
      The data set; images are uint8 [N, 32, 32, 3], labels int32 [N] in 0..9.

    Raises:
      UserError: `split` is unknown.
    """
    del unused
    # Takes a second to import, and only this data set needs it.
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = np.rint(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    factor = SIDE // small.shape[1]
    grey = small.repeat(factor, axis=1).repeat(factor, axis=2)
    images = np.repeat(grey[..., None], 3, axis=-1)
    everything = dataset.canonical(images, bunch.target)
    draw = dataset.balanced_draw(everything.labels, parts=TEST_PARTS, seed=TEST_SEED)
    train, test = dataset.divide(everything, draw)
    return dataset.assemble(
        name,
        train=train,
        test=test,
        class_names=tuple(str(name) for name in bunch.target_names),
        split=split,
        seed=seed,
    )
