"""Data sets: where they are read from and how they are split and ordered."""

import difflib
import os

from resnet_flax.data import cifar, digits, folder
from resnet_flax.data.dataset import Dataset, Split
from resnet_flax.data.streamed import Geometry
from resnet_flax.errors import UserError

__all__ = ["NAMES", "Dataset", "Split", "load"]

_LOADERS = {
    "cifar10": cifar.load,
    "cifar100": cifar.load,
    "digits": digits.load,
    "folder": folder.load,
}
NAMES = tuple(_LOADERS)
STREAMED = frozenset({"folder"})
"""Those whose images are decoded as they are needed."""


def load(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    split: str = "all",
    archive: str | os.PathLike | None = None,
    mirror: str | None = None,
    seed: int = 0,
    geometry: Geometry | None = None,
    show_progress: bool = True,
) -> Dataset:
    """Loads a data set, preparing it first where that has not been done.

    CIFAR is read where TFDS has prepared it. Where it has not, the original archive is taken from
    `archive`, or else downloaded from `mirror`, or else from its authors' site, and prepared so
    that TFDS itself, too, can read the result.

    Args:
      name: one of `NAMES`.
      data_dir: folder of prepared data sets; None or "" for the environment variable
        TFDS_DATA_DIR, or else ~/tensorflow_datasets. Of "folder": the folder of images. Not used
        for digits.
      split: "all" to train on the whole training set, "45k/5k" to hold a class-balanced tenth of
        it out for validation.
      archive: path of the original archive (cifar-10-binary.tar.gz, cifar-10-python.tar.gz and
        their likes), or None or "".
      mirror: URL of such an archive or of a folder that holds it, or None or "".
      seed: of the held-out draw.
      geometry: what is made of streamed images ("folder"); of no use for the others.
      show_progress: whether to say on stderr what takes long.

    Returns:
      The data set, in canonical order (see `dataset.canonical`); images are uint8 [N, 32, 32, 3],
      labels int32 [N], both in memory. Of "folder": a data set of `streamed.StreamedSplit`.

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
