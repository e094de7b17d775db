r"""Publishes the weights of a recorded run with the package, for `load_pretrained`.

    python -m resnet_flax.tools.publish results/resnet20 --name=resnet20 \
        --weights=runs/resnet20/seed0/weights.safetensors

The results folder must hold the run's config.json, run.json, result.json and metrics.jsonl. Weights
of any other run are refused; nothing is evaluated again.
"""

import pathlib
import re
from typing import Any

import jax

from resnet_flax import pretrained
from resnet_flax.errors import UserError
from resnet_flax.runs import files, published, weights
from resnet_flax.tools import entry

MOST_BYTES = 16_000_000
"""All published files together; they come with every installation."""


def publish(
    results: pathlib.Path, file: pathlib.Path, name: str, *, replace: bool = False
) -> dict[str, Any]:
    """Publishes the weights `file` of the run recorded in `results`; returns its index entry.

    Raises:
      UserError: the weights are of another run, the name is wrong or taken, or the published files
        would be too large.
    """
    parts = results.resolve().parts
    if "results" not in parts[:-1]:
        raise UserError(f"{results} does not lie in results/: record the run there first")
    for needed in ("result.json", "config.json", "run.json", "metrics.jsonl"):
        if not (results / needed).is_file():
            raise UserError(f"{results} holds no {needed}: give the folder of a recorded run")
    loaded = weights.load(file)
    net = pretrained.assemble(str(file), loaded, files.sha256_of(file))
    result, config = (files.read_json(results / f"{kind}.json") for kind in ("result", "config"))
    # Durations, commit and errors to the last digit identify the run.
    recorded = {key: value for key, value in config.items() if key.startswith("optim.")} | result
    recorded.pop("test_confusion_last", None)  # Not in the weights.
    own = loaded.training.get("config", {}) | loaded.training
    own["class_names"] = list(loaded.class_names)
    for key, value in recorded.items():
        if own.get(key) != value:
            raise UserError(
                f"{file} is not of the run in {results}: its {key} is {own.get(key)!r}, the run's "
                f"{value!r}"
            )
    if not re.fullmatch(r"[a-z0-9_]+", name) or not name.startswith(result["model"]):
        raise UserError(
            f"--name={name} must be of small letters, digits and _, and begin with the net's name, "
            f"{result['model']}"
        )
    index, folder = published.read_index(), published.FOLDER
    if name in index and not replace:
        raise UserError(f"{name} is published already, from {index[name]['results']}; --replace?")
    path, size = folder / f"{name}.safetensors", file.stat().st_size
    if size + sum(p.stat().st_size for p in folder.glob("*.safetensors") if p != path) > MOST_BYTES:
        raise UserError(
            f"with the {size:,} bytes of {name} the published files would have more than "
            f"{MOST_BYTES:,}"
        )
    start = len(parts) - 1 - parts[::-1].index("results")
    index[name] = {
        "file": path.name,
        "sha256": net.sha256,
        **{key: result[key] for key in ("model", "data", "seed", "steps")},
        "parameters": sum(x.size for x in jax.tree.leaves(net.variables["params"])),
        "test_error": result["test_error_last"],
        "results": "/".join(parts[start:]),
    }
    files.write_atomically(path, file.read_bytes())
    files.write_json(folder / "index.json", dict(sorted(index.items())))
    return index[name]


def main(argv: list[str]) -> None:
    """Publishes one file."""
    parser = entry.parser(__doc__)
    parser.add_argument("results", type=pathlib.Path, help="folder of the recorded run")
    parser.add_argument("--weights", type=pathlib.Path, required=True, help="the run's weights")
    parser.add_argument("--name", required=True, help="to load them by")
    parser.add_argument("--replace", action="store_true", help="replace the one of this name")
    args = parser.parse_args(argv)
    with entry.writing(published.FOLDER):
        new = publish(args.results, args.weights, args.name, replace=args.replace)
    error = 100 * new["test_error"]
    print(f"published {args.name}: {error:.2f} % test error, from {new['results']}")


if __name__ == "__main__":
    entry.run(main)
