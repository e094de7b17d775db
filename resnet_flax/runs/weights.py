"""Weight files: safetensors that say which net they are, how images must be prepared, and whence.

Tensors: `params/…` and `batch_stats/…` in the canonical layout (see `models.layout`), and
`preprocess/mean` and `preprocess/std` in pixel values 0 to 255. Metadata: `format`, and JSON in
`model` (arguments of `create_model`), `class_names` and `training`; `sha256` of all this, for the
format itself would not notice a flipped bit.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.runs.files import write_atomically

FORMAT = "resnet_flax 1"

# Of `create_model`, for files that do not say.
_DEFAULTS = {"stride_in_3x3": False, "survival": 1.0}


@dataclasses.dataclass(frozen=True)
class Weights:
    """The content of a weights file.

    Attributes:
      model: `name`, `shortcut`, `num_classes`, `stride_in_3x3`, `survival` of `create_model`; one
        that is missing stands at its default.
      variables: `{"params": …, "batch_stats": …}`, float32 host arrays, canonical layout.
      mean: float32, what is subtracted from pixel values 0 to 255: [H, W, C] or [C].
      std: float32, what they are divided by then: [1] or [C].
      class_names: one a class.
      training: how the weights came about.
    """

    model: dict[str, Any]
    variables: dict[str, Any]
    mean: np.ndarray
    std: np.ndarray
    class_names: tuple[str, ...]
    training: dict[str, Any]


def save(path: pathlib.Path, weights: Weights) -> None:
    """Writes a file, whole or not at all."""
    tree = layout.to_canonical(jax.device_get(weights.variables))
    tensors = {"preprocess/mean": weights.mean, "preprocess/std": weights.std}
    tensors |= flax.traverse_util.flatten_dict(tree, sep="/")
    metadata = {
        "format": FORMAT,
        "model": json.dumps(weights.model),
        "class_names": json.dumps(weights.class_names),
        "training": json.dumps(weights.training),
    }
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    metadata["sha256"] = _content_hash(tensors, metadata)
    write_atomically(path, safetensors.numpy.save(tensors, metadata))


def _content_hash(tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    described = {k: v for k, v in metadata.items() if k != "sha256"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def load(path: pathlib.Path) -> Weights:
    """Reads a file.

    Raises:
      UserError: it is missing, damaged, or not in this format.
    """
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise UserError(
            f"weights file {path} cannot be read: no safetensors, or damaged"
        ) from error
    except OSError as error:
        raise UserError(f"weights file {path} cannot be read: {error.strerror}") from error
    if metadata.get("format") != FORMAT:
        raise UserError(
            f"weights file {path} is of format {metadata.get('format')!r}, not {FORMAT!r}"
        )
    # Where there is none, an older version wrote the file.
    if metadata.get("sha256", expected := _content_hash(tensors, metadata)) != expected:
        raise UserError(f"weights file {path} is damaged: its content does not match its SHA-256")
    try:
        mean, std = tensors.pop("preprocess/mean"), tensors.pop("preprocess/std")
        variables = flax.traverse_util.unflatten_dict(tensors, sep="/")
        model, class_names, training = (
            json.loads(metadata[key]) for key in ("model", "class_names", "training")
        )
    except (KeyError, ValueError) as error:
        raise UserError(f"weights file {path} is incomplete: {error}") from error
    if not (
        isinstance(model, dict)
        and isinstance(model.get("name"), str)
        and isinstance(class_names, list)
        and isinstance(training, dict)
    ):
        raise UserError(f"weights file {path} is damaged: its metadata are not of the right types")
    for name, value in {"preprocess/mean": mean, "preprocess/std": std, **tensors}.items():
        if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            raise UserError(f"weights file {path} is damaged: {name} is not finite throughout")
    return Weights(model, variables, mean, std, tuple(class_names), training)


def check_preprocessing(
    mean: np.ndarray, std: np.ndarray, image_shape: tuple[int, ...], source: str
) -> None:
    """Refuses a mean and a deviation that do not go with images of `image_shape` (H, W, C).

    Raises:
      UserError: names the shapes.
    """
    try:
        fits = np.broadcast_shapes(mean.shape, std.shape, image_shape) == tuple(image_shape)
    except ValueError:
        fits = False
    if not fits or np.any(std == 0):
        raise UserError(
            f"{source} expects images of another shape: its mean is {list(mean.shape)}, its "
            f"deviation {list(std.shape)}, the images are {list(image_shape)}"
        )


def save_preprocessing(path: pathlib.Path, mean: np.ndarray, std: np.ndarray) -> None:
    """Writes what a run subtracts from pixel values and divides them by."""
    write_atomically(path, safetensors.numpy.save({"mean": mean, "std": std}))


def load_preprocessing(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """The (mean, std) of `save_preprocessing`."""
    tensors = safetensors.numpy.load_file(path)
    return tensors["mean"], tensors["std"]


def for_classes(weights: Weights, class_names: tuple[str, ...], source: str) -> Weights:
    """`weights` with the outputs in the order of a data set's classes, which it may have more of.

    Weights from elsewhere have numbers for names. Where the data set's are others, and as many,
    outputs and classes go together by their order.

    Args:
      weights: from `load`.
      class_names: of the data set.
      source: where the weights come from, for the message.

    Raises:
      UserError: a class of the data set is none of the weights'.
    """
    names, count = weights.class_names, len(weights.class_names)
    are_numbers = names == tuple(map(str, range(count)))
    by_order = are_numbers and count == len(class_names) and set(names) != set(class_names)
    if not names or names == class_names or by_order:
        return weights
    missing = [name for name in class_names if name not in names]
    if missing:
        raise UserError(
            f"{source} is of other classes ({names[0]!r} to {names[-1]!r}, {count} in all): it "
            f"lacks {missing[0]!r}"
        )
    chosen = [names.index(name) for name in class_names]

    def reorder(values: np.ndarray) -> np.ndarray:
        others = [k for k in range(values.shape[-1]) if k not in chosen]
        return values[..., chosen + others]

    params = weights.variables["params"]
    params = params | {"head": jax.tree.map(reorder, params["head"])}
    return dataclasses.replace(
        weights,
        variables=weights.variables | {"params": params},
        class_names=tuple(dict.fromkeys([*class_names, *names])),
    )


def check_model(weights: Weights, model: dict[str, Any], source: str) -> None:
    """Refuses the weights of a net whose arrays may fit, but which computes something else.

    Args:
      weights: from `load`.
      model: what `Weights.model` must be.
      source: where the weights come from, for the message.

    Raises:
      UserError: names the first option that differs.
    """
    for key, value in model.items():
        own = weights.model.get(key, _DEFAULTS.get(key, value))
        if own != value:
            raise UserError(f"{source} is of another net: its {key} is {own!r}, but {value!r} here")


def fit(variables: dict[str, Any], template: Any, source: str) -> dict[str, Any]:
    """`variables`, once they are known to be those of a net.

    Args:
      variables: canonical `{"params": …, "batch_stats": …}`.
      template: the net's own, with shapes and dtypes, in the canonical layout.
      source: where they come from, for the message.

    Raises:
      UserError: names the first array that is missing, foreign, or of another shape.
    """
    have = flax.traverse_util.flatten_dict(variables, sep="/")
    want = flax.traverse_util.flatten_dict(template, sep="/")
    for name, spec in want.items():
        if name not in have:
            raise UserError(f"{source} is of another net: it lacks {name} {list(spec.shape)}")
        if have[name].shape != spec.shape:
            raise UserError(
                f"{source} is of another net: {name} is {list(have[name].shape)}, but "
                f"{list(spec.shape)} here"
            )
        if have[name].dtype != spec.dtype:
            raise UserError(f"{source}: {name} is {have[name].dtype}, must be {spec.dtype}")
    for name in have:
        if name not in want:
            raise UserError(f"{source} is of another net: it has {name}, which this one lacks")
    return variables
