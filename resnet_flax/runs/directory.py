"""The directory of one run: one process at a time, one configuration for ever.

`config.json` holds the configuration as it was given, `run.json` what the run began with and each
start, `preprocess.safetensors` the mean and the standard deviation. Checkpoints, the log and the
result lie beside them.
"""

import contextlib
import datetime
import json
import math
import pathlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import safetensors.numpy

from resnet_flax import locks
from resnet_flax.config import OPERATIONAL_KEYS, base_config, flatten
from resnet_flax.errors import UserError
from resnet_flax.runs import files, weights

# What tells of the last step: kept under another name if the run goes on.
_OF_THE_END = (
    "result.json",
    "weights.safetensors",
    "evaluation.json",
    "confusion.png",
    "responses.json",
)


class Directory:
    """What a run's directory says of the run, and whether a new start is the same run.

    What does not fit is refused with a `UserError` that says what to do.

    Attributes:
      path: of the directory.
      config: content of config.json, {} before the run has begun.
      record: content of run.json, {} before the run has begun.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the directory; it need not exist."""
        self.path = path
        self.config = self._read("config.json")
        self.record = self._read("run.json")

    def _read(self, name: str) -> dict[str, Any]:
        content = files.read_json(self.path / name)
        begun = any((self.path / n).exists() for n in ("checkpoints", "metrics.jsonl"))
        if content is None and begun:
            raise UserError(
                f"workdir {self.path} holds a run without its {name}; restore it, or choose "
                "another --workdir"
            )
        return content or {}

    @property
    def model(self) -> dict[str, Any]:
        """The run's "model" section, {} before the run has begun."""
        prefix = "model."
        return {k.removeprefix(prefix): v for k, v in self.config.items() if k.startswith(prefix)}

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: pathlib.Path) -> Iterator["Directory"]:
        """Makes the directory and holds it for this process alone.

        A failure leaves no empty directory behind.
        """
        made = [p for p in (path, *path.parents) if not p.exists()]
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = open(path / ".lock", "a")
        except OSError as error:
            raise UserError(
                f"cannot write in workdir {path}: {error.strerror}; choose another --workdir"
            ) from error
        with lock:
            # Without locks it is up to the user to avoid two runs at once.
            if locks.hold(lock) is False:
                raise UserError(
                    f"another process is training in workdir {path}; wait for it, or choose "
                    "another --workdir"
                )
            for part in path.glob(f".*{files.PART}"):
                part.unlink()  # Left by a kill.
            try:
                yield cls(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    if made and [p.name for p in path.iterdir()] == [".lock"]:
                        (path / ".lock").unlink()
                        for p in made:
                            p.rmdir()
                raise

    def grows(self, config: dict[str, Any]) -> bool:
        """Whether `config` only lengthens the run, and leaves its learning rates as they were."""
        key = "train.total_steps"
        in_steps = not (config["train.total_epochs"] or config["train.total_examples"])
        longer = self.config.get(key, math.inf) < config[key]
        if not (longer and in_steps and config["optim.schedule"] != "cosine"):
            return False
        return not _differing(self.config | {key: config[key]}, config)

    def check_config(self, config: dict[str, Any], sections: Collection[str] = ()) -> None:
        """Refuses another configuration than the run's; the `UserError` names the keys.

        `config` is flat and as given, before durations are resolved. Compared are these sections,
        or everything, but never operational keys.
        """
        if not self.config or self.grows(config):
            return
        if differing := _differing(self.config, config, sections):
            hint = "--weights=FILE begins from what a finished run has learned"
            if all(change.startswith("train.total_steps") for change in differing):
                hint = "a run may grow if its schedule is not cosine, but not become shorter"
            raise UserError(
                f"workdir {self.path} belongs to a run of another config; choose another --workdir "
                f"({hint}), or undo: {'; '.join(differing)}"
            )

    def check_data(self, name: str, fingerprint: str) -> None:
        """Refuses other data than the run began with."""
        old = self.record.get("data", {}).get("fingerprint")
        if old not in (None, fingerprint):
            raise UserError(
                f"the data set {name} is not the one that the run in {self.path} began with "
                f"(fingerprint {fingerprint[:12]}, was {old[:12]}); restore it, or choose another "
                "--workdir"
            )

    def check_initial_weights(self, sha256: str | None, *, resuming: bool) -> None:
        """Refuses to begin again from other weights, or from none; a checkpoint needs none."""
        old = self.record.get("init_weights")
        if not self.record or old == sha256 or (resuming and sha256 is None):
            return
        began = f"the weights file with SHA-256 {old[:12]}…" if old else "no weights file"
        raise UserError(
            f"the run in {self.path} began with {began}: give the same --weights, or choose "
            "another --workdir"
        )

    def check_not_in_group(self) -> None:
        """Refuses a run that version 0.1.0 began together with other seeds and did not finish.

        Its checkpoints lie in one directory with the ones of the other seeds.
        """
        if self.record.get("group") and not (self.path / "checkpoints").exists():
            raise UserError(
                f"the run in {self.path} was begun by resnet_flax 0.1.0 together with other seeds "
                f"({self.record['group']}), which this version cannot resume; choose another "
                "--workdir"
            )

    def checkpoints(self, requested: str | None = None) -> str:
        """Where the checkpoints lie: a path, or the URL of a bucket.

        A new run has them where `requested`, by default in the directory; an older run refuses
        another place than its own.
        """
        own = str(self.path / "checkpoints")
        if not self.record:
            return requested or own
        place = self.record.get("checkpoint_dir") or own
        if requested not in (None, place):
            raise UserError(
                f"the run in {self.path} has its checkpoints in {place}, not in {requested}: leave "
                "--checkpoint_dir as it was, or choose another --workdir"
            )
        return place

    def check_checkpoint(self, saved: dict[str, Any], now: dict[str, Any], place: str) -> None:
        """Refuses a checkpoint of another run, where the run's directory was lost.

        `saved`, from the checkpoint, and `now` have "config" (flat) and "fingerprint" of the data.
        """
        if self.record:
            return  # It has been compared already.
        differing = _differing(saved["config"], now["config"])
        if saved["fingerprint"] != now["fingerprint"]:
            differing.append("the data set")
        if differing:
            raise UserError(
                f"the checkpoints in {place} are those of another run; choose another "
                f"--checkpoint_dir, or undo: {'; '.join(differing)}"
            )

    def preprocessing(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The (mean, std) that the run began with, None before it has begun."""
        digest = self.record.get("preprocess_sha256")
        if digest is None:
            return None
        path = self.path / "preprocess.safetensors"
        if not path.exists() or files.sha256_of(path) != digest:
            raise UserError(f"{path} is missing or damaged; restore it from a copy")
        tensors = safetensors.numpy.load_file(path)
        return tensors["mean"], tensors["std"]

    def write_start(
        self,
        config: dict[str, Any],
        record: dict[str, Any],
        preprocessing: tuple[np.ndarray, np.ndarray],
        start: dict[str, Any],
    ) -> None:
        """Writes what the run is when it begins; a later `start` is only added to `run.json`.

        If the run grows, its result so far is kept under a name with its step.
        """
        total = record["total_steps"]
        if grows := bool(self.record) and self.grows(config):
            old = self.config["train.total_steps"]
            for name in _OF_THE_END:
                path = self.path / name
                if path.exists():
                    path.rename(path.with_stem(f"{path.stem}_{old}"))
            self.record.setdefault("extended", []).append({"from": old, "to": total})
        if not self.record:
            files.write_json(self.path / "config.json", config)
            mean, std = preprocessing
            path = self.path / "preprocess.safetensors"
            files.write_atomically(path, safetensors.numpy.save({"mean": mean, "std": std}))
            self.record = {**record, "preprocess_sha256": files.sha256_of(path)}
        self.record["total_steps"] = total
        if "extended" in self.record:
            # Without what a start wrote that was killed before it wrote config.json.
            entries = {e["from"]: e for e in self.record["extended"] if e["to"] <= total}
            self.record["extended"] = list(entries.values())
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.record["starts"] = [*self.record.get("starts", []), {"time": now, **start}]
        files.write_json(self.path / "run.json", self.record)
        if grows:
            files.write_json(self.path / "config.json", config)

    def finished(self, total_steps: int) -> dict[str, Any] | None:
        """The result of a finished run; None: it is made again from the last checkpoint."""
        try:
            result = files.read_json(self.path / "result.json") or {}
            weights.load(self.path / "weights.safetensors")
        except UserError:
            return None
        return result if result.get("steps") == total_steps else None


def _differing(
    old: dict[str, Any], new: dict[str, Any], sections: Collection[str] = ()
) -> list[str]:
    """The differences of two flat configurations as "key: old -> new", but for operational keys.

    With `sections` only their keys are compared. A key that `old` lacks had its default.
    """
    old = flatten(base_config()) | old
    old, new = (json.loads(json.dumps(config, default=list)) for config in (old, new))
    return [
        f"{key}: {old.get(key, 'absent')!r} -> {new.get(key, 'absent')!r}"
        for key in sorted((old.keys() | new.keys()) - OPERATIONAL_KEYS)
        if old.get(key) != new.get(key) and (not sections or key.partition(".")[0] in sections)
    ]
