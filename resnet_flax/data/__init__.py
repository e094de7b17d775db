"""Data sets: where they are read from and how they are split and ordered."""

import difflib
import os

import numpy as np

from resnet_flax.data import cifar, digits, folder, imagenet, streamed
from resnet_flax.data.dataset import Dataset, Split, check_split
from resnet_flax.errors import UserError

__all__ = ["NAMES", "Dataset", "Split", "load"]


def _load_imagenet(
    name: str, *, data_dir, split, archive, seed, geometry, show_progress, **unused
) -> Dataset:
    del unused
    check_split(split)  # Before the minutes that an index may take.
    train, test, class_names, fingerprint = imagenet.load(
        data_dir=data_dir, archives=archive, show_progress=show_progress
    )
    return streamed.assemble(
        name,
        source=train,
        train=np.arange(len(train)),
        test_source=test,
        test=np.arange(len(test)),
        class_names=class_names,
        fingerprint=fingerprint,
        split=split,
        seed=seed,
        geometry=geometry,
    )


_LOADERS = {
    "cifar10": cifar.load,
    "cifar100": cifar.load,
    "digits": digits.load,
    "folder": folder.load,
    imagenet.NAME: _load_imagenet,
}
NAMES = tuple(_LOADERS)
STREAMED = frozenset({"folder", imagenet.NAME})
"""Those whose images are decoded as they are needed."""


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    split: str = "all",
    archive: str | os.PathLike | None = None,
    mirror: str | None = None,
    seed: int = 0,
    geometry: streamed.Geometry | None = None,
    show_progress: bool = True,
) -> Dataset:
    """Loads a data set, preparing it first where that has not been done.

    CIFAR and ImageNet are read where TFDS has prepared them. Where it has not, ImageNet's archives
    are read in place, and CIFAR's archive is taken from `archive`, or else downloaded from `mirror`
    or its authors' site, and prepared so that TFDS itself can read the result too.

    Args:
      name: one of `NAMES`.
      data_dir: folder of prepared data sets; None or "" for the environment variable
        TFDS_DATA_DIR, or else ~/tensorflow_datasets. Of "folder": the folder of images. Not used
        for digits.
      split: "all" to train on the whole training set, "45k/5k" to hold a class-balanced tenth of
        it out for validation.
      archive: path of the original archive (cifar-10-binary.tar.gz, cifar-10-python.tar.gz and
        their likes), or None or "". Of imagenet2012: the folder of ILSVRC2012_img_train.tar and
        ILSVRC2012_img_val.tar.
      mirror: URL of such an archive or of a folder that holds it, or None or "".
      seed: of the held-out draw.
      geometry: what is made of streamed images ("folder", "imagenet2012"); of no use for others.
      show_progress: whether to say on stderr what takes long.

    Returns:
      The data set, in canonical order (see `dataset.canonical`); images are uint8 [N, 32, 32, 3],
      labels int32 [N], both in memory. Of "folder" and "imagenet2012": a data set of
      `streamed.StreamedSplit`.

    Raises:
      UserError: whatever the user can mend: an unknown name or split, data that are absent,
        damaged or not what they should be, a full or read-only disk, no network.
    """
    if name not in NAMES:
        close = difflib.get_close_matches(str(name).lower(), NAMES, n=1, cutoff=0.5)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown data set {name!r}{hint}; the known ones are {', '.join(NAMES)}")
    if name in STREAMED and geometry is None:
        raise ValueError(f"{name} needs a geometry: what is made of images of any size")
    return _LOADERS[name](
        name,
        data_dir=data_dir,
        split=split,
        archive=archive,
        mirror=mirror,
        seed=seed,
        geometry=geometry,
        show_progress=show_progress,
    )
