"""Measures the responses of runs' layers [R, Fig. 7], for resnet_flax.tools.report to draw.

    python -m resnet_flax.tools.responses runs/paper/plain20/seed0 runs/paper/resnet20/seed0

A response is the standard deviation, over the test set, of the output of a 3x3 layer's batch
normalisation before the addition and the ReLU, with the statistics used at test. They are written
to responses.json in the run's directory. Nets with another order of layers, such as pre-activation
nets, have no batch normalisation at that place.
"""

import pathlib
import sys

from resnet_flax.errors import UserError
from resnet_flax.runs import files
from resnet_flax.tools import entry
from resnet_flax.training import outputs
from resnet_flax.training.trained import Loader


def measure(directory: pathlib.Path, loader: Loader) -> dict:
    """Measures a finished run's layers and writes responses.json, which it returns.

    Raises:
      UserError: anything the user can mend.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory of a run")
    trained = loader.load(directory)
    deviations, images = outputs.response_deviations(trained)
    content = {
        "model": trained.run.config.model.name,
        "data": trained.run.dataset.name,
        "images": images,
        "weights_sha256": trained.sha256,
        "layers": [{"name": name, "std": std} for name, std in deviations.items()],
    }
    path = directory / "responses.json"
    with entry.writing(path):
        files.write_json(path, content)
    return content


def main(argv: list[str]) -> None:
    """Measures the named runs."""
    parser = entry.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="directories of finished runs")
    parser.add_argument("--data_dir", help="where the data are, if not where the run found them")
    args = parser.parse_args(argv)
    loader, failed = Loader(args.data_dir), 0
    for directory in args.runs:
        try:
            content = measure(directory.expanduser(), loader)
        except UserError as error:
            failed += 1
            print(f"passed over: {error}", file=sys.stderr)
            continue
        values = [layer["std"] for layer in content["layers"]]
        print(
            f"{directory}: {content['model']}, {len(values)} layers, standard deviations from "
            f"{min(values):.3f} to {max(values):.3f}, mean {sum(values) / len(values):.3f}, on "
            f"{content['images']} images",
            flush=True,
        )
    if failed:
        raise UserError(f"{failed} of {len(args.runs)} runs could not be measured")


if __name__ == "__main__":
    entry.run(main)
