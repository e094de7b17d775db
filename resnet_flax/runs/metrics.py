"""The record of a run: `metrics.jsonl`, TensorBoard events, and the curves drawn from them."""

import contextlib
import errno
import io
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

from resnet_flax.errors import UserError
from resnet_flax.runs.files import write_atomically


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
    """All whole records of a `metrics.jsonl`; a line cut off by a crash is left out."""
    return [r for r in map(_parse, _lines(path)) if r is not None]


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


class _Events:
    """TensorBoard's copy of the records.

    Written by the caller's own thread: tensorboardX's `SummaryWriter` hands events to another one,
    and once a full disk has ended that, waits for it without end.
    """

    def __init__(self, folder: pathlib.Path, first_step: int):
        """Opens a file in `folder`; what others there hold from `first_step` on is not shown."""
        # Imported here: it takes a while, and not every run wants it.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        self._event, self._scalar = Event, summary.scalar
        self._writer = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(wall_time=time.time(), step=first_step, session_log=start))

    def write(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if name != "step" and isinstance(value, (int, float)) and math.isfinite(value):
                scalar = self._scalar(f"{record['split']}/{name}", value)
                now = time.time()
                event = self._event(wall_time=now, step=record["step"], summary=scalar)
                self._writer.write_event(event)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Records:
    """The records of a run, each (split, step) once.

    A record is a dict with at least `step`, `split`, `error` and `examples`: "train" records hold
    means over the steps since the one before.
    """

    def __init__(self, records: list[dict[str, Any]]):
        """Begins with `records`."""
        self.records = records
        self._known = {(r["split"], r["step"]) for r in records}

    def has(self, split: str, step: int) -> bool:
        """Whether there is this record."""
        return (split, step) in self._known

    def count_lost(self, every: int, until: int) -> int:
        """How many training records, due `every` so many steps, are missing up to step `until`."""
        return sum(not self.has("train", step) for step in range(every, until + 1, every))

    def write(self, split: str, step: int, values: dict[str, Any]) -> None:
        """Adds a record, unless there is one of this split and step.

        Raises:
          UserError: it cannot be kept: the disk is full, say.
        """
        if not self.has(split, step):
            self._known.add((split, step))
            self._add({"step": step, "split": split, **values})

    def _add(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def sync(self) -> None:
        """Puts all records on disk, where they are kept on one."""

    def close(self) -> None:
        """Ends the log."""


class RunLog(Records):
    """Records that are appended to `metrics.jsonl`, one JSON object a line, and to TensorBoard."""

    def __init__(self, directory: pathlib.Path, resume_step: int, tensorboard: bool):
        """Opens the log of a run that goes on from `resume_step` (0: from the start).

        Records of later steps, which the run will pass again, and lines that are none, move to
        `metrics.superseded.jsonl`.
        """
        self._path = directory / "metrics.jsonl"
        lines = _lines(self._path)
        parsed = [_parse(line) for line in lines]
        keep = [r is not None and r["step"] <= resume_step for r in parsed]
        kept = [line for line, k in zip(lines, keep, strict=True) if k]
        moved = [line for line, k in zip(lines, keep, strict=True) if not k]
        super().__init__([r for r, k in zip(parsed, keep, strict=True) if k])
        if moved:
            with open(directory / "metrics.superseded.jsonl", "ab") as file:
                file.write(_join(moved))
                file.flush()
                os.fsync(file.fileno())
        if moved or not self._path.exists() or not self._path.read_bytes().endswith(b"\n"):
            write_atomically(self._path, _join(kept))
        # No buffer: what could not be written must not be tried again by `close`.
        self._file = open(self._path, "ab", buffering=0)
        self._events = None
        if tensorboard:
            with self._no_matter():
                self._events = _Events(directory / "tensorboard", resume_step + 1)

    @contextlib.contextmanager
    def _no_matter(self):
        """TensorBoard repeats what metrics.jsonl has: nothing that goes wrong in it ends a run."""
        try:
            yield
        except Exception as error:
            events, self._events = self._events, None
            with contextlib.suppress(Exception):
                events.close()
            reason = str(error).partition("\n")[0] or type(error).__name__
            print(f"note: nothing more is written for TensorBoard: {reason}", file=sys.stderr)

    def _add(self, record: dict[str, Any]) -> None:
        super()._add(record)
        line = json.dumps(record).encode() + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(f"could not write {self._path}: {error.strerror}") from error
        if self._events:
            with self._no_matter():
                self._events.write(record)

    def sync(self) -> None:
        """Puts all records on disk, before a checkpoint that counts on them.

        Raises:
          UserError: the disk is full, say, or the file is no longer where it was.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"could not write {self._path}: {error.strerror}") from error
        if self._events:
            with self._no_matter():
                self._events.flush()
        if not self._in_place():
            raise UserError(
                f"{self._path} was removed or replaced while the run wrote it; leave "
                f"{self._path.parent} alone until the run has ended"
            )

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Ends the log."""
        self._file.close()
        if self._events:
            with self._no_matter():
                self._events.close()


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


def draw_curves(records: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Writes a PNG of error against step in the style of [R Fig. 6]: training dashed, test bold."""
    # Without pyplot: no global state, no display, and a third of the import time.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    styles = {
        "train": {"linestyle": "--", "linewidth": 1, "color": "tab:blue"},
        "validation": {"linestyle": "-", "linewidth": 1, "color": "tab:green"},
        "test": {"linestyle": "-", "linewidth": 2, "color": "tab:red"},
    }
    top = 0.0
    for split, style in styles.items():
        points = [(r["step"], 100 * r["error"]) for r in of_split(records, split)]
        if points:
            steps, errors = zip(*points, strict=True)
            marker = "o" if len(points) == 1 else None
            # A training record is of the few steps before it: its last number would say little.
            label = split if split == "train" else f"{split} {errors[-1]:.2f} %"
            axes.plot(steps, errors, label=label, marker=marker, **style)
            top = max(top, *errors[len(errors) // 20 :])
    axes.set(xlabel="step", ylabel="error (%)", title=title)
    axes.set_ylim(0, max(1.0, 1.05 * min(top, 100)))
    axes.grid(alpha=0.3)
    if axes.get_lines():
        axes.legend()
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content)
    write_atomically(path, content.getvalue())
