"""Moments of a run: functions from a run to a predicate on its directory, whatever the speed."""

from tests.faults.harness import EVALUATE_EVERY, STEPS, Run


def claimed(run: Run):
    return (run.directory / ".lock").exists


def begun(run: Run):
    """What the run is has been written; compilation comes next."""
    return (run.directory / "run.json").exists


def compiling(run: Run):
    """The log is there, and empty: signals are expected from about here."""
    return lambda: (run.directory / "metrics.jsonl").exists() and not run.records()


def at_step(run: Run, step: int):
    return lambda: any(r["step"] >= step for r in run.records())


def saving(run: Run, after: int = 0):
    """Orbax is writing, into a directory that it will rename."""
    return lambda: any(".orbax-checkpoint-tmp" in n and _step(n) > after for n in run.saves())


def unlisted(run: Run, after: int = 0):
    """Orbax is done, but the list of files has not been written."""

    def check():
        names = (n for n in run.saves() if n.isdigit() and int(n) > after)
        return any(not (run.directory / "checkpoints" / n / "files.json").exists() for n in names)

    return check


def evaluating(run: Run, after: int = 0):
    """The steps before a due evaluation are recorded, its scores are not."""

    def check():
        records = run.records()
        last = records[-1] if records else {"step": 0, "split": ""}
        due = last["step"] > after and last["step"] % EVALUATE_EVERY == 0
        return due and last["split"] == "train"

    return check


def ending(run: Run):
    """All is trained and scored, the result not written."""

    def check():
        scored = any(r["step"] == STEPS and r["split"] == "test" for r in run.records())
        return scored and not (run.directory / "result.json").exists()

    return check


# name: (the moment, the longest random delay after it in seconds; 0: the very moment)
RANDOM = {
    "while it starts": (lambda run: lambda: True, 2.0),
    "before the first step": (begun, 2.0),
    "at any step": (lambda run: at_step(run, 1), 0.7),
    "during a save": (saving, 0),
    "between a save and its list of files": (unlisted, 0),
    "during an evaluation": (evaluating, 0),
    "while the result is written": (ending, 0.4),
}


def _step(name: str) -> int:
    return int(name.partition(".")[0])


def describe(run: Run) -> str:
    """Where a run stands, in words: for the log."""
    if not run.directory.exists():
        return "no directory yet"
    records = run.records()
    at = f"after step {records[-1]['step']}" if records else "before the first step"
    partial = [n for n in run.saves() if not n.isdigit()]
    saved = [n for n in run.saves() if n.isdigit()]
    bare = [n for n in saved if not (run.directory / "checkpoints" / n / "files.json").exists()]
    return at + "".join(
        [f", {n} there" for n in partial] + [f", checkpoint {n} without its list" for n in bare]
    )
