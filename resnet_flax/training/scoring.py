"""Evaluation of a run, a checkpoint or a weights file, as `--mode=evaluate` does it."""

import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import flatten, override, validate
from resnet_flax.data.dataset import Dataset
from resnet_flax.devices import distributed, hardware, randomness
from resnet_flax.errors import UserError
from resnet_flax.runs import environment, files, pictures
from resnet_flax.runs.weights import Weights
from resnet_flax.training import inputs, setup, trained
from resnet_flax.training.evaluate import MANY_CLASSES, Score


@randomness.default_switches()
def score(
    config: ConfigDict | None,
    directory: str | None,
    source: str | None,
    warn: Callable[[str], None] = print,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Scores a net on every example of the test (and validation) split.

    Args:
      config: None: the one of the run or of the weights file.
      directory: of a run; `evaluation.json` and `confusion.png` are written there.
      source: a weights file, the name of published weights, a run's directory or one of its
        checkpoints; None: `directory`.
      warn: called with a line about each damaged checkpoint or unreadable image.
      overrides: changes, as text, of the configuration if that is None.

    Returns:
      The content of `evaluation.json`: "model", "source", "step", "class_names", the environment,
      and for each split its score (see `Score.as_record`), with "confusion" below `MANY_CLASSES`.

    Raises:
      UserError: anything the user can mend.
    """
    if config is not None and config.train.num_seeds > 1:
        raise UserError(
            f"--mode=evaluate scores one net, config.train.num_seeds={config.train.num_seeds}: "
            "leave that at 1, and choose the net with --config.seed or --workdir"
        )
    start = distributed.share(lambda: _configure(config, directory, source, overrides or {}))
    config = trained.unflatten(json.loads(start["config"]))
    path = pathlib.Path(source or directory)
    mesh, dataset = hardware.choose_mesh(config), inputs.load_data(config)
    loaded = distributed.share(lambda: _read(path, dataset, warn))
    loaded = Weights(**loaded | {"class_names": tuple(loaded["class_names"])})
    net = trained.build(trained.Source(path, loaded), config, dataset, mesh, warn)
    variables = net.variables(scanned=net.run.model.scan)
    if start["is_run"]:
        # A weights file holds what is to be scored; a checkpoint what was trained.
        variables = net.run.evaluated(variables)
    scores = net.run.score(variables)
    found = {
        "model": config.model.name,
        "source": str(path),
        "step": loaded.training.get("steps"),
        "class_names": list(dataset.class_names),
        **{split: _record(score) for split, score in scores.items()},
        **environment.describe(mesh),
    }
    if directory and distributed.is_first():
        folder = pathlib.Path(directory)
        files.write_json(folder / "evaluation.json", found)
        if "confusion" in found["test"]:
            title = f"{config.model.name} on {dataset.name}, % of each class's test images"
            names = dataset.class_names  # A net may have more outputs.
            matrix = scores["test"].confusion[: len(names), : len(names)]
            pictures.draw_confusion(matrix, names, folder / "confusion.png", title)
    return found


def describe(found: dict[str, Any]) -> str:
    """What `score` returns, as text: loss, error and the classes' errors of each split."""
    step = f", step {found['step']}" if found["step"] is not None else ""
    lines = [f"{found['model']} from {found['source']}{step}"]
    for split in ("test", "validation"):
        if split in found:
            lines += _table(split, found[split], found["class_names"])
    return "\n".join(lines)


def _record(score: Score) -> dict[str, Any]:
    few = len(score.confusion) < MANY_CLASSES
    return score.as_record() | ({"confusion": score.confusion.tolist()} if few else {})


def _configure(
    config: ConfigDict | None,
    directory: str | None,
    source: str | None,
    overrides: Mapping[str, str],
) -> dict[str, Any]:
    """The configuration to evaluate with, before jax's devices are counted."""
    if not (source or directory):
        raise UserError("nothing to evaluate: give --workdir, --weights or --config")
    path = pathlib.Path(source or directory)
    if not (source or path.exists()):
        raise UserError(f"{path} does not exist: give a weights file, or a run's directory")
    run = trained.run_of(path) if path.is_dir() else None
    loaded = None if run else trained.read_weights(path).weights
    if directory:
        pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
    if config is None:
        config = trained.own_config(run, loaded)
        override(config, overrides)
    if run:
        # An evaluation does not change what the run was trained for, or on.
        run.check_config(flatten(config), sections=("model", "data", "seed"))
    validate(config)
    setup.take_model(config, run.model if run else loaded.model)
    models.resolve_shortcut(config.model.name, config.model.shortcut)
    return {"config": json.dumps(flatten(config)), "is_run": run is not None}


def _read(path: pathlib.Path, dataset: Dataset, warn: Callable[[str], None]) -> dict[str, Any]:
    """The fields of the weights to score, in a form that all processes can be sent."""
    if path.is_dir():
        trained.run_of(path).check_data(dataset.name, dataset.fingerprint)
        loaded = trained.read_checkpoint(path, warn)
    else:
        loaded = trained.read_weights(path).weights
    return vars(loaded) | {"class_names": list(loaded.class_names)}


def _table(split: str, score: dict[str, Any], class_names: list[str]) -> list[str]:
    head = (
        f"{split}: error {100 * score['error']:.2f} % ({score['wrong']} of {score['examples']} "
        f"wrong), loss {score['loss']:.4f}"
    )
    if "unreadable" in score:
        head += f"; {score['unreadable']} images could not be read"
    if "top5_error" in score:
        return [f"{head}, top-5 error {100 * score['top5_error']:.2f} %"]
    width = max(map(len, class_names))
    errors = (math.nan if e is None else e for e in score["class_errors"])
    pairs = zip(class_names, errors, strict=False)
    return [head, *(f"  {name:<{width}}  {100 * error:6.2f} %" for name, error in pairs)]
