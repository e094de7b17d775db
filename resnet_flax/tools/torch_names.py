"""Variables of this package's nets under the names and layouts that PyTorch projects use.

CIFAR projects (akamaster, chenyaofo, …) and torchvision agree on `conv1`, `bn1`,
`layer<stage>.<block>.conv<i>` / `bn<i>`. `_ALIASES` has what others call them.
"""

import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from resnet_flax.errors import UserError

# Pattern in a project's names: ours.
_ALIASES = (
    (r"\bdownsample\.", "shortcut."),  # torchvision, timm, chenyaofo
    (r"\b(fc|classifier|fcOut)\.", "linear."),
    (r"\b(conv|bn)In\.", r"\g<1>1."),  # a-martyn/resnet, to the end
    (r"\bstack(\d)\.", r"layer\1."),
    (r"\bstack(\d)a\.", r"layer\1.0."),
    (r"\bstack(\d)b\.(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) + 1}"),
)
# Counters, and what a layer in front of the net normalises images by.
_IGNORED = re.compile(r"(.*\.)?(num_batches_tracked|n_averaged|mean|std)")
_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(.+)")
# Our leaf: PyTorch's.
_NORM = {
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def canonical(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a net, under the names of the CIFAR projects.

    Whatever stands before `layer1.0.conv1` is taken off every name; counters are left out.

    Raises:
      UserError: there are several nets.
    """
    out = {}
    for name, value in state_dict.items():
        if not _IGNORED.fullmatch(name):
            for pattern, ours in _ALIASES:
                name = re.sub(pattern, ours, name)
            out[name] = value
    ends = "layer1.0.conv1.weight"
    prefixes = [name.removesuffix(ends) for name in out if name.endswith(ends)]
    if len(prefixes) > 1:
        raise UserError(f"the state dict is of several nets: {', '.join(sorted(prefixes))}")
    return {name.removeprefix("".join(prefixes)): value for name, value in out.items()}


def blocks(names: Iterable[str], inside: str = "") -> set[tuple[int, int]]:
    """(stage, block), both from 1, of the blocks that have an array whose name begins `inside`."""
    found = filter(None, map(_BLOCK.match, names))
    return {(int(m[1]), int(m[2]) + 1) for m in found if m[3].startswith(inside)}


def shortcut_option(names: Iterable[str]) -> str:
    """Option A, B or C: by which blocks have a projection in `canonical` names."""
    names = list(names)
    projected = blocks(names, "shortcut.")
    if not projected:
        return "A"
    return "C" if projected == blocks(names) else "B"


def from_torch(state_dict: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> dict[str, Any]:
    """Variables in the canonical layout from a PyTorch state dict.

    Args:
      state_dict: arrays by name, see `canonical`.
      template: the net's own `{"params": …, "batch_stats": …}`, with shapes.

    Raises:
      UserError: names the first array that is missing, of another shape or kind, not finite, or
        left over.
    """
    have, out = canonical(state_dict), {}
    for path, spec in flax.traverse_util.flatten_dict(template).items():
        name = _torch_name(path)
        if name not in have:
            raise UserError(f"the state dict is of another net: it lacks {name}")
        value = np.asarray(have.pop(name))
        if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
            raise UserError(f"the state dict's {name} is {value.dtype}: only floats are read")
        with np.errstate(over="ignore"):
            value = value.astype(np.float32)
        if not np.isfinite(value).all():
            raise UserError(f"the state dict's {name} is not finite throughout in float32")
        if path[-1] == "kernel":
            value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
        if value.shape != spec.shape:
            raise UserError(
                f"the state dict is of another net: {name} is {list(value.shape)} in this "
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
        name = _torch_name(path).replace(".shortcut.", f".{shortcut}.")
        name = re.sub(r"^linear\.", f"{head}.", name)
        value = np.asarray(value, np.float32)
        if path[-1] == "kernel":
            value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        out[name] = np.ascontiguousarray(value)
        if path[-1] == "var":
            out[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return out


def move_zeros(variables: Mapping[str, Any], to: str) -> dict[str, Any]:
    """Variables of a net with option A for zeros in another place; the outputs stay the same.

    This package puts the zeros half before and half after the old channels, some PyTorch projects
    all after them: the same net with the channels between its blocks in another order.

    Args:
      variables: `{"params": …, "batch_stats": …}`, canonical layout.
      to: "split", of a net that has them after; or "after", of one that has them split.
    """
    params = variables["params"]
    last = "3" if "conv3" in params["stage1_block1"] else "2"
    preactivation = "final_bn" in params
    # The places of the channels of the stem and of each stage in the order to come.
    orders = [np.arange(params["stem_conv"]["kernel"].shape[-1])]
    for stage in itertools.count(1):
        if f"stage{stage}_block1" not in params:
            break
        width = params[f"stage{stage}_block1"][f"conv{last}"]["kernel"].shape[-1]
        old = len(orders[-1])
        before, after = np.split(np.arange(old, width), [(width - old) // 2])
        orders.append(np.concatenate([before, orders[-1], after]))
    if to == "after":
        orders = list(map(np.argsort, orders))
    out = {}
    for path, value in flax.traverse_util.flatten_dict(dict(variables)).items():
        module, layer = path[1], path[-2]
        if match := re.fullmatch(r"stage(\d+)_block(\d+)", module):
            came, goes = orders[int(match[1]) - (match[2] == "1")], orders[int(match[1])]
        else:
            came = goes = orders[-1]
        if layer in ("conv1", "head") and path[-1] == "kernel":
            value = value.take(came, axis=-2)
        if layer == f"conv{last}" or (layer == f"bn{last}" and not preactivation):
            value = value[..., goes]
        if layer == "final_bn" or (layer == "bn1" and preactivation):
            value = value[came]
        out[path] = value
    return flax.traverse_util.unflatten_dict(out)


def _torch_name(path: tuple[str, ...]) -> str:
    collection, *modules, leaf = path
    module = modules[-1]
    if module == "head":
        return {"kernel": "linear.weight", "bias": "linear.bias"}[leaf]
    torch_leaf = "weight" if leaf == "kernel" else _NORM[collection, leaf]
    if len(modules) == 1:
        names = {"stem_conv": "conv1", "stem_bn": "bn1", "final_bn": "bn"}
        return f"{names[module]}.{torch_leaf}"
    stage, block = re.fullmatch(r"stage(\d+)_block(\d+)", modules[0]).groups()
    inside = {"proj_conv": "shortcut.0", "proj_bn": "shortcut.1"}.get(module, module)
    return f"layer{stage}.{int(block) - 1}.{inside}.{torch_leaf}"
