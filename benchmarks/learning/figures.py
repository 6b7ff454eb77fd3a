"""One function for each figure: what is read, the drawing, and the same numbers as a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from mlx_ttt.learning import states
from mlx_ttt.training.evaluate import BLOCK, Band, losses

from ..report import table
from .reading import Place, Reader, Text
from .style import BLUE, CAPTION, COLOURS, PAPER, RED, SOFT, apart, figure, label, plt

Drawn = tuple[plt.Figure, str]  # with a table in Markdown
Curve = tuple[np.ndarray, np.ndarray, np.ndarray]  # positions, means, half widths of their intervals
SIZE = 2048  # tokens of a point of a curve
RESETS = (2048, 512, 128)
SCALES = (0.0, 0.5, 1.0, 1.5, 2.0)
WEIGHTS = (-0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
LONG, MIDDLE, SHORT = 16384, 16384, 8192  # tokens of a text, where it is not read to its end
COMMON = 50  # words

# ---- While it reads --------------------------------------------------------------------------------------------------


def carried(readers: Sequence[Reader], files: Sequence[str]) -> Drawn:
    """One text, with the state carried from its beginning to its end, or forgotten every so many tokens."""
    reader, text = readers[0], readers[0].text(files[0])
    ways = {"carried": losses(reader.model, text.ids)}
    ways |= {f"forgotten every {n:,} tokens": losses(reader.model, text.ids, reset=n) for n in RESETS}
    means = {name: text.bits_per_byte(nats)[0].mean for name, nats in ways.items()}
    first, *_, last = list(ways)[1:]
    drawn, (axis,) = figure(1, 1, 3.4)
    curves = {name: points(text.bits_per_byte(ways[name], 2 * SIZE)) for name in (first, last, "carried")}
    ends = apart(np.array([y[-3:].mean() for _, y, _ in curves.values()]), 0.065)
    for (name, (x, y, _)), end, colour in zip(curves.items(), ends, (SOFT, RED, BLUE), strict=True):
        axis.plot(x, y, color=colour, linewidth=2.4 if name == "carried" else 1.6)
        label(axis, len(text) / 1000, end, f"{name.replace(' tokens', '')}\n{means[name]:.3f}", colour)
    axis.fill_between(x, y, curves[last][1], color=BLUE, alpha=0.12, linewidth=0)
    axis.set_xlim(0, len(text) / 1000)
    axis.set_xlabel("thousands of tokens read")
    axis.set_title("bits per byte of the text (less is better), with the state …", color=SOFT)
    rows = [[name, f"{mean:.3f}", change(text, ways[name] - ways["carried"])] for name, mean in means.items()]
    return drawn, table([f"{text.name}, {reader.name}", "bits per byte", "more than carried"], rows)


def play(readers: Sequence[Reader], files: Sequence[str]) -> Drawn:
    """Learning rates, write norms and drift of each layer over a text."""
    reader, text = readers[0], readers[0].text(files[0])
    place, (lr, write_norm, drift) = reader.start(), ([], [], [])
    for a in range(0, len(text) - BLOCK + 1, BLOCK):
        seen = reader.observe(text.ids[a + 1 : a + 1 + BLOCK], place)
        lr.append(np.array(seen.lr)[:, 0].mean(-1))
        write_norm.append(np.array(seen.write_norm)[:, 0].mean(-1))
        drift.append(np.array(states.drift(reader.model, place.cache).of_layers().relative)[:, 0])
    largest = reader.model.layers[0].seq_modeling_block.base_lr
    panels = {
        "learning rate, % of the largest possible": 100 * np.array(lr) / largest,
        "write norm: what one token adds to the weights of a layer": np.array(write_norm),
        "drift, % of the norm of the start weights": 100 * np.array(drift),
    }
    drawn, axes = figure(3, 1, 6.2, sharex=True)
    x = (np.arange(len(lr)) + 0.5) * BLOCK / 1000
    rows = []
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        ends = apart(values[-8:].mean(0), 0.09 * values.max())
        for layer, y in enumerate(values.T):
            colour = COLOURS[layer % len(COLOURS)]
            axis.plot(x, y, color=colour, linewidth=1.4)
            label(axis, x[-1], ends[layer], f"layer {layer}", colour)
            rows.append([name, str(layer), *(f"{v:.3g}" for v in (y[:8].mean(), y[-8:].mean(), y.min(), y.max()))])
        axis.set_title(name)
        axis.set_ylim(bottom=0)
        for at in act_starts(text).values():
            axis.axvline(at / 1000, color=SOFT, linewidth=0.8, linestyle=(0, (1, 3)))
    for name, at in act_starts(text).items():
        at_foot = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "bottom"}
        axes[0].annotate(name, (at / 1000, 0), (3, 4), color=SOFT, fontsize=8, **at_foot)
    axes[-1].set_xlabel("thousands of tokens read")
    axes[-1].set_xlim(0, x[-1])
    return drawn, table([text.name, "layer", "first 2 048 tokens", "last 2 048", "least", "largest"], rows)


def act_starts(text: Text) -> dict[str, int]:
    """Where the acts of a play begin, in tokens."""
    ends = np.cumsum(text.sizes)
    acts = re.finditer(rb"^ACT (\d|[IV]+)\b", b"".join(text.pieces), re.MULTILINE)
    return {m[0].decode().capitalize(): int(np.searchsorted(ends, m.start())) for m in acts}


def tokens(readers: Sequence[Reader], files: Sequence[str]) -> Drawn:
    """What is learned from names, rare words, line ends: each kind of token beside the mean of all."""
    reader, text = readers[0], readers[0].text(files[0])
    seen = reader.observe(text.ids[1:], reader.start())
    layers = {name: np.array(getattr(seen, name))[:, 0] for name in ("write_norm", "lr", "loss")}
    values = {name: x / x.mean(-1, keepdims=True) for name, x in layers.items()}  # [layers, T]
    surprisal = np.array(seen.surprisal)[0]
    values["surprisal"] = (surprisal / surprisal.mean())[None]
    kinds = kinds_of_tokens(text)
    found = {kind: np.array(kinds) == kind for kind in KINDS if kind in kinds}
    order = sorted(found, key=lambda kind: values["write_norm"].mean(0)[found[kind]].mean())
    titles = {"write_norm": "write norm", "lr": "learning rate", "loss": "inner loss", "surprisal": "surprisal"}
    drawn, axes = figure(1, 4, 3.3, sharey=True)
    for axis, (name, of_layers) in zip(axes, values.items(), strict=True):
        for y, kind in enumerate(order):
            mean = of_layers[:, found[kind]].mean(-1)
            axis.plot([1, mean.mean()], [y, y], color=BLUE, linewidth=2, solid_capstyle="butt")
            if len(mean) > 1:
                axis.plot(mean, [y] * len(mean), "o", color=SOFT, markersize=3, alpha=0.7)
            axis.plot(mean.mean(), y, "o", color=BLUE, markersize=7, markeredgecolor=PAPER)
        axis.axvline(1, color=SOFT, linewidth=0.8)
        axis.set_title(titles[name])
        axis.xaxis.set_major_formatter("{x:g}×")  # noqa: RUF001
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(order)), order)
    axes[0].set_ylim(-0.6, len(order) - 0.4)
    rows = []
    for kind in reversed(order):
        means = [of_layers.mean(0)[found[kind]].mean() for of_layers in values.values()]
        rows.append([kind, f"{100 * found[kind].mean():.1f} %", *(f"{mean:.2f}" for mean in means)])
    together = [ranked(surprisal, values[name].mean(0)) for name in ("write_norm", "lr", "loss")]
    rows.append(["rank correlation with surprisal", "", *(f"{r:+.2f}" for r in together), ""])
    return drawn, table([text.name, "of all tokens", *titles.values()], rows)


KINDS = (
    "line ends",
    "speakers",
    "names",
    "punctuation",
    f"the {COMMON} commonest words",
    "words seen once or twice",
    "other words",
)


def kinds_of_tokens(text: Text) -> list[str]:
    """One of KINDS for each token."""
    content = b"".join(text.pieces).decode("latin-1")  # a character for each byte
    kind_at = ["punctuation"] * len(content)
    words = Counter(m[0].lower() for m in WORD.finditer(content))
    lower = {m[0] for m in WORD.finditer(content) if m[0].islower()}
    common = {word for word, _ in words.most_common(COMMON)}
    for m in WORD.finditer(content):
        word = m[0].lower()
        kind = "other words"
        if word in common:
            kind = KINDS[4]
        elif word not in lower and m[0][0].isupper():
            kind = "names"
        elif words[word] <= 2:
            kind = "words seen once or twice"
        kind_at[m.start() : m.end()] = [kind] * (m.end() - m.start())
    for m in re.finditer(r"^[A-Z][A-Z ']+\.$", content, re.MULTILINE):
        kind_at[m.start() : m.end()] = ["speakers"] * (m.end() - m.start())
    ends = np.cumsum(text.sizes)
    return ["line ends" if b"\n" in p else kind_at[end - 1] for p, end in zip(text.pieces, ends, strict=True)]


WORD = re.compile(r"[A-Za-z\x80-\xff]+(?:'[A-Za-z]+)*")


def ranked(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation."""
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


# ---- Steered ---------------------------------------------------------------------------------------------------------


def scales(readers: Sequence[Reader], files: Sequence[str]) -> Drawn:
    """The first 16 384 tokens of texts with learning rates times 0, a half, 1, 2, side by side in one batch."""
    drawn, axes = figure(1, len(readers), 3.4, sharey=True)
    rows = []
    for axis, reader in zip(axes, readers, strict=True):
        curves = {}
        for text in (reader.text(file).part(0, LONG) for file in files):
            nats = reader.nats(text, Place.merge([reader.start() for _ in SCALES]), np.array(SCALES))
            found = [text.bits_per_byte(n)[0].mean for n in nats]
            more = [text.bits_per_byte(n - nats[SCALES.index(1)])[0] for n in nats]
            curves[text.name] = np.array(SCALES), *points(more)[1:]
            rows.append([reader.name, text.name, *(f"{v:.3f}" for v in found)])
            rows.append(["", "beside λ = 1", *map(signed, more)])
        intervals(axis, curves, COLOURS)
        axis.axhline(0, color=SOFT, linewidth=0.8)
        axis.set_title(reader.name)
        axis.set_xticks(SCALES, [f"{s:g}" for s in SCALES])
    drawn.supxlabel("learning scale λ", **CAPTION)
    axes[0].set_ylabel("bits per byte more than with λ = 1")
    names(axes[-1], curves, COLOURS)
    return drawn, table(["", "bits per byte at λ =", *(f"{s:g}" for s in SCALES)], rows)


def twice(readers: Sequence[Reader], files: Sequence[str]) -> Drawn:
    """Each text alone, a second time behind itself, and behind the others."""
    reader, texts = readers[0], [readers[0].text(file) for file in files]
    behind = {text.name: Place(*vars(reader.start()).values()) for text in texts}
    alone = {text.name: reader.nats(text, behind[text.name]) for text in texts}
    drawn, axes = figure(1, len(texts), 3.4, sharey=True)
    rows = []
    for axis, text in zip(axes, texts, strict=True):
        curves = {}
        for before in sorted(texts, key=lambda before: before is not text):
            saved = reader.nats(text, behind[before.name].copy()) - alone[text.name]
            said = "behind itself" if before is text else f"behind {before.name}"
            curves[said] = points(text.bits_per_byte(saved, SIZE))
            rows.append([text.name, said, change(text.part(0, SIZE), saved[:SIZE]), change(text, saved)])
        intervals(axis, curves, (BLUE, RED, *COLOURS[2:]))
        axis.axhline(0, color=SOFT, linewidth=0.8)
        axis.set_title(text.name)
        axis.set_xlabel("thousands of tokens read")
    axes[0].set_ylabel("bits per byte more than alone")
    names(axes[-1], {"behind itself": curves["behind itself"], "behind the other": curves[said]}, (BLUE, RED))
    return drawn, table(["text", "read", "its first 2 048 tokens", "the whole text"], rows)


def after(readers: Sequence[Reader], files: Sequence[str]) -> Drawn:
    """The beginning of each text behind the beginning of each other, beside what it costs alone."""
    reader, texts = readers[0], [readers[0].text(file) for file in files]
    places = [reader.start() for _ in texts]
    for text, place in zip(texts, places, strict=True):
        reader.nats(text.part(0, MIDDLE), place)
    together = Place.merge([reader.start(), *places])
    drawn, (axis,) = figure(1, 1, 0.62 * len(texts) + 0.9)
    rows = []
    for row, text in enumerate(texts):
        text = text.part(0, SHORT)
        alone, *behind = reader.nats(text, together.copy())
        rows.append([text.name, *(change(text, nats - alone) for nats in behind)])
        for i, (nats, colour) in enumerate(zip(behind, COLOURS, strict=False)):
            (mean,) = text.bits_per_byte(nats - alone)
            y = row + (i - (len(texts) - 1) / 2) * 0.13
            axis.plot([mean.mean - mean.half_width, mean.mean + mean.half_width], [y, y], color=colour, linewidth=1.4)
            itself = "D" if i == row else "o"
            axis.plot(mean.mean, y, itself, color=colour, markersize=6, label=texts[i].name if row == 0 else None)
    axis.axvline(0, color=SOFT, linewidth=0.8)
    axis.set_yticks(range(len(texts)), [text.name for text in texts])
    axis.set_ylim(len(texts) - 0.5, -0.5)
    axis.set_xlabel("bits per byte more than alone; to the left, what was read before helps")
    drawn.legend(loc="outside upper left", ncols=len(texts), title="read before", alignment="left", fontsize=8)
    return drawn, table(["text / read before it", *(text.name for text in texts)], rows)


def freeze(readers: Sequence[Reader], files: Sequence[str]) -> Drawn:
    """The second half of each text: going on, with what was learned kept but nothing more learned, or without it."""
    reader = readers[0]
    drawn, axes = figure(1, len(files), 3.4, sharey=True)
    rows = []
    for axis, text in zip(axes, map(reader.text, files), strict=True):
        half, place = text.part(len(text) // 2), reader.start()
        reader.nats(text.part(0, len(text) // 2), place)
        frozen = Place(states.freeze(reader.model, place.cache), place.expected)
        emptied = Place(states.reset(reader.model, place.cache), place.expected)
        ways = {
            "goes on": reader.nats(half, place),
            "frozen": reader.nats(half, frozen, learning=0),
            "forgets, learns anew": reader.nats(half, emptied.copy()),
            "forgets, learns nothing": reader.nats(half, emptied, learning=0),
        }
        curves = {name: points(half.bits_per_byte(nats - ways["goes on"], SIZE)) for name, nats in ways.items()}
        intervals(axis, curves, (SOFT, BLUE, COLOURS[2], RED))
        for name, nats in ways.items():
            more, whole = nats - ways["goes on"], half.bits_per_byte(nats)[0].mean
            first = change(half.part(0, SIZE), more[:SIZE])
            rows.append([text.name, name, f"{whole:.3f}", change(half, more), first])
        axis.set_title(text.name)
        axis.set_xlabel("thousands of tokens after the half")
    axes[0].set_ylabel("bits per byte more than if it goes on")
    names(axes[-1], curves, (SOFT, BLUE, COLOURS[2], RED))
    return drawn, table(["second half of", "", "bits per byte", "more than going on", "its first 2 048 tokens"], rows)


def blend(readers: Sequence[Reader], files: Sequence[str]) -> Drawn:
    """The states in the middle of two texts, blended, then the next tokens of both: frozen, and learning."""
    reader, texts = readers[0], [readers[0].text(file) for file in files[:2]]
    places = [reader.start() for _ in texts]
    for text, place in zip(texts, places, strict=True):
        reader.nats(text.part(0, len(text) // 2), place)
    drawn, axes = figure(1, 2, 3.4, sharey=True)
    rows = []
    for axis, learning in zip(axes, (0.0, 1.0), strict=True):
        curves = {}
        for i, text in enumerate(texts):
            own, other = places[i], places[1 - i]
            shares = [1 - w if i else w for w in WEIGHTS]  # of the other text's weights
            blends = [states.blend(reader.model, own.cache, other.cache, w, extrapolate=True) for w in shares]
            rest = text.part(len(text) // 2, len(text) // 2 + SHORT)
            nats = reader.nats(rest, Place.merge([Place(cache, own.expected) for cache in blends]), learning)
            more = [rest.bits_per_byte(n - nats[shares.index(0)])[0] for n in nats]
            curves[text.name] = np.array(WEIGHTS), *points(more)[1:]
            rows.append([text.name, "learning" if learning else "frozen", *(signed(m) for m in more)])
        intervals(axis, curves, (BLUE, RED))
        axis.axhline(0, color=SOFT, linewidth=0.8)
        axis.set_title("goes on learning" if learning else "learns nothing more")
        axis.set_xticks(WEIGHTS, [f"{w:g}" for w in WEIGHTS])
    drawn.supxlabel(f"share of what was learned from {texts[1].name}; the rest from {texts[0].name}", **CAPTION)
    axes[0].set_ylabel("bits per byte beside its own state")
    names(axes[-1], curves, (BLUE, RED))
    return drawn, table(["next tokens of", "", *(f"{w:g}" for w in WEIGHTS)], rows)


# ---- Lines and numbers -----------------------------------------------------------------------------------------------


def intervals(axis: plt.Axes, curves: dict[str, Curve], colours: Sequence[str]) -> None:
    """Lines with their 95 % intervals."""
    for (x, y, half), colour in zip(curves.values(), colours, strict=False):
        axis.plot(x, y, color=colour)
        axis.fill_between(x, y - half, y + half, color=colour, alpha=0.15, linewidth=0)


def names(axis: plt.Axes, curves: dict[str, Curve], colours: Sequence[str]) -> None:
    """The names of lines, behind their ends."""
    low, high = axis.get_ylim()
    ends = apart(np.array([y[-1] for _, y, _ in curves.values()]), 0.055 * (high - low))
    for (name, (x, _, _)), end, colour in zip(curves.items(), ends, colours, strict=False):
        label(axis, x[-1], end, name, colour)


def points(bands: Sequence[Band]) -> Curve:
    """Positions in thousands of tokens, means and half widths of the intervals."""
    x = [(band.start + band.stop) / 2000 for band in bands]
    return np.array(x), np.array([band.mean for band in bands]), np.array([band.half_width for band in bands])


def change(text: Text, nats: np.ndarray) -> str:
    """A paired difference over a text, in bits per byte, with its interval."""
    return signed(text.bits_per_byte(nats)[0])


def signed(band: Band) -> str:
    return f"{band.mean:+.3f} ± {band.half_width:.3f}".replace("-", "\N{MINUS SIGN}")


FIGURES = {f.__name__: f for f in (carried, play, tokens, scales, twice, after, freeze, blend)}
