"""The tables of a report, as text in cells."""

import dataclasses
import datetime
import statistics

from resnet_flax.tools.report.published import ERRORS, PAPER_STEPS, SOURCES, TABLES
from resnet_flax.tools.report.runs import Experiment, Run, by_classes

MISSING, NONE = "missing", "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Table:
    """Line breaks separate the entries of a cell; a wide table is set in small type."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: tuple[str, ...] = ()
    wide: bool = True


def percent(errors: list[float]) -> str:
    """`8.75 ± 0.12`: mean and sample standard deviation of errors in %."""
    if not errors:
        return NONE
    mean = f"{statistics.fmean(errors):.2f}"
    return mean if len(errors) == 1 else f"{mean} ± {statistics.stdev(errors):.2f}"


def comparisons(experiments: list[Experiment]) -> tuple[list[Table], list[str]]:
    """The papers' tables, and the titles of those of which nothing has been run."""
    tables, absent = [], []
    comparable = [e for e in experiments if e.is_comparable]
    done = {e.model for e in comparable}.difference(TABLES[0]["models"])
    for table in TABLES:
        if table.get("optional") and done.isdisjoint(table["models"]):
            absent.append(table["title"])
            continue
        rows = []
        for model in table["models"]:
            theirs = [ERRORS.get(model, {}).get(name, NONE) for name in table["sources"]]
            rows.append((model, _here(model, comparable), *theirs))
        notes = tuple(f"{name}: {SOURCES[name]}." for name in table["sources"])
        columns = ("net", "here, last step", *table["sources"])
        tables.append(Table(table["title"], columns, rows, notes, wide=False))
    return tables, absent


def _here(model: str, comparable: list[Experiment]) -> str:
    matching = [e for e in comparable if e.model == model]
    return "\n".join(map(_entry, sorted(matching, key=lambda e: -e.steps))) or MISSING


def _entry(e: Experiment) -> str:
    if not e.finished:
        at = max(run.last_step for run in e.unfinished)
        return f"unfinished, at step {at:,} of {e.steps:,}"
    length = "" if e.recipe.is_full else f"{_steps(e)} steps"
    dtype = "" if e.dtype == "float32" else e.dtype
    remarks = filter(None, (e.run_count, length, e.recipe.remarks, dtype))
    return f"{percent(e.values('test_error_last', 100))} ({'; '.join(remarks)})"


def _steps(e: Experiment) -> str:
    """`7,820 of 64,000` for a shortened recipe of the paper's."""
    shortened = e.recipe.is_paper and e.steps != PAPER_STEPS
    return f"{e.steps:,} of {PAPER_STEPS:,}" if shortened else f"{e.steps:,}"


def overview(experiments: list[Experiment]) -> Table:
    """A row for each experiment."""
    columns = (
        "net", "data; recipe; precision", "steps", "runs", "test error, last step, %",
        "published, %", "test error at the best validation step, %",
        "best on test, %: leakage", "training error, %", "time a run", "images/s", "hardware",
    )  # fmt: skip
    rows = []
    for e in experiments:
        theirs = ERRORS.get(e.model, {})
        published = theirs.get("[R]") or theirs.get("[I]")
        seconds, speed = e.values("seconds"), e.values("images_per_second")
        unfinished = f"\n{len(e.unfinished)} unfinished" if e.unfinished else ""
        hardware = sorted({str(run.result.get("hardware")) for run in e.finished})
        rows.append((
            f"{e.model}\n{e.parameters:,} parameters",
            f"{e.data}; {e.recipe.text}; {e.dtype}",
            _steps(e),
            f"{len(e.finished)}{unfinished}",
            percent(e.values("test_error_last", 100)),
            published if published and e.is_comparable else NONE,
            percent(e.values("test_error_at_best_validation", 100)),
            percent(e.values("test_error_best_is_leakage", 100)),
            percent(e.values("train_error_last", 100)),
            str(datetime.timedelta(seconds=round(statistics.fmean(seconds)))) if seconds else NONE,
            f"{statistics.fmean(speed):,.0f}" if speed else NONE,
            "\n".join(hardware) or NONE,
        ))  # fmt: skip
    notes = (
        "Mean ± sample standard deviation over runs that differ in nothing but the seed. Published "
        "numbers are of the paper's 64,000 steps.",
        "The best error on the test set was chosen by looking at the test set: it flatters, and is "
        "here because others quote it.",
    )
    return Table("All runs, by net and recipe", columns, rows, notes)


def every_run(runs: list[Run]) -> Table:
    """A row for each run."""
    columns = "run", "net", "seed", "steps", "test error, last step, %", "wrong", "commit", "jax"
    rows = []
    for run in runs:
        result = run.result or {}
        error = result.get("test_error_last")
        rows.append((
            str(run.directory),
            run.info["model"],
            str(run.config["seed"]),
            f"{run.info['total_steps']:,}",
            f"at step {run.last_step:,}" if error is None else f"{100 * error:.2f}",
            f"{result.get('test_wrong_last', NONE)} of {result.get('test_examples', NONE)}",
            str(result.get("commit") or NONE)[:12],
            str((result.get("versions") or {}).get("jax", NONE)),
        ))  # fmt: skip
    return Table("Every run", columns, rows)


def class_errors(experiments: list[Experiment]) -> list[Table]:
    """Test error of each class, a table for each set of classes."""
    tables = []
    for names, own in by_classes(experiments).items():
        errors = [(e.label, *(f"{v:.1f}" for v in e.class_errors())) for e in own]
        rows = [tuple(NONE if cell == "nan" else cell for cell in row) for row in errors]
        note = "At the last step; mean over the runs."
        tables.append(Table("Test error by class, %", ("net", *names), rows, (note,)))
    return tables
