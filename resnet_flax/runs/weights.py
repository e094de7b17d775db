"""Weight files: safetensors that describe their net and the preprocessing of its images.

Tensors: `params/…` and `batch_stats/…` in the canonical layout (see `models.layout`), and
`preprocess/mean` and `preprocess/std` in pixel values 0 to 255. Metadata: `format`; JSON in `model`
(arguments of `create_model`), `class_names` and `training`; and `sha256` of tensors and metadata,
since safetensors itself does not notice a flipped bit.
"""

import dataclasses
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
from resnet_flax.runs.files import content_hash, write_atomically

FORMAT = "resnet_flax 1"

# Options that the `model` of older versions lacks, and what those nets have.
_DEFAULTS = {"stride_in_3x3": False, "survival": 1.0}
_DESCRIPTION = {"model": dict, "class_names": list, "training": dict}


@dataclasses.dataclass(frozen=True)
class Weights:
    """The content of a weights file."""

    model: dict[str, Any]  # arguments of `create_model`
    variables: dict[str, Any]  # params and batch_stats: float32 host arrays, canonical layout
    mean: np.ndarray  # float32 [H, W, C] or [C], subtracted from pixel values 0 to 255
    std: np.ndarray  # float32 [1] or [C], divided by
    class_names: tuple[str, ...]
    training: dict[str, Any]  # result and `config` of the run, or the source of converted weights


def save(path: pathlib.Path, weights: Weights) -> None:
    """Writes a file atomically."""
    tree = layout.to_canonical(jax.device_get(weights.variables))
    tensors = {"preprocess/mean": weights.mean, "preprocess/std": weights.std}
    tensors |= flax.traverse_util.flatten_dict(tree, sep="/")
    tensors = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    description = {key: json.dumps(getattr(weights, key)) for key in _DESCRIPTION}
    metadata = {"format": FORMAT, **description}
    metadata["sha256"] = content_hash(tensors, metadata)
    write_atomically(path, safetensors.numpy.save(tensors, metadata))


def load(path: pathlib.Path) -> Weights:
    """Reads a file; raises a UserError if it is missing, damaged, or not in this format."""
    if not path.is_file():
        raise UserError(f"weights file {path} does not exist")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or "no safetensors, or damaged"
        raise UserError(f"weights file {path} cannot be read: {reason}") from error
    if (form := metadata.get("format")) != FORMAT:
        raise UserError(f"weights file {path} is of format {form!r}, not {FORMAT!r}")
    digest = metadata.pop("sha256", None)  # Older versions wrote none.
    if digest not in (None, content_hash(tensors, metadata)):
        raise UserError(f"weights file {path} is damaged: its content does not match its SHA-256")
    for name, value in tensors.items():
        if not np.issubdtype(value.dtype, np.floating) or not np.isfinite(value).all():
            raise UserError(f"weights file {path} is damaged: {name} is not finite throughout")
    try:
        mean, std = tensors.pop("preprocess/mean"), tensors.pop("preprocess/std")
        variables = flax.traverse_util.unflatten_dict(tensors, sep="/")
        description = {key: json.loads(metadata[key]) for key in _DESCRIPTION}
    except (KeyError, ValueError) as error:
        raise UserError(f"weights file {path} is incomplete: {error}") from error
    right = all(isinstance(description[key], kind) for key, kind in _DESCRIPTION.items())
    if not right or "name" not in description["model"]:
        raise UserError(f"weights file {path} is damaged: its metadata are of the wrong types")
    description["class_names"] = tuple(description["class_names"])
    return Weights(variables=variables, mean=mean, std=std, **description)


def check_preprocessing(
    mean: np.ndarray, std: np.ndarray, image_shape: tuple[int, ...], source: str
) -> None:
    """Raises a UserError unless mean and std fit images of `image_shape` (H, W, C)."""
    try:
        fits = np.broadcast_shapes(mean.shape, std.shape, image_shape) == tuple(image_shape)
    except ValueError:
        fits = False
    if not fits or np.any(std == 0):
        raise UserError(
            f"{source} expects images of another shape: its mean is {list(mean.shape)}, its "
            f"deviation {list(std.shape)}, the images are {list(image_shape)}"
        )


def for_classes(weights: Weights, class_names: tuple[str, ...], source: str) -> Weights:
    """`weights` with its outputs in the order of a data set's classes, then any others.

    Outputs named by numbers only match a data set of as many classes by order.

    Raises:
      UserError: the weights lack a class of the data set.
    """
    names, count = weights.class_names, len(weights.class_names)
    are_numbers = names == tuple(map(str, range(count)))
    by_order = are_numbers and count == len(class_names) and set(names) != set(class_names)
    if not names or names == class_names or by_order:
        return weights
    if missing := [name for name in class_names if name not in names]:
        raise UserError(
            f"{source} is of other classes ({names[0]!r} to {names[-1]!r}, {count} in all): it "
            f"lacks {missing[0]!r}"
        )
    ordered = tuple(dict.fromkeys([*class_names, *names]))
    outputs = [names.index(name) for name in ordered]
    params = weights.variables["params"]
    head = {name: values[..., outputs] for name, values in params["head"].items()}
    variables = weights.variables | {"params": params | {"head": head}}
    return dataclasses.replace(weights, variables=variables, class_names=ordered)


def check_model(weights: Weights, model: dict[str, Any], source: str) -> None:
    """Raises a UserError where `weights.model` differs from `model`: the arrays may fit even so."""
    for key, value in model.items():
        own = weights.model.get(key, _DEFAULTS.get(key, value))
        if own != value:
            raise UserError(f"{source} is of another net: its {key} is {own!r}, but {value!r} here")


def fit(variables: dict[str, Any], template: Any, source: str) -> dict[str, Any]:
    """Returns `variables` if their names, shapes and dtypes are the template's.

    Raises:
      UserError: names the first array that is missing, foreign, or of another shape or dtype.
    """
    have = flax.traverse_util.flatten_dict(variables, sep="/")
    want = flax.traverse_util.flatten_dict(template, sep="/")
    for name in sorted(have.keys() | want.keys()):
        if name not in have:
            raise UserError(f"{source} is of another net: it lacks {name}")
        if name not in want:
            raise UserError(f"{source} is of another net: it has {name}, which this one lacks")
        own, needed = (f"{x.dtype} {list(x.shape)}" for x in (have[name], want[name]))
        if own != needed:
            raise UserError(f"{source} is of another net: {name} is {own}, but {needed} here")
    return variables
