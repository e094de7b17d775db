"""The configured data: which they are, and how images become examples."""

import numpy as np
from ml_collections import ConfigDict

from resnet_flax import data, models
from resnet_flax.data import streaming
from resnet_flax.data.dataset import Dataset
from resnet_flax.devices import distributed
from resnet_flax.errors import UserError
from resnet_flax.training import augment

_SAMPLE = 2048  # training images that give the statistics of a streamed data set

# ImageNet's crops and shorter sides, pixels [R §3.4].
_CROP, _SHORT_SIDES, _TEST_SHORT_SIDE = 224, (256, 480), 256


def is_for_cifar(config: ConfigDict) -> bool:
    """Whether the configured net is made for small images like CIFAR's."""
    return models.get_architecture(config.model.name).image_size < _CROP


def make_geometry(config: ConfigDict) -> streaming.Geometry:
    """How streamed images become examples; a UserError if the sizes contradict each other."""
    d = config.data
    size = d.image_size or models.get_architecture(config.model.name).image_size
    scale = 0 if is_for_cifar(config) else size / _CROP
    short_sides = tuple(d.short_sides) or tuple(round(s * scale) or size for s in _SHORT_SIDES)
    eval_short_side = d.eval_short_side or round(_TEST_SHORT_SIDE * scale) or size
    for key, side in (("short_sides", short_sides[0]), ("eval_short_side", eval_short_side)):
        if side < size:
            raise UserError(f"config.data.{key}={side} is less than the image size, {size} pixels")
    ten = config.eval.crops == 10
    if ten and eval_short_side == size:
        raise UserError(
            f"config.eval.crops=10 needs config.data.eval_short_side above the image size, {size}"
        )
    return streaming.Geometry(size, short_sides, eval_short_side if ten else size, eval_short_side)


def load_data(config: ConfigDict) -> Dataset:
    """The configured data set, see `data.load`.

    Of several processes the first one prepares it before the others read it.

    Raises:
      UserError: see `data.load`; or the processes found different data.
    """
    found: list[Dataset] = []
    distributed.share(lambda: found.append(_load(config)))
    dataset = found[0] if found else _load(config)
    here = dataset.fingerprint
    for index, other in enumerate(distributed.gather(here)):
        if other != here:
            raise UserError(
                f"the data set {dataset.name} of process {index} is not that of process "
                f"{distributed.index()} (fingerprints {other[:12]}, {here[:12]}): give all "
                "machines the same"
            )
    return dataset


def _load(config: ConfigDict) -> Dataset:
    is_streamed = config.data.name in data.STREAMED
    if config.eval.crops != 1 and not is_streamed:
        raise UserError(f"config.eval.crops={config.eval.crops} is for streamed images only")
    return data.load(
        config.data.name,
        data_dir=config.data.data_dir,
        split=config.data.split,
        archive=config.data.archive,
        mirror=config.data.mirror,
        seed=config.seed,
        geometry=make_geometry(config) if is_streamed else None,
    )


def statistics(dataset: Dataset, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The training set's `augment.statistics`; streamed images are sampled."""
    if not isinstance(dataset.train, streaming.StreamedSplit):
        return augment.statistics(dataset.train.images, kind)
    needed = 1 if kind == "imagenet" else _SAMPLE
    return augment.statistics(streaming.central_sample(dataset.train, needed), kind)
