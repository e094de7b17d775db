"""Data sets by name."""

import os

from resnet_flax.data import arrays, cifar, digits, folder, imagenet, streaming
from resnet_flax.data.dataset import Dataset, check_split, for_seed
from resnet_flax.errors import UserError, did_you_mean

NAMES = ("cifar10", "cifar100", "digits", "folder", imagenet.NAME)
STREAMED = frozenset({"folder", imagenet.NAME})
"""The data sets whose images are decoded when they are needed; the others are in memory."""


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    split: str = "all",
    archive: str | os.PathLike | None = None,
    mirror: str | None = None,
    seed: int = 0,
    geometry: streaming.Geometry | None = None,
) -> Dataset:
    """Loads a data set in its canonical order; slow work is reported on stderr.

    CIFAR and ImageNet are read where TFDS has prepared them. Where it has not, ImageNet's archives
    are read in place, and CIFAR's archive is taken from `archive`, or else downloaded from `mirror`
    or its authors' site, and prepared so that TFDS itself can read the result too.

    Args:
      name: one of `NAMES`.
      data_dir: folder of the data sets that TFDS has prepared; None or "" for the environment
        variable TFDS_DATA_DIR, or else ~/tensorflow_datasets. For "folder": the images' folder.
      split: "all" trains on the whole training set, "45k/5k" holds a class-balanced tenth out.
      archive: the original CIFAR archive, or the folder of ImageNet's two tars.
      mirror: URL of the CIFAR archive or of its folder.
      seed: of the held-out draw.
      geometry: how images become examples; only `STREAMED` data sets need it.

    Raises:
      UserError: the name or split is unknown; the data are absent or damaged; the disk is full or
        read-only; there is no network.
    """
    if name == arrays.NAME:
        raise UserError(
            "this run was trained on arrays in Python: resume it by the same call of "
            "resnet_flax.fit; predict and convert take its weights"
        )
    if name not in NAMES:
        raise UserError(
            f"unknown data set {name!r}{did_you_mean(name, NAMES, 0.5)}; "
            f"the known ones are {', '.join(NAMES)}"
        )
    check_split(split)  # Before a preparation that may take hours.
    if name == "folder":
        whole = folder.load(data_dir, geometry)
    elif name == imagenet.NAME:
        whole = imagenet.load(data_dir, archive, geometry)
    elif name == "digits":
        whole = digits.load()
    else:
        whole = cifar.load(name, data_dir, archive, mirror)
    return for_seed(whole, split, seed)
