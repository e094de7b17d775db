"""The configured data: which they are, how images become examples, and their feeds."""

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import data, models
from resnet_flax.data import streaming
from resnet_flax.data.dataset import Dataset
from resnet_flax.errors import UserError
from resnet_flax.training import augment, feed

_SAMPLE = 2048  # training images that give the statistics of a streamed data set

# ImageNet's crops and shorter sides, pixels [R §3.4].
_CROP, _SHORT_SIDES, _TEST_SHORT_SIDE = 224, (256, 480), 256


def is_for_cifar(config: ConfigDict) -> bool:
    """Whether the configured net is made for small images like CIFAR's."""
    return models.get_architecture(config.model.name).image_size < _CROP


def make_geometry(config: ConfigDict) -> streaming.Geometry:
    """How streamed images become examples; a UserError where the sizes contradict each other."""
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
    """See `data.load`."""
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
    """See `augment.statistics`; streamed images are sampled."""
    if not isinstance(dataset.train, streaming.StreamedSplit):
        return augment.statistics(dataset.train.images, kind)
    needed = 1 if kind == "imagenet" else _SAMPLE
    return augment.statistics(streaming.central_sample(dataset.train, needed), kind)


def make_feed(
    split, mean: np.ndarray, std: np.ndarray, *, config: ConfigDict, mesh: Mesh, workers, warn, put
) -> feed.Feed:
    """The feed of a split; `config` has its durations in steps."""
    common = {"seed": config.seed, "mesh": mesh, "batch_size": config.data.batch_size}
    if not isinstance(split, streaming.StreamedSplit):
        return feed.ResidentFeed(split, mean, std, **common, put=put)
    steps, limit = config.train.total_steps, config.data.max_unreadable
    return feed.StreamedFeed(
        split, mean, std, **common, total_steps=steps, workers=workers, limit=limit, warn=warn
    )
