"""Shapes, parameters and multiply-adds of a net, or of all.

python -m resnet_flax.tools.summary --model=resnet56 --shortcut=B
python -m resnet_flax.tools.summary --list
"""

import json

from resnet_flax import models
from resnet_flax.errors import UserError
from resnet_flax.models import count
from resnet_flax.tools import entry


def summarize(
    name: str,
    *,
    shortcut: str | None = None,
    num_classes: int | None = None,
    stride_in_3x3: bool = False,
    image_size: int | None = None,
) -> dict:
    """Totals and layers of a net, for one image.

    Args:
      name: one of `models.ARCHITECTURES`.
      shortcut: see `models.create_model`.
      num_classes: likewise.
      stride_in_3x3: likewise.
      image_size: side of a square image, pixels; None: that of the net's data set.

    Returns:
      `name`, `shortcut`, `num_classes`, `image_size`, `parameters`, `weighted_layers`,
      `multiply_adds`, and `layers`: `name`, `kind`, `shape`, `parameters`, `multiply_adds` of each.

    Raises:
      UserError: unknown name or option.
    """
    architecture = models.get_architecture(name)
    model = models.create_model(name, num_classes, shortcut=shortcut, stride_in_3x3=stride_in_3x3)
    size = architecture.image_size if image_size is None else image_size
    if size < 8:
        raise UserError(f"--image_size={size} must be at least 8 pixels")
    rows = count.layers(model, size)
    return {
        "name": name,
        "shortcut": models.resolve_shortcut(name, shortcut),
        "num_classes": model.num_classes,
        "image_size": size,
        "parameters": sum(r.parameters for r in rows),
        # Without the dense layer there is one weighted layer less.
        "weighted_layers": architecture.weighted_layers - (model.num_classes == 0),
        "multiply_adds": sum(r.multiply_adds for r in rows),
        "layers": [vars(r) for r in rows],
    }


def _table(total: dict) -> str:
    lines = [f"{'layer':<28}{'output':>16}{'parameters':>14}{'multiply-adds':>18}"]
    for row in total["layers"]:
        shape = " x ".join(map(str, row["shape"]))
        lines.append(
            f"{row['name']:<28}{shape:>16}{row['parameters']:>14,}{row['multiply_adds']:>18,}"
        )
    lines.append(
        f"{total['name']}, shortcut {total['shortcut']}: {total['weighted_layers']} weighted "
        f"layers, {total['parameters']:,} parameters, {total['multiply_adds']:,} multiply-adds "
        f"at {total['image_size']} x {total['image_size']}"
    )
    return "\n".join(lines)


def _totals(totals: list[dict]) -> str:
    lines = [
        f"{'name':<28}{'shortcut':>17}{'layers':>8}{'parameters':>14}{'multiply-adds':>18}{'at':>6}"
    ]
    for t in totals:
        lines.append(
            f"{t['name']:<28}{t['shortcut']:>17}{t['weighted_layers']:>8}{t['parameters']:>14,}"
            f"{t['multiply_adds']:>18,}{t['image_size']:>6}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Prints what the flags ask for."""
    parser = entry.parser(__doc__)
    parser.add_argument("--model", help="name of a net")
    parser.add_argument("--list", action="store_true", help="all nets, totals only")
    parser.add_argument("--shortcut", help="A, B or C; default: the paper's for the net")
    parser.add_argument("--num_classes", type=int, help="default: the net's data set's")
    parser.add_argument("--stride_in_3x3", action="store_true", help='bottlenecks as in "v1.5"')
    parser.add_argument("--image_size", type=int, help="side, pixels; default: the data set's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    if bool(args.model) == args.list:
        raise UserError("give either --model=NAME or --list")
    if args.list:
        totals = [
            {key: value for key, value in summarize(name).items() if key != "layers"}
            for name in models.ARCHITECTURES
        ]
        print(json.dumps(totals, indent=2) if args.json else _totals(totals))
        return
    total = summarize(
        args.model,
        shortcut=args.shortcut,
        num_classes=args.num_classes,
        stride_in_3x3=args.stride_in_3x3,
        image_size=args.image_size,
    )
    print(json.dumps(total, indent=2) if args.json else _table(total))


if __name__ == "__main__":
    entry.run(main)
