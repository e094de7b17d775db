"""The log of a run: `metrics.jsonl` and TensorBoard events.

A record is a dict with at least `step`, `split`, `error` (0 to 1) and `examples`. "train" records
hold means over the steps since the one before.
"""

import contextlib
import errno
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

from resnet_flax.errors import UserError, first_line
from resnet_flax.runs.files import write_atomically


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """All whole records of a `metrics.jsonl`; a line cut off by a crash is left out."""
    return [r for r in map(_parse, _lines(path)) if r is not None]


def of_split(records: list[dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """The records of one split."""
    return [r for r in records if r["split"] == split]


def recent_error(records: list[dict[str, Any]], examples: int) -> float | None:
    """Training error, 0 to 1, over the last records that hold at least `examples` examples."""
    wrong = total = 0.0
    for record in reversed(of_split(records, "train")):
        wrong += record["error"] * record["examples"]
        total += record["examples"]
        if total >= examples:
            break
    return wrong / total if total else None


def _lines(path: pathlib.Path) -> list[bytes]:
    try:
        return [line for line in path.read_bytes().split(b"\n") if line]
    except FileNotFoundError:
        return []


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
        usable = isinstance(record["step"], int) and isinstance(record["split"], str)
        if usable and math.isfinite(record["error"]) and record["examples"] >= 0:
            return record
    except (ValueError, KeyError, TypeError):
        pass
    return None


def _join(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


class Log:
    """The records of a run in memory, each (split, step) once.

    Of several processes the first has a `RunLog`, the others this.
    """

    def __init__(self, records: list[dict[str, Any]]):
        self.records = records
        self._known = {(r["split"], r["step"]) for r in records}

    def has(self, split: str, step: int) -> bool:
        """Whether there is a record of this split and step."""
        return (split, step) in self._known

    def count_lost(self, every: int, until: int) -> int:
        """Number of training records missing up to step `until`; one is due every `every` steps."""
        return sum(not self.has("train", step) for step in range(every, until + 1, every))

    def write(self, split: str, step: int, values: dict[str, Any]) -> None:
        """Adds a record, unless there is one of this split and step.

        Raises:
          UserError: it cannot be written (disk full, say).
        """
        if not self.has(split, step):
            self._known.add((split, step))
            self._add({"step": step, "split": split, **values})

    def _add(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def sync(self) -> None:
        """Flushes the records to disk."""

    def close(self) -> None:
        """Closes the files."""


class RunLog(Log):
    """A log that is appended to `metrics.jsonl`, one JSON object a line, and to TensorBoard."""

    def __init__(self, directory: pathlib.Path, resume_step: int, tensorboard: bool):
        """Opens the log of a run that resumes from `resume_step` (0: from the start).

        Records of later steps, which the run will pass again, and lines that are no records move
        to `metrics.superseded.jsonl`.
        """
        self._path = directory / "metrics.jsonl"
        kept, moved, records = [], [], []
        for line in _lines(self._path):
            record = _parse(line)
            if record is not None and record["step"] <= resume_step:
                kept.append(line)
                records.append(record)
            else:
                moved.append(line)
        super().__init__(records)
        if moved:
            with open(directory / "metrics.superseded.jsonl", "ab") as file:
                file.write(_join(moved))
                file.flush()
                os.fsync(file.fileno())
        if moved or not self._path.exists() or not self._path.read_bytes().endswith(b"\n"):
            write_atomically(self._path, _join(kept))
        # Unbuffered: `close` must not try again what could not be written.
        self._file = open(self._path, "ab", buffering=0)
        self._events = None
        if tensorboard:
            with self._optional():
                self._events = _Events(directory / "tensorboard", resume_step + 1)

    @contextlib.contextmanager
    def _optional(self):
        """TensorBoard repeats what metrics.jsonl has: its failure does not end a run."""
        try:
            yield
        except Exception as error:
            events, self._events = self._events, None
            with contextlib.suppress(Exception):
                events.close()
            note = f"note: nothing more is written for TensorBoard: {first_line(error)}"
            print(note, file=sys.stderr)

    def _add(self, record: dict[str, Any]) -> None:
        super()._add(record)
        line = _join([json.dumps(record).encode()])
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(f"could not write {self._path}: {error.strerror}") from error
        if self._events:
            with self._optional():
                self._events.write(record)

    def sync(self) -> None:
        """Flushes all records to disk, before a checkpoint that counts on them.

        Raises:
          UserError: the disk is full, say, or the file is no longer where it was.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"could not write {self._path}: {error.strerror}") from error
        if self._events:
            with self._optional():
                self._events.flush()
        here = self._path.exists() and self._path.stat()
        if not (here and os.path.samestat(here, os.fstat(self._file.fileno()))):
            raise UserError(
                f"{self._path} was removed or replaced while the run wrote it; leave "
                f"{self._path.parent} alone until the run has ended"
            )

    def close(self) -> None:
        """Closes the files."""
        self._file.close()
        if self._events:
            with self._optional():
                self._events.close()


class _Events:
    """TensorBoard's copy of the records, written by the caller's thread.

    tensorboardX's `SummaryWriter` hands events to a thread of its own, and waits for it for ever
    once a full disk has ended it.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        """Opens a file in `folder`; TensorBoard hides what others hold from `first_step` on."""
        # Imported here: it takes a while, and not every run wants it.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        folder.mkdir(exist_ok=True)
        self._event, self._summary = Event, Summary
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        self.flush, self.close = self._writer.flush, self._writer.close
        self._write(first_step, session_log=SessionLog(status=SessionLog.START))

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), step=step, **content))

    def write(self, record: dict[str, Any]) -> None:
        values = [
            self._summary.Value(tag=f"{record['split']}/{name}", simple_value=value)
            for name, value in record.items()
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value)
        ]
        self._write(record["step"], summary=self._summary(value=values))
