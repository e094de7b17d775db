"""The files of several seeds that train in one program: one series of checkpoints, then a run each.

The runs lie side by side, `<workdir>/seed3`, `<workdir>/seed4`, … Beside them, in
`<workdir>/seeds3-4/checkpoints`, lie the checkpoints of all while they train: a tree and a record
for each, by the name of its directory. At the end each run is handed its own, as an ordinary one
has them, and that folder goes.
"""

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from resnet_flax.errors import UserError
from resnet_flax.runs import checkpoint, identity, record
from resnet_flax.training.account import Account

_DOOMED = "checkpoints.deleting"


def place_of(directories: Sequence[pathlib.Path]) -> pathlib.Path:
    """Where the checkpoints of all lie while they train."""
    first, last = (directories[i].name.removeprefix("seed") for i in (0, -1))
    return directories[0].parent / f"seeds{first}-{last}" / "checkpoints"


def group_of(directories: Sequence[pathlib.Path]) -> str:
    """What the runs' records call those that train together: "seeds3-4"."""
    return place_of(directories).parent.name


def _is_whole(directory: pathlib.Path, total: int) -> bool:
    """Whether a run has ended and has its last checkpoint."""
    has_last = total in checkpoint.steps_in(directory / "checkpoints")
    return has_last and record.finished(directory, total) is not None


def begin(
    directories: Sequence[pathlib.Path],
    identities: Sequence[dict[str, Any]],
    digest: str | None,
    total: int,
    warn: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Where each of the runs goes on.

    Args:
      directories: of the runs.
      identities: see `identity.describe`.
      digest: SHA-256 of the weights file given, None where none is.
      total: steps of each.
      warn: told of damaged checkpoints.

    Returns:
      For each the `tree` and `history` of a checkpoint, None where there is none; and its `result`,
      as JSON, where all have ended.

    Raises:
      UserError: a run is not one of these, or they can no longer go on together.
    """
    place, group = place_of(directories), group_of(directories)
    found = checkpoint.read_newest(place, warn, set_aside=True)
    if found is None and all(_is_whole(own, total) for own in directories):
        clear(directories)
        results = [json.dumps(record.finished(own, total)) for own in directories]
        return [{"tree": None, "history": None, "result": result} for result in results]
    for own in directories:
        identity.check_same_group(own, group)
        identity.check_same_beginning(own, digest, resuming=found is not None)
        if found is None and checkpoint.steps_in(own / "checkpoints"):
            raise UserError(
                f"the run in {own} has been trained to its end together with others, of which some "
                "lack something: let each that does go on alone, with config.train.num_seeds=1, "
                f"its own config.seed and --workdir, such as {own}"
            )
    if found is None:
        return [{"tree": None, "history": None, "result": None} for _ in directories]
    _, trees, records = found
    beginnings = []
    for own, now in zip(directories, identities, strict=True):
        history = records[own.name]
        identity.check_same_run(own, str(place), history["run"], now)
        beginnings.append({"tree": trees[own.name], "history": history, "result": None})
    return beginnings


def hand_out(directories: Sequence[pathlib.Path], accounts: Sequence[Account]) -> None:
    """Gives each run the checkpoints that it would have kept alone; those that have them keep them.

    Args:
      directories: of the runs.
      accounts: of each, at the end.

    Raises:
      UserError: one is damaged, or cannot be saved.
    """
    place, config = place_of(directories), accounts[0].run.config
    steps = checkpoint.steps_in(place)
    newest = set(steps[-config.checkpoint.keep :])
    needing = {
        own.name: newest | ({account.best_step()} & set(steps))
        for own, account in zip(directories, accounts, strict=True)
        if not _is_whole(own, config.train.total_steps)
    }
    # The last one first: where there is any, a run that goes on alone finds its end.
    for step in reversed(sorted(set().union(*needing.values()))):
        trees, records = checkpoint.read(place / str(step))
        for own in directories:
            if step in needing.get(own.name, ()):
                _save(own, step, trees[own.name], records[own.name], needing[own.name])


def _save(own: pathlib.Path, step: int, tree: Any, history: dict, steps: set[int]) -> None:
    with contextlib.closing(checkpoint.Writer(own / "checkpoints", len(steps))) as writer:
        if (old := epath.Path(own / "checkpoints" / str(step))).exists():
            old.rmtree()  # Of a program that was killed here.
        writer.best_steps = set(steps)
        writer.save(tree, history)


def clear(directories: Sequence[pathlib.Path]) -> None:
    """Removes the checkpoints of all; damaged ones that were set aside stay."""
    place = place_of(directories)
    doomed = place.with_name(_DOOMED)
    shutil.rmtree(doomed, ignore_errors=True)
    if place.exists():
        # Renamed first: half of them must not pass for all.
        place.rename(doomed)
        shutil.rmtree(doomed)
    with contextlib.suppress(OSError):
        place.parent.rmdir()
