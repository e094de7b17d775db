"""The tables of a report, as text in cells."""

import datetime
import statistics
from typing import NamedTuple

from resnet_flax.tools.report.experiment import Experiment, by_classes
from resnet_flax.tools.report.published import ERRORS, SOURCES, TABLES
from resnet_flax.tools.report.runs import Run

MISSING, NONE = "missing", "\N{EN DASH}"


class Table(NamedTuple):
    """Line breaks separate the entries of a cell; a wide table is set in small type."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    wide: bool = True


def _from_dicts(title: str, rows: list[dict[str, str]], *notes: str, wide: bool = True) -> Table:
    return Table(title, list(rows[0]), [list(row.values()) for row in rows], list(notes), wide)


def _percent(errors: list[float]) -> str:
    """`8.75 ± 0.12`: mean and sample standard deviation, in %, of errors from 0 to 1."""
    if not errors:
        return NONE
    percents = [100 * error for error in errors]
    mean = f"{statistics.fmean(percents):.2f}"
    return mean if len(errors) == 1 else f"{mean} ± {statistics.stdev(percents):.2f}"


def comparisons(experiments: list[Experiment]) -> tuple[list[Table], list[str]]:
    """The papers' tables, and the titles of the tables left out: none of their nets has a run."""
    tables, absent = [], []
    comparable = [e for e in experiments if e.is_comparable]
    done = {e.model for e in comparable}.difference(TABLES[0]["models"])
    for table in TABLES:
        title, sources = table["title"], table["sources"]
        if table.get("optional") and done.isdisjoint(table["models"]):
            absent.append(title)
            continue
        rows = [
            {"net": model, "here, last step": _here(model, comparable)}
            | {name: ERRORS.get(model, {}).get(name, NONE) for name in sources}
            for model in table["models"]
        ]
        notes = (f"{name}: {SOURCES[name]}." for name in sources)
        tables.append(_from_dicts(title, rows, *notes, wide=False))
    return tables, absent


def _here(model: str, comparable: list[Experiment]) -> str:
    matching = [e for e in comparable if e.model == model]
    return "\n".join(map(_entry, sorted(matching, key=lambda e: -e.steps))) or MISSING


def _entry(e: Experiment) -> str:
    if not e.finished:
        at = max(run.last_step for run in e.unfinished)
        return f"unfinished, at step {at:,} of {e.steps:,}"
    length = "" if e.is_full else f"{e.length} steps"
    dtype = "" if e.dtype == "float32" else e.dtype
    remarks = filter(None, (e.run_count, length, e.remarks, dtype))
    return f"{_percent(e.values('test_error_last'))} ({'; '.join(remarks)})"


def overview(experiments: list[Experiment]) -> Table:
    """A row for each experiment."""
    return _from_dicts(
        "All runs, by net and recipe",
        [_overview_row(e) for e in experiments],
        "Mean ± sample standard deviation over runs that differ in nothing but the seed. Published "
        "numbers are of the paper's 64,000 steps.",
        "The best error on the test set was chosen by looking at the test set: it flatters, and is "
        "here because others quote it.",
    )


def _overview_row(e: Experiment) -> dict[str, str]:
    theirs = ERRORS.get(e.model, {}) if e.is_comparable else {}
    seconds, speed = e.values("seconds"), e.values("images_per_second")
    time = str(datetime.timedelta(seconds=round(statistics.fmean(seconds)))) if seconds else NONE
    unfinished = f"\n{len(e.unfinished)} unfinished" if e.unfinished else ""
    hardware = sorted({str(run.result.get("hardware")) for run in e.finished})
    return {
        "net": f"{e.model}\n{e.parameters:,} parameters",
        "data; recipe; precision": f"{e.data}; {e.recipe}; {e.dtype}",
        "steps": e.length,
        "runs": f"{len(e.finished)}{unfinished}",
        "test error, last step, %": _percent(e.values("test_error_last")),
        "published, %": theirs.get("[R]") or theirs.get("[I]") or NONE,
        "test error at the best validation step, %": _percent(
            e.values("test_error_at_best_validation")
        ),
        "best on test, %: leakage": _percent(e.values("test_error_best_is_leakage")),
        "training error, %": _percent(e.values("train_error_last")),
        "time a run": time,
        "images/s": f"{statistics.fmean(speed):,.0f}" if speed else NONE,
        "hardware": "\n".join(hardware) or NONE,
    }


def every_run(runs: list[Run]) -> Table:
    """A row for each run."""
    return _from_dicts("Every run", [_run_row(run) for run in runs])


def _run_row(run: Run) -> dict[str, str]:
    result = run.result or {}
    error = result.get("test_error_last")
    return {
        "run": str(run.directory),
        "net": run.info["model"],
        "seed": str(run.config["seed"]),
        "steps": f"{run.info['total_steps']:,}",
        "test error, last step, %": _percent([error]) if result else f"at step {run.last_step:,}",
        "wrong": f"{result.get('test_wrong_last', NONE)} of {result.get('test_examples', NONE)}",
        "commit": str(result.get("commit") or NONE)[:12],
        "jax": str((result.get("versions") or {}).get("jax", NONE)),
    }


def class_errors(experiments: list[Experiment]) -> list[Table]:
    """Test error of each class, a table for each set of classes."""
    tables = []
    for names, own in by_classes(experiments).items():
        rows = [[e.label, *(f"{error:.1f}" for error in e.class_errors())] for e in own]
        rows = [[NONE if cell == "nan" else cell for cell in row] for row in rows]
        note = "At the last step; mean over the runs."
        tables.append(Table("Test error by class, %", ["net", *names], rows, [note]))
    return tables
