"""Images too many for memory: read, decoded and cropped as they are needed."""

import dataclasses
from typing import Protocol

import numpy as np

from resnet_flax.data import dataset, images
from resnet_flax.errors import UserError


class Source(Protocol):
    """Encoded images by number. It is sent to worker processes once, and so must be picklable."""

    def __len__(self) -> int:
        """Number of images."""

    def labels(self) -> np.ndarray:
        """Labels of all images, int32 [N]; may take a while."""

    def read(self, index: int) -> tuple[bytes, int]:
        """Content of an image file, and its label."""

    def name(self, index: int) -> str:
        """What a message calls the image."""


@dataclasses.dataclass(frozen=True)
class Crops:
    """Which part of an image becomes an example.

    Attributes:
      size: side of the square that comes out, pixels.
      short_sides: the image is resized so that its shorter side is drawn from this range, both ends
        included, and a square is cut out at random: "scale augmentation" [R §3.4].
      central: instead, the first of `short_sides` and the central square.
    """

    size: int
    short_sides: tuple[int, int]
    central: bool = False


@dataclasses.dataclass(frozen=True)
class Geometry:
    """How the images of a data set become examples.

    Attributes:
      size: side of a training example, pixels.
      short_sides: see `Crops`.
      eval_size: side of an evaluated example, pixels: as `size`, or more where the evaluation cuts
        its own crops.
      eval_short_side: shorter side that an image is resized to before its central part is taken.
    """

    size: int
    short_sides: tuple[int, int]
    eval_size: int
    eval_short_side: int

    def training(self) -> Crops:
        """Of training examples."""
        return Crops(self.size, self.short_sides)

    def evaluation(self) -> Crops:
        """Of evaluated examples."""
        return Crops(self.eval_size, (self.eval_short_side,) * 2, central=True)


@dataclasses.dataclass(frozen=True)
class StreamedSplit:
    """The examples of one split, on disk.

    Attributes:
      source: of the images.
      positions: int64 [N], of the split's examples in the source.
      crops: what is made of an image.
    """

    source: Source
    positions: np.ndarray
    crops: Crops

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        return self.crops.size, self.crops.size, 3

    def name(self, index: int) -> str:
        """What a message calls an example."""
        return self.source.name(int(self.positions[index]))

    def example(self, index: int, random: np.random.RandomState | None) -> tuple[np.ndarray, int]:
        """One example: uint8 [size, size, 3], and its label; `random` draws where it is cut out.

        Raises:
          OSError, ValueError: it cannot be read, or is no image.
        """
        content, label = self.source.read(int(self.positions[index]))
        size, (low, high) = self.crops.size, self.crops.short_sides
        # A JPEG far bigger than what will be cut out of it is decoded at a fraction of its size.
        least = low if self.crops.central else high
        image = images.decode(content, at_least=(least, least))
        if self.crops.central:
            box = images.central_box(*image.size, short_side=low, size=size)
        else:
            box = images.random_box(random, *image.size, short_sides=(low, high), size=size)
        return images.crop_resized(image, box, size), label


def why_unreadable(split: StreamedSplit, index: int) -> str:
    """The reason, on one line, why `split.example` fails."""
    try:
        content, _ = split.source.read(int(split.positions[index]))
        images.decode(content)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().partition("\n")[0]
        return reason or type(error).__name__
    return "it could not be read the first time"


def central_sample(split: StreamedSplit, most: int) -> np.ndarray:
    """Central parts of at most `most` examples, evenly spaced: uint8 [n, size, size, 3].

    Args:
      split: of a training set.
      most: number of examples; unreadable ones are left out.

    Raises:
      UserError: not one of them can be read.
    """
    low, _ = split.crops.short_sides
    central = dataclasses.replace(split.crops, short_sides=(low, low), central=True)
    split = dataclasses.replace(split, crops=central)
    index = np.linspace(0, len(split), min(most, len(split)), endpoint=False).astype(np.int64)
    found, reason = [], ""
    for i in index.tolist():
        try:
            found.append(split.example(i, None)[0])
        except (OSError, ValueError) as error:
            reason = reason or f"{split.name(i)}: {error}"
    if not found:
        raise UserError(f"none of {len(index)} training images can be read; {reason}")
    return np.stack(found)


def assemble(
    name: str,
    *,
    source: Source,
    train: np.ndarray,
    validation: StreamedSplit | None = None,
    test_source: Source,
    test: np.ndarray,
    class_names: tuple[str, ...],
    fingerprint: str,
    split: str,
    seed: int,
    geometry: Geometry,
) -> dataset.Dataset:
    """Makes a `Dataset`, with a class-balanced tenth held out of `train` where `split` says so.

    Args:
      name: of the data set.
      source: of the training images.
      train: int64 [N], positions in it.
      validation: where it is not to be drawn from the training images.
      test_source: of the test images.
      test: int64 [M], positions in it.
      class_names: one per label.
      fingerprint: see `Dataset`; what identifies the images.
      split: a key of `dataset.SPLIT_NAMES`.
      seed: of the held-out draw.
      geometry: what is made of the images.

    Raises:
      UserError: `split` is unknown, there are too few images to hold some out, or there is a
        validation split already.
    """
    draw = None
    if dataset.check_split(split) != "all":
        if validation is not None:
            raise UserError(
                f"{name} has a validation split of its own: leave config.data.split at 'all'"
            )
        labels = source.labels()[train]
        held_out = dataset.balanced_draw(labels, parts=dataset.HELD_OUT_PARTS, seed=seed)
        if not len(held_out):
            raise UserError(f"config.data.split={split} would hold no image of {name} out")
        draw = tuple(held_out.tolist())
        validation = StreamedSplit(source, train[held_out], geometry.evaluation())
        train = np.delete(train, held_out)
    return dataset.Dataset(
        name,
        StreamedSplit(source, train, geometry.training()),
        validation,
        StreamedSplit(test_source, test, geometry.evaluation()),
        class_names,
        fingerprint,
        draw,
    )
