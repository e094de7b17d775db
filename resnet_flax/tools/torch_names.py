"""Variables of this package's nets under the names and layouts that PyTorch projects use.

CIFAR projects (akamaster, chenyaofo, …) and torchvision agree on `conv1`, `bn1` and
`layer<stage>.<block>.conv<i>` / `bn<i>`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from resnet_flax.errors import UserError
from resnet_flax.runs import weights

# Our module: PyTorch's, where they differ.
_MODULES = {"stem_conv": "conv1", "stem_bn": "bn1", "final_bn": "bn"}
STYLES = {
    "cifar": {"head": "linear", "proj_conv": "shortcut.0", "proj_bn": "shortcut.1"},
    "torchvision": {"head": "fc", "proj_conv": "downsample.0", "proj_bn": "downsample.1"},
}
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# Pattern in the names of other projects: the CIFAR style.
_ALIASES = (
    (r"\bdownsample\.", "shortcut."),  # torchvision, timm, chenyaofo
    (r"\b(fc|classifier|fcOut)\.", "linear."),
    (r"\b(conv|bn)In\.", r"\g<1>1."),  # a-martyn/resnet, to the end
    (r"\bstack(\d)\.", r"layer\1."),
    (r"\bstack(\d)a\.", r"layer\1.0."),
    (r"\bstack(\d)b\.(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) + 1}"),
)
# Counters, and the mean and deviation of a normalisation in front of the net.
_IGNORED = re.compile(r"(.*\.)?(num_batches_tracked|n_averaged|mean|std)")
_TORCH_BLOCK = re.compile(r"layer(\d+)\.(\d+)\.(.+)")
_BLOCK = re.compile(r"stage(\d+)_block(\d+)")


def canonical(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a net under CIFAR-style names, without prefix and counters.

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
    """(stage, block) of the blocks that have an array whose name in the block begins `inside`."""
    found = filter(None, map(_TORCH_BLOCK.match, names))
    return {(int(m[1]), int(m[2])) for m in found if m[3].startswith(inside)}


def shortcut_option(arrays: Mapping[str, Any]) -> str:
    """Option A, B or C, by the blocks that have a projection in `canonical` arrays."""
    if not (projected := blocks(arrays, "shortcut.")):
        return "A"
    return "C" if projected == blocks(arrays) else "B"


def from_torch(arrays: Mapping[str, np.ndarray], template: Mapping[str, Any]) -> dict[str, Any]:
    """Variables in the canonical layout, of the shapes in `template`, from `canonical` arrays.

    Raises:
      UserError: an array is missing, foreign, of another shape or kind, or not finite.
    """
    flat = flax.traverse_util.flatten_dict(template)
    paths = {_torch_name(path): path for path in flat}
    have = {name: _our_layout(name, np.asarray(value)) for name, value in arrays.items()}
    weights.fit(have, {name: flat[path] for name, path in paths.items()}, "the state dict")
    return flax.traverse_util.unflatten_dict({path: have[name] for name, path in paths.items()})


def _our_layout(name: str, value: np.ndarray) -> np.ndarray:
    if value.dtype.kind != "f" and value.dtype.name != "bfloat16":
        raise UserError(f"the state dict's {name} is {value.dtype}: only floats are read")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    if not np.isfinite(value).all():
        raise UserError(f"the state dict's {name} is not finite throughout in float32")
    value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    return np.ascontiguousarray(value)


def to_torch(variables: Mapping[str, Any], style: str = "cifar") -> dict[str, np.ndarray]:
    """A PyTorch state dict, as arrays, from canonical variables; its names in one of `STYLES`."""
    out = {}
    for path, value in flax.traverse_util.flatten_dict(dict(variables)).items():
        name = _torch_name(path, style)
        value = np.asarray(value, np.float32)
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        out[name] = np.ascontiguousarray(value)
        if path[-1] == "var":
            out[name.replace("running_var", "num_batches_tracked")] = np.zeros((), np.int64)
    return out


def _torch_name(path: tuple[str, ...], style: str = "cifar") -> str:
    _, *block, module, leaf = path
    names = _MODULES | STYLES[style]
    name = f"{names.get(module, module)}.{_LEAVES.get(leaf, leaf)}"
    if not block:
        return name
    stage, number = map(int, _BLOCK.fullmatch(block[0]).groups())
    return f"layer{stage}.{number - 1}.{name}"


def move_zeros(variables: Mapping[str, Any], to: str) -> dict[str, Any]:
    """Moves the zeros of option A's new channels, by another order of the channels of the same net.

    This package puts the zeros half before and half after the old channels ("split"), some PyTorch
    projects all of them "after". `variables` are canonical, with the zeros where `to` does not say.
    """
    params = variables["params"]
    last = "3" if "conv3" in params["stage1_block1"] else "2"
    preactivation = "final_bn" in params
    # The new order of the channels of the stem and of each stage.
    orders = [np.arange(params["stem_conv"]["kernel"].shape[-1])]
    while first := params.get(f"stage{len(orders)}_block1"):
        old, width = len(orders[-1]), first[f"conv{last}"]["kernel"].shape[-1]
        before, after = np.split(np.arange(old, width), [(width - old) // 2])
        orders.append(np.concatenate([before, orders[-1], after]))
    if to == "after":
        orders = list(map(np.argsort, orders))
    out = {}
    for path, value in flax.traverse_util.flatten_dict(dict(variables)).items():
        module, layer = path[1], path[-2]
        came = goes = orders[-1]
        if match := _BLOCK.fullmatch(module):
            came, goes = orders[int(match[1]) - (match[2] == "1")], orders[int(match[1])]
        if layer in ("conv1", "head") and path[-1] == "kernel":
            value = value.take(came, axis=-2)
        if layer == f"conv{last}" or (layer == f"bn{last}" and not preactivation):
            value = value[..., goes]
        if layer == "final_bn" or (layer == "bn1" and preactivation):
            value = value[came]
        out[path] = value
    return flax.traverse_util.unflatten_dict(out)
