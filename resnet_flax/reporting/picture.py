"""A picture of a report, drawn for a light page and for a dark one."""

import dataclasses
import io
from collections.abc import Callable
from typing import Any

# Colours that can be told apart on white and on black, also by people who see few of them.
COLORS = "#4477AA", "#EE6677", "#228833", "#BB9922", "#44AADD", "#AA3377", "#888888"
_THEMES = {
    "light": {"page": "#ffffff", "ink": "#1b1f24", "grid": "#d0d4d9", "map": "Blues"},
    "dark": {"page": "#16191d", "ink": "#dfe3e8", "grid": "#3a4048", "map": "bone"},
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
      name: of its file, without an ending.
      title: its heading, which also says what it shows to those who cannot see it.
      caption: how to read it.
      size: inches.
      draw: draws into a matplotlib figure, given a theme.
    """

    name: str
    title: str
    caption: str
    size: tuple[float, float]
    draw: Callable[[Any, dict[str, str]], None]

    def png(self, theme: str) -> bytes:
        """The picture for a page that is "light" or "dark"."""
        # Without pyplot: no global state and no display.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        colors = _THEMES[theme]
        figure = Figure(figsize=self.size, dpi=130, layout="constrained")
        figure.set_facecolor(colors["page"])
        self.draw(figure, colors)
        for axes in figure.axes:
            _dress(axes, colors)
        content = io.BytesIO()
        FigureCanvasAgg(figure).print_png(content)
        return content.getvalue()


def _dress(axes, colors: dict[str, str]) -> None:
    axes.set_facecolor(colors["page"])
    axes.tick_params(colors=colors["ink"], which="both")
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(colors["ink"])
    for spine in axes.spines.values():
        spine.set_color(colors["grid"])
    if legend := axes.get_legend():
        legend.get_frame().set(facecolor=colors["page"], edgecolor=colors["grid"])
        for text in legend.get_texts():
            text.set_color(colors["ink"])


def draw_grid(axes, colors: dict[str, str]) -> None:
    """Fine lines behind what is drawn."""
    axes.grid(color=colors["grid"], linewidth=0.6, alpha=0.7)
    axes.set_axisbelow(True)
