"""Saving and restoring a run's state, with a content hash and a way round damage.

Each checkpoint is one orbax directory, `<directory>/<step>`, that holds the state in the canonical
layout (see `models.layout`) and, as orbax's custom metadata, a small JSON record of the run and the
SHA-256 of both: orbax itself loads a flipped bit without a word. `files.json`, written once a save
is complete, holds the SHA-256 of each of its files.
"""

import concurrent.futures
import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import v1 as ocp_v1

from resnet_flax.errors import UserError
from resnet_flax.models import layout
from resnet_flax.runs import file_list
from resnet_flax.training.state import TrainState


class NotFiniteError(Exception):
    """The state to be saved holds an infinity or a NaN."""


def to_tree(state: TrainState) -> dict[str, Any]:
    """Nested dicts of host arrays in the canonical layout, without empty branches."""
    canonical = layout.to_canonical(jax.device_get(state))
    flat = flax.traverse_util.flatten_dict(flax.serialization.to_state_dict(canonical))
    flat = {path: np.asarray(value) for path, value in flat.items() if value is not None}
    return flax.traverse_util.unflatten_dict(flat)


def from_tree(tree: dict[str, Any], template: TrainState, scanned: bool) -> TrainState:
    """The inverse of `to_tree`: host arrays in the model's layout.

    Args:
      tree: as from `to_tree`.
      template: the state's structure, shapes and dtypes, in the model's layout.
      scanned: whether that layout is the scanned one.

    Raises:
      UserError: the first array that is missing, foreign, or of another shape or dtype.
    """
    canonical = layout.to_canonical(template)
    nested = flax.serialization.to_state_dict(canonical)
    want = flax.traverse_util.flatten_dict(nested, keep_empty_nodes=True)
    have = flax.traverse_util.flatten_dict(tree)
    for path, spec in want.items():
        name = "/".join(path)
        if spec is None or spec is flax.traverse_util.empty_node:
            continue
        if path not in have:
            raise UserError(f"the checkpoint lacks {name} {spec.dtype}{list(spec.shape)}")
        if (have[path].shape, have[path].dtype) != (spec.shape, spec.dtype):
            raise UserError(
                f"{name} is {have[path].dtype}{list(have[path].shape)} in the checkpoint, but "
                f"{spec.dtype}{list(spec.shape)} in this net"
            )
        want[path] = have.pop(path)
    if have:
        raise UserError(f"the checkpoint holds {'/'.join(next(iter(have)))}, which this net lacks")
    nested = flax.traverse_util.unflatten_dict(want)
    state = flax.serialization.from_state_dict(canonical, nested)
    return layout.to_scanned(state) if scanned else state


def content_hash(tree: dict[str, Any], record: dict[str, Any]) -> str:
    """SHA-256, in hex, of every array's name, dtype, shape and bytes, and of the record."""
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for path, value in sorted(flax.traverse_util.flatten_dict(tree).items()):
        digest.update(f"{'/'.join(path)} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()


def read(path: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """State tree and record of one checkpoint directory.

    Raises:
      UserError: it is damaged; the message says how.
    """
    path = epath.Path(path).resolve()
    reason = file_list.find_damage(path) or "its content does not match its SHA-256"
    if not reason.startswith("file"):
        try:
            with _reading():
                metadata = ocp_v1.checkpointables_metadata(path).custom_metadata
                record, expected = metadata["record"], metadata["sha256"]
                tree = ocp_v1.load_checkpointables(path, {"state": None})["state"]
            if content_hash(tree, record) == expected:
                return tree, record
        except Exception as error:
            # Whatever orbax, tensorstore or a JSON reader raises for a damaged file.
            cause = error.__cause__ or error
            first = str(cause).strip().partition("\n")[0][:160]
            reason = f"{type(cause).__name__}: {first}"
    raise UserError(f"checkpoint {path} is damaged: {reason}")


def _reading() -> ocp_v1.Context:
    context = ocp_v1.Context()
    here = ocp_v1.multihost.process_index()
    context.multiprocessing.primary_host = here
    context.multiprocessing.active_processes = {here}
    return context


def locate(place: str) -> epath.Path:
    """A directory of checkpoints, local or in a bucket, once it is known that it can be reached.

    Raises:
      UserError: it cannot: no such bucket, no access, a library that is not installed.
    """
    path = epath.Path(place)
    try:
        path.exists()
    except Exception as error:  # Whatever the library for that kind of place raises.
        raise UserError(f"cannot reach {place}: {str(error).partition(chr(10))[0]}") from error
    return path


def steps_in(directory: epath.PathLike) -> list[int]:
    """Steps of the finished checkpoints in a directory, rising; [] where there is none."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdigit())


def read_newest(
    directory: epath.PathLike, warn: Callable[[str], None], *, set_aside: bool
) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """The newest undamaged checkpoint as (step, tree, record), or None where there are none at all.

    Args:
      directory: holds the checkpoints.
      warn: told of each damaged one that is passed over.
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
    if not steps:
        return
    aside = directory.parent / "damaged_checkpoints"
    aside.mkdir(exist_ok=True)
    for step in steps:
        number = 0
        while (target := aside / f"{step}.{number}").exists():
            number += 1
        (directory / str(step)).rename(target)


class NoWriter:
    """Saves nothing: what a process has that is not the first."""

    def save(self, state: TrainState, record: dict[str, Any]) -> None:
        """Leaves it to the first process."""

    def wait(self) -> None:
        """Returns."""

    close = wait


class Writer:
    """Saves checkpoints in the background and deletes old ones.

    Kept are the newest `keep` and the steps last named as best.
    """

    def __init__(self, directory: epath.PathLike, keep: int):
        """Opens (or makes) `directory`; what an interrupted save or deletion left is removed."""
        self.directory = epath.Path(directory).resolve()  # Orbax takes no relative path.
        self.best_steps: set[int | None] = set()
        self._keep = keep
        self._pending: concurrent.futures.Future | None = None
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        # Of several processes only one calls this: orbax must not wait for the others. In its newer
        # interface, version 1, a save does, whatever it is told.
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

    def save(self, state: TrainState | dict[str, Any], record: dict[str, Any]) -> epath.Path:
        """Begins to save; returns the checkpoint's path. An earlier save is waited for first.

        Args:
          state: on the devices; or a tree of one, or of several at the same step, on the host.
          record: JSON-serialisable, returned by `read`.

        Raises:
          NotFiniteError: a value is not finite: nothing is saved.
          UserError: this save or an earlier one failed (disk full, say).
        """
        tree = state if isinstance(state, dict) else to_tree(state)
        flat = flax.traverse_util.flatten_dict(tree)
        step = int(next(value for path, value in flat.items() if path[-1] == "step"))
        for path, value in flat.items():
            if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
                raise NotFiniteError(f"{'/'.join(path)} is not finite at step {step}")
        # What JSON makes of the record (floats, say) is what will be hashed on reading.
        record = json.loads(json.dumps(record))
        metadata = {"record": record, "sha256": content_hash(tree, record)}
        self.wait()
        self._check_room(tree)
        path = self.directory / str(step)
        try:
            content = ocp.args.Composite(state=ocp.args.PyTreeSave(tree))
            self._orbax.save(path, args=content, custom_metadata=metadata)
        except Exception as error:
            raise self._failure(error) from error
        self._pending = self._thread.submit(self._finish, path, self.best_steps)
        return path

    def _check_room(self, tree: dict[str, Any]) -> None:
        """Orbax would find out too, but in pages of tracebacks from threads of its own."""
        need = sum(value.nbytes for value in flax.traverse_util.flatten_dict(tree).values())
        with contextlib.suppress(OSError):  # A file system that does not tell.
            if (free := shutil.disk_usage(self.directory).free) < need:
                full = os.strerror(errno.ENOSPC)
                raise self._failure(OSError(f"{full}: {need:,} bytes needed, {free:,} free"))

    def _finish(self, path: epath.Path, best_steps: set[int | None]) -> None:
        self._orbax.wait_until_finished()
        file_list.write(path)
        for step in steps_in(self.directory)[: -self._keep]:
            if step not in best_steps:
                # Renamed first: half of a checkpoint must not pass for one.
                doomed = (self.directory / str(step)).rename(self.directory / f"{step}.deleting")
                doomed.rmtree()

    def wait(self) -> None:
        """Blocks until the save under way is on disk.

        Raises:
          UserError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            try:
                pending.result()
            except Exception as error:
                raise self._failure(error) from error

    def _failure(self, error: Exception) -> UserError:
        cause = error.__cause__ or error
        # Tensorstore names files first, then the reason, then pages of specification.
        text = str(cause).partition(" [tensorstore_spec")[0].strip() or type(cause).__name__
        text = text.splitlines()[0]
        text = text if len(text) <= 200 else f"… {text[-200:]}"
        return UserError(f"could not save a checkpoint in {self.directory}: {text}")

    def close(self) -> None:
        """Waits for the save under way."""
        self._thread.shutdown()
        try:
            self.wait()
        finally:
            self._orbax.close()
