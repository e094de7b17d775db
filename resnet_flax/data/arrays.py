"""A data set given as arrays in Python, see `resnet_flax.fit`."""

from collections.abc import Sequence

import numpy as np

from resnet_flax.data import dataset
from resnet_flax.errors import UserError

NAME = "arrays"

Pair = tuple[np.ndarray, np.ndarray]
"""Images, uint8 [N, S, S, 3], and labels, integers [N]."""


def load(
    train: Pair,
    test: Pair | None = None,
    class_names: Sequence[str] | None = None,
    *,
    split: str = "all",
    seed: int = 0,
) -> dataset.Dataset:
    """Makes a data set of arrays.

    Args:
      train: the training set.
      test: the test set; None: a tenth of each class, the same one for every seed.
      class_names: by label; None: the labels themselves.
      split: see `data.load`.
      seed: of the draw for validation.

    Raises:
      UserError: the arrays have other types or shapes, or do not fit together.
    """
    given = _check("the training", *train)
    if test is None:
        kept, drawn = dataset.hold_out(given.labels, seed=0)
        examples, tests = given.take(kept), given.take(drawn)
    else:
        examples, tests = given, _check("the test", *test)
    if tests.image_shape != examples.image_shape:
        raise UserError(
            f"the test images are {tests.image_shape}, the training images {examples.image_shape}"
        )
    if not len(tests):
        raise UserError("there are no test images: give `test`, or two images of a class")
    classes = 1 + max(int(labels.max()) for labels in (given.labels, tests.labels))
    names = tuple(map(str, range(classes) if class_names is None else class_names))
    if len(names) < classes:
        raise UserError(f"class_names has {len(names)} names, but the labels go to {classes - 1}")
    fingerprint = dataset.fingerprint(examples, tests)
    whole = dataset.Dataset(NAME, examples, None, tests, names, fingerprint)
    return dataset.for_seed(whole, split, seed)


def _check(name: str, images: np.ndarray, labels: np.ndarray) -> dataset.Split:
    images, labels = np.asarray(images), np.asarray(labels)
    height, width = images.shape[1:3] if images.ndim == 4 else (0, 1)
    if images.dtype != np.uint8 or height != width or images.shape[3] != 3:
        raise UserError(
            f"{name} images are {images.dtype} {list(images.shape)}, must be uint8 [N, S, S, 3] "
            "with values from 0 to 255"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UserError(
            f"{name} labels are {labels.dtype} {list(labels.shape)}, must be {len(images)} "
            "integers, one for each image"
        )
    if not len(labels) or labels.min() < 0:
        raise UserError(f"{name} labels must be at least one, and none below 0")
    return dataset.canonical(images, labels)
