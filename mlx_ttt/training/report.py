"""What a training says of itself: its log, the line that moves, the picture at the end."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import OutputError, TrainingError

Entry = dict[str, Any]


class Log:
    """`log.jsonl`: a line of JSON for each step ("loss", "lr", …) and each evaluation ("held_out", "bands")."""

    def __init__(self, file: Path):
        self.file = file

    def append(self, entry: Entry) -> None:
        """Raises OutputError where it cannot be written."""
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise OutputError(f"{self.file}: cannot be written: {error.strerror}") from None

    def entries(self) -> list[Entry]:
        """All entries. A line that a killed process left half-written is none."""
        found = []
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def go_back(self, step: int, evaluated: int) -> None:
        """Drop the steps after `step` and the evaluations after `evaluated`: they will come again."""
        kept = [e for e in self.entries() if e["step"] <= (evaluated if "held_out" in e else step)]
        partial = self.file.with_name(f".{self.file.name}.partial")
        partial.write_text("".join(json.dumps(e) + "\n" for e in kept), encoding="utf-8")
        os.replace(partial, self.file)


class Clock:
    """How fast the training is since this process started, without what it spends on evaluation and saving."""

    def __init__(self) -> None:
        self.seconds, self.tokens = 0.0, 0
        self.start()

    def start(self) -> None:
        self._since = time.perf_counter()

    def count(self, tokens: int) -> None:
        """So many tokens are read since the last `start` or `count`."""
        now = time.perf_counter()
        self.seconds, self.tokens, self._since = self.seconds + now - self._since, self.tokens + tokens, now

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0


def duration(seconds: float) -> str:
    """Seconds as a person says them: 40 s, 12 min, 3 h 20 min, 5 d 4 h."""
    if not math.isfinite(seconds):
        return "?"
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 100:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def plot(entries: Iterable[Entry], file: Path) -> None:
    """Draw the loss by step, and the held-out loss by position: at the start, at its best, and at the end.

    Raises:
        TrainingError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise TrainingError(f"{file}: not drawn, since matplotlib is missing: pip install 'mlx-ttt[bench]'") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    del matplotlib
    entries = list(entries)
    steps = [e for e in entries if e.get("loss") is not None]
    evaluations = [e for e in entries if "held_out" in e]
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    by_step, by_position = figure.subplots(1, 2)
    by_step.plot([e["step"] for e in steps], [e["loss"] for e in steps], linewidth=1, label="training")
    if evaluations:
        x, y = [e["step"] for e in evaluations], [e["held_out"] for e in evaluations]
        by_step.plot(x, y, marker="o", markersize=4, label="held out")
    by_step.set(title="Loss by step", xlabel="step", ylabel="nats per token")
    by_step.xaxis.get_major_locator().set_params(integer=True)
    by_step.legend(frameon=False)
    for label, entry in _chosen(evaluations).items():
        bands = entry["bands"]
        x = [(b["start"] + b["stop"]) / 2 for b in bands]
        errors = [b["half_width"] or 0 for b in bands]
        label = f"{label}: step {entry['step']}"
        by_position.errorbar(x, [b["mean"] for b in bands], errors, marker="o", markersize=4, capsize=3, label=label)
    by_position.set(title="Held-out loss by position", xlabel="tokens read before", ylabel="nats per token")
    if evaluations:
        by_position.legend(frameon=False)
    for axis in (by_step, by_position):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120, format="png")


def _chosen(evaluations: list[Entry]) -> dict[str, Entry]:
    """The evaluations to compare. One that is two of them is shown once."""
    if not evaluations:
        return {}
    best = min(evaluations, key=lambda e: e["held_out"])
    chosen = {"start": evaluations[0], "best": best, "end": evaluations[-1]}
    return {label: e for label, e in chosen.items() if label == "end" or e is not chosen["end"]}
