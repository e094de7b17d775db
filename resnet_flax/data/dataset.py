"""What every data set looks like once loaded: canonical order, fingerprint, held-out draw."""

import dataclasses
import hashlib

import numpy as np

from resnet_flax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Split:
    """Examples in memory: `images` uint8 [N, H, W, C], 0 to 255, and `labels` int32 [N]."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        return self.images.shape[1:]

    def take(self, positions: np.ndarray) -> "Split":
        """A copy of the examples at `positions`."""
        return Split(self.images[positions], self.labels[positions])

    def divide(self, kept: np.ndarray, drawn: np.ndarray) -> tuple["Part", "Part"]:
        """The examples at `kept`, to train on, and at `drawn`, to validate on."""
        return Part(self, kept.astype(np.int32)), Part(self, drawn.astype(np.int32))


@dataclasses.dataclass(frozen=True)
class Part:
    """The examples of `whole` at `positions`, int32 [N]; `images` and `labels` are copies."""

    whole: Split
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def images(self) -> np.ndarray:  # noqa: D102
        return self.whole.images[self.positions]

    @property
    def labels(self) -> np.ndarray:  # noqa: D102
        return self.whole.labels[self.positions]

    @property
    def image_shape(self) -> tuple[int, int, int]:  # noqa: D102
        return self.whole.image_shape


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A data set in canonical order.

    Its splits are in memory, or each is a `streaming.StreamedSplit`.

    Attributes:
      fingerprint: SHA-256 (hex) of the whole training set and the test set in canonical order. It
        does not depend on the draw or the seed. Streamed images are identified without reading
        them: see the data set's module.
      validation_draw: ascending positions of the held-out examples in the whole training set, or
        None where none are drawn.
    """

    name: str
    train: Split | Part
    validation: Split | Part | None
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str
    validation_draw: tuple[int, ...] | None = None


def canonical(images: np.ndarray, labels: np.ndarray) -> Split:
    """Sorts examples by the SHA-256 of their pixels, then by label.

    Seeded permutations start from this order, so they do not depend on the version of TFDS or the
    archive that the examples were read from. Takes uint8 [N, H, W, C] and integers [N].
    """
    images = np.ascontiguousarray(images)
    labels = np.asarray(labels, np.int32)
    digests = [hashlib.sha256(image).digest() for image in images]
    order = sorted(range(len(digests)), key=lambda i: (digests[i], labels[i]))
    return Split(images, labels).take(order)


def fingerprint(train: Split, test: Split) -> str:
    """SHA-256 (hex) of the shapes, pixels and little-endian int32 labels of both splits."""
    digest = hashlib.sha256()
    for name, split in (("train", train), ("test", test)):
        digest.update(f"{name} {split.images.shape}\n".encode())
        digest.update(np.ascontiguousarray(split.images))
        digest.update(np.ascontiguousarray(split.labels, "<i4"))
    return digest.hexdigest()


def hold_out(labels: np.ndarray, *, seed: int, parts: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Draws one example in `parts` of each class, rounded, but one at least of two or more.

    The paper holds a tenth out, 5,000 of 50,000 images [R §4.2]. `np.random.RandomState` draws
    because numpy never changes its stream (NEP 19).

    Returns:
      Positions of the kept and of the drawn examples, int64, both ascending.
    """
    random = np.random.RandomState(seed)
    drawn = []
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        count = max(round(len(positions) / parts), len(positions) > 1)
        drawn.append(random.permutation(positions)[:count])
    held_out = np.sort(np.concatenate(drawn))
    return np.delete(np.arange(len(labels)), held_out), held_out


def check_split(split: str) -> str:
    """The canonical spelling of `split`, "all" or "45k/5k"; a UserError where it is unknown."""
    if split in ("all", "50k"):
        return "all"
    if split in ("45k/5k", "45k", "45k5k"):
        return "45k/5k"
    raise UserError(
        f"config.data.split is {split!r}; it must be 'all' (the whole training set; also '50k') "
        "or '45k/5k' (a tenth of it held out for validation; also '45k', '45k5k')"
    )


def for_seed(whole: Dataset, split: str, seed: int) -> Dataset:
    """Holds a tenth out of the whole training set to validate on, if `split` is "45k/5k".

    The images are not copied: several seeds share them.

    Raises:
      UserError: there is a validation split already, or too few images to hold any out.
    """
    if check_split(split) == "all":
        return whole
    if whole.validation is not None:
        raise UserError(
            f"{whole.name} has a validation split of its own: set config.data.split=all"
        )
    kept, drawn = hold_out(whole.train.labels, seed=seed)
    if not len(drawn):
        raise UserError(f"config.data.split={split} would hold no image of {whole.name} out")
    train, validation = whole.train.divide(kept, drawn)
    return dataclasses.replace(
        whole, train=train, validation=validation, validation_draw=tuple(drawn.tolist())
    )
