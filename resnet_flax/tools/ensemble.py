"""Averages the probabilities of several nets on the test set.

    python -m resnet_flax.tools.ensemble runs/paper/resnet110/seed* --out=ensemble.json

Each net is the directory of a finished run, a weights file, or the name of published weights; all
must be of the same classes and data. Says the error of each, their mean, and that of the ensemble.
"""

import json
import pathlib
from typing import Any

import numpy as np

from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.runs import environment, files
from resnet_flax.tools import entry
from resnet_flax.training import outputs
from resnet_flax.training.trained import Loader, Trained


def evaluate(sources: list[pathlib.Path], loader: Loader) -> dict[str, Any]:
    """Scores nets alone and together.

    Args:
      sources: directories of finished runs, or weights files.
      loader: loads them.

    Returns:
      `members`, each with `source`, `model`, `seed`, `wrong`, `error` and `weights_sha256`;
      `examples`, `wrong` and `error` of the ensemble, `mean_error` of the members, and the
      environment.

    Raises:
      UserError: fewer than two nets, the same twice, or nets of different classes or data.
    """
    if len(sources) < 2:
        raise UserError("an ensemble needs at least two nets")
    # All are looked at before the first is scored.
    nets, digests = [], {}
    for source in sources:
        trained = loader.load(source)
        _check_alike((nets or [trained])[0], trained)
        if twin := digests.get(trained.sha256):
            raise UserError(f"{source} and {twin} are the same weights; name one")
        digests[trained.sha256] = source
        nets.append(trained)
    total, members = np.zeros(()), []
    for trained in nets:
        probabilities, labels = _predict(trained)
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
        "data": nets[0].run.dataset.name,
        "examples": len(labels),
        **_scored(total, labels),
        "mean_error": sum(m["error"] for m in members) / len(members),
        "members": members,
        **environment.describe(nets[0].run.mesh),
    }


def _predict(trained: Trained) -> tuple[np.ndarray, np.ndarray]:
    run = trained.run
    variables = trained.variables()
    if run.model.scan:
        variables = layout.to_scanned(variables)
    return outputs.predict(
        run.model,
        variables,
        trained.test_feed(),
        sharding=sharding.split(run.mesh),
        batch_size=run.config.eval.batch_size,
        ten_crops=run.dataset.train.image_shape[0] if run.config.eval.crops == 10 else 0,
    )


def _scored(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    wrong = int(np.sum(np.argmax(probabilities, axis=1) != labels))
    return {"wrong": wrong, "error": wrong / len(labels)}


def _check_alike(first: Trained, other: Trained) -> None:
    for what, get in (
        ("data set", lambda t: t.run.dataset.name),
        ("number of outputs", lambda t: t.run.config.model.num_classes),
        ("data set's fingerprint", lambda t: t.run.dataset.fingerprint),
    ):
        if get(first) != get(other):
            raise UserError(
                f"{other.source} does not go with {first.source}: its {what}: {get(other)}; "
                f"the other's: {get(first)}"
            )


def _text(result: dict[str, Any]) -> str:
    lines = [
        f"{m['source']}: {m['model']}, error {100 * m['error']:.2f} % ({m['wrong']} wrong)"
        for m in result["members"]
    ]
    count = len(result["members"])
    lines.append(
        f"ensemble of {count} on {result['data']}: error {100 * result['error']:.2f} % "
        f"({result['wrong']} of {result['examples']} wrong); mean of the members "
        f"{100 * result['mean_error']:.2f} %"
    )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Scores the nets that are named."""
    parser = entry.parser(__doc__)
    parser.add_argument("nets", nargs="+", help="directories of runs, weights files, names")
    parser.add_argument("--data_dir", help="where the data are, if not where the runs found them")
    parser.add_argument("--out", help="a JSON file to write")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args(argv)
    sources = [pathlib.Path(path).expanduser() for path in args.nets]
    result = evaluate(sources, Loader(args.data_dir))
    if args.out:
        try:
            files.write_json(pathlib.Path(args.out).expanduser(), result)
        except OSError as error:
            raise UserError(f"cannot write {args.out}: {error.strerror}") from error
    print(json.dumps(result, indent=2) if args.json else _text(result))


if __name__ == "__main__":
    entry.run(main)
