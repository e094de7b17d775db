"""Files of PyTorch state dicts.

They are read as weights only: nothing in them is ever executed. `.safetensors` files are read and
written without PyTorch.
"""

import argparse
import collections
import io
import json
import pathlib
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors.numpy

from resnet_flax.errors import UserError, first_line
from resnet_flax.runs.files import write_atomically

# Where mean, std and class names lie: attribute of the state dict, or key of the metadata.
_BESIDE = "resnet_flax"
# Of several state dicts in a file, the first of these is taken: averaged weights first, as timm and
# torchvision do.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")
# What torch.load says of a pickle that would execute something.
_EXECUTED = re.compile(r"(?<=: GLOBAL )\S+|(?<=Unsupported class )\S+|TorchScript")


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    """The state dict in a PyTorch or safetensors file.

    Returns:
      Arrays by name, PyTorch's floats as float32; `mean`, `std` and `class_names` of
      `weights.Weights` if this package wrote the file; notes for the user.

    Raises:
      UserError: there is no state dict, or more than plain tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix != ".safetensors":
        return _read_torch(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            beside = json.loads((file.metadata() or {}).get(_BESIDE, "{}"))
        return safetensors.numpy.load_file(path), _checked(beside, path), []
    except (safetensors.SafetensorError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read: no safetensors, or damaged ({first_line(error)})"
        ) from error


def _read_torch(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any], list[str]]:
    torch = _torch()
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # About what is refused below.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if more := _EXECUTED.search(str(error)):
            raise UserError(
                f"{path} holds more than weights, {more[0]}, which would have to be executed: "
                "save net.state_dict() alone"
            ) from error
        raise UserError(
            f"{path} cannot be read as weights only: it is no file of PyTorch's, or damaged"
        ) from error
    found = dict(_state_dicts(content, torch.Tensor))
    if not found:
        raise UserError(f"{path} holds no state dict")
    taken = next(key for key in (*_KEYS, *found) if key in found)
    if len(found) > 1 and taken not in _KEYS:
        raise UserError(f"{path} holds several state dicts: {', '.join(found)}; save one alone")
    rest = ", ".join(key for key in found if key != taken)
    notes = [f"took {taken} of the file, not {rest}"] if rest else []
    try:
        arrays = {
            name: (value.detach().float() if value.is_floating_point() else value).numpy()
            for name, value in found[taken].items()
            if isinstance(value, torch.Tensor)
        }
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"{path} holds tensors that are not plain arrays: {first_line(error)}"
        ) from error
    return arrays, _checked(getattr(found[taken], _BESIDE, {}), path), notes


def _checked(beside: Any, path: pathlib.Path) -> dict[str, Any]:
    if not beside:
        return {}
    try:
        arrays = {name: np.asarray(beside[name], np.float32) for name in ("mean", "std")}
        return arrays | {"class_names": tuple(map(str, beside["class_names"]))}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged: what it says in {_BESIDE!r} is no preprocessing"
        ) from error


def _harmless() -> list[Any]:
    """Types that may stand beside weights: numbers and arrays of numpy, and command lines."""
    functions = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    old = [(f, f"numpy.core.multiarray.{f.__name__}") for f in functions]
    dtypes = [type(np.dtype(code)) for code in "?bhilqBHILQefdSU"]
    return [*functions, *old, np.ndarray, np.dtype, *dtypes, argparse.Namespace]


def _state_dicts(content: Any, tensor: type, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every state dict in nested dicts with its key there, as in `model.state_dict`."""
    if isinstance(content, dict):
        if any(str(k).endswith("weight") and isinstance(v, tensor) for k, v in content.items()):
            yield key, content
            return
        for name, value in content.items():
            yield from _state_dicts(value, tensor, f"{key}.{name}".strip("."))


def _torch():
    try:
        import torch
    except ImportError as error:
        raise UserError("this needs PyTorch: pip install torch") from error
    return torch


def write(path: pathlib.Path, arrays: dict[str, np.ndarray], beside: dict[str, Any]) -> str:
    """Writes a state dict that any program can load; says where `beside` lies in the file."""
    if path.suffix == ".safetensors":
        text = json.dumps(beside, default=lambda array: array.tolist())
        write_atomically(path, safetensors.numpy.save(arrays, {_BESIDE: text}))
        return f"the file's metadata, {_BESIDE!r}"
    torch, buffer = _torch(), io.BytesIO()

    def convert(value):
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    state_dict = collections.OrderedDict((name, convert(value)) for name, value in arrays.items())
    # An attribute, like PyTorch's own _metadata, does not disturb load_state_dict.
    setattr(state_dict, _BESIDE, {name: convert(value) for name, value in beside.items()})
    torch.save(state_dict, buffer)
    write_atomically(path, buffer.getvalue())
    return f"torch.load({path.name!r}).{_BESIDE}"
