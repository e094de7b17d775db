r"""Converts weights between this package's format and PyTorch's.

    python -m resnet_flax.tools.convert --from_torch=resnet20.th --model=resnet20 \
        --preprocess=imagenet --out=resnet20.safetensors
    python -m resnet_flax.tools.convert --to_torch=resnet20.safetensors --out=resnet20.pth

A state dict does not describe what happens between its arrays. So only nets are converted whose
layers PyTorch projects build too; stochastic depth, which scales branches at test, is folded into
the arrays on the way to PyTorch.
"""

import collections
import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from resnet_flax import models, pretrained
from resnet_flax.errors import UserError
from resnet_flax.models import blocks
from resnet_flax.models.resnet import without_survival
from resnet_flax.runs import published, weights
from resnet_flax.tools import entry, torch_file, torch_names
from resnet_flax.training.state import abstract_variables

# Mean and standard deviation of the channels, in pixel values from 0 to 1.
PREPROCESS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar10_0.2": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}

_BLOCKS = "BasicBlock", "BottleneckBlock", "PreactBasicBlock", "PreactBottleneckBlock"


def check_expressible(name: str) -> None:
    """Raises a UserError if there is no net of this name, or its arrays mean another in PyTorch."""
    net = models.get_architecture(name)
    if net.block.__name__ not in _BLOCKS or net.shortcut not in (*models.OPTIONS, "none"):
        raise UserError(
            f"model {name!r} cannot be converted: no PyTorch project's net computes the same from "
            "its arrays. Plain, residual, bottleneck and pre-activation nets can"
        )


def from_torch(
    state_dict: dict[str, np.ndarray],
    name: str,
    *,
    mean: np.ndarray,
    std: np.ndarray,
    stride_in_3x3: bool | None = None,
    option_a_zeros: str | None = None,
    class_names: tuple[str, ...] = (),
    source: str = "",
) -> weights.Weights:
    """Weights of the net called `name` from a PyTorch state dict.

    `mean` and `std`, [C] or [H, W, C], are in pixel values 0 to 255. `stride_in_3x3` is by default
    as in torchvision.

    Raises:
      UserError: the state dict is of another net, or the net cannot be converted.
    """
    check_expressible(name)
    architecture = models.get_architecture(name)
    arrays = torch_names.canonical(state_dict)
    if stride_in_3x3 is None:
        stride_in_3x3 = architecture.image_size == 224 and architecture.block.expansion == 4
    num_classes = len(arrays.get("linear.weight", ())) or architecture.num_classes
    try:
        shortcut, variables = _fitted(arrays, name, num_classes)
    except UserError as error:
        if fitting := " or ".join(_fitting(arrays, num_classes)):
            raise UserError(f"{error}; it fits --model={fitting}") from error
        raise
    model = {"name": name, "shortcut": shortcut, "num_classes": num_classes}
    variables = _move_zeros(variables, option_a_zeros, model, "split")
    if class_names and len(class_names) != num_classes:
        raise UserError(f"there are {len(class_names)} class names, but {num_classes} classes")
    return weights.Weights(
        model | {"stride_in_3x3": stride_in_3x3},
        variables,
        np.asarray(mean, np.float32),
        np.asarray(std, np.float32),
        class_names or tuple(map(str, range(num_classes))),
        {"source": source} if source else {},
    )


def _fitted(arrays: dict[str, np.ndarray], name: str, num_classes: int) -> tuple[str, dict]:
    shortcut = models.get_architecture(name).shortcut
    if shortcut in models.OPTIONS:
        shortcut = torch_names.shortcut_option(arrays)
    template = abstract_variables(models.create_model(name, num_classes, shortcut=shortcut))
    return shortcut, torch_names.from_torch(arrays, template)


def _fitting(arrays: dict[str, np.ndarray], num_classes: int) -> Iterator[str]:
    """Names of the nets that have these arrays."""
    stages = collections.Counter(stage for stage, _ in torch_names.blocks(arrays))
    for name, architecture in models.ARCHITECTURES.items():
        if architecture.stage_sizes == tuple(stages[s] for s in sorted(stages)):
            with contextlib.suppress(UserError):
                check_expressible(name)
                _fitted(arrays, name, num_classes)
                yield name


def _move_zeros(variables: dict, option_a_zeros: str | None, model: dict, to: str) -> dict:
    if option_a_zeros and model["shortcut"] != "A":
        raise UserError(
            f"--option_a_zeros means nothing to {model['name']} with shortcut={model['shortcut']}: "
            "leave it out"
        )
    return torch_names.move_zeros(variables, to) if option_a_zeros == "after" else variables


def main(argv: list[str]) -> None:
    """Converts one file."""
    parser = entry.parser(__doc__)
    parser.add_argument("--from_torch", type=pathlib.Path, help="a PyTorch file to read")
    parser.add_argument("--to_torch", help="a published name, a file of ours, or a run, to read")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the file to write")
    parser.add_argument(
        "--option_a_zeros",
        choices=["split", "after"],
        help="where the PyTorch net has option A's zeros: half before and half after the old "
        "channels (the default), or all after them",
    )
    only_from = [
        parser.add_argument("--model", help="the net's name"),
        parser.add_argument("--stride_in_3x3", choices=["true", "false"], help="of bottlenecks"),
        parser.add_argument("--preprocess", choices=PREPROCESS, help="what the net expects"),
        parser.add_argument("--mean", help="three numbers, of pixel values from 0 to 1"),
        parser.add_argument("--std", help="three numbers, of pixel values from 0 to 1"),
        parser.add_argument("--class_names", help="cat,dog,…: one per class"),
    ]
    args = parser.parse_args(argv)
    if (args.from_torch is None) == (args.to_torch is None):
        raise UserError("give either --from_torch=FILE or --to_torch=FILE")
    for flag in only_from:
        if args.to_torch and getattr(args, flag.dest) is not None:
            raise UserError(f"--{flag.dest} means nothing to --to_torch: leave it out")
    model, notes = _from(args) if args.from_torch else _to(args)
    for assumption in _assumptions(model, args.option_a_zeros):
        notes.append(f"taken to {assumption}, which a state dict does not show")
    print(f"wrote {args.out}", *notes, sep="\nnote: ")


def _assumptions(model: dict[str, Any], option_a_zeros: str | None) -> Iterator[str]:
    """What the net in PyTorch must do beyond what its state dict shows."""
    block = models.get_architecture(model["name"]).block
    if model["shortcut"] == "none":
        yield "have no shortcuts"
    if model["shortcut"] == "A":
        where = "after" if option_a_zeros == "after" else "half before and half after"
        yield (
            "have shortcuts without parameters (option A), the zeros of new channels "
            f"{where} the old ones (--option_a_zeros)"
        )
    if block is blocks.BottleneckBlock:
        where = "the 3x3" if model["stride_in_3x3"] else "the first 1x1"
        yield f"have the stride of its bottlenecks in {where} convolution"
    if block.preactivation:
        yield (
            "activate before branch and shortcut split, in the first block and where the shape "
            "changes (Identity Mappings, appendix)"
        )


def _from(args) -> tuple[dict[str, Any], list[str]]:
    if not args.model:
        raise UserError("--from_torch needs --model=NAME")
    given = _given_preprocessing(args)
    state_dict, beside, notes = torch_file.read(args.from_torch)
    if beside and not given:
        notes.append("took the preprocessing that the file has")
    described = beside | given
    if "mean" not in described:
        raise UserError(
            "say what the net expects of images: --preprocess="
            f"{'|'.join(PREPROCESS)}, or --mean=R,G,B --std=R,G,B"
        )
    if args.class_names:
        described["class_names"] = tuple(args.class_names.split(","))
    converted = from_torch(
        state_dict,
        args.model,
        **described,
        stride_in_3x3={"true": True, "false": False}.get(args.stride_in_3x3),
        option_a_zeros=args.option_a_zeros,
        source=args.from_torch.name,
    )
    with entry.writing(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        weights.save(args.out, converted)
    return converted.model, notes


def _given_preprocessing(args) -> dict[str, Any]:
    """`mean` and `std` that the flags give, in pixel values 0 to 255."""
    if args.preprocess and (args.mean or args.std):
        raise UserError("give --preprocess, or --mean and --std, not both")
    if bool(args.mean) != bool(args.std):
        raise UserError("give both --mean=R,G,B and --std=R,G,B")
    if not (args.preprocess or args.mean):
        return {}
    pair = PREPROCESS.get(args.preprocess) or (args.mean.split(","), args.std.split(","))
    try:
        mean, std = numbers = np.array(pair, np.float32).reshape(2, 3)
    except ValueError:
        numbers = np.nan
    if not np.isfinite(numbers).all():
        raise UserError(f"--mean={args.mean} and --std={args.std} must be three numbers each")
    if (std <= 0).any():
        raise UserError(f"--std={args.std} must be three positive numbers")
    return {"mean": 255 * mean, "std": 255 * std}


def _to(args) -> tuple[dict[str, Any], list[str]]:
    path, _ = published.locate(args.to_torch)
    loaded = weights.load(path)
    name = loaded.model["name"]
    check_expressible(name)
    net, variables = pretrained.build(loaded, str(path))
    shortcut = models.resolve_shortcut(name, loaded.model.get("shortcut"))
    model = {"name": name, "shortcut": shortcut, "stride_in_3x3": net.stride_in_3x3}
    variables = without_survival(net, variables)
    variables = _move_zeros(variables, args.option_a_zeros, model, "after")
    style = "cifar" if models.get_architecture(name).image_size == 32 else "torchvision"
    beside = {"mean": loaded.mean, "std": loaded.std, "class_names": list(loaded.class_names)}
    with entry.writing(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        where = torch_file.write(args.out, torch_names.to_torch(variables, style), beside)
    note = (
        "the net expects (pixels - mean) / std of pixel values 0 to 255; mean "
        f"{list(loaded.mean.shape)}, std and class names are in {where}"
    )
    return model, [note]


if __name__ == "__main__":
    entry.run(main)
