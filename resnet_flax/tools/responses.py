"""Measures the responses of runs' layers [R, Fig. 7], for resnet_flax.tools.report to draw.

    python -m resnet_flax.tools.responses runs/paper/plain20/seed0 runs/paper/resnet20/seed0

The standard deviation, over the test set, of the output of each 3x3 layer's batch normalisation,
before the addition and the ReLU, with the statistics used at test. It is left as responses.json in
the run's directory. Not for nets with another order of layers, such as pre-activation nets, where
no batch normalisation stands at that place.
"""

import pathlib
import sys

from resnet_flax.devices import sharding
from resnet_flax.errors import UserError
from resnet_flax.runs import files
from resnet_flax.tools import entry
from resnet_flax.training import outputs
from resnet_flax.training.trained import Loader


def measure(directory: pathlib.Path, loader: Loader) -> dict:
    """Measures a run's layers and leaves the result in its directory.

    Returns:
      `model`, `images`, `weights_sha256`, and `layers`, each with `name` and `std`.

    Raises:
      UserError: the run is not finished, its data are not there, or its net is of another kind.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is no directory of a run")
    trained = loader.load(directory)
    run = trained.run
    model = run.model.clone(scan=False)
    layers = outputs.response_layers(model, run.config.model.name)
    deviations, images = outputs.response_deviations(
        model,
        trained.variables(),
        trained.test_feed(),
        layers=layers,
        sharding=sharding.split(run.mesh),
        batch_size=run.config.eval.batch_size,
    )
    content = {
        "model": run.config.model.name,
        "data": run.dataset.name,
        "images": images,
        "weights_sha256": trained.sha256,
        "layers": [{"name": name, "std": deviations[name]} for name in layers],
    }
    files.write_json(directory / "responses.json", content)
    return content


def main(argv: list[str]) -> None:
    """Measures the runs that are named."""
    parser = entry.parser(__doc__)
    parser.add_argument("runs", nargs="+", help="directories of finished runs")
    parser.add_argument("--data_dir", help="where the data are, if not where the run found them")
    args = parser.parse_args(argv)
    loader, failed = Loader(args.data_dir), 0
    for path in args.runs:
        directory = pathlib.Path(path).expanduser()
        try:
            content = measure(directory, loader)
        except (UserError, OSError) as error:
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
