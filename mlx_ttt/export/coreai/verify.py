"""How far a bundle is from its model, function by function, on Apple's runtime."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import CheckpointError
from ...loading import load_model
from ...network.model import Model
from ...text.state import fingerprint
from ..errors import first_line
from ..functions import SIGNALS
from ..layout import StateLayout
from ..metadata import learning_of
from ..numbers import COMPUTE
from ..verify import invented_text, log_softmax, observed, signals_error, uneven_scale
from ..weights import Joined, joined, matrix
from .bundle import read_bundle
from .child import ChildRuntime
from .formats import as_stored, table_format
from .program import ALL, outside
from .runner_main import MAIN
from .runtime import Main, Runs, start_session
from .state import apart, packed

TOKENS = {"float32": 4096, "mixed": 192, "float16": 192}  # on Linux, half precision is a hundred times as slow
_GREEDY = 64  # tokens of the text that each writes
_CHUNK = 512  # tokens of a call of the model
_APART = "decode and prefill"


@dataclass(frozen=True)
class Bound:
    """What a function may differ by.

    Attributes:
        logits: of the largest absolute logit.
        state: of the largest absolute number in the state.
        reason: where the difference comes from.
    """

    logits: float
    state: float
    reason: str


# Five and three times what was measured: 0.9 % of the logits and 0.6 % of the state, small models, 64 to 192 tokens.
_MIXED = Bound(0.05, 0.02, "activations and products in float16; on Linux sums, too")
_HALF = Bound(0.05, 0.02, "all in float16, also what is learned; on Linux sums, too")

# In all rows the model's matrices hold the numbers that the bundle stores, so the bounds do not depend on the format.
BOUNDS = {
    ("float32", _APART): Bound(1e-4, 1e-4, "the order of sums in float32"),
    ("float32", MAIN): Bound(6e-4, 1e-5, "logits leave in float16, which alone costs up to 4.9e-4"),
    ("mixed", _APART): _MIXED,
    ("mixed", MAIN): _MIXED,
    ("float16", _APART): _HALF,
    ("float16", MAIN): _HALF,
}


@dataclass(frozen=True)
class Row:
    """One way of running a bundle beside the model with the same weights.

    Attributes:
        what: the functions, and how they were called.
        tokens: how many were read.
        logits: largest difference, of the largest absolute logit.
        state: the same of the state after the text.
        bits: per token, of the bundle and of the model.
        greedy: at which token the bundle's greedy text parts from the model's; None if it does not.
        signals: largest difference, of the largest of each kind; None: the functions give none.
        bound: what is allowed.
    """

    what: str
    tokens: int
    logits: float
    state: float
    bits: tuple[float, float]
    greedy: int | None
    signals: float | None
    bound: Bound

    @property
    def holds(self) -> bool:
        signals = self.signals is None or self.signals <= max(self.bound.logits, self.bound.state)
        return self.logits <= self.bound.logits and self.state <= self.bound.state and signals


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        rows: of the comparison.
        bits: per token, of the model as it is, and of the model with the weights that the bundle stores.
        weights, compute: of the bundle.
        kernels: the name of its program with kernels, which is not run; None: it has none.
    """

    rows: list[Row]
    bits: tuple[float, float]
    weights: str
    compute: str
    kernels: str | None = None


def verify(
    path: Path,
    model_dir: Path,
    *,
    tokens: int | None = None,
    ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Read a text with the bundle, in odd splits, and with the model, whose matrices hold what the bundle stores.

    Args:
        path: a bundle, or the .aimodel in it.
        model_dir: the model that it was exported from.
        tokens: how many to read; by default TOKENS of its number types.
        ids: the text; by default the model makes one up.
        progress: called with the tokens read so far and in all.

    Raises:
        CheckpointError: one of them cannot be read, the bundle was made of another model, its functions are not those
            of ours, or the runtime refuses it.
    """
    bundle = read_bundle(path)
    model, _ = load_model(model_dir)
    if bundle.facts["model"] != fingerprint(model):
        raise CheckpointError(f"{path}: was exported from another model than {model_dir}")
    tokens = max(tokens or TOKENS[bundle.facts["compute"]], 4 * model.args.mini_batch_size)
    text = list(ids) if ids is not None else invented_text(model, tokens)
    own = _bits(_read(model, text)[0], range(len(text)), text)
    store(model, bundle.facts["weights"], bundle.facts["compute"])
    expected = _Expected(model, text)
    scaled = _Expected(model, text, uneven_scale(model)) if "learning" in bundle.facts else None
    try:
        with ChildRuntime(bundle.asset) as runtime:
            if set(runtime.names) != set(ALL):
                raise CheckpointError(
                    f"{bundle.asset}: has the functions {', '.join(runtime.names)}, not {', '.join(ALL)}"
                )
            ways = [(way, expected) for way in _ways(runtime, expected.layout, bundle.facts)]
            if scaled is not None:
                ways.append((_apart(runtime, scaled.layout, bundle.facts, scaled.learning), scaled))
            total, rows = len(ways) * len(text), []
            for i, (way, wanted) in enumerate(ways):

                def done(read: int, before: int = i * len(text)) -> None:
                    progress(before + read, total)

                rows.append(_row(way, wanted, bundle.facts["compute"], done))
    except RuntimeError as error:
        raise CheckpointError(f"{bundle.asset}: Core AI's runtime refuses it: {first_line(error)}") from None
    kernels = bundle.facts["kernels"]["asset"] if "kernels" in bundle.facts else None
    return Verified(rows, (own, expected.bits), bundle.facts["weights"], bundle.facts["compute"], kernels)


def store(model: Model, weights: str, compute: str) -> None:
    """Give a model's matrices the numbers that a bundle of this format stores, joined as they are in the bundle: what
    shares a block or a table depends on it.
    """
    number, args = COMPUTE[compute][0], model.args
    for block in model.layers:
        for part in joined(block, args).values():
            part.replace(as_stored(part.matrix.astype(number), weights))
    table = as_stored(matrix(model.model.embed_tokens).astype(number), table_format(weights))
    model.model.embed_tokens = nn.Embedding(*table.shape)
    model.model.embed_tokens.weight = mx.array(table)
    if not args.tie_word_embeddings:
        head = Joined(model, ("lm_head",))
        head.replace(as_stored(head.matrix.astype(number), weights))


def _read(
    model: Model, ids: Sequence[int], learning: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray], list]:
    """Logits [n, V], the signals [layers, H, n], and the caches after them."""
    cache, logits, signals = model.make_cache(), list[np.ndarray](), list[dict[str, np.ndarray]]()
    for start in range(0, len(ids), _CHUNK):
        found, seen = observed(model, ids[start : start + _CHUNK], cache, learning)
        logits.append(found)
        signals.append(seen)
    joined = {name: np.concatenate([part[name] for part in signals], axis=-1) for name in SIGNALS}
    return np.concatenate(logits), joined, cache


def _bits(logits: np.ndarray, positions: Sequence[int], ids: Sequence[int]) -> float:
    """Bits that the tokens after these positions cost, on average; logits [positions, V]."""
    nats = [
        -log_softmax(row[None])[0, ids[position + 1]]
        for row, position in zip(logits, positions, strict=True)
        if position + 1 < len(ids)
    ]
    return float(np.mean(nats) / math.log(2))


class _Expected:
    """What the model makes of a text, read with a learning scale [layers, H] or none."""

    def __init__(self, model: Model, ids: list[int], learning: np.ndarray | None = None):
        self.args, self.ids, self.layout, self.learning = model.args, ids, StateLayout.of(model.args), learning
        self.logits, self.signals, cache = _read(model, ids, learning)
        if not np.isfinite(self.logits).all():
            raise CheckpointError("the model gives logits that are not finite numbers")
        self.state = self.layout.pack(cache, model.make_cache())
        self.bits = _bits(self.logits, range(len(ids)), ids)
        self.greedy, last = [], self.logits[-1]
        for _ in range(_GREEDY):
            self.greedy.append(int(last.argmax()))
            last = observed(model, self.greedy[-1:], cache, learning)[0][-1]


@dataclass(frozen=True)
class _Way:
    """A way of running a bundle.

    Attributes:
        what: the functions.
        read: reads tokens; gives logits [n, V] with the number of tokens read after the last of them.
        state: as layout.StateLayout has it.
        cuts: tokens of each call, again and again.
        seen: the signals of each call so far.
    """

    what: str
    read: Callable[[Sequence[int]], list[tuple[int, np.ndarray]]]
    state: Callable[[], np.ndarray]
    cuts: Sequence[int]
    seen: list[dict[str, np.ndarray]] = field(default_factory=list)


def _apart(runtime: Runs, layout: StateLayout, facts: Mapping[str, Any], learning: np.ndarray | None = None) -> _Way:
    """`decode` and `prefill`, with this learning scale or none, if they take one."""
    own, seen, K = learning_of(facts), list[dict[str, np.ndarray]](), layout.args.mini_batch_size
    session = start_session(runtime, layout, outside(facts["compute"]), own if learning is None else learning)

    def read(ids: Sequence[int]) -> list[tuple[int, np.ndarray]]:
        found = []
        for answer in session.feed(ids):
            found.append(answer)
            seen.append(session.signals)
        return found

    what = _APART if learning is None else f"{_APART}, learning scaled"
    return _Way(what, read, lambda: session.state, [K + 3, *[1] * K, 5 * K + 1], seen)


def _ways(runtime: Runs, layout: StateLayout, facts: Mapping[str, Any]) -> list[_Way]:
    """Each of them in splits that begin and end at many phases of a mini-batch."""
    K = layout.args.mini_batch_size
    main = Main(runtime, layout, outside(facts["compute"]))
    return [
        _apart(runtime, layout, facts),
        _Way(
            MAIN,
            lambda ids: [(main.offset + len(ids), main.read(ids))],
            lambda: packed(layout, apart(layout, main.arrays)),
            [K + 3, 1, 1, 6 * K - 7, K, 1],
        ),
    ]


def _row(way: _Way, expected: _Expected, compute: str, progress: Callable[[int], None] = lambda read: None) -> Row:
    """Read the text in one way.

    Raises:
        CheckpointError: a logit is not a finite number.
    """
    ids, positions, found, start = expected.ids, list[int](), list[np.ndarray](), 0
    for n in itertools.cycle(way.cuts):
        for offset, logits in way.read(ids[start : start + n]):
            last = logits if way.what == MAIN else logits[-1:]  # of prefill only the last logits are given
            positions += range(offset - len(last), offset)
            found.append(last)
        start += n
        progress(min(start, len(ids)))
        if start >= len(ids):
            break
    given, wanted = np.concatenate(found), expected.logits[positions]
    signals = signals_error(way.seen, expected.signals)  # before more tokens are read
    if not np.isfinite(given).all():
        raise CheckpointError(f"{way.what}: a logit is not a finite number")
    return Row(
        what=way.what,
        tokens=len(ids),
        logits=float(np.abs(given - wanted).max() / np.abs(wanted).max()),
        state=float(np.abs(way.state() - expected.state).max() / np.abs(expected.state).max()),
        bits=(_bits(given, positions, ids), _bits(wanted, positions, ids)),
        greedy=_parting(way, given[-1], expected.greedy),
        signals=signals,
        bound=BOUNDS[compute, MAIN if way.what == MAIN else _APART],
    )


def _parting(way: _Way, last: np.ndarray, greedy: Sequence[int]) -> int | None:
    """At which token the text that the bundle writes parts from this one; None: nowhere."""
    for i, token in enumerate(greedy):
        if int(last.argmax()) != token:
            return i
        last = way.read([token])[-1][1][-1]
    return None
