"""Several seeds of a line of a table as one job, see `config.train.num_seeds`."""

import dataclasses
import itertools
import pathlib
from collections.abc import Iterable

from resnet_flax.errors import UserError
from resnet_flax.grid.plan import Job, state_of
from resnet_flax.runs import files, identity


def together(jobs: list[Job], seeds_per_run: int) -> list[Job]:
    """`jobs`, each of one seed, with those that are made by one program joined.

    Runs that have begun together go on together, however many that are. Of the rest those that have
    not begun are joined; a run that is done, or has begun alone, stays alone.

    Args:
      jobs: from `plan.make_jobs`.
      seeds_per_run: how many seeds that follow one another are joined; 1: none.

    Raises:
      UserError: the number makes no sense.
    """
    if seeds_per_run < 1:
        raise UserError(f"--seeds_per_run={seeds_per_run} must be at least 1")
    lines: dict[pathlib.Path, dict[int, Job]] = {}
    for job in jobs:
        lines.setdefault(job.directory.parent, {})[job.config.seed] = job
    made: dict[str, Job] = {}
    for line in lines.values():
        fresh = []
        for seed, job in line.items():
            begun = _begun(job)
            if begun and begun.get("group") and _is_unfinished(job, begun["group"]):
                group = _join(_with_seed(job, s) for s in _seeds_of(begun["group"]))
                made |= {member.name: group for member in group.members}
            elif begun is None:
                fresh.append(seed)
        # Neighbours differ by one from place to place, and so have this difference in common.
        for _, run in itertools.groupby(enumerate(fresh), lambda pair: pair[1] - pair[0]):
            row = [seed for _, seed in run]
            for begin in range(0, len(row), seeds_per_run):
                some = row[begin : begin + seeds_per_run]
                if len(some) > 1:
                    group = _join(line[seed] for seed in some)
                    made |= {member.name: group for member in group.members}
    joined = [made.get(job.name, job) for job in jobs]
    return list({job.name: job for job in joined}.values())


def _begun(job: Job) -> dict | None:
    """What a run says of its beginning, {} where that cannot be read; None: it has not begun."""
    try:
        return files.read_json(job.directory / "run.json")
    except UserError:
        return {}


def _is_unfinished(job: Job, group: str) -> bool:
    """Whether a run that was begun with others has to go on with them."""
    if state_of(job).results:
        return False
    alone = identity.has_checkpoints(job.directory)
    return not alone or (job.directory.parent / group / "checkpoints").exists()


def _seeds_of(group: str) -> range:
    """The seeds 3 and 4 of "seeds3-4"."""
    first, _, last = group.removeprefix("seeds").partition("-")
    return range(int(first), int(last) + 1)


def _with_seed(job: Job, seed: int) -> Job:
    """The same run with another seed."""
    config = job.config.copy_and_resolve_references()
    config.seed = seed
    directory = job.directory.with_name(f"seed{seed}")
    changed = {"--config.seed": str(seed), "--workdir": str(directory)}
    name = f"{job.name.rpartition('/')[0]}/{directory.name}"
    return dataclasses.replace(
        job, name=name, directory=directory, config=config, flags=_replaced(job.flags, changed)
    )


def _replaced(flags: tuple[str, ...], changed: dict[str, str]) -> tuple[str, ...]:
    keys = [flag.partition("=")[0] for flag in flags]
    return tuple(
        f"{key}={changed[key]}" if key in changed else flag
        for key, flag in zip(keys, flags, strict=True)
    )


def _join(jobs: Iterable[Job]) -> Job:
    """The job of all of them, in rising order of their seeds."""
    members = tuple(jobs)
    first, last = members[0], members[-1]
    directory = first.directory.parent
    flags = _replaced(first.flags, {"--workdir": str(directory)})
    return dataclasses.replace(
        first,
        name=f"{first.name.rpartition('/')[0]}/seeds{first.config.seed}-{last.config.seed}",
        directory=directory,
        flags=(*flags, f"--config.train.num_seeds={len(members)}"),
        members=members,
    )
