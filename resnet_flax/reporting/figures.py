"""Pictures of a report: training curves, responses, errors by size and by class."""

import json
import math
import statistics

from resnet_flax.reporting import classes, published
from resnet_flax.reporting.picture import COLORS, Picture, draw_grid
from resnet_flax.reporting.recipe import PAPER_STEPS
from resnet_flax.reporting.records import Group
from resnet_flax.reporting.tables import label
from resnet_flax.runs.metrics import of_split

_DEPTHS = 20, 32, 44, 56, 110, 1202
# Points of a training curve; more are averaged, as they would not be seen.
_POINTS = 250


def _curve(group: Group, split: str) -> tuple[list[float], list[float]]:
    """Steps and mean errors, %, at the steps that all runs of a group have."""
    by_step: dict[int, list[float]] = {}
    for record in group.finished:
        for point in of_split(record.metrics, split):
            by_step.setdefault(point["step"], []).append(100 * point["error"])
    whole = [(s, statistics.fmean(e)) for s, e in sorted(by_step.items())
             if len(e) == len(group.finished)]  # fmt: skip
    size = math.ceil(len(whole) / _POINTS) if split == "train" else 1
    parts = [whole[i : i + size] for i in range(0, len(whole), size or 1)]
    return [p[-1][0] for p in parts], [statistics.fmean(e for _, e in p) for p in parts]


def _color(net: str) -> str:
    depth = int("".join(c for c in net.partition("_")[0] if c.isdigit()) or 0)
    return COLORS[_DEPTHS.index(depth) if depth in _DEPTHS else -1]


def _families(groups: list[Group]) -> list[list[Group]]:
    """Plain and residual nets that were trained alike, the paper's way and at length first."""
    families: dict[str, list[Group]] = {}
    for group in groups:
        if not group.finished or group.net not in published.ENDS:
            continue
        config, run = group.first.config, group.first.run
        key = {
            k: v
            for k, v in config.items()
            if k.partition(".")[0] in ("data", "optim", "train") and "warmup" not in k
            and k not in ("data.data_dir", "data.archive", "data.mirror", "train.cpu_devices")
        }  # fmt: skip
        key["all"] = run["total_steps"], run["dtype"], group.data
        families.setdefault(json.dumps(key, sort_keys=True), []).append(group)
    return sorted(
        families.values(), key=lambda f: (not f[0].recipe.is_paper, -f[0].recipe.steps, f[0].data)
    )


def training_curves(groups: list[Group]) -> list[Picture]:
    """[R, Fig. 6] of every recipe by which nets of [R, Table 6] or their plain kin were trained."""
    pictures = []
    for number, family in enumerate(_families(groups), 1):
        recipe, data = family[0].recipe, family[0].data
        length = f"{recipe.steps:,} steps"
        if recipe.is_paper and not recipe.is_full:
            length += f" of the paper's {PAPER_STEPS:,}"
        kind = "the paper's recipe" if recipe.is_paper else "another recipe"
        marks = recipe.is_paper and data == "cifar10"
        caption = "Training error dashed, test error bold; mean over the runs of a net." + (
            f" Marks at the right: where the paper's curves end, after {PAPER_STEPS:,} steps (test "
            "filled, training hollow)."
            if marks
            else f" Recipe: {recipe.text}."
        )
        pictures.append(
            Picture(
                "fig6" if number == 1 else f"fig6_{number}",
                f"Training of plain and residual nets [R, Fig. 6]: {data}, {kind}, {length}",
                caption,
                (10, 4.2),
                lambda f, c, family=family, marks=marks: _draw_curves(f, c, family, marks),
            )
        )
    return pictures


def _draw_curves(figure, colors, family: list[Group], marks: bool) -> None:
    panels = figure.subplots(1, 2, sharey=True)
    top = 20.0
    for axes, kind in zip(panels, ("plain", "resnet"), strict=True):
        own = [g for g in family if g.net.startswith(kind)]
        for group in own:
            color = _color(group.net)
            style = {"color": color, "marker": None}
            steps, errors = _curve(group, "train")
            if len(steps) == 1:
                style["marker"] = "o"
            axes.plot(steps, errors, linestyle="--", linewidth=0.9, alpha=0.9, **style)
            steps, errors = _curve(group, "test")
            style["marker"] = "o" if len(steps) == 1 else None
            runs = len(group.finished)
            name = f"{group.net} ({runs} run{'s' if runs > 1 else ''})"
            axes.plot(steps, errors, linewidth=2.2, label=name, **style)
            if errors:
                top = max(top, 1.15 * max(errors[len(errors) // 2 :]))
            if marks:
                _mark(axes, group, color)
        axes.set(title="plain" if kind == "plain" else "residual", xlabel="step")
        draw_grid(axes, colors)
        if own:
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "no runs", transform=axes.transAxes, ha="center",
                      color=colors["ink"])  # fmt: skip
    panels[0].set_ylabel("error (%)")
    panels[0].set_ylim(0, min(100, top))
    for axes in panels:
        axes.set_xlim(0, 1.03 * family[0].recipe.steps)


def _mark(axes, group: Group, color: str) -> None:
    test, train = published.ENDS[group.net]
    x = 1.015 * group.recipe.steps
    axes.plot([x], [test], "D", color=color, markersize=6, clip_on=False)
    axes.plot([x], [train], "D", color=color, markersize=6, fillstyle="none", clip_on=False)


def responses(groups: list[Group]) -> list[Picture]:
    """[R, Fig. 7] of all runs whose layers' responses have been measured."""
    series = []
    for group in groups:
        measured = [r.responses for r in group.finished if r.responses]
        if measured and len(set(map(len, measured))) == 1:
            means = [statistics.fmean(values) for values in zip(*measured, strict=True)]
            series.append((group, f"{label(group)} ({len(measured)})", means))
    if not series:
        return []

    def draw(figure, colors):
        panels = figure.subplots(2, 1, sharex=True)
        for group, name, means in series:
            style = ":" if group.net.startswith("plain") else "-"
            for axes, values in zip(panels, (means, sorted(means, reverse=True)), strict=True):
                axes.plot(range(1, len(values) + 1), values, style, color=_color(group.net),
                          linewidth=1.4, marker=".", markersize=3, label=name)  # fmt: skip
        for axes, title in zip(panels, ("in the order of the layers", "sorted"), strict=True):
            axes.set(title=title, ylabel="std")
            axes.set_ylim(bottom=0)
            draw_grid(axes, colors)
        panels[0].legend(fontsize=8)
        panels[1].set_xlabel("3x3 layer")
        panels[1].xaxis.get_major_locator().set_params(integer=True)

    caption = (
        "Standard deviation, on the test images, of the output of each 3x3 layer's batch "
        "normalisation, before the addition and the ReLU. Plain nets dotted; in brackets the runs "
        "measured."
    )
    title = "Responses of the layers [R, Fig. 7]"
    return [Picture("fig7", title, caption, (9, 6.5), draw)]


def parameters(groups: list[Group]) -> list[Picture]:
    """Error against the number of parameters, of nets that were trained on CIFAR-10."""
    chosen = [g for g in groups if g.finished and g.data == "cifar10"]
    if not chosen:
        return []

    def draw(figure, colors):
        axes = figure.subplots()
        kinds: dict[str, str] = {}
        for group in chosen:
            error = group.statistic("test_error_last", 100)
            kind = _kind(group)
            color = kinds.setdefault(kind, COLORS[len(kinds) % len(COLORS)])
            x = group.first.run["parameters"]
            bar = 0 if math.isnan(error.deviation) else error.deviation
            axes.errorbar([x], [error.mean], [bar], fmt="o", color=color, capsize=3,
                          label=kind if list(kinds)[-1] == kind else None)  # fmt: skip
            axes.annotate(group.net, (x, error.mean), (5, 4), textcoords="offset points",
                          fontsize=7, color=colors["ink"])  # fmt: skip
        nets = published.OWN_NETS.values(), published.OTHER_NETS.values()
        for points, marker, name in zip(nets, "Ds", ("published [R]", "Highway nets"), strict=True):
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, marker, fillstyle="none", color=colors["ink"], label=name)
        axes.set(xscale="log", xlabel="parameters", ylabel="test error, last step (%)")
        handles, names = axes.get_legend_handles_labels()
        unique = dict(zip(names, handles, strict=True))
        axes.legend(unique.values(), unique.keys(), fontsize=8)
        draw_grid(axes, colors)

    caption = "Mean and standard deviation; published numbers hollow."
    title = "Test error by number of parameters"
    return [Picture("parameters", title, caption, (8, 4.8), draw)]


def _kind(group: Group) -> str:
    recipe = group.recipe
    kind = "plain" if group.net.startswith("plain") else "residual"
    for word in ("preact", "bottleneck", "keras"):
        kind = word if word in group.net else kind
    if not recipe.is_paper:
        return f"{kind}, other recipe"
    return kind if recipe.is_full else f"{kind}, {recipe.steps:,} steps"


def all_pictures(groups: list[Group]) -> list[Picture]:
    """Every picture that there is something to show in."""
    makers = training_curves, responses, parameters, classes.errors, classes.confusion
    return [picture for make in makers for picture in make(groups)]
