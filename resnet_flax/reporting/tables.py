"""Tables of a report, as text in cells: the same for HTML and Markdown."""

import dataclasses
import math
import statistics

from resnet_flax.reporting import published
from resnet_flax.reporting.recipe import PAPER_STEPS
from resnet_flax.reporting.records import Group, Record, Statistic

MISSING, NONE = "missing", "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
      title: its heading.
      caption: what must be said of it; each item a paragraph.
      columns: their heads.
      rows: cells; a line break separates entries of a cell.
      wide: whether it is for looking things up rather than for reading.
    """

    title: str
    caption: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    wide: bool = False


def percent(statistic: Statistic | None) -> str:
    """`8.75 ± 0.12` of a statistic in percent."""
    if statistic is None:
        return NONE
    if math.isnan(statistic.deviation):
        return f"{statistic.mean:.2f}"
    return f"{statistic.mean:.2f} ± {statistic.deviation:.2f}"


def steps(group: Group) -> str:
    """`7,820 of 64,000` of a shortened recipe of the paper's."""
    recipe = group.recipe
    full = recipe.is_full or not recipe.is_paper or recipe.steps == PAPER_STEPS
    return f"{recipe.steps:,}" if full else f"{recipe.steps:,} of {PAPER_STEPS:,}"


def _is_comparable(group: Group) -> bool:
    return group.data == "cifar10" and group.recipe.is_paper


def comparisons(groups: list[Group]) -> tuple[list[Table], list[str]]:
    """The papers' tables, and the titles of those of which nothing has been run."""
    tables, absent = [], []
    for title, nets, sources, always in published.TABLES:
        # Only nets that are nowhere else make a table worth showing.
        own = {g.net for g in groups if g.net in nets and _is_comparable(g)} - _TABLE_6
        if not always and not own:
            absent.append(title)
            continue
        sources = tuple(s for s in sources if any(net in s.errors for net in nets))
        rows = tuple(
            (net, _here(net, groups), *(source.errors.get(net, NONE) for source in sources))
            for net in nets
        )
        caption = tuple(f"{s.name}: {s.where}; {s.protocol}." for s in sources)
        columns = ("net", "here, last step", *(source.name for source in sources))
        tables.append(Table(title, caption, columns, rows))
    return tables, absent


_TABLE_6 = {f"resnet{depth}" for depth in (20, 32, 44, 56, 110, 1202)}


def _here(net: str, groups: list[Group]) -> str:
    matching = [g for g in groups if g.net == net and _is_comparable(g)]
    matching.sort(key=lambda g: -g.recipe.steps)
    return "\n".join(map(_entry, matching)) or MISSING


def _entry(group: Group) -> str:
    remarks = [] if group.recipe.is_full else [f"{steps(group)} steps"]
    # What all of the paper's own runs of the net share need not be said again.
    remarks += [part for part in group.recipe.text.split(", ")[1:] if "warm-up" not in part]
    if group.first.run["dtype"] != "float32":
        remarks.append(group.first.run["dtype"])
    if not group.finished:
        at = max(record.last_step for record in group.unfinished)
        return f"unfinished, at step {at:,} of {group.recipe.steps:,}"
    statistic = group.statistic("test_error_last", 100)
    runs = "1 run" if statistic.n == 1 else f"{statistic.n} runs"
    return f"{percent(statistic)} ({'; '.join([runs, *remarks])})"


def overview(groups: list[Group]) -> Table:
    """All groups, with everything that there is to say of them."""
    rows = []
    for group in groups:
        seconds, speed = group.statistic("seconds"), group.statistic("images_per_second")
        hardware = sorted({str(r.result.get("hardware")) for r in group.finished})
        count = str(len(group.finished))
        if group.unfinished:
            count += f"\n{len(group.unfinished)} unfinished"
        paper = published.PAPER.errors.get(group.net)
        paper = paper or published.IDENTITY_MAPPINGS.errors.get(group.net, NONE)
        last, validation, leakage, train = (
            percent(group.statistic(name, 100))
            for name in (
                "test_error_last",
                "test_error_at_best_validation",
                "test_error_best_is_leakage",
                "train_error_last",
            )
        )
        rows.append((
            f"{group.net}\n{group.first.run['parameters']:,} parameters",
            f"{group.data}; {group.recipe.text}; {group.first.run['dtype']}",
            steps(group),
            count,
            last,
            paper if _is_comparable(group) else NONE,
            validation,
            leakage,
            train,
            duration(seconds.mean) if seconds else NONE,
            f"{speed.mean:,.0f}" if speed else NONE,
            "\n".join(hardware) or NONE,
        ))  # fmt: skip
    columns = (
        "net", "data; recipe; precision", "steps", "runs", "test error, last step, %",
        "published, %", "test error at the best validation step, %",
        "best on test, %: leakage", "training error, %", "time a run", "images/s", "hardware",
    )  # fmt: skip
    caption = (
        "Mean ± sample standard deviation over runs that differ in nothing but the seed. Published "
        "numbers are of the paper's 64,000 steps.",
        "The best error on the test set was chosen by looking at the test set: it flatters, and is "
        "here because others quote it.",
    )
    return Table("All runs, by net and recipe", caption, columns, tuple(rows), wide=True)


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def every_run(records: list[Record]) -> Table:
    """All runs one by one."""
    rows = []
    for record in records:
        result = record.result or {}
        error = result.get("test_error_last")
        rows.append((
            str(record.directory),
            str(record.run["model"]),
            str(record.seed),
            f"{record.run['total_steps']:,}",
            f"{100 * error:.2f}" if error is not None else f"at step {record.last_step:,}",
            f"{result.get('test_wrong_last', NONE)} of {result.get('test_examples', NONE)}",
            str(result.get("commit") or NONE)[:12],
            str((result.get("versions") or {}).get("jax", NONE)),
        ))  # fmt: skip
    columns = ("run", "net", "seed", "steps", "test error, last step, %", "wrong", "commit", "jax")
    return Table("Every run", (), columns, tuple(rows), wide=True)


def class_errors(groups: list[Group]) -> list[Table]:
    """Test error of each class, a table for every set of classes."""
    by_names: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for group in groups:
        errors = group_class_errors(group)
        if errors:
            names, values = errors
            row = (label(group), *(NONE if v is None else f"{v:.1f}" for v in values))
            by_names.setdefault(names, []).append(row)
    return [
        Table(
            "Test error by class, %",
            ("At the last step; mean over the runs.",),
            ("net", *names),
            tuple(rows),
            wide=True,
        )
        for names, rows in by_names.items()
    ]


def group_class_errors(group: Group) -> tuple[tuple[str, ...], list[float | None]] | None:
    """Names and mean test errors, %, of the classes; None where a run lacks them."""
    matrices = [r.result.get("test_confusion_last") for r in group.finished]
    if not matrices or None in matrices:
        return None
    names = tuple(map(str, group.finished[0].result["class_names"]))
    means: list[float | None] = []
    for k in range(len(names)):
        errors = [100 * (1 - m[k][k] / sum(m[k])) for m in matrices if sum(m[k])]
        means.append(statistics.fmean(errors) if errors else None)
    return names, means


def label(group: Group) -> str:
    """A short name of a group, for legends and rows."""
    remark = "" if group.recipe.is_full else f", {group.recipe.steps:,} steps"
    other = "" if group.recipe.is_paper else ", other recipe"
    data = "" if group.data == "cifar10" else f", {group.data}"
    return f"{group.net}{data}{other}{remark}"
