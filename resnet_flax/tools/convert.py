r"""Converts weights between this package's format and PyTorch's.

    python -m resnet_flax.tools.convert --from_torch=resnet20.th --model=resnet20 \
        --preprocess=imagenet --out=resnet20.safetensors
    python -m resnet_flax.tools.convert --to_torch=resnet20.safetensors --out=resnet20.pth

PyTorch files are read with `weights_only`: nothing in them is ever executed. A `.safetensors` file
with PyTorch's names is read and written without PyTorch.

A state dict says nothing of what lies between its arrays. So only nets are converted whose layers
PyTorch projects build too; stochastic depth, which scales branches at test, is folded into the
arrays on the way to PyTorch.
"""

import io
import pathlib
from typing import Any

import numpy as np
import safetensors.numpy

from resnet_flax import models, torch_names, weights
from resnet_flax.errors import UserError
from resnet_flax.models import blocks
from resnet_flax.models.resnet import without_survival
from resnet_flax.state import abstract_variables
from resnet_flax.tools import entry
from resnet_flax.workdir import write_atomically

# Mean and standard deviation of the channels, of pixel values from 0 to 1.
PREPROCESS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10_0.2": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}

_BLOCKS = (
    blocks.BasicBlock,
    blocks.BottleneckBlock,
    blocks.PreactBasicBlock,
    blocks.PreactBottleneckBlock,
)


def check_expressible(name: str) -> None:
    """Refuses a net that PyTorch's names cannot stand for.

    Raises:
      UserError: there is no net called `name`, or its arrays would make another net in PyTorch.
    """
    architecture = models.get_architecture(name)
    if architecture.block not in _BLOCKS or architecture.shortcut not in (*models.OPTIONS, "none"):
        raise UserError(
            f"model {name!r} cannot be converted: no PyTorch project's net computes the same from "
            "its arrays. Plain, residual, bottleneck and pre-activation nets can"
        )


def read_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The state dict in a PyTorch or safetensors file; what PyTorch has as floats is float32.

    Raises:
      UserError: there is none, or it holds more than plain tensors.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        try:
            return safetensors.numpy.load_file(path)
        except (safetensors.SafetensorError, TypeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    torch = _torch()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        first = str(error).strip().partition("\n")[0][:160]
        raise UserError(f"{path} cannot be read as weights only: {first}") from error
    for key in ("state_dict", "model", "net", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no state dict")
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    try:
        return {
            k: (v.detach().to(torch.float32) if v.is_floating_point() else v).numpy()
            for k, v in tensors.items()
        }
    except (TypeError, RuntimeError, NotImplementedError) as error:
        first = str(error).strip().partition("\n")[0][:160]
        raise UserError(f"{path} holds tensors that are not plain arrays: {first}") from error


def _torch():
    try:
        import torch
    except ImportError as error:
        raise UserError("this needs PyTorch: pip install torch") from error
    return torch


def from_torch(
    state_dict: dict[str, np.ndarray],
    name: str,
    *,
    mean: np.ndarray,
    std: np.ndarray,
    shortcut: str | None = None,
    stride_in_3x3: bool | None = None,
    class_names: tuple[str, ...] | None = None,
    source: str = "",
) -> weights.Weights:
    """Weights of the net called `name` from a PyTorch state dict.

    Args:
      state_dict: arrays by name.
      name: of the net.
      mean: [C] or [H, W, C], subtracted from pixel values 0 to 255.
      std: [C], divided by.
      shortcut: A, B or C; None: by the projections that the state dict has.
      stride_in_3x3: of bottlenecks; None: as torchvision has it in its ImageNet nets.
      class_names: one a class; None: numbers.
      source: where it comes from, for the record.

    Raises:
      UserError: the state dict is not that net's, or the net is none that can be converted.
    """
    check_expressible(name)
    architecture = models.get_architecture(name)
    if shortcut is None and architecture.shortcut in models.OPTIONS:
        shortcut = torch_names.shortcut_option(state_dict)
    if stride_in_3x3 is None:
        stride_in_3x3 = architecture.image_size == 224 and architecture.block.expansion == 4
    heads = [v for k, v in state_dict.items() if np.ndim(v) == 2 and k.endswith(".weight")]
    num_classes = len(heads[-1]) if heads else architecture.num_classes
    model = models.create_model(name, num_classes, shortcut=shortcut, stride_in_3x3=stride_in_3x3)
    template = abstract_variables(model)
    return weights.Weights(
        model={
            "name": name,
            "shortcut": models.resolve_shortcut(name, shortcut),
            "num_classes": num_classes,
            "stride_in_3x3": stride_in_3x3,
        },
        variables=torch_names.from_torch(state_dict, template),
        mean=np.asarray(mean, np.float32),
        std=np.asarray(std, np.float32),
        class_names=class_names or tuple(map(str, range(num_classes))),
        training={"source": source} if source else {},
    )


def _numbers(text: str, flag: str, *, positive: bool = False) -> np.ndarray:
    try:
        values = np.array([float(v) for v in text.split(",")], np.float32)
    except ValueError:
        values = np.zeros(0)
    if len(values) != 3 or not np.isfinite(values).all() or (positive and (values <= 0).any()):
        kind = "three positive numbers" if positive else "three numbers"
        raise UserError(f"{flag}={text} must be {kind}, as in {flag}=0.49,0.48,0.45")
    return values


# Flags that only one of the two ways has.
_FROM = ("model", "shortcut", "stride_in_3x3", "preprocess", "mean", "std")
_TO = ("names",)


def main(argv: list[str]) -> None:
    """Converts one file."""
    parser = entry.parser(__doc__)
    parser.add_argument("--from_torch", type=pathlib.Path, help="a PyTorch file to read")
    parser.add_argument("--to_torch", type=pathlib.Path, help="a file of ours to read")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the file to write")
    parser.add_argument("--model", help="the net's name (from_torch)")
    parser.add_argument("--shortcut", help="A, B or C; default: as the file has it")
    parser.add_argument("--stride_in_3x3", choices=["true", "false"], help="of bottlenecks")
    parser.add_argument("--preprocess", choices=PREPROCESS, help="what the net expects of images")
    parser.add_argument("--mean", help="three numbers, of pixel values from 0 to 1")
    parser.add_argument("--std", help="likewise")
    parser.add_argument("--names", choices=["cifar", "torchvision"], help="style (to_torch)")
    args = parser.parse_args(argv)
    if (args.from_torch is None) == (args.to_torch is None):
        raise UserError("give either --from_torch=FILE or --to_torch=FILE")
    way, foreign = ("from_torch", _TO) if args.from_torch else ("to_torch", _FROM)
    for flag in foreign:
        if getattr(args, flag) is not None:
            raise UserError(f"--{flag} means nothing to --{way}: leave it out")
    try:
        model = (_from if args.from_torch else _to)(args)
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror}") from error
    print(f"wrote {args.out}")
    if note := _unsaid(model):
        print(f"note: {note}")


def _unsaid(model: dict[str, Any]) -> str | None:
    """What the net in PyTorch must be like beyond what its state dict shows."""
    block = models.get_architecture(model["name"]).block
    if block is blocks.BottleneckBlock:
        where = "the 3x3" if model["stride_in_3x3"] else "the first 1x1"
        return (
            f"taken to have the stride of its bottlenecks in {where} convolution, which a state "
            "dict does not show"
        )
    if block.preactivation:
        return (
            "taken to activate before branch and shortcut split, in the first block and where the "
            "shape changes (Identity Mappings, appendix), which a state dict does not show"
        )
    return None


def _from(args) -> dict[str, Any]:
    if not args.model:
        raise UserError("--from_torch needs --model=NAME")
    check_expressible(args.model)
    if args.preprocess and (args.mean or args.std):
        raise UserError("give --preprocess, or --mean and --std, not both")
    if args.preprocess:
        mean, std = (np.array(v, np.float32) for v in PREPROCESS[args.preprocess])
    elif args.mean and args.std:
        mean, std = _numbers(args.mean, "--mean"), _numbers(args.std, "--std", positive=True)
    else:
        raise UserError(
            "say what the net expects of images: --preprocess="
            f"{'|'.join(PREPROCESS)}, or --mean=R,G,B --std=R,G,B"
        )
    stride = None if args.stride_in_3x3 is None else args.stride_in_3x3 == "true"
    converted = from_torch(
        read_torch(args.from_torch),
        args.model,
        mean=255 * mean,
        std=255 * std,
        shortcut=args.shortcut,
        stride_in_3x3=stride,
        source=args.from_torch.name,
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    weights.save(args.out, converted)
    return converted.model


def _to(args) -> dict[str, Any]:
    loaded = weights.load(args.to_torch)
    name = loaded.model["name"]
    check_expressible(name)
    try:
        model = models.create_model(**loaded.model)
    except TypeError as error:
        raise UserError(f"{args.to_torch} is damaged: its net is {loaded.model}") from error
    variables = weights.fit(loaded.variables, abstract_variables(model), str(args.to_torch))
    variables = without_survival(model, variables)
    cifar = models.get_architecture(name).image_size == 32
    style = args.names or ("cifar" if cifar else "torchvision")
    names = ("shortcut", "linear") if style == "cifar" else ("downsample", "fc")
    arrays = torch_names.to_torch(variables, shortcut=names[0], head=names[1])
    if args.out.suffix == ".safetensors":
        content = safetensors.numpy.save(arrays)
    else:
        torch, buffer = _torch(), io.BytesIO()
        torch.save({k: torch.from_numpy(v.copy()) for k, v in arrays.items()}, buffer)
        content = buffer.getvalue()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.out, content)
    return {"name": name, "stride_in_3x3": model.stride_in_3x3}


if __name__ == "__main__":
    entry.run(main)
