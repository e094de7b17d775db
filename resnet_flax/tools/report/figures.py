"""The figures of a report: training curves, responses, errors by size and by class."""

import dataclasses
import io
import math
import pathlib
import statistics
from collections.abc import Iterator

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resnet_flax.runs.metrics import of_split
from resnet_flax.tools.report import published
from resnet_flax.tools.report.runs import Experiment, by_classes, grouped

_STYLE = pathlib.Path(__file__).with_suffix(".mplstyle")
_DEPTHS = 20, 32, 44, 56, 110, 1202  # each of a colour, the same in every figure
_POINTS = 250  # of a training curve; beyond that, neighbours are averaged


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure; its title is also its alternative text."""

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """The content of a PNG file."""
        content = io.BytesIO()
        with matplotlib.rc_context(fname=_STYLE):
            self.figure.savefig(content, format="png")
        return content.getvalue()


def all_pictures(experiments: list[Experiment]) -> list[Picture]:
    """Every picture that there is something to show in."""
    finished = [e for e in experiments if e.finished]
    makers = _training_curves, _responses, _parameters, _by_class
    with matplotlib.rc_context(fname=_STYLE):
        return [picture for make in makers for picture in make(finished)]


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"


def _color(e: Experiment) -> str:
    return f"C{_DEPTHS.index(e.depth) if e.depth in _DEPTHS else len(_DEPTHS)}"


def _training_curves(experiments: list[Experiment]) -> Iterator[Picture]:
    # [R, Fig. 6], a picture for each recipe; the paper's at full length first.
    chosen = [e for e in experiments if e.model in published.TRAINING_ERRORS]
    families = grouped(
        sorted(chosen, key=lambda e: (not e.recipe.is_paper, -e.steps, e.data)),
        lambda e: (e.recipe.settings, e.recipe.remarks, e.steps, e.dtype, e.data),
    )
    for number, family in enumerate(families.values(), 1):
        first, recipe = family[0], family[0].recipe
        kind = "the paper's recipe" if recipe.is_paper else "another recipe"
        length = f"{first.steps:,} steps"
        if recipe.is_paper and not recipe.is_full:
            length += f" of the paper's {published.PAPER_STEPS:,}"
        what = ", ".join(filter(None, (first.data, kind, length, recipe.remarks)))
        title = f"Training of plain and residual nets [R, Fig. 6]: {what}"
        caption = "Training error dashed, test error bold; mean over the runs of a net. "
        caption += (
            "Marks at the right: where the paper's curves end, after "
            f"{published.PAPER_STEPS:,} steps (test filled, training hollow)."
            if first.is_comparable
            else f"Recipe: {recipe.text}."
        )
        figure, top = Figure(figsize=(10, 4.2)), 20
        panels = figure.subplots(1, 2, sharey=True)
        for axes, name in zip(panels, ("plain", "resnet"), strict=True):
            top = max(top, _draw_curves(axes, [e for e in family if e.model.startswith(name)]))
            axes.set(xlim=(0, 1.03 * first.steps))
        panels[0].set(title="plain", ylabel="error (%)", ylim=(0, min(100, top)))
        panels[1].set(title="residual")
        yield Picture(_numbered("fig6", number), title, caption, figure)


def _draw_curves(axes: Axes, experiments: list[Experiment]) -> float:
    # Returns the height that the later half of the test curves needs.
    top = 0.0
    for e in experiments:
        color = _color(e)
        test = {"linewidth": 2.2, "label": f"{e.model} ({e.run_count})"}
        train = {"linestyle": "--", "linewidth": 0.9, "alpha": 0.9}
        for split, style in (("train", train), ("test", test)):
            steps, errors = _curve(e, split)
            axes.plot(steps, errors, color=color, marker="o" if len(steps) == 1 else None, **style)
        top = max(top, 1.15 * max(errors[len(errors) // 2 :], default=0))
        if e.is_comparable:
            ends = published.paper_error(e.model), published.TRAINING_ERRORS[e.model]
            for end, fill in zip(ends, ("full", "none"), strict=True):
                axes.plot(1.015 * e.steps, end, "D", color=color, fillstyle=fill, clip_on=False)
    axes.set_xlabel("step")
    if experiments:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center")
    return top


def _curve(e: Experiment, split: str) -> tuple[list[int], list[float]]:
    # Steps and mean errors, %, where every finished run has one.
    points = [point for run in e.finished for point in of_split(run.log, split)]
    by_step = sorted(grouped(points, lambda point: point["step"]).items())
    means = [
        (step, statistics.fmean(100 * point["error"] for point in own))
        for step, own in by_step
        if len(own) == len(e.finished)
    ]
    size = max(1, math.ceil(len(means) / _POINTS)) if split == "train" else 1
    parts = [means[i : i + size] for i in range(0, len(means), size)]
    return [p[-1][0] for p in parts], [statistics.fmean(e for _, e in p) for p in parts]


def _responses(experiments: list[Experiment]) -> Iterator[Picture]:
    # [R, Fig. 7] of all runs whose responses have been measured.
    figure = Figure(figsize=(9, 6.5))
    in_order, by_size = figure.subplots(2, 1, sharex=True)
    for e in experiments:
        measured = [run.responses for run in e.finished if run.responses]
        if len(set(map(len, measured))) == 1:
            means = np.mean(measured, axis=0)
            layers = range(1, len(means) + 1)
            style = {"linestyle": ":" if e.model.startswith("plain") else "-", "color": _color(e)}
            style |= {"linewidth": 1.4, "marker": ".", "markersize": 3}
            in_order.plot(layers, means, label=f"{e.label} ({len(measured)})", **style)
            by_size.plot(layers, sorted(means, reverse=True), **style)
    if not in_order.lines:
        return
    in_order.set(title="in the order of the layers", ylabel="std", ylim=(0, None))
    by_size.set(title="sorted", ylabel="std", xlabel="3x3 layer", ylim=(0, None))
    in_order.legend()
    by_size.xaxis.get_major_locator().set_params(integer=True)
    caption = (
        "Standard deviation, on the test images, of the output of each 3x3 layer's batch "
        "normalisation, before the addition and the ReLU. Plain nets dotted; in brackets the runs "
        "measured."
    )
    yield Picture("fig7", "Responses of the layers [R, Fig. 7]", caption, figure)


def _parameters(experiments: list[Experiment]) -> Iterator[Picture]:
    figure = Figure(figsize=(8, 4.8))
    axes = figure.subplots()
    colors: dict[str, str] = {}
    for e in experiments:
        if e.data == "cifar10":
            errors, kind = e.values("test_error_last", 100), _kind(e)
            x, mean = e.parameters, statistics.fmean(errors)
            deviation = statistics.stdev(errors) if len(errors) > 1 else 0
            label = None if kind in colors else kind
            color = colors.setdefault(kind, f"C{len(colors)}")
            axes.errorbar(x, mean, deviation, fmt="o", color=color, capsize=3, label=label)
            axes.annotate(e.model, (x, mean), (5, 4), textcoords="offset points", fontsize=7)
    if not colors:
        return
    paper = [(size, published.paper_error(model)) for model, size in published.PARAMETERS.items()]
    style = {"color": matplotlib.rcParams["text.color"], "fillstyle": "none"}
    axes.plot(*zip(*paper, strict=True), "D", label="published [R]", **style)
    axes.plot(*zip(*published.HIGHWAY, strict=True), "s", label="Highway nets", **style)
    axes.set(xscale="log", xlabel="parameters", ylabel="test error, last step (%)")
    axes.legend()
    caption = "Mean and standard deviation; published numbers hollow."
    yield Picture("parameters", "Test error by number of parameters", caption, figure)


def _kind(e: Experiment) -> str:
    kinds = "keras", "bottleneck", "preact", "plain"
    kind = next((word for word in kinds if word in e.model), "residual")
    if not e.recipe.is_paper:
        return f"{kind}, other recipe"
    return kind if e.recipe.is_full else f"{kind}, {e.steps:,} steps"


def _by_class(experiments: list[Experiment]) -> Iterator[Picture]:
    for number, (names, own) in enumerate(by_classes(experiments).items(), 1):
        names = [name.replace("$", r"\$") for name in names]  # not a formula
        figure = Figure(figsize=(10, max(4.2, 0.22 * len(own))))
        axes = figure.subplots()
        for e in own:
            axes.plot(e.class_errors(), "o-", linewidth=0.8, markersize=4, label=e.label)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set(ylabel="test error (%)", ylim=(0, None))
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        caption = "At the last step; mean over the runs."
        yield Picture(_numbered("class_errors", number), "Test error by class", caption, figure)

        across, down = min(3, len(own)), math.ceil(len(own) / 3)
        figure = Figure(figsize=(4.6 * across, 5.4 * down))
        for i, e in enumerate(own, 1):
            _draw_confusion(figure.add_subplot(down, across, i), e, names)
        caption = (
            "Share of each class's test images (rows) that are taken for each class (columns), %; "
            "all runs of a net together, at the last step."
        )
        yield Picture(_numbered("confusion", number), "Confusion of the classes", caption, figure)


def _draw_confusion(axes: Axes, e: Experiment, names: list[str]) -> None:
    count = len(names)
    images = sum(run.confusion for run in e.finished)[:count, :count]
    shares = 100 * images / np.maximum(1, images.sum(axis=1, keepdims=True))
    # The diagonal would leave no colour for the mistakes.
    mistakes = shares * (1 - np.eye(count))
    highest = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, vmin=0, vmax=highest)
    axes.grid(False)
    style = {"ha": "center", "va": "center", "fontsize": 6}
    for (i, j), share in np.ndenumerate(shares):
        if count <= 20 and (share >= 0.05 or i == j):
            text = f"{share:.1f}" if share < 10 else f"{share:.0f}"
            color = "#ffffff" if mistakes[i, j] > 0.55 * highest else "#111111"
            weight = "bold" if i == j else "normal"
            axes.text(j, i, text, color=color, fontweight=weight, **style)
    axes.set_xticks(range(count), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(count), names, fontsize=7)
    axes.set_title(e.label, fontsize=9)
