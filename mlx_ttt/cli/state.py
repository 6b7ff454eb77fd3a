"""state: what saved states have learned, and new ones made of them."""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import StateError, TTTError
from ..files import output_file
from .command import CONTEXT, Command, Group, Named, Rows, model_options, show_table

if TYPE_CHECKING:
    from ..learning.states import Distance
    from ..network.model import Model
    from ..text.state import TextState

_BAR = 20  # characters of the longest
_DIGITS = 16  # shown of a fingerprint

_output = click.option("--output", "-o", "out", required=True, metavar="FILE", help="Where the new state is saved.")
_json = click.option("--json", "as_json", is_flag=True, help="Write JSON, with the figures of each head.")
_layers = click.option("--layers", metavar="LIST", help="Of these layers only, such as 4-7 or 0,2; all by default.")
_heads = click.option("--heads", metavar="LIST", help="Of these heads only; all by default.")


@click.group(cls=Group, context_settings=CONTEXT)
def state() -> None:
    """Look at saved states, compare them, and make new ones of them.

    Layers and heads are counted from 0.
    """


_command = functools.partial(state.command, cls=Command, context_settings=CONTEXT)


# ---- Looking at states -----------------------------------------------------------------------------------------------


@_command()
@click.argument("file")
@model_options
@_json
def show(file: str, model: Named, as_json: bool) -> None:
    """Show what a state has learned.

    That is how far its weights have come from the start of the text, by layer, also as a part of the start weights.
    """
    from ..learning.states import drift

    network, tokenizer, (text,) = _opened(model, file)
    found, made_by = drift(network, text), _fingerprint(network, tokenizer)
    facts = {
        "file": file,
        "tokens": len(text),
        "learning": text.learning,
        "rewindable": text.cache[0].is_trimmable(),
        "bytes": Path(file).stat().st_size,
        "fingerprint": made_by,
    }
    if as_json:
        click.echo(json.dumps({**facts, "layers": list(_figures(found, "drift"))}))
        return
    click.echo(f"{file}: {_sizes(text)}, for {_name(network)}, fingerprint {made_by[:_DIGITS]}")
    click.echo()
    show_table(_drift_table(found))


@_command()
@click.argument("a")
@click.argument("b")
@model_options
@_json
def diff(a: str, b: str, model: Named, as_json: bool) -> None:
    """Show how far two states are apart.

    That is the distance of their weights, by layer, beside how far each of them has come from the start of its text.
    """
    from ..learning.states import distance, drift

    network, tokenizer, texts = _opened(model, a, b)
    found, (drift_a, drift_b) = distance(network, *texts), (drift(network, text) for text in texts)
    if as_json:
        layers = [_figures(*which) for which in ((found, "distance"), (drift_a, "drift_a"), (drift_b, "drift_b"))]
        facts = {"a": a, "b": b, "tokens": list(map(len, texts)), "fingerprint": _fingerprint(network, tokenizer)}
        click.echo(json.dumps({**facts, "layers": [{**x, **y, **z} for x, y, z in zip(*layers, strict=True)]}))
        return
    for file, text in zip((a, b), texts, strict=True):
        click.echo(f"{file}: {_sizes(text)}")
    click.echo()
    show_table(_distance_table(found, drift_a, drift_b))


def _drift_table(found: Distance) -> Rows:
    """A row for each layer: its drift, also as a part of the start weights, and the head that has come furthest."""
    layers, bar = found.of_layers(), _bars(found)
    yield "layer", "drift", "relative", "furthest head", ""
    for i, (heads, relative) in enumerate(zip(_sequence(found.relative), _sequence(layers.relative), strict=True)):
        furthest = max(range(len(heads)), key=lambda h: heads[h])
        frobenius = _sequence(layers.frobenius)[i]
        yield f"{i}", f"{frobenius:#.3g}", _percent(relative), f"{furthest}: {_percent(heads[furthest])}", bar(relative)


def _distance_table(found: Distance, drift_a: Distance, drift_b: Distance) -> Rows:
    """A row for each layer: the distance, and the drift of both states."""
    bar, frobenius = _bars(found), _sequence(found.of_layers().frobenius)
    parts = [_sequence(x.of_layers().relative) for x in (found, drift_a, drift_b)]
    yield "layer", "distance", "relative", "drift of A", "drift of B", ""
    for i, (apart, a, b) in enumerate(zip(*parts, strict=True)):
        yield f"{i}", f"{frobenius[i]:#.3g}", _percent(apart), _percent(a), _percent(b), bar(apart)


def _bars(found: Distance) -> Callable[[float], str]:
    """What draws a layer's relative distance as a bar; the largest fills the width."""
    largest = max((x for x in _sequence(found.of_layers().relative) if math.isfinite(x)), default=0)

    def bar(value: float) -> str:
        length = round(_BAR * value / largest) if math.isfinite(value) and largest else 0
        return ("#" * length).ljust(_BAR)

    return bar


def _percent(part: float) -> str:
    return f"{100 * part:.1f} %"


def _figures(found: Distance, name: str) -> Iterator[dict[str, Any]]:
    """For JSON: a layer's distance, and that of each of its heads; relative to the start weights, too."""
    whole = found.of_layers()
    for i, heads in enumerate(_sequence(found.frobenius)):
        yield {
            "layer": i,
            name: _figure(_sequence(whole.frobenius)[i]),
            f"{name}_relative": _figure(_sequence(whole.relative)[i]),
            f"{name}_heads": list(map(_figure, heads)),
            f"{name}_heads_relative": list(map(_figure, _sequence(found.relative)[i])),
        }


def _figure(x: float) -> float | None:
    """JSON has no NaN."""
    return x if math.isfinite(x) else None


def _sequence(x: Any) -> list[Any]:
    """The only sequence of a state, from [layers, 1, ...]."""
    return x[:, 0].tolist()


def _sizes(text: TextState) -> str:
    learning = "" if text.learning == 1 else f", learning {text.learning:g}" if text.learning else ", frozen"
    return f"{len(text)} tokens, {text.nbytes / 1e6:.2f} MB{learning}"


def _name(network: Model) -> str:
    args = network.args
    return f"{args.kind} with {args.num_hidden_layers} layers of {args.num_attention_heads} heads"


def _fingerprint(network: Model, tokenizer: Any) -> str:
    from ..text.state import fingerprint

    return fingerprint(network, tokenizer)


# ---- Making states ---------------------------------------------------------------------------------------------------


@_command()
@click.argument("a")
@click.argument("b")
@click.option("--weight", required=True, type=float, help="Of B: 0 is A, 1 is the text of A with what B has learned.")
@click.option("--extrapolate", is_flag=True, help="Allow a weight below 0 or above 1.")
@_output
@model_options
def blend(a: str, b: str, weight: float, extrapolate: bool, out: str, model: Named) -> None:
    """Mix what two states have learned.

    The new state goes on with the text of A. Its weights are between those of A and those of B.
    """
    from ..learning import states

    if math.isfinite(weight) and not 0 <= weight <= 1 and not extrapolate:
        raise StateError(f"--weight {weight:g}: expected 0 to 1; --extrapolate allows others")
    _make(out, model, (a, b), lambda network, a, b: states.blend(network, a, b, weight, extrapolate=extrapolate))


@_command()
@click.argument("a")
@click.argument("b")
@_layers
@_heads
@_output
@model_options
def swap(a: str, b: str, layers: str | None, heads: str | None, out: str, model: Named) -> None:
    """Take some layers and heads from another state.

    The new state goes on with the text of A. In these layers and heads it has learned what B has learned.
    """
    from ..learning import states

    chosen = _chosen(layers, heads)
    _make(out, model, (a, b), lambda network, a, b: states.swap(network, a, b, **chosen))


@_command()
@click.argument("file")
@_layers
@_heads
@_output
@model_options
def reset(file: str, layers: str | None, heads: str | None, out: str, model: Named) -> None:
    """Take back what some layers and heads have learned.

    The new state goes on with the same text. In these layers and heads, nothing has been learned from it.
    """
    from ..learning import states

    chosen = _chosen(layers, heads)
    _make(out, model, (file,), lambda network, text: states.reset(network, text, **chosen))


@_command()
@click.argument("file")
@click.option("--factor", required=True, type=float, help="0 is nothing learned, 1 what was learned, 2 twice as much.")
@_output
@model_options
def scale(file: str, factor: float, out: str, model: Named) -> None:
    """Weaken or strengthen what was learned.

    The new state goes on with the same text. How far its weights have come from the start is multiplied.
    """
    from ..learning import states

    _make(out, model, (file,), lambda network, text: states.scale(network, text, factor))


@_command()
@click.argument("file")
@_output
@model_options
def freeze(file: str, out: str, model: Named) -> None:
    """Make a state that learns nothing more.

    The new state goes on with the same text, with all that was learned from it.
    """
    from ..learning import states

    _make(out, model, (file,), states.freeze)


def _make(out: str, model: Named, files: tuple[str, ...], operation: Callable[..., TextState]) -> None:
    """Save what an operation makes of the states in some files."""
    from ..text.state import save_state

    output_file(out)  # fails before the model is loaded
    network, tokenizer, texts = _opened(model, *files)
    made = operation(network, *texts)
    _check_finite(made, out)
    save_state(out, made, network, tokenizer)
    click.echo(f"{out}: {_sizes(made)}")


def _check_finite(made: TextState, out: str) -> None:
    import mlx.core as mx

    for i, cache in enumerate(made.cache):
        if not all(mx.isfinite(x).all() for x in (*cache.weights, cache.rows)):
            raise StateError(f"{out}: not saved, since layer {i} would not be finite; `state reset` can make it new")


def _opened(model: Named, *files: str) -> tuple[Model, Any, list[TextState]]:
    """The model, its tokenizer, and the states in some files."""
    from ..loading import load
    from ..text.state import load_state

    network, tokenizer = load(model.directory())
    return network, tokenizer, [load_state(file, network, tokenizer) for file in files]


def _chosen(layers: str | None, heads: str | None) -> dict[str, Any]:
    """Both as the library takes them."""
    return {"layers": _numbers("--layers", layers), "heads": _numbers("--heads", heads)}


def _numbers(option: str, text: str | None) -> Iterator[int] | None:
    """The numbers of a list such as 0,2 or 4-7."""
    if text is None:
        return None
    ranges = []
    for part in text.split(","):
        numbers = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part)
        first, last = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (1, 0)
        if first > last:
            raise TTTError(f"{option} {text}: expected numbers such as 0,2 or 4-7")
        ranges.append(range(first, last + 1))
    return itertools.chain(*ranges)
