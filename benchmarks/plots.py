"""The curves by length: prefill, decode, memory and state, a figure for each size, in PNG and SVG."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from .models import OURS
from .report import peak_bytes, seconds, thousands

STATE = "State: MB by context length"
PANELS = {
    "Prefill: tokens/s by prompt length": ("read", lambda n, a: n / median(seconds(a))),
    "Decode: tokens/s by context length": ("decode", lambda n, a: a[0]["tokens"] / median(seconds(a))),
    "Peak memory while reading: MB by prompt length": ("read", lambda n, a: peak_bytes(a) / 1e6),
    STATE: ("decode", lambda n, a: a[0]["state_bytes"] / 1e6),
}


def write(results: dict, folder: Path) -> None:
    """A figure for each comparison that has curves."""
    for result in results["comparisons"]:
        if len({n for lengths in result["read"].values() for n in lengths}) > 1:
            figure = draw(result)
            for suffix in ("png", "svg"):
                figure.savefig(folder / f"{result['title'].split(',')[0]}.{suffix}", dpi=120)
            plt.close(figure)


def draw(result: dict) -> plt.Figure:
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    for axis, (title, (what, value)) in zip(axes.flat, PANELS.items(), strict=True):
        for name, lengths in result[what].items():
            x = sorted(map(int, lengths))
            style = {"linewidth": 2.5} if name in OURS else {"linewidth": 1.2, "linestyle": "--"}
            axis.plot(x, [value(n, lengths[str(n)]) for n in x], marker="o", markersize=4, label=name, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xscale("log", base=2)
        ticks = sorted({int(n) for lengths in result[what].values() for n in lengths})
        axis.set_xticks(ticks, map(thousands, ticks))
        axis.spines[["top", "right"]].set_visible(False)
        if title == STATE:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
        else:
            axis.set_ylim(bottom=0)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.suptitle(result["title"])
    return figure
