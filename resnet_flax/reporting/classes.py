"""Pictures of what a net takes for what."""

import math

from resnet_flax.reporting.picture import COLORS, Picture, draw_grid
from resnet_flax.reporting.records import Group
from resnet_flax.reporting.tables import group_class_errors, label


def _with_classes(groups: list[Group]) -> dict[tuple[str, ...], list[Group]]:
    by_names: dict[tuple[str, ...], list[Group]] = {}
    for group in groups:
        if found := group_class_errors(group):
            by_names.setdefault(found[0], []).append(group)
    return by_names


def errors(groups: list[Group]) -> list[Picture]:
    """Test error of each class, a picture for every set of classes."""
    pictures = []
    for number, (names, own) in enumerate(_with_classes(groups).items(), 1):

        def draw(figure, colors, names=names, own=own):
            axes = figure.subplots()
            for i, group in enumerate(own):
                _, values = group_class_errors(group)
                values = [math.nan if v is None else v for v in values]
                axes.plot(range(len(names)), values, "o-", linewidth=0.8, markersize=4,
                          color=COLORS[i % len(COLORS)], label=label(group))  # fmt: skip
            axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
            axes.set_ylabel("test error (%)")
            axes.set_ylim(bottom=0)
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
            draw_grid(axes, colors)

        name = "class_errors" if number == 1 else f"class_errors_{number}"
        caption = "At the last step; mean over the runs."
        height = max(4.2, 0.22 * len(own))
        pictures.append(Picture(name, "Test error by class", caption, (10, height), draw))
    return pictures


def confusion(groups: list[Group]) -> list[Picture]:
    """What is taken for what: the runs of a group together, a picture for every set of classes."""
    pictures = []
    for number, (names, own) in enumerate(_with_classes(groups).items(), 1):
        across = min(3, len(own))
        down = math.ceil(len(own) / across)

        def draw(figure, colors, names=names, own=own, across=across, down=down):
            panels = figure.subplots(down, across, squeeze=False)
            for axes in panels.flat[len(own) :]:
                axes.set_axis_off()
            for axes, group in zip(panels.flat, own, strict=False):
                _draw_confusion(axes, colors, names, group)

        name = "confusion" if number == 1 else f"confusion_{number}"
        caption = (
            "Share of each class's test images (rows) that are taken for each class (columns), %; "
            "all runs of a net together, at the last step."
        )
        size = 4.6 * across, 5.4 * down
        pictures.append(Picture(name, "Confusion of the classes", caption, size, draw))
    return pictures


def _draw_confusion(axes, colors, names: tuple[str, ...], group: Group) -> None:
    matrices = [record.result["test_confusion_last"] for record in group.finished]
    count = len(names)
    total = [[sum(m[i][j] for m in matrices) for j in range(count)] for i in range(count)]
    shares = [[100 * v / max(1, sum(row)) for v in row] for row in total]
    # The diagonal would leave no colour for the mistakes.
    mistakes = [[0 if i == j else v for j, v in enumerate(row)] for i, row in enumerate(shares)]
    highest = max(max(map(max, mistakes)), 1e-9)
    axes.imshow(mistakes, cmap=colors["map"], vmin=0, vmax=highest)
    for i, row in enumerate(shares):
        for j, value in enumerate(row):
            if count <= 20 and (value >= 0.05 or i == j):
                strong = (mistakes[i][j] > 0.55 * highest) == (colors["map"] == "Blues")
                color = "#ffffff" if strong else "#111111"
                axes.text(j, i, f"{value:.1f}" if value < 10 else f"{value:.0f}", ha="center",
                          va="center", fontsize=6, color=color,
                          fontweight="bold" if i == j else None)  # fmt: skip
    axes.set_xticks(range(count), names, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(count), names, fontsize=7)
    axes.set_title(label(group), fontsize=9)
