"""Whether the run in a directory is the one asked for: configuration, data, beginning, devices."""

import hashlib
import pathlib
from typing import Any

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from resnet_flax.config import OPERATIONAL_KEYS, base_config, flatten
from resnet_flax.data.dataset import Dataset
from resnet_flax.errors import UserError
from resnet_flax.runs import files, weights


def check_same_config(
    directory: pathlib.Path, config: ConfigDict, sections: tuple[str, ...] | None = None
) -> None:
    """Refuses a directory that belongs to another configuration.

    Args:
      directory: a run's, or an empty one.
      config: as given, before durations are resolved.
      sections: compare these only; None: everything but operational keys.

    Raises:
      UserError: names the keys that differ.
    """
    old = _read(directory, "config.json")
    if not old:
        return
    # A key that the run's version of the program did not have stood, in effect, at its default.
    old = flatten(base_config()) | old
    ignored = set(OPERATIONAL_KEYS)
    if sections is not None:
        ignored |= {key for key in old if key.split(".")[0] not in sections}
    differing = files.differing_keys(old, flatten(config), frozenset(ignored))
    if differing:
        raise UserError(
            f"workdir {directory} belongs to a run of another config; choose another --workdir "
            "(--weights=FILE begins from what a finished run has learned), or undo: "
            f"{'; '.join(differing)}"
        )


def take_model(
    config: ConfigDict, initial: weights.Weights | None, directory: pathlib.Path
) -> None:
    """Where `config.model.name` is "auto": sets the net to that of the weights, or of the run.

    Args:
      config: changed in place.
      initial: weights to begin with, if any.
      directory: of a run that may have begun, and then need not be given the weights again.

    Raises:
      UserError: there is neither.
    """
    if config.model.name != "auto":
        return
    if initial:
        found = initial.model
    else:
        begun = files.read_json(directory / "config.json") or {}
        found = {k.removeprefix("model."): v for k, v in begun.items() if k.startswith("model.")}
    if "name" not in found:
        raise UserError(
            "config.model.name=auto takes the net from --weights: give a weights file, or name a "
            "net, for example --config.model.name=resnet50"
        )
    for key in ("name", "shortcut", "stride_in_3x3", "survival"):
        config.model[key] = found.get(key, config.model[key])


def check_same_data(directory: pathlib.Path, dataset: Dataset) -> None:
    """Refuses to go on with other data than the run began with.

    Raises:
      UserError: the data's fingerprint has changed.
    """
    old = _run_record(directory).get("data", {}).get("fingerprint")
    if old not in (None, dataset.fingerprint):
        raise UserError(
            f"the data set {dataset.name} is not the one that the run in {directory} began with "
            f"(fingerprint {dataset.fingerprint[:12]}, was {old[:12]}); restore it, or choose "
            "another --workdir"
        )


def check_same_beginning(directory: pathlib.Path, digest: str | None, *, resuming: bool) -> None:
    """Refuses to begin a run again from other weights than before.

    Args:
      directory: the run's.
      digest: SHA-256 of the weights file given, None where none is.
      resuming: whether there is a checkpoint: then no weights need be given.

    Raises:
      UserError: says which weights the run began with.
    """
    old = _run_record(directory)
    if not old or old.get("init_weights") == digest or (resuming and digest is None):
        return
    began = (
        f"the weights file with SHA-256 {old['init_weights'][:12]}…"
        if old.get("init_weights")
        else "no weights file"
    )
    raise UserError(
        f"the run in {directory} began with {began}: give the same --weights, or choose another "
        "--workdir"
    )


def has_checkpoints(directory: pathlib.Path) -> bool:
    """Whether checkpoints lie in a run's own directory."""
    # `checkpoint.steps_in` says more, but takes a second to import.
    return any(path.name.isdigit() for path in (directory / "checkpoints").glob("*"))


def check_same_group(directory: pathlib.Path, group: str | None) -> None:
    """Refuses to train a run alone that was begun with other seeds, or with others than those.

    Args:
      directory: the run's.
      group: those that are to be trained together, see `handover.group_of`; None: it is alone. A
        run that has got its own checkpoints may go on alone.

    Raises:
      UserError: says how the run was begun.
    """
    begun = _run_record(directory)
    old = begun.get("group")
    if not begun or old == group:
        return
    if group is not None:
        raise UserError(
            f"the run in {directory} was begun {f'with {old}' if old else 'alone'}, not with "
            f"{group}: choose another --workdir, or other seeds (config.seed, "
            "config.train.num_seeds)"
        )
    if not has_checkpoints(directory):
        first, _, last = old.removeprefix("seeds").partition("-")
        raise UserError(
            f"the run in {directory} is trained together with others: go on with all of them, "
            f"--config.seed={first} --config.train.num_seeds={int(last) - int(first) + 1} "
            f"--workdir={directory.parent}, or choose another --workdir"
        )


def checkpoint_directory(directory: pathlib.Path, requested: str | None) -> str:
    """Where the checkpoints of the run in `directory` lie: a path, or the URL of a bucket.

    Args:
      directory: the run's.
      requested: where they are to lie; None: where they do, or else in the directory.

    Raises:
      UserError: they lie elsewhere.
    """
    own = str(directory / "checkpoints")
    begun = _run_record(directory)
    place = begun.get("checkpoint_dir") or own
    if begun and requested not in (None, place):
        raise UserError(
            f"the run in {directory} has its checkpoints in {place}, not in {requested}: leave "
            "--checkpoint_dir as it was, or choose another --workdir"
        )
    return place if begun else requested or own


def describe(config: ConfigDict, dataset: Dataset) -> dict[str, Any]:
    """What a checkpoint remembers of its run, in case the run's directory is lost."""
    return {"config": flatten(config), "fingerprint": dataset.fingerprint}


def check_same_run(
    directory: pathlib.Path, place: str, saved: dict[str, Any], now: dict[str, Any]
) -> None:
    """Refuses checkpoints of another run, where those of a lost directory were kept elsewhere.

    Args:
      directory: the run's; where it has a record already, that has been compared.
      place: of the checkpoints.
      saved: as from `describe`, from a checkpoint.
      now: likewise, of the run that is to go on from it.

    Raises:
      UserError: names what differs.
    """
    if _run_record(directory):
        return
    old = flatten(base_config()) | saved["config"]
    differing = files.differing_keys(old, now["config"], OPERATIONAL_KEYS)
    if saved["fingerprint"] != now["fingerprint"]:
        differing.append("the data set")
    if differing:
        raise UserError(
            f"the checkpoints in {place} are those of another run; choose another "
            f"--checkpoint_dir, or undo: {'; '.join(differing)}"
        )


def other_devices(directory: pathlib.Path, mesh: Mesh) -> str | None:
    """A note, where a run goes on with another number of devices than it began with."""
    old = _run_record(directory).get("devices")
    if old in (None, mesh.size):
        return None
    return (
        f"note: the run began on {old} device(s) and goes on with {mesh.size}: the results agree "
        "up to rounding, not to the bit"
    )


def preprocessing(directory: pathlib.Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The (mean, std) that the run in a directory began with, or None where none has begun.

    Raises:
      UserError: their file is not as the run wrote it.
    """
    digest = _run_record(directory).get("preprocess_sha256")
    if digest is None:
        return None
    path = directory / "preprocess.safetensors"
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        raise UserError(f"{path} is missing or damaged; restore it from a copy")
    return weights.load_preprocessing(path)


def _run_record(directory: pathlib.Path) -> dict[str, Any]:
    return _read(directory, "run.json")


def _read(directory: pathlib.Path, name: str) -> dict[str, Any]:
    """What a JSON file of a run says, {} where no run has begun."""
    content = files.read_json(directory / name)
    if content is None and any((directory / n).exists() for n in ("checkpoints", "metrics.jsonl")):
        raise UserError(
            f"workdir {directory} holds a run without its {name}; restore it, or choose another "
            "--workdir"
        )
    return content or {}
