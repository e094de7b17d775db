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
    """Totals and, as dicts, `count.layers` of a net, for a square image of `image_size` pixels.

    The options are arguments of `models.create_model`; the default size is the data set's.
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


def _table(rows: list[dict]) -> str:
    columns = []
    for key in rows[0]:
        cells = [key.replace("_", " "), *(_cell(row[key]) for row in rows)]
        width = max(map(len, cells))
        columns.append([c.rjust(width) if columns else c.ljust(width) for c in cells])
    return "\n".join(map("  ".join, zip(*columns, strict=True)))


def _cell(value) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else value


def main(argv: list[str]) -> None:
    """Prints one net or the list."""
    parser = entry.parser(__doc__)
    parser.add_argument("--model", help="name of a net")
    parser.add_argument("--list", action="store_true", help="all nets, totals only")
    parser.add_argument("--shortcut", help="A, B or C; default: the paper's for the net")
    parser.add_argument("--num_classes", type=int, help="default: the net's data set's")
    parser.add_argument("--stride_in_3x3", action="store_true", help='bottlenecks as in "v1.5"')
    parser.add_argument("--image_size", type=int, help="side, pixels; default: the data set's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = vars(parser.parse_args(argv))
    name, as_json = options.pop("model"), options.pop("json")
    if options.pop("list") == bool(name):
        raise UserError("give either --model=NAME or --list")
    totals = [summarize(name, **options) for name in ([name] if name else models.ARCHITECTURES)]
    layers = [total.pop("layers") for total in totals]
    if as_json:
        print(json.dumps(totals[0] | {"layers": layers[0]} if name else totals, indent=2))
        return
    if name:
        print(_table(layers[0]), end="\n\n")
    print(_table(totals))


if __name__ == "__main__":
    entry.run(main)
