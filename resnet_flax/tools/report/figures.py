"""The figures of a report: training curves, responses, errors by size and by class."""

import io
import math
import pathlib
import statistics
from collections.abc import Iterator
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from resnet_flax.runs.metrics import of_split
from resnet_flax.runs.pictures import show_confusion
from resnet_flax.tools.report import published
from resnet_flax.tools.report.experiment import Experiment, by_classes, commas, grouped

STYLE = pathlib.Path(__file__).with_suffix(".mplstyle")
_DEPTHS = 20, 32, 44, 56, 110, 1202  # each of a colour, the same in every figure
_POINTS = 250  # of a training curve; beyond that, neighbours are averaged


class Picture(NamedTuple):
    """A figure; its title is also its alternative text."""

    name: str
    title: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """The content of a PNG file."""
        content = io.BytesIO()
        self.figure.savefig(content, format="png")
        return content.getvalue()


def all_pictures(experiments: list[Experiment]) -> list[Picture]:
    """Every picture that there is something to show in."""
    finished = [e for e in experiments if e.finished]
    makers = _training_curves, _responses, _parameters, _by_class
    return [picture for make in makers for picture in make(finished)]


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}_{number}"


def _color(e: Experiment) -> str:
    return f"C{_DEPTHS.index(e.depth) if e.depth in _DEPTHS else len(_DEPTHS)}"


def _training_curves(experiments: list[Experiment]) -> Iterator[Picture]:
    # [R, Fig. 6], a picture for each recipe; the paper's at full length first.
    chosen = [e for e in experiments if e.model in published.TRAINING_ERRORS]
    families = grouped(
        sorted(chosen, key=lambda e: (not e.is_paper, -e.steps, e.data)),
        lambda e: (e.settings, e.remarks, e.steps, e.dtype, e.data),
    )
    for number, family in enumerate(families.values(), 1):
        first = family[0]
        kind = "the paper's recipe" if first.is_paper else "another recipe"
        what = commas(first.data, kind, f"{first.length} steps", first.remarks)
        title = f"Training of plain and residual nets [R, Fig. 6]: {what}"
        caption = "Training error dashed, test error bold; mean over the runs of a net. "
        caption += (
            "Marks at the right: where the paper's curves end, after "
            f"{published.PAPER_STEPS:,} steps (test filled, training hollow)."
            if first.is_comparable
            else f"Recipe: {first.recipe}."
        )
        figure = Figure(figsize=(10, 4.2))
        plain, residual = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, name in ((plain, "plain"), (residual, "resnet")):
            _draw_curves(axes, [e for e in family if e.model.startswith(name)])
        tests = [_curve(e, "test")[1] for e in family]
        highest = max(max(errors[len(errors) // 2 :], default=0) for errors in tests)
        plain.set(xlim=(0, 1.03 * first.steps), ylim=(0, np.clip(1.15 * highest, 20, 100)))
        plain.set(title="plain", ylabel="error (%)")
        residual.set(title="residual")
        yield Picture(_numbered("fig6", number), title, caption, figure)


def _draw_curves(axes: Axes, experiments: list[Experiment]) -> None:
    train = {"linestyle": "--", "linewidth": 0.9, "alpha": 0.9}
    for e in experiments:
        color = _color(e)
        test = {"linewidth": 2.2, "label": f"{e.model} ({e.run_count})"}
        for split, style in (("train", train), ("test", test)):
            steps, errors = _curve(e, split)
            axes.plot(steps, errors, color=color, marker="o" if len(steps) == 1 else None, **style)
        if e.is_comparable:
            ends = published.paper_error(e.model), published.TRAINING_ERRORS[e.model]
            for end, fill in zip(ends, ("full", "none"), strict=True):
                axes.plot(1.015 * e.steps, end, "D", color=color, fillstyle=fill, clip_on=False)
    axes.set_xlabel("step")
    if experiments:
        axes.legend()
    else:
        axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center")


def _curve(e: Experiment, split: str) -> tuple[list[int], list[float]]:
    # Steps at which every finished run has an error, and the mean errors there, %.
    logs = [{r["step"]: r["error"] for r in of_split(run.log, split)} for run in e.finished]
    steps = sorted(set.intersection(*map(set, logs)))
    errors = [statistics.fmean(100 * log[step] for log in logs) for step in steps]
    if split != "train" or len(steps) <= _POINTS:
        return steps, errors
    size = math.ceil(len(steps) / _POINTS)
    starts = range(0, len(steps), size)
    return (
        [steps[min(i + size, len(steps)) - 1] for i in starts],
        [statistics.fmean(errors[i : i + size]) for i in starts],
    )


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
    kinds = grouped((e for e in experiments if e.data == "cifar10"), _kind)
    for kind, own in kinds.items():
        errors = [[100 * error for error in e.values("test_error_last")] for e in own]
        means = list(map(statistics.fmean, errors))
        deviations = [statistics.stdev(x) if len(x) > 1 else 0 for x in errors]
        sizes = [e.parameters for e in own]
        axes.errorbar(sizes, means, deviations, fmt="o", capsize=3, label=kind)
        for e, *point in zip(own, sizes, means, strict=True):
            axes.annotate(e.model, point, (5, 4), textcoords="offset points", fontsize=7)
    if not kinds:
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
    words = "keras", "bottleneck", "preact", "plain"
    return commas(next((word for word in words if word in e.model), "residual"), e.difference)


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
            images = sum(run.confusion for run in e.finished)[: len(names), : len(names)]
            show_confusion(figure.add_subplot(down, across, i), images, names, e.label)
        caption = (
            "Share of each class's test images (rows) that are taken for each class (columns), %; "
            "all runs of a net together, at the last step."
        )
        yield Picture(_numbered("confusion", number), "Confusion of the classes", caption, figure)
