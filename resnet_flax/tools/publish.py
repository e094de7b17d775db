r"""Publishes the weights of a recorded run with the package, for `load_pretrained`.

    python -m resnet_flax.tools.publish results/resnet20 --name=resnet20 \
        --weights=runs/resnet20/seed0/weights.safetensors

The folder of results must hold what the run left: config.json, run.json, result.json and
metrics.jsonl. Weights of any other run are refused; nothing is evaluated again.
"""

import hashlib
import pathlib
import re
from typing import Any

import jax

from resnet_flax import pretrained
from resnet_flax.errors import UserError
from resnet_flax.runs import files, metrics, weights
from resnet_flax.tools import entry

MOST_BYTES = 16_000_000
"""All published files together; they come with every installation."""

# Of result.json: what a weights file keeps elsewhere, or leaves out.
_NOT_IN_WEIGHTS = ("class_names", "test_confusion_last")


def publish(
    results: pathlib.Path,
    file: pathlib.Path,
    name: str,
    *,
    folder: pathlib.Path = pretrained.FOLDER,
    replace: bool = False,
) -> dict[str, Any]:
    """Adds a weights file to the published ones.

    Args:
      results: folder of the recorded run, somewhere below a folder called "results".
      file: the run's `weights.safetensors`.
      name: to load it by; it must begin with the net's.
      folder: where published files lie.
      replace: put it in the place of the one that has this name.

    Returns:
      The new entry of the index.

    Raises:
      UserError: the weights are not those of the run, the name is taken or no name, or the files
        would be too large.
    """
    result = _record(results, "result.json")
    loaded = weights.load(file)
    _check_same_run(results, result, loaded, file)
    net = pretrained.assemble(str(file), loaded, "")  # Can it be used at all?
    if not re.fullmatch(r"[a-z0-9_]+", name) or not name.startswith(result["model"]):
        raise UserError(
            f"--name={name} must be of small letters, digits and _, and begin with the net's name, "
            f"{result['model']}"
        )
    index = pretrained.read_index(folder)
    if name in index and not replace:
        raise UserError(f"{name} is published already, from {index[name]['results']}; --replace?")
    path = folder / f"{name}.safetensors"
    old = path.read_bytes() if path.exists() else None
    others = sum(p.stat().st_size for p in folder.glob("*.safetensors") if p != path)
    weights.save(path, loaded)
    content = path.read_bytes()
    try:
        if others + len(content) > MOST_BYTES:
            raise UserError(
                f"with the {len(content):,} bytes of {name} the published files would have more "
                f"than {MOST_BYTES:,}"
            )
        index[name] = {
            "file": path.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            **{key: result[key] for key in ("model", "data", "seed", "steps")},
            "parameters": sum(x.size for x in jax.tree.leaves(net.variables["params"])),
            "test_error": result["test_error_last"],
            "results": _below_results(results),
        }
        files.write_json(folder / "index.json", dict(sorted(index.items())))
    except BaseException:
        # The index must go on describing the files that are there.
        path.unlink() if old is None else files.write_atomically(path, old)
        raise
    return index[name]


def _record(results: pathlib.Path, name: str) -> dict[str, Any]:
    content = files.read_json(results / name)
    if content is None:
        raise UserError(f"{results} holds no {name}: give the folder of a recorded run")
    return content


def _below_results(results: pathlib.Path) -> str:
    parts = results.resolve().parts
    if "results" not in parts[:-1]:
        raise UserError(f"{results} does not lie in results/: record the run there first")
    start = len(parts) - 1 - parts[::-1].index("results")
    return "/".join(parts[start:])


def _check_same_run(
    results: pathlib.Path, result: dict[str, Any], loaded: weights.Weights, file: pathlib.Path
) -> None:
    """Refuses weights whose record of their training is not the run's, to the last digit."""
    _below_results(results)
    missing = [k for k in ("model", "data", "seed", "steps", "test_error_last") if k not in result]
    if missing:
        raise UserError(f"{results / 'result.json'} lacks {missing[0]}: it is no finished run's")
    for key, value in result.items():
        if key not in _NOT_IN_WEIGHTS and loaded.training.get(key) != value:
            raise UserError(
                f"{file} is not of the run in {results}: its {key} is "
                f"{loaded.training.get(key)!r}, the run's {value!r}"
            )
    run, config = _record(results, "run.json"), _record(results, "config.json")
    trained = loaded.training.get("config", {})
    parameters = sum(x.size for x in jax.tree.leaves(loaded.variables["params"]))
    tests = metrics.of_split(metrics.read_records(results / "metrics.jsonl"), "test")
    for what, own, recorded in (
        ("net", loaded.model["name"], result["model"]),
        ("shortcut", loaded.model.get("shortcut"), result.get("shortcut")),
        ("class names", list(loaded.class_names), result.get("class_names")),
        ("parameter count", parameters, run.get("parameters")),
        ("learning rate", trained.get("optim.learning_rate"), config.get("optim.learning_rate")),
        ("last test error", result["test_error_last"], tests[-1]["error"] if tests else None),
        ("last step", result["steps"], tests[-1]["step"] if tests else None),
    ):
        if own != recorded:
            raise UserError(
                f"{file} is not of the run in {results}: its {what} is {own!r}, the run's "
                f"{recorded!r}"
            )


def main(argv: list[str]) -> None:
    """Publishes one file."""
    parser = entry.parser(__doc__)
    parser.add_argument("results", type=pathlib.Path, help="folder of the recorded run")
    parser.add_argument("--weights", type=pathlib.Path, required=True, help="the run's weights")
    parser.add_argument("--name", required=True, help="to load them by")
    parser.add_argument("--folder", type=pathlib.Path, default=pretrained.FOLDER)
    parser.add_argument("--replace", action="store_true", help="in the place of one of this name")
    args = parser.parse_args(argv)
    try:
        new = publish(
            args.results, args.weights, args.name, folder=args.folder, replace=args.replace
        )
    except OSError as error:
        raise UserError(f"cannot write in {args.folder}: {error.strerror}") from error
    print(
        f"published {args.name}: {100 * new['test_error']:.2f} % test error, from {new['results']}"
    )


if __name__ == "__main__":
    entry.run(main)
