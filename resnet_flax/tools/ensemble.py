"""Averages the probabilities of several nets on the test set.

    python -m resnet_flax.tools.ensemble runs/paper/resnet110/seed* --out=ensemble.json

Each net is a finished run, a weights file, or published weights; all must be of the same classes
and data. Prints the error of each, their mean, and the error of the ensemble.
"""

import json
import pathlib
from typing import Any

import numpy as np

from resnet_flax.errors import UserError
from resnet_flax.runs import environment, files
from resnet_flax.tools import entry
from resnet_flax.training import outputs
from resnet_flax.training.trained import Loader, Trained


def evaluate(sources: list[pathlib.Path], loader: Loader) -> dict[str, Any]:
    """Scores nets alone and together; returns what `--out` writes.

    Raises:
      UserError: fewer than two nets, the same twice, or nets of different classes or data.
    """
    if len(sources) < 2:
        raise UserError("an ensemble needs at least two nets")
    nets = {}  # By SHA-256. All are checked before the first is scored.
    for source in sources:
        trained = loader.load(source)
        _check_alike(next(iter(nets.values()), trained), trained)
        if twin := nets.get(trained.sha256):
            raise UserError(f"{source} and {twin.source} are the same weights; name one")
        nets[trained.sha256] = trained
    total, members = 0.0, []
    for trained in nets.values():
        probabilities, labels = outputs.probabilities(trained)
        total = total + probabilities.astype(np.float64)
        members.append(
            {
                "source": str(trained.source),
                "model": trained.run.config.model.name,
                "seed": trained.weights.training.get("seed"),
                "weights_sha256": trained.sha256,
                **_scored(probabilities, labels),
            }
        )
    return {
        "data": trained.run.dataset.name,
        "examples": len(labels),
        **_scored(total, labels),
        "mean_error": sum(m["error"] for m in members) / len(members),
        "members": members,
        **environment.describe(trained.run.mesh),
    }


def _scored(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    wrong = int(np.sum(np.argmax(probabilities, axis=1) != labels))
    return {"wrong": wrong, "error": wrong / len(labels)}


def _check_alike(first: Trained, other: Trained) -> None:
    one, two = first.run, other.run
    for what, own, firsts in (
        ("data set", two.dataset.name, one.dataset.name),
        ("number of outputs", two.config.model.num_classes, one.config.model.num_classes),
        ("data set's fingerprint", two.dataset.fingerprint, one.dataset.fingerprint),
    ):
        if own != firsts:
            pair = f"{other.source} does not go with {first.source}"
            raise UserError(f"{pair}: its {what}: {own}; the other's: {firsts}")


def main(argv: list[str]) -> None:
    """Scores the named nets."""
    parser = entry.parser(__doc__)
    parser.add_argument("nets", nargs="+", type=pathlib.Path, help="runs, weights files, names")
    parser.add_argument("--data_dir", help="where the data are, if not where the runs found them")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    result = evaluate([path.expanduser() for path in args.nets], Loader(args.data_dir))
    if args.out:
        with entry.writing(args.out):
            files.write_json(args.out.expanduser(), result)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    for net in result["members"]:
        error = f"error {100 * net['error']:.2f} % ({net['wrong']} wrong)"
        print(f"{net['source']}: {net['model']}, {error}")
    print(
        f"ensemble of {len(result['members'])} on {result['data']}: error "
        f"{100 * result['error']:.2f} % ({result['wrong']} of {result['examples']} wrong); mean of "
        f"the members {100 * result['mean_error']:.2f} %"
    )


if __name__ == "__main__":
    entry.run(main)
