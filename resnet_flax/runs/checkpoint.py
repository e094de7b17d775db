"""Saving and restoring a run's state; damage is noticed and passed over.

Each checkpoint is an orbax directory, `<directory>/<step>`, of the state in the canonical layout
(see `models.layout`). Its custom metadata hold a JSON record of the run and the SHA-256 of both:
orbax itself loads a flipped bit without a word. `files.json`, written once a save is complete,
holds the SHA-256 of each file.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import v1 as ocp_v1

from resnet_flax.errors import UserError, first_line
from resnet_flax.models import layout
from resnet_flax.runs import files, weights

_FILES = "files.json"


class NotFiniteError(Exception):
    """The state to be saved holds an infinity or a NaN."""


def to_tree(state: Any) -> dict[str, Any]:
    """Nested dicts of host arrays of a state, in the canonical layout, without empty branches."""
    canonical = layout.to_canonical(jax.device_get(state))
    flat = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(canonical))
    flat = {path: np.asarray(value) for path, value in flat.items() if value is not None}
    return flax.traverse_util.unflatten_dict(flat)


def from_tree(tree: dict[str, Any], template: Any, scanned: bool) -> Any:
    """The inverse of `to_tree`: a state of host arrays in the model's layout.

    `template` has the state's structure, shapes and dtypes in that layout, scanned or not.

    Raises:
      UserError: names the first array that is missing, foreign, or of another shape or dtype.
    """
    canonical = layout.to_canonical(template)
    nested = flax.serialization.to_state_dict(canonical)
    want = flax.traverse_util.flatten_dict(nested, keep_empty_nodes=True)
    arrays = {path: spec for path, spec in want.items() if hasattr(spec, "shape")}
    weights.fit(tree, flax.traverse_util.unflatten_dict(arrays), "the checkpoint")
    nested = flax.traverse_util.unflatten_dict(want | flax.traverse_util.flatten_dict(tree))
    state = flax.serialization.from_state_dict(canonical, nested)
    return layout.to_scanned(state) if scanned else state


def read(path: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """State tree and record of one checkpoint directory; a `UserError` says how it is damaged."""
    path = epath.Path(path).resolve()
    reason = _find_damaged_file(path)
    if reason is None:
        try:
            tree, metadata = _load(path)
            if _content_hash(tree, metadata["record"]) == metadata["sha256"]:
                return tree, metadata["record"]
            reason = "its content does not match its SHA-256"
        except Exception as error:  # Whatever orbax, tensorstore or a JSON reader raises.
            cause = error.__cause__ or error
            reason = f"{type(cause).__name__}: {first_line(cause)}"
    raise UserError(f"checkpoint {path} is damaged: {reason}")


def _load(path: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """State tree and custom metadata, read by this process alone."""
    context = ocp_v1.Context()
    here = ocp_v1.multihost.process_index()
    context.multiprocessing.primary_host = here
    context.multiprocessing.active_processes = {here}
    with context:
        metadata = ocp_v1.checkpointables_metadata(path).custom_metadata
        return ocp_v1.load_checkpointables(path, {"state": None})["state"], metadata


def _content_hash(tree: dict[str, Any], record: dict[str, Any]) -> str:
    return files.content_hash(flax.traverse_util.flatten_dict(tree, sep="/"), record)


def _find_damaged_file(path: epath.Path) -> str | None:
    """What is wrong with a checkpoint's files by its list of them; None also without a list.

    Orbax would find most of it too, but in pages of tracebacks from threads of its own.
    """
    try:
        expected = json.loads((path / _FILES).read_text()).items()
        actual = _hash_files(path)
    except FileNotFoundError:
        return None  # Killed between saving and listing: the hash of the content decides.
    except (ValueError, AttributeError, OSError) as error:
        return f"file {_FILES} cannot be read: {error}"
    for name, digest in expected:
        if actual.get(name) != digest:
            return f"file {name} {'has changed' if name in actual else 'is missing'}"
    return None


def _hash_files(path: epath.Path) -> dict[str, str]:
    """SHA-256 of every file below a directory, by its relative path."""
    found = {}
    for child in path.iterdir():
        if child.is_dir():
            found |= {f"{child.name}/{k}": v for k, v in _hash_files(child).items()}
        elif child.name != _FILES:
            found[child.name] = hashlib.sha256(child.read_bytes()).hexdigest()
    return found


def locate(place: str) -> epath.Path:
    """A directory of checkpoints, local or in a bucket; a `UserError` if it cannot be reached."""
    path = epath.Path(place)
    try:
        path.exists()
    except Exception as error:  # Whatever the library for that kind of place raises.
        raise UserError(f"cannot reach {place}: {first_line(error)}") from error
    return path


def steps_in(directory: epath.PathLike) -> list[int]:
    """Steps of the finished checkpoints in a directory, rising; [] without a directory."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def read_newest(
    directory: epath.PathLike, warn: Callable[[str], None], *, set_aside: bool
) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """The newest undamaged checkpoint as (step, tree, record), or None if there are none at all.

    Args:
      directory: holds the checkpoints.
      warn: called with a line about each damaged one that is passed over.
      set_aside: move damaged ones to `<directory>/../damaged_checkpoints`, so that their step can
        be saved again; nothing is deleted.

    Raises:
      UserError: there are checkpoints and all are damaged. A fresh start is the user's to decide.
    """
    directory = epath.Path(directory)
    steps = steps_in(directory)
    for step in reversed(steps):
        try:
            tree, record = read(directory / str(step))
        except UserError as error:
            warn(f"{error}; passed over")
            continue
        if set_aside:
            _set_aside(directory, [s for s in steps if s > step])
        return step, tree, record
    if steps:
        raise UserError(
            f"all {len(steps)} checkpoints in {directory} are damaged; restore them from a copy, "
            "or start again in another --workdir"
        )
    return None


def _set_aside(directory: epath.Path, steps: list[int]) -> None:
    aside = directory.parent / "damaged_checkpoints"
    for step in steps:
        aside.mkdir(exist_ok=True)
        number = 0
        while (target := aside / f"{step}.{number}").exists():
            number += 1
        (directory / str(step)).rename(target)


class Writer:
    """Saves checkpoints in the background and deletes old ones.

    It keeps the newest `keep` and `best_step`.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        """Opens (or makes) `directory`; removes what an interrupted save or deletion left."""
        self.directory = epath.Path(directory).resolve()  # Orbax takes no relative path.
        self.best_step: int | None = None
        self._keep = keep
        self._pending: concurrent.futures.Future | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        # Only one process calls this: orbax must not wait for the others. In its version 1
        # interface a save does, whatever it is told.
        here = ocp.multihost.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=here, active_processes={here})
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=alone),
            state=ocp.PyTreeCheckpointHandler(multiprocessing_options=alone),
        )
        self._orbax = ocp.AsyncCheckpointer(handler, multiprocessing_options=alone)
        self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            if ".orbax-checkpoint-tmp" in path.name or path.name.endswith(".deleting"):
                path.rmtree()

    def save(self, step: int, tree: dict[str, Any], record: dict[str, Any]) -> None:
        """Begins to save a tree and a JSON-serialisable record; waits for an earlier save first.

        Raises:
          NotFiniteError: a value is not finite; nothing is saved.
          UserError: this save or an earlier one failed (disk full, say).
        """
        flat = flax.traverse_util.flatten_dict(tree, sep="/")
        for name, value in flat.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                raise NotFiniteError(f"{name} is not finite at step {step}")
        # JSON may change the record (floats, tuples): hash what will be read.
        record = json.loads(json.dumps(record))
        metadata = {"record": record, "sha256": _content_hash(tree, record)}
        self.wait()
        self._check_room(sum(value.nbytes for value in flat.values()))
        path = self.directory / str(step)
        try:
            content = ocp.args.Composite(state=ocp.args.PyTreeSave(tree))
            self._orbax.save(path, args=content, custom_metadata=metadata)
        except Exception as error:
            raise self._failure(error) from error
        self._pending = self._thread.submit(self._finish, path, self.best_step)

    def _check_room(self, need: int) -> None:
        """Orbax would find out too, but in pages of tracebacks from threads of its own."""
        with contextlib.suppress(OSError):  # A file system that does not tell.
            if (free := shutil.disk_usage(self.directory).free) < need:
                full = os.strerror(errno.ENOSPC)
                raise self._failure(OSError(f"{full}: {need:,} bytes needed, {free:,} free"))

    def _finish(self, path: epath.Path, best_step: int | None) -> None:
        self._orbax.wait_until_finished()
        temporary = path / f"{_FILES}.tmp"
        temporary.write_text(json.dumps(_hash_files(path)))
        temporary.replace(path / _FILES)
        for step in steps_in(self.directory)[: -self._keep]:
            if step != best_step:
                # Renamed first: half a checkpoint must not pass for a whole one.
                doomed = (self.directory / str(step)).rename(self.directory / f"{step}.deleting")
                doomed.rmtree()

    def wait(self) -> None:
        """Blocks until the save under way is on disk; a `UserError` if it failed."""
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        # Tensorstore names files first, then the reason, then pages of specification.
        text = first_line(error.__cause__ or error, sys.maxsize).partition(" [tensorstore_spec")[0]
        text = text if len(text) <= 200 else f"… {text[-200:]}"
        return UserError(f"could not save a checkpoint in {self.directory}: {text}")

    def close(self) -> None:
        """Waits for the save under way."""
        self._thread.shutdown()
        try:
            self.wait()
        finally:
            self._orbax.close()
