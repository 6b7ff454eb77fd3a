"""How the figures look: on white paper or, where the reader's screen is dark, on black; one file for both."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PAPER, INK, SOFT, GRID = "#ffffff", "#1f2a37", "#66717f", "#dfe3e8"
BLUE, RED, GREEN, PURPLE, YELLOW = "#1d6fb8", "#c2512f", "#3f8a4d", "#7d57b2", "#a87b00"
COLOURS = (BLUE, RED, GREEN, PURPLE, YELLOW)
DARK = {  # of each colour on a dark screen
    PAPER: "#0f141a",
    INK: "#e6eaef",
    SOFT: "#9aa5b1",
    GRID: "#2b333d",
    BLUE: "#62aef2",
    RED: "#f08a63",
    GREEN: "#74c47f",
    PURPLE: "#b795ea",
    YELLOW: "#d9ae3c",
}
CAPTION = {"fontsize": 9, "color": SOFT}
WIDTH = 7.6  # inches: as wide as a page of documentation

plt.rcParams.update(
    {
        "font.family": "sans-serif",
        "font.sans-serif": ["Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
        "font.size": 9,
        "figure.facecolor": PAPER,
        "axes.facecolor": PAPER,
        "savefig.facecolor": PAPER,
        "text.color": INK,
        "axes.labelcolor": SOFT,
        "axes.edgecolor": GRID,
        "axes.titlecolor": INK,
        "axes.titlesize": 9.5,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "axes.axisbelow": True,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "xtick.labelcolor": SOFT,
        "ytick.labelcolor": SOFT,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "mlx_ttt",
    }
)
matplotlib.set_loglevel("error")  # of fonts that this machine lacks


def figure(rows: int, columns: int, height: float, **options) -> tuple[plt.Figure, list[plt.Axes]]:
    drawn, axes = plt.subplots(rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options)
    drawn.get_layout_engine().set(w_pad=0.1, h_pad=0.08, wspace=0.04)
    return drawn, list(axes.flat)


def label(axis: plt.Axes, x: float, y: float, text: str, colour: str) -> None:
    """A word behind the end of a line, in its colour."""
    bold = {"va": "center", "fontweight": "bold", "color": colour}
    axis.annotate(text, (x, y), xytext=(5, 0), textcoords="offset points", **bold)


def save(drawn: plt.Figure, file: Path) -> None:
    """An SVG that follows the reader's colour scheme, or a PNG on white."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".svg":
        drawn.savefig(file, metadata={"Date": None, "Creator": None})
        file.write_text(_for_both_screens(file.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        drawn.savefig(file, dpi=150)
    plt.close(drawn)


def _for_both_screens(svg: str) -> str:
    """Each colour has another one on a dark screen, whatever is drawn in it. Only browsers know of that."""
    rules = [
        f'[style*="{what}: {light}"]{{{what}:{dark}!important}}'
        for light, dark in DARK.items()
        for what in ("fill", "stroke")
    ]
    style = "<style>@media (prefers-color-scheme: dark){" + "".join(rules) + "}</style>"
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r"(<svg[^>]*>)", lambda m: m[1] + style, svg, count=1)


def apart(values: np.ndarray, least: float) -> np.ndarray:
    """The values, moved so that words beside them do not lie on each other."""
    moved, order = np.array(values, float), np.argsort(values)
    for a, b in itertools.pairwise(order):
        moved[b] = max(moved[b], moved[a] + least)
    return moved
