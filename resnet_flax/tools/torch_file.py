"""Files of PyTorch's state dicts, read and written.

They are read with `weights_only`: nothing in them is ever executed. `.safetensors` files are read
and written without PyTorch.
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

from resnet_flax.errors import UserError
from resnet_flax.runs.files import write_atomically

# What a converted file says beside its arrays: attribute of the state dict, or metadata.
_BESIDE = "resnet_flax"
# Where several state dicts lie in a file, the one taken, in the order in which timm asks for them.
_KEYS = ("state_dict_ema", "model_ema", "state_dict", "model")


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The state dict in a PyTorch or safetensors file; what PyTorch has as floats is float32.

    Returns:
      Arrays by name, and what is known beside them: `notes` for the user and, in files of this
      program, `mean`, `std` and `class_names` as in `weights.Weights`.

    Raises:
      UserError: there is none, or it holds more than plain tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                said = json.loads((file.metadata() or {}).get(_BESIDE, "{}"))
            return safetensors.numpy.load_file(path), {**_checked(said, path), "notes": []}
        except safetensors.SafetensorError as error:
            raise UserError(f"{path} cannot be read: no safetensors, or damaged") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    torch = _torch()
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_harmless()):
            warnings.simplefilter("ignore")  # Of what is refused below.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if more := re.search(
            r"(?<=: GLOBAL )\S+|(?<=Unsupported class )\S+|TorchScript", str(error)
        ):
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
    # timm and torchvision read the averaged weights where there are any.
    taken = next((key for key in _KEYS if key in found), next(iter(found)))
    if len(found) > 1 and taken not in _KEYS:
        raise UserError(f"{path} holds several state dicts: {', '.join(found)}; save one alone")
    rest = ", ".join(key for key in found if key != taken)
    notes = [f"took {taken} of the file, not {rest}"] if rest else []
    state_dict = found[taken]

    def array(value):
        return (value.detach().float() if value.is_floating_point() else value).numpy()

    beside = _checked(getattr(state_dict, _BESIDE, {}), path)
    tensors = {k: v for k, v in state_dict.items() if isinstance(v, torch.Tensor)}
    try:
        return {k: array(v) for k, v in tensors.items()}, {**beside, "notes": notes}
    except (TypeError, RuntimeError, NotImplementedError) as error:
        first = str(error).strip().partition("\n")[0][:160]
        raise UserError(f"{path} holds tensors that are not plain arrays: {first}") from error


def _checked(beside: Any, path: pathlib.Path) -> dict[str, Any]:
    if not beside:
        return {}
    try:
        arrays = {name: np.array(beside[name], np.float32) for name in ("mean", "std")}
        return arrays | {"class_names": tuple(map(str, beside["class_names"]))}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is damaged: what it says in {_BESIDE!r} is no preprocessing"
        ) from error


def _harmless() -> list[Any]:
    """What may stand beside weights: numbers and arrays of numpy, and command lines."""
    functions = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    old = [(f, f"numpy.core.multiarray.{f.__name__}") for f in functions]
    dtypes = [type(np.dtype(code)) for code in "?bhilqBHILQefdSU"]
    return [*functions, *old, np.ndarray, np.dtype, *dtypes, argparse.Namespace]


def _state_dicts(content: Any, tensor: type, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every state dict in dicts of dicts, with its key there, as in `model.state_dict`."""
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
    """Writes a state dict that any program can load, and `beside` it what `read` returns.

    Returns:
      Where that is, in words.
    """
    if path.suffix == ".safetensors":
        text = json.dumps(beside, default=lambda array: array.tolist())
        write_atomically(path, safetensors.numpy.save(arrays, {_BESIDE: text}))
        return f"the file's metadata, {_BESIDE!r}"
    torch, buffer = _torch(), io.BytesIO()

    def tensors(values):
        return {
            k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v
            for k, v in values.items()
        }

    state_dict = collections.OrderedDict(tensors(arrays))
    # An attribute, like PyTorch's own _metadata: no load_state_dict trips over it.
    setattr(state_dict, _BESIDE, tensors(beside))
    torch.save(state_dict, buffer)
    write_atomically(path, buffer.getvalue())
    return f"torch.load({path.name!r}).{_BESIDE}"
