"""Variables of this package's nets under the names and layouts that PyTorch projects use.

CIFAR projects (akamaster, chenyaofo, …) and torchvision agree on `conv1`, `bn1`,
`layer<stage>.<block>.conv<i>` / `bn<i>`; they differ in the shortcut's name (`shortcut` or
`downsample`) and in the last layer's (`linear`, `fc`, `classifier`).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from resnet_flax.errors import UserError

_SHORTCUTS = "shortcut", "downsample"
_HEADS = "linear", "fc", "classifier"
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(.+)")
# Our leaf: PyTorch's.
_NORM = {
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def _strip(name: str) -> str:
    # nn.DataParallel and torch.compile put their own names in front.
    return re.sub(r"^((module|_orig_mod|model|backbone)\.)+", "", name)


def shortcut_option(names: Iterable[str]) -> str:
    """Option A, B or C: by which blocks have a projection in the keys of a state dict."""
    names = [_strip(name) for name in names]
    blocks = {match.group(1, 2) for name in names if (match := _BLOCK.match(name))}
    projected = {
        match.group(1, 2)
        for name in names
        if (match := _BLOCK.match(name)) and match[3].startswith(_SHORTCUTS)
    }
    if not projected:
        return "A"
    return "C" if projected == blocks else "B"


def from_torch(state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> dict[str, Any]:
    """Variables in the canonical layout from a PyTorch state dict.

    Args:
      state_dict: arrays by name; a prefix `module.` and counters `num_batches_tracked` are ignored.
      template: the net's own `{"params": …, "batch_stats": …}`, with shapes.

    Raises:
      UserError: names the first array that is missing, of another shape or kind, not finite, or
        left over.
    """
    have = {}
    for name, value in state_dict.items():
        if not name.endswith("num_batches_tracked"):
            have[_strip(name)] = value
    out = {}
    for path, spec in flax.traverse_util.flatten_dict(template).items():
        candidates = list(_torch_names(path))
        found = [name for name in candidates if name in have]
        if not found:
            raise UserError(
                f"the state dict is of another net: it lacks {candidates[0]} for {'/'.join(path)}"
            )
        value = np.asarray(have.pop(found[0]))
        if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
            raise UserError(f"the state dict's {found[0]} is {value.dtype}: only floats are read")
        with np.errstate(over="ignore"):
            value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"the state dict's {found[0]} is not finite throughout in float32")
        if path[-1] == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if value.shape != spec.shape:
            raise UserError(
                f"the state dict is of another net: {found[0]} is {list(value.shape)} in this "
                f"layout, but {'/'.join(path)} is {list(spec.shape)}"
            )
        out[path] = np.ascontiguousarray(value)
    if have:
        raise UserError(
            f"the state dict is of another net: it has {min(have)}, which this one lacks"
        )
    return flax.traverse_util.unflatten_dict(out)


def to_torch(
    variables: Mapping[str, Any], *, shortcut: str = "shortcut", head: str = "linear"
) -> dict[str, np.ndarray]:
    """A PyTorch state dict, as arrays, from variables in the canonical layout.

    Args:
      variables: `{"params": …, "batch_stats": …}`.
      shortcut: name of the projections: "shortcut", or torchvision's "downsample".
      head: name of the last layer: "linear", or torchvision's "fc".
    """
    out = {}
    for path, value in flax.traverse_util.flatten_dict(dict(variables)).items():
        (name,) = [
            name
            for name in _torch_names(path)
            if not any(f".{s}." in name for s in _SHORTCUTS if s != shortcut)
            and not name.startswith(tuple(f"{h}." for h in _HEADS if h != head))
        ]
        value = np.asarray(value, np.float32)
        if path[-1] == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        out[name] = np.ascontiguousarray(value)
        if path[-1] == "var":
            out[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return out


def _torch_names(path: tuple[str, ...]) -> Iterable[str]:
    """The names a variable may have in a PyTorch state dict."""
    collection, *modules, leaf = path
    module = modules[-1]
    if module == "head":
        ours = {"kernel": "weight", "bias": "bias"}
        return [f"{head}.{ours[leaf]}" for head in _HEADS]
    torch_leaf = "weight" if leaf == "kernel" else _NORM[collection, leaf]
    if len(modules) == 1:
        names = {"stem_conv": "conv1", "stem_bn": "bn1", "final_bn": "bn"}
        return [f"{names[module]}.{torch_leaf}"]
    stage, block = re.fullmatch(r"stage(\d+)_block(\d+)", modules[0]).groups()
    prefix = f"layer{stage}.{int(block) - 1}"
    inside = {"proj_conv": 0, "proj_bn": 1}.get(module)
    if inside is None:
        return [f"{prefix}.{module}.{torch_leaf}"]
    return [f"{prefix}.{name}.{inside}.{torch_leaf}" for name in _SHORTCUTS]
