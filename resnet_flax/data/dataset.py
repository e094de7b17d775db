"""What every data set looks like once loaded: canonical order, fingerprint, held-out draw."""

import dataclasses
import hashlib

import numpy as np

from resnet_flax.errors import UserError

SPLIT_NAMES = {
    "all": "all",
    "50k": "all",
    "45k/5k": "45k/5k",
    "45k": "45k/5k",
    "45k5k": "45k/5k",
}
"""Every accepted spelling of `split`, and the one it stands for."""

HELD_OUT_PARTS = 10  # The paper holds 5,000 of the 50,000 training images out (section 4.2).


@dataclasses.dataclass(frozen=True)
class Split:
    """The examples of one split, in memory.

    Attributes:
      images: uint8 [N, H, W, C], 0..255.
      labels: int32 [N], 0..classes-1.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise ValueError(
                f"images must be uint8 [N, H, W, C], got {self.images.dtype} {self.images.shape}"
            )
        if self.labels.dtype != np.int32 or self.labels.shape != self.images.shape[:1]:
            raise ValueError(
                f"labels must be int32 [{len(self.images)}], "
                f"got {self.labels.dtype} {self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        return self.images.shape[1:]


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of the examples of a split in memory, which stay where they are.

    Attributes:
      whole: the split.
      positions: int32 [n], of the examples in it.
    """

    whole: Split
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def images(self) -> np.ndarray:
        """A copy: uint8 [n, H, W, C]."""
        return self.whole.images[self.positions]

    @property
    def labels(self) -> np.ndarray:
        """A copy: int32 [n]."""
        return self.whole.labels[self.positions]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an example."""
        return self.whole.image_shape


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A whole data set, in a canonical order.

    Its splits are in memory, as `Split` or `Part`, or else are `streamed.StreamedSplit`, which have
    a length and an `image_shape` too.

    Attributes:
      name: one of `resnet_flax.data.NAMES`.
      train: the examples to train on.
      validation: the examples held out of the training set, or None where all of it is trained on.
      test: the test set.
      class_names: one name per label.
      fingerprint: sha256 (hex) of the training set before the draw and of the test set, both in
        canonical order: the same for everyone who holds the same pixels and labels, whatever the
        seed and the draw. Of streamed images: of what identifies them without reading them all.
      validation_draw: positions, in ascending order, of the held-out examples in the canonical
        order of the whole training set, or None where nothing is held out.
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    class_names: tuple[str, ...]
    fingerprint: str
    validation_draw: tuple[int, ...] | None


def canonical(images: np.ndarray, labels: np.ndarray) -> Split:
    """Puts examples in an order that depends on nothing but the examples.

    A data set prepared by another version of TFDS, or read from another archive layout, comes in
    another order, and a seeded permutation of it would be another permutation. Examples are
    therefore sorted by the sha256 of their pixels, then by label. Examples equal in both are
    interchangeable.

    Args:
      images: uint8 [N, H, W, C].
      labels: integers [N].

    Returns:
      The same examples, sorted.
    """
    images = np.ascontiguousarray(images)
    labels = np.asarray(labels, np.int32)
    digests = [hashlib.sha256(image).digest() for image in images]
    order = sorted(range(len(digests)), key=lambda i: (digests[i], labels[i]))
    return Split(images=images[order], labels=labels[order])


def fingerprint(train: Split, test: Split) -> str:
    """Returns the sha256 (hex) of shapes, pixels and little-endian int32 labels of both splits."""
    digest = hashlib.sha256()
    for name, split in (("train", train), ("test", test)):
        digest.update(f"{name} {split.images.shape}\n".encode())
        digest.update(np.ascontiguousarray(split.images))
        digest.update(np.ascontiguousarray(split.labels, "<i4"))
    return digest.hexdigest()


def balanced_draw(labels: np.ndarray, *, parts: int, seed: int) -> np.ndarray:
    """Draws one part in `parts` of the examples, the same share of every class.

    `np.random.RandomState` is used because numpy has frozen its stream (NEP 19): the draw for a
    seed is the same with every version of numpy.

    Args:
      labels: integers [N].
      parts: one example in this many is drawn, rounded within each class, but at least one of
        each class of two or more.
      seed: of the draw.

    Returns:
      Positions of the drawn examples, int64, ascending.
    """
    random = np.random.RandomState(seed)
    drawn = []
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        count = max(round(len(positions) / parts), len(positions) > 1)
        drawn.append(random.permutation(positions)[:count])
    return np.sort(np.concatenate(drawn))


def divide(split: Split, positions: np.ndarray) -> tuple[Split, Split]:
    """Returns the examples not at `positions` and those at `positions`, order kept."""
    held_out = np.zeros(len(split), bool)
    held_out[positions] = True
    return (
        Split(images=split.images[~held_out], labels=split.labels[~held_out]),
        Split(images=split.images[held_out], labels=split.labels[held_out]),
    )


def check_split(split: str) -> str:
    """Returns the canonical spelling of `split`.

    Raises:
      UserError: `split` is not one of `SPLIT_NAMES`.
    """
    # Not every value a config may hold can be looked up in a dict.
    if not isinstance(split, str) or split not in SPLIT_NAMES:
        raise UserError(
            f"config.data.split is {split!r}; it must be 'all' (the whole training set; also "
            "'50k') or '45k/5k' (a tenth of it held out for validation; also '45k', '45k5k')"
        )
    return SPLIT_NAMES[split]


def assemble(
    name: str,
    *,
    train: Split,
    test: Split,
    class_names: tuple[str, ...],
    split: str,
    seed: int,
) -> Dataset:
    """Makes a `Dataset` of whole, canonically ordered splits.

    Args:
      name: of the data set.
      train: the whole training set, from `canonical`.
      test: the whole test set, from `canonical`.
      class_names: one per label.
      split: a key of `SPLIT_NAMES`.
      seed: of the held-out draw; without effect where nothing is held out.

    Returns:
      The data set.

    Raises:
      UserError: `split` is unknown, or `seed` is not one `np.random.RandomState` takes.
    """
    whole = fingerprint(train, test)
    if check_split(split) == "all":
        return Dataset(name, train, None, test, class_names, whole, None)
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise UserError(f"the data seed is {seed!r}; it must be an integer in 0..{2**32 - 1}")
    draw = balanced_draw(train.labels, parts=HELD_OUT_PARTS, seed=int(seed))
    train, validation = divide(train, draw)
    return Dataset(name, train, validation, test, class_names, whole, tuple(draw.tolist()))


def for_seed(whole: Dataset, split: str, seed: int) -> Dataset:
    """What `assemble` makes with `seed`, of a data set in memory that holds nothing out yet.

    The images are not copied: several seeds share them.

    Raises:
      UserError: `split` is unknown.
    """
    if check_split(split) == "all":
        return whole
    draw = balanced_draw(whole.train.labels, parts=HELD_OUT_PARTS, seed=seed)
    rest = np.delete(np.arange(len(whole.train)), draw)
    train, validation = (Part(whole.train, p.astype(np.int32)) for p in (rest, draw))
    return dataclasses.replace(
        whole, train=train, validation=validation, validation_draw=tuple(draw.tolist())
    )
