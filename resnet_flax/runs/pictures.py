"""Pictures of a run: its curves and its confusion matrix."""

import io
import pathlib
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from resnet_flax.runs.files import write_atomically
from resnet_flax.runs.metrics import of_split


def draw_curves(records: list[dict[str, Any]], path: pathlib.Path, title: str) -> None:
    """Writes a PNG of error against step in the style of [R Fig. 6]: training dashed, test bold."""
    styles = {
        "train": {"linestyle": "--", "linewidth": 1, "color": "tab:blue"},
        "validation": {"linestyle": "-", "linewidth": 1, "color": "tab:green"},
        "test": {"linestyle": "-", "linewidth": 2, "color": "tab:red"},
    }

    def draw(axes) -> None:
        top = 0.0
        for split, style in styles.items():
            points = [(r["step"], 100 * r["error"]) for r in of_split(records, split)]
            if points:
                steps, errors = zip(*points, strict=True)
                marker = "o" if len(points) == 1 else None
                # The last training record covers a few steps only: its number would say little.
                label = split if split == "train" else f"{split} {errors[-1]:.2f} %"
                axes.plot(steps, errors, label=label, marker=marker, **style)
                top = max(top, *errors[len(errors) // 20 :])
        axes.set(xlabel="step", ylabel="error (%)", title=title)
        axes.set_ylim(0, max(1.0, 1.05 * min(top, 100)))
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend()

    _write(path, (7, 4.5), draw)


def draw_confusion(
    confusion: np.ndarray, class_names: Sequence[str], path: pathlib.Path, title: str
) -> None:
    """Writes a PNG of a confusion matrix, see `show_confusion`."""

    def draw(axes) -> None:
        show_confusion(axes, confusion, class_names, title)
        axes.set(xlabel="predicted class", ylabel="true class")

    _write(path, (6.5, 6), draw)


def show_confusion(axes, confusion: np.ndarray, class_names: Sequence[str], title: str) -> None:
    """Draws the share of each class's images, in percent, that is taken for each class.

    Args:
      axes: of matplotlib.
      confusion: examples by (label, prediction), [K, K].
      class_names: K names.
      title: of the axes.
    """
    confusion, count = np.asarray(confusion), len(class_names)
    shares = 100 * confusion / np.maximum(1, confusion.sum(axis=1, keepdims=True))
    mistakes = shares * (1 - np.eye(count))  # The diagonal would leave no colour for them.
    highest = max(mistakes.max(), 1e-9)
    axes.imshow(mistakes, vmin=0, vmax=highest, cmap="Blues")
    axes.grid(False)
    for (i, j), share in np.ndenumerate(shares):
        if count <= 20 and (share >= 0.05 or i == j):
            text = f"{share:.1f}" if share < 10 else f"{share:.0f}"
            color = "#ffffff" if mistakes[i, j] > 0.55 * highest else "#111111"
            weight = "bold" if i == j else "normal"
            style = {"ha": "center", "va": "center", "fontsize": 6}
            axes.text(j, i, text, color=color, fontweight=weight, **style)
    # Names of folders: a dollar in them begins no formula.
    style = {"fontsize": 7, "parse_math": False}
    axes.set_xticks(range(count), class_names, rotation=60, ha="right", **style)
    axes.set_yticks(range(count), class_names, **style)
    axes.set_title(title, fontsize=9)


def _write(path: pathlib.Path, inches: tuple[float, float], draw: Callable[[Any], None]) -> None:
    try:
        # Without pyplot: no global state, no display, and a third of the import time.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=inches, dpi=120, layout="constrained")
        draw(figure.subplots())
        content = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # Class names in any script.
            FigureCanvasAgg(figure).print_png(content)
    except OSError as error:
        if error.errno is not None:
            raise
        # Matplotlib has found no place for its cache of fonts.
        print(f"note: {path.name} could not be drawn: {error}", file=sys.stderr)
    else:
        write_atomically(path, content.getvalue())
