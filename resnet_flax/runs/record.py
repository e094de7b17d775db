"""What a run leaves beside checkpoints and metrics: config, versions, results, weights, curves.

All errors in these files are shares, 0 to 1.
"""

import datetime
import hashlib
import importlib.metadata
import os
import pathlib
import platform
import shlex
import subprocess
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax import models
from resnet_flax.config import flatten
from resnet_flax.data.dataset import Dataset
from resnet_flax.devices import distributed
from resnet_flax.errors import UserError
from resnet_flax.runs import files, weights
from resnet_flax.runs.metrics import draw_curves, of_split, recent_error
from resnet_flax.training.evaluate import Score
from resnet_flax.training.experiment import Experiment

# From here on the top-5 error says more than a table of every class.
MANY_CLASSES = 100


def describe_model(run: Experiment) -> dict[str, Any]:
    """The arguments of `create_model` that make the run's net, as a weights file keeps them."""
    model = run.config.model
    return {
        "name": model.name,
        "shortcut": models.resolve_shortcut(model.name, model.shortcut),
        "num_classes": model.num_classes,
        "stride_in_3x3": model.stride_in_3x3,
        "survival": model.survival,
    }


def count_parameters(run: Experiment) -> int:
    """Trainable parameters of the run's net."""
    return sum(p.size for p in jax.tree.leaves(run.abstract_state().params))


def write_start(
    directory: pathlib.Path,
    config: ConfigDict,
    run: Experiment,
    *,
    step: int,
    environment: dict[str, Any],
    init_weights: str | None,
    checkpoint_dir: str,
    group: str | None = None,
) -> None:
    """Writes config, preprocessing and `run.json` at a run's start; a restart adds to the latter.

    Args:
      directory: the run's.
      config: as given, before durations are resolved.
      run: the experiment.
      step: where it begins or goes on.
      environment: see `environment`.
      init_weights: SHA-256 of the weights file it began with, if any.
      checkpoint_dir: where its checkpoints lie.
      group: those that it is trained with, see `handover.group_of`; None: it is alone.
    """
    path = directory / "run.json"
    old = files.read_json(path) or {}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    start = {"time": now, "step": step, **environment}
    if old:
        files.write_json(path, old | {"starts": [*old.get("starts", []), start]})
        return
    files.write_json(directory / "config.json", flatten(config))
    preprocess = directory / "preprocess.safetensors"
    weights.save_preprocessing(preprocess, run.mean, run.std)
    dataset, usual = run.dataset, directory / "checkpoints"
    draw = dataset.validation_draw
    files.write_json(
        path,
        {
            "model": run.config.model.name,
            "shortcut": describe_model(run)["shortcut"],
            "devices": run.mesh.size,
            "init_weights": init_weights,
            # Not where it is the usual place: directories are moved.
            "checkpoint_dir": None if checkpoint_dir == str(usual) else checkpoint_dir,
            **({"group": group} if group else {}),
            "preprocess_sha256": hashlib.sha256(preprocess.read_bytes()).hexdigest(),
            "dtype": str(np.dtype(run.model.dtype)),
            "parameters": count_parameters(run),
            "weighted_layers": models.get_architecture(run.config.model.name).weighted_layers,
            "total_steps": run.config.train.total_steps,
            "data": {
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
                "train_examples": len(dataset.train),
                "validation_examples": len(dataset.validation or ()),
                "test_examples": len(dataset.test),
                "class_names": dataset.class_names,
                "validation_draw": list(map(int, draw)) if draw is not None else None,
            },
            "starts": [start],
        },
    )


def environment(mesh: Mesh) -> dict[str, Any]:
    """Command, commit, versions and hardware of this process; ask for it when it begins."""
    packages = "resnet-flax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"
    return {
        "command": shlex.join([pathlib.Path(sys.executable).name, *sys.orig_argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in packages},
        "hardware": hardware(mesh),
        "processes": distributed.count(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware(mesh: Mesh) -> str:
    """For example "1 x NVIDIA H200 (gpu)" or "Intel Xeon, 2 cores as 2 devices (cpu)"."""
    device = mesh.devices.flat[0]
    if device.platform == "cpu":
        return f"{_cpu_name()}, {os.cpu_count()} cores as {mesh.size} device(s) (cpu)"
    return f"{mesh.size} x {device.device_kind} ({device.platform})"


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The package's git commit, with "+" where files differ from it; None outside a checkout."""
    here = pathlib.Path(__file__).parent

    def git(*args):
        return subprocess.run(
            ["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", ":/")
        return git("rev-parse", "HEAD") + ("+" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None


def selection_split(dataset: Dataset) -> str:
    """The split by which a best checkpoint is kept: "test" only where nothing else is there."""
    return "validation" if dataset.validation is not None else "test"


def best(records: list[dict[str, Any]], split: str) -> dict[str, Any] | None:
    """The first record of the lowest error in a split, None where there is none."""
    return min(of_split(records, split), key=lambda r: r["error"], default=None)


def describe_score(score: Score) -> dict[str, Any]:
    """A score as a record: loss, error, counts, and, of few classes, the error of each.

    Of many classes: the top-5 error.
    """
    few = len(score.confusion) < MANY_CLASSES
    per_class = [None if np.isnan(e) else round(float(e), 6) for e in score.class_errors()]
    return {
        "loss": score.loss,
        "error": score.error,
        "wrong": score.wrong,
        "examples": score.examples,
        **({"unreadable": score.unreadable} if score.unreadable else {}),
        **({"class_errors": per_class} if few else {"top5_error": score.top5_error}),
    }


def _details(score: Score) -> dict[str, Any]:
    described = describe_score(score)
    details = {
        "test_top5_error_last": described.get("top5_error"),
        "test_unreadable_last": described.get("unreadable"),
        "test_class_errors_last": described.get("class_errors"),
        "test_confusion_last": score.confusion.tolist() if "class_errors" in described else None,
    }
    return {key: value for key, value in details.items() if value is not None}


def finished(directory: pathlib.Path, total_steps: int) -> dict[str, Any] | None:
    """The result of a run that has ended, or None: it is made again from the last checkpoint."""
    try:
        result = files.read_json(directory / "result.json") or {}
        weights.load(directory / "weights.safetensors")
    except UserError:
        return None
    return result if result.get("steps") == total_steps else None


def write_result(
    directory: pathlib.Path,
    run: Experiment,
    variables: Any,
    scores: dict[str, Score],
    records: list[dict[str, Any]],
    *,
    seconds: float,
    images_per_second: float,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Writes `weights.safetensors`, `curves.png` and, last, `result.json`, which it returns.

    The headline is the last step's test error. The test error at the step of the lowest validation
    error stands beside it, null without a validation split. The lowest test error of all is there
    because others quote it, and is named for what it is.
    """
    name = run.config.model.name
    at_validation = best(records, "validation")
    test_by_step = {r["step"]: r["error"] for r in of_split(records, "test")}
    result = {
        "model": name,
        "shortcut": describe_model(run)["shortcut"],
        "data": run.dataset.name,
        "seed": run.config.seed,
        "steps": run.config.train.total_steps,
        "test_error_last": scores["test"].error,
        "test_loss_last": scores["test"].loss,
        "test_wrong_last": scores["test"].wrong,
        "test_examples": scores["test"].examples,
        "test_error_at_best_validation": at_validation and test_by_step.get(at_validation["step"]),
        "best_validation_step": at_validation and at_validation["step"],
        "test_error_best_is_leakage": min(test_by_step.values(), default=None),
        "train_error_last": recent_error(records, len(run.dataset.train)),
        "class_names": run.dataset.class_names,
        **_details(scores["test"]),
        # The whole of `starts` in run.json took part; time that a crash undid does not count.
        "seconds": round(seconds, 2),
        "images_per_second": round(images_per_second, 1),
        **environment,
    }
    _save_weights(directory / "weights.safetensors", run, variables, result)
    try:
        draw_curves(records, directory / "curves.png", f"{name} on {run.dataset.name}")
    except OSError as error:
        if error.errno is not None:
            raise
        # Matplotlib has found no place for its cache of fonts: no picture, but a result.
        print(f"note: curves.png could not be drawn: {error}", file=sys.stderr)
    files.write_json(directory / "result.json", result)
    return result


def _save_weights(path: pathlib.Path, run: Experiment, variables: Any, result: dict) -> None:
    training = {k: v for k, v in result.items() if k not in ("class_names", "test_confusion_last")}
    weights.save(
        path,
        weights.Weights(
            model=describe_model(run),
            variables=variables,
            mean=run.mean,
            std=run.std,
            class_names=run.dataset.class_names,
            training=training | {"config": flatten(run.config)},
        ),
    )
