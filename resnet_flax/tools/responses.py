"""Measures the responses of runs' layers [R, Fig. 7], for resnet_flax.tools.report to draw.

    python -m resnet_flax.tools.responses runs/paper/plain20/seed0 runs/paper/resnet20/seed0

A response is the standard deviation, over the test set, of the output of a 3x3 layer's batch
normalisation before the addition and the ReLU, with the statistics used at test. It is written to
responses.json in the run's directory. Nets with another order of layers, such as pre-activation
nets, have no batch normalisation at that place.
"""

import pathlib
import sys

from resnet_flax.errors import UserError
from resnet_flax.runs import files
from resnet_flax.tools import entry
from resnet_flax.training import outputs
from resnet_flax.training.trained import Loader


def measure(directory: pathlib.Path, loader: Loader) -> str:
    """Writes a finished run's responses.json; returns a line about it.

    Raises:
      UserError: the run cannot be measured, or the file not written.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory of a run")
    trained = loader.load(directory)
    deviations, images = outputs.response_deviations(trained)
    name, path = trained.run.config.model.name, directory / "responses.json"
    content = {
        "model": name,
        "data": trained.run.dataset.name,
        "images": images,
        "weights_sha256": trained.sha256,
        "layers": [{"name": layer, "std": std} for layer, std in deviations.items()],
    }
    with entry.writing(path):
        files.write_json(path, content)
    values = deviations.values()
    return (
        f"{directory}: {name}, {len(values)} layers, standard deviations from {min(values):.3f} to "
        f"{max(values):.3f}, mean {sum(values) / len(values):.3f}, on {images} images"
    )


def main(argv: list[str]) -> None:
    """Measures the named runs."""
    parser = entry.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=pathlib.Path, help="directories of finished runs")
    parser.add_argument("--data_dir", help="where the data are, if not where the run found them")
    args = parser.parse_args(argv)
    loader, failed = Loader(args.data_dir), 0
    for directory in args.runs:
        try:
            print(measure(directory.expanduser(), loader), flush=True)
        except UserError as error:
            failed += 1
            print(f"passed over: {error}", file=sys.stderr)
    if failed:
        raise UserError(f"{failed} of {len(args.runs)} runs could not be measured")


if __name__ == "__main__":
    entry.run(main)
