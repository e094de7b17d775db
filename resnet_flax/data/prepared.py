"""Finds and reads data sets that TFDS has prepared, without TensorFlow."""

import io
import json
import os
import pathlib
import re
import shlex

import numpy as np

from resnet_flax.errors import UserError

INFO_FILE = "dataset_info.json"
READABLE_FORMAT = "array_record"  # The one format TFDS reads without TensorFlow or pyarrow.
_CHUNK = 1000  # examples read at a time, undecoded


def resolve_data_dir(data_dir: str | os.PathLike | None) -> pathlib.Path:
    """Returns the folder in which to look for prepared data sets.

    Args:
      data_dir: the folder, or None or "" for that of the environment variable TFDS_DATA_DIR, or
        else TFDS's own default, ~/tensorflow_datasets.

    Returns:
      An absolute path, ~ expanded; the default one need not exist.

    Raises:
      UserError: it is a URL or a file, starts with the ~ of an unknown user, or was named and does
        not exist.
    """
    named = data_dir or os.environ.get("TFDS_DATA_DIR")
    chosen = os.fspath(named or "~/tensorflow_datasets")
    if "://" in chosen:
        raise UserError(
            f"data_dir is {chosen!r}; it must be a folder of this machine: copy the data set there"
        )
    try:
        path = pathlib.Path(os.path.abspath(pathlib.Path(chosen).expanduser()))
    except RuntimeError as error:
        raise UserError(f"data_dir is {chosen!r}: {error}") from error
    if path.exists() and not path.is_dir():
        raise UserError(f"data_dir is {chosen!r}, which is a file; give the folder of data sets")
    if named and not path.exists():
        origin = "data_dir" if data_dir else "$TFDS_DATA_DIR"
        raise UserError(
            f"{origin} is {chosen!r}, which does not exist: correct it, or, to have the data set "
            f"put there, create it first (mkdir -p {shlex.quote(str(path))})"
        )
    return path


def find(name: str, *, data_dir: pathlib.Path, version: str) -> pathlib.Path | None:
    """Looks for a prepared data set.

    Args:
      name: of the data set, as TFDS calls it.
      data_dir: the folder of data sets, or that of this data set, or that of one version of it.
      version: preferred where several are there; otherwise the highest is taken.

    Returns:
      The folder of the version, or None where there is none.

    Raises:
      UserError: `data_dir` is itself a prepared data set, but of another name, or cannot be read.
    """
    try:
        if (data_dir / INFO_FILE).is_file():
            _check_name(name, data_dir)
            return data_dir
        for folder in (data_dir / name, data_dir):
            found = {
                tuple(int(number) for number in path.name.split(".")): path
                for path in (folder.iterdir() if folder.is_dir() else ())
                if re.fullmatch(r"\d+\.\d+\.\d+", path.name) and (path / INFO_FILE).is_file()
            }
            if found:
                preferred = tuple(int(number) for number in version.split("."))
                chosen = found.get(preferred) or found[max(found)]
                _check_name(name, chosen)
                return chosen
    except OSError as error:
        raise UserError(f"cannot look for {name} in data_dir {data_dir}: {error}") from error
    return None


def _check_name(name: str, directory: pathlib.Path) -> None:
    """Raises a UserError where the data set of `directory` is known to be another one."""
    try:
        found = json.loads((directory / INFO_FILE).read_bytes())["name"]
    except (ValueError, KeyError, TypeError):
        return  # Damaged; `read` says so.
    if found != name:
        raise UserError(f"{directory} holds the data set {found!r}, not {name!r}")


def open_builder(name: str, *, directory: pathlib.Path, sizes: dict[str, int]):
    """Returns TFDS's builder of a prepared data set that can be read without TensorFlow.

    Args:
      name: of the data set, for messages.
      directory: of the version, from `find`.
      sizes: the number of examples that each split must have.

    Raises:
      UserError: the data set cannot be read without TensorFlow, is damaged, has no labels, or has
        other splits.
    """
    # Takes a few tenths of a second to import; `import resnet_flax` should not.
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
        formats = {builder.info.file_format, *builder.info.alternative_file_formats}
        formats = sorted(format.value for format in formats if format is not None)
        _ = builder.info.features["label"].names
        found = {split: builder.info.splits[split].num_examples for split in sizes}
    except Exception as error:  # Anything at all may come out of a damaged or foreign folder.
        raise UserError(
            f"{directory} is not a {name} prepared by TFDS: {first_line(error)}"
        ) from error
    if READABLE_FORMAT not in formats:
        raise UserError(
            f"{directory} is prepared in the format {', '.join(formats)}, which needs TensorFlow to"
            f" read; give another data_dir, and {name} will be prepared there as {READABLE_FORMAT}"
        )
    for split, size in sizes.items():
        if found[split] != size:
            raise UserError(
                f"the split {split!r} of {directory} has {found[split]} examples; {name} has {size}"
            )
    return builder


def read(
    name: str,
    *,
    directory: pathlib.Path,
    sizes: dict[str, int],
    shape: tuple[int, int, int],
    classes: int,
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """Reads and checks a data set prepared by TFDS.

    Args:
      name: of the data set, for messages.
      directory: of the version, from `find`.
      sizes: the number of examples that each split must have.
      shape: of one image, height, width and channels.
      classes: the number of labels.

    Returns:
      For each split of `sizes`, uint8 images [N, *shape] and int32 labels [N], in the order in
      which they lie in the files; and the names of the classes.

    Raises:
      UserError: the data set cannot be read without TensorFlow, is damaged, or is not what it
        should be.
    """
    import tensorflow_datasets as tfds

    builder = open_builder(name, directory=directory, sizes=sizes)
    names = tuple(builder.info.features["label"].names or (str(i) for i in range(classes)))
    arrays = {}
    for split in sizes:
        try:
            source = builder.as_data_source(
                split=split,
                decoders={"image": tfds.decode.SkipDecoding()},
                file_format=READABLE_FORMAT,
            )
            images, labels = _read_all(source, shape=shape)
        except Exception as error:  # array_record and Pillow raise many kinds.
            files = [os.fspath(path) for path in builder.info.splits[split].filepaths]
            named = files[0] if len(files) == 1 else f"one of the {len(files)} files of {split!r}"
            raise UserError(
                f"cannot read {named} of {directory}: {first_line(error)}\n"
                f"Delete that folder to have {name} prepared again, or give another data_dir."
            ) from error
        if labels.min() < 0 or labels.max() >= classes:
            raise UserError(
                f"the split {split!r} of {directory} has labels {labels.min()}..{labels.max()}; "
                f"those of {name} are 0..{classes - 1}"
            )
        arrays[split] = (images, labels)
    return arrays, names


def first_line(error: Exception) -> str:
    """Returns the first line of an error, not too long for a message."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _read_all(source, *, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Reads and decodes every example of a TFDS data source with undecoded images.

    Threads would make it slower: most of the time is Python's own, per image.
    """
    from PIL import Image

    images = np.empty((len(source), *shape), np.uint8)
    labels = np.empty(len(source), np.int32)
    for start in range(0, len(source), _CHUNK):
        indices = list(range(start, min(start + _CHUNK, len(source))))
        for index, example in zip(indices, source.__getitems__(indices), strict=True):
            with Image.open(io.BytesIO(example["image"])) as opened:
                image = np.asarray(opened)
            # Assignment would broadcast a wrong shape and wrap a wrong dtype.
            if image.shape != shape or image.dtype != np.uint8:
                raise ValueError(
                    f"example {index} is {image.dtype} {image.shape}, not uint8 {shape}"
                )
            images[index] = image
            labels[index] = example["label"]
    return images, labels
