"""perplexity: how well a model predicts a text, carried or reset; without a text, mlx-lm's own command."""

from __future__ import annotations

import importlib.util
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import OutputError, TTTError
from ..files import output_file, written_whole
from .command import CONTEXT, Command, Named, Progress, Rows, model_options, show_table, text_of
from .mlx_lm import MLXLM

if TYPE_CHECKING:
    import numpy as np

    from ..network.model import Model
    from ..training.evaluate import Band
    from ..training.needle import Recall

Sizes = Callable[[int, int], int]  # the bytes of the text that the predictions [a, b) are of

_CURVE = 32  # points of a curve in the figure


class Perplexity(Command):
    """Our command where one of our options is given, else mlx-lm's, which measures on a data set of the Hub."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ours = [name for p in self.params if p.name != "model" for name in p.opts]
        if not args or args[0] in ("-h", "--help") or any(arg.split("=")[0] in ours for arg in args):
            return super().parse_args(ctx, args)
        ctx.args = args
        ctx.meta["mlx_lm"] = True
        return args

    def invoke(self, ctx: click.Context) -> Any:
        if ctx.meta.get("mlx_lm"):
            return MLXLM("perplexity", "perplexity", "").invoke(ctx)
        return super().invoke(ctx)


@click.command(cls=Perplexity, context_settings=CONTEXT)
@model_options
@click.option("--text", metavar="FILE", help="The text, in UTF-8.")
@click.option(
    "--reset",
    multiple=True,
    type=click.IntRange(1),
    metavar="N",
    help="Also read the text with the state reset every N tokens, and compare; can be given several times.",
)
@click.option("--by-position", is_flag=True, help="Show what tokens cost by their position in the text.")
@click.option("--plot", metavar="PNG", help="Draw that as a figure.")
@click.option("--needle", is_flag=True, help="Put a made-up name and number into the text, and ask for it later.")
def perplexity(
    model: Named, text: str | None, reset: tuple[int, ...], by_position: bool, plot: str | None, needle: bool
) -> None:
    """Measure how well a model predicts a text that it reads in one pass.

    Intervals of 95 % are of means of blocks of tokens, and of the paired difference for two ways of reading the text.

    \b
    mlx-ttt perplexity --text book.txt --reset 2048 --reset 512 --by-position
    mlx-ttt perplexity --model DIR --text book.txt --needle

    Without --text, this is mlx-lm's command, which measures on a data set: `mlx-ttt perplexity --model DIR --data-path
    NAME`. It needs the package `datasets`. It also has --batch-size, --sequence-length, --num-samples and --seed.
    """
    if text is None:
        raise TTTError("no text: give --text FILE (or --data-path NAME alone, for mlx-lm's command)")
    content = text_of(text, f"--text {text}")
    if plot is not None:
        _check_plot(plot)

    from ..loading import load
    from ..text.tokenizer import encode_long
    from ..training.needle import DISTANCES, needle_test

    network, tokenizer = load(model.directory())
    ids = encode_long(tokenizer, content)
    if len(ids) < 2:
        raise TTTError(f"{text}: too short: it has {len(ids)} tokens, and the first one is not predicted")
    if needle and len(ids) < 2 * DISTANCES[0]:
        raise TTTError(f"{text}: too short for --needle: it has {len(ids)} tokens, the test needs {2 * DISTANCES[0]}")
    sizes = _byte_counter(tokenizer, ids, len(content.encode()))
    ways = [_Way.of(network, ids, n) for n in (None, *dict.fromkeys(reset))]
    click.echo(f"{text}: {sizes(0, len(ids) - 1)} bytes, {len(ids) - 1} tokens, read in one pass")
    click.echo()
    show_table(_totals(ways, sizes))
    if by_position:
        for unit in ("token", "byte"):
            click.echo()
            show_table(_table(ways, unit, sizes))
    if plot is not None:
        _draw(ways, plot, Path(text).name)
    if needle:
        with Progress("needle test") as progress:
            recalls = needle_test(network, tokenizer, ids, progress=progress)
        click.echo()
        show_table(_recalls(recalls))


@dataclass(frozen=True)
class _Way:
    """One way of reading a text, and what each token cost: nats [T]."""

    name: str
    nats: np.ndarray

    @classmethod
    def of(cls, model: Model, ids: np.ndarray, reset: int | None) -> _Way:
        import numpy as np

        from ..training.evaluate import losses

        name = "carried" if reset is None else f"reset {reset}"
        with Progress(name, at_least=4096) as progress:
            nats = losses(model, ids, reset, progress=progress)
        bad = np.flatnonzero(~np.isfinite(nats))
        if bad.size:
            raise TTTError(f"the loss of token {bad[0]} ({name}) is {nats[bad[0]]}: the model's weights are damaged")
        return cls(name, nats)

    def less(self, other: _Way) -> np.ndarray:
        return self.nats - other.nats


def _byte_counter(tokenizer: Any, ids: np.ndarray, total: int) -> Sizes:
    """Sizes of a text's parts. That of all predictions is exact; a part's can be a few bytes off at its ends.

    Args:
        total: the size of the text. If it has no BOS in front, its first token is not predicted.
    """

    def count(start: int, stop: int) -> int:
        return len(tokenizer.decode(ids[start:stop].tolist(), skip_special_tokens=True).encode())

    whole = total - (count(0, 1) if ids[0] not in tokenizer.all_special_ids else 0)
    return lambda a, b: whole if (a, b) == (0, len(ids) - 1) else max(count(a + 1, b + 1), 1)


def _totals(ways: Sequence[_Way], sizes: Sizes) -> Rows:
    """A row for each way of reading the whole text, and for each paired difference."""
    from ..training.evaluate import by_position

    T = len(ways[0].nats)
    per_byte = T / sizes(0, T)
    yield "", "bits per byte", "bits per token", "perplexity"
    for way in ways:
        (band,) = by_position(way.nats, [(0, None)])
        yield way.name, _bits(band, per_byte, 4), _bits(band, 1, 3), f"{math.exp(band.mean):.2f}"
    for way in ways[1:]:
        (band,) = by_position(ways[0].less(way), [(0, None)])
        yield f"carried - {way.name}", _bits(band, per_byte, 4, "+"), _bits(band, 1, 3, "+"), ""


def _table(ways: Sequence[_Way], unit: str, sizes: Sizes) -> Rows:
    """A row for each band of positions: each way of reading, then the paired differences, in bits per `unit`."""
    from ..training.evaluate import by_position

    yield f"bits per {unit}", *(way.name for way in ways), *(f"carried - {way.name}" for way in ways[1:])
    columns = [(by_position(way.nats), "") for way in ways]
    columns += [(by_position(ways[0].less(way)), "+") for way in ways[1:]]
    for i, band in enumerate(columns[0][0]):
        per_unit = (band.stop - band.start) / sizes(band.start, band.stop) if unit == "byte" else 1
        yield f"{band.start}-{band.stop}", *(_bits(bands[i], per_unit, 3, sign) for bands, sign in columns)


def _bits(band: Band, per_unit: float, digits: int, sign: str = "") -> str:
    mean, half = (value * per_unit / math.log(2) for value in (band.mean, band.half_width))
    return f"{mean:{sign}.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def _recalls(recalls: Sequence[Recall]) -> Rows:
    """A row for each distance: what the name and the number gain, in bits, and by how much that multiplies."""
    yield "needle, tokens back", "name, bits", "number, bits", "times as probable", "another number, bits"
    for recall in recalls:
        name, number, other = (
            f"{gain.mean / math.log(2):+.2f} ± {gain.half_width / math.log(2):.2f}"
            for gain in (recall.name, recall.number, recall.other)
        )
        yield f"{recall.distance}", name, number, f"{math.exp(recall.number.mean):.3g}", other


def _check_plot(plot: str) -> None:
    """Find out before an hour of reading whether the figure can be written."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TTTError("--plot needs matplotlib: pip install matplotlib")
    if Path(plot).suffix.lower() != ".png":
        raise OutputError(f"--plot {plot}: the name must end in .png")
    output_file(plot)


def _draw(ways: Sequence[_Way], plot: str, title: str) -> None:
    """A PNG: bits per token by position; below, the paired differences with their intervals, if there are any."""
    import matplotlib
    import numpy as np

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from ..training.evaluate import by_position

    T = len(ways[0].nats)
    edges = np.linspace(0, T, min(_CURVE, T) + 1).astype(int).tolist()
    bands = list(itertools.pairwise(edges))
    figure, axes = plt.subplots(2 if ways[1:] else 1, squeeze=False, sharex=True, figsize=(8, 6), layout="constrained")
    lines = [(axes[0, 0], way.name, way.nats) for way in ways]
    lines += [(axes[1, 0], f"carried - {way.name}", ways[0].less(way)) for way in ways[1:]]
    for axis, name, values in lines:
        found = by_position(values, bands)
        x = [(band.start + band.stop) / 2 for band in found]
        mean, half = (np.array([getattr(b, field) for b in found]) / math.log(2) for field in ("mean", "half_width"))
        axis.plot(x, mean, label=name)
        if axis is not axes[0, 0]:
            axis.fill_between(x, mean - half, mean + half, alpha=0.2)
    for axis in axes[1:, 0]:
        axis.axhline(0, color="black", linewidth=0.5)
    for axis in axes[:, 0]:
        axis.set_ylabel("bits per token")
        axis.legend()
    axes[0, 0].set_title(title)
    axes[-1, 0].set_xlabel("position in the text, tokens")
    with written_whole(Path(plot), ".png") as complete:
        figure.savefig(complete, dpi=120)
    plt.close(figure)
