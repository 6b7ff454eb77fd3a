"""How far a bundle is from its model, function by function, on Apple's runtime."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...errors import CheckpointError
from ...loading import load_model
from ...network.model import Model
from ...text.state import fingerprint
from ..errors import first_line
from ..layout import StateLayout
from ..numbers import COMPUTE
from ..operations import NumberType
from ..verify import invented_text, log_softmax
from ..weights import Joined, joined, matrix
from .bundle import read_bundle
from .formats import as_stored, table_format
from .program import ALL, outside
from .runner_main import MAIN
from .runtime import Main, Runtime, start_session
from .state import apart, packed

_GREEDY = 64  # tokens of the text that each writes
_CHUNK = 512  # tokens of a call of the model


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


# In all rows the model's matrices hold the numbers that the bundle stores, so the bounds do not depend on the format.
BOUNDS = {
    ("float32", "decode and prefill"): Bound(1e-4, 1e-4, "the order of sums in float32"),
    ("float32", MAIN): Bound(6e-4, 1e-5, "logits leave in float16, which alone costs up to 4.9e-4"),
    ("mixed", "decode and prefill"): Bound(0.1, 0.2, "activations and products in float16; on Linux sums, too"),
    ("mixed", MAIN): Bound(0.1, 0.2, "activations and products in float16; on Linux sums, too"),
    ("float16", "decode and prefill"): Bound(0.2, 0.5, "all in float16, also what is learned; on Linux sums, too"),
    ("float16", MAIN): Bound(0.2, 0.5, "all in float16, also what is learned; on Linux sums, too"),
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
        bound: what is allowed.
    """

    what: str
    tokens: int
    logits: float
    state: float
    bits: tuple[float, float]
    greedy: int | None
    bound: Bound

    @property
    def holds(self) -> bool:
        return self.logits <= self.bound.logits and self.state <= self.bound.state


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    Attributes:
        rows: of the comparison.
        bits: per token, of the model as it is, and of the model with the weights that the bundle stores.
        weights, compute: of the bundle.
    """

    rows: list[Row]
    bits: tuple[float, float]
    weights: str
    compute: str


def verify(
    path: Path,
    model_dir: Path,
    *,
    tokens: int = 4096,
    ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Verified:
    """Read a text with the bundle, in odd splits, and with the model, whose matrices hold what the bundle stores.

    Args:
        path: a bundle, or the .aimodel in it.
        model_dir: the model that it was exported from.
        tokens: how many to read.
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
    tokens = max(tokens, 4 * model.args.mini_batch_size)
    text = list(ids) if ids is not None else invented_text(model, tokens)
    own = _bits(_read(model, text)[0], range(len(text)), text)
    store(model, bundle.facts["weights"], bundle.facts["compute"])
    expected = _Expected(model, text)
    try:
        with Runtime(bundle.asset) as runtime:
            if set(runtime.names) != set(ALL):
                raise CheckpointError(
                    f"{bundle.asset}: has the functions {', '.join(runtime.names)}, not {', '.join(ALL)}"
                )
            ways = _ways(runtime, expected.layout, outside(bundle.facts["compute"]))
            total, rows = len(ways) * len(text), []
            for i, way in enumerate(ways):

                def done(read: int, before: int = i * len(text)) -> None:
                    progress(before + read, total)

                rows.append(_row(way, expected, bundle.facts["compute"], done))
    except RuntimeError as error:
        raise CheckpointError(f"{bundle.asset}: Core AI's runtime refuses it: {first_line(error)}") from None
    return Verified(rows, (own, expected.bits), bundle.facts["weights"], bundle.facts["compute"])


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


def _read(model: Model, ids: Sequence[int]) -> tuple[np.ndarray, list]:
    """Logits [n, V] and the caches after them."""
    cache, logits = model.make_cache(), []
    for start in range(0, len(ids), _CHUNK):
        part = mx.array([list(map(int, ids[start : start + _CHUNK]))])
        logits.append(np.array(model(part, cache=cache)[0].astype(mx.float32)))
    return np.concatenate(logits), cache


def _bits(logits: np.ndarray, positions: Sequence[int], ids: Sequence[int]) -> float:
    """Bits that the tokens after these positions cost, on average; logits [positions, V]."""
    nats = [
        -log_softmax(row[None])[0, ids[position + 1]]
        for row, position in zip(logits, positions, strict=True)
        if position + 1 < len(ids)
    ]
    return float(np.mean(nats) / math.log(2))


class _Expected:
    """What the model makes of a text."""

    def __init__(self, model: Model, ids: list[int]):
        self.args, self.ids, self.layout = model.args, ids, StateLayout.of(model.args)
        self.logits, cache = _read(model, ids)
        if not np.isfinite(self.logits).all():
            raise CheckpointError("the model gives logits that are not finite numbers")
        self.state = self.layout.pack(cache, model.make_cache())
        self.bits = _bits(self.logits, range(len(ids)), ids)
        self.greedy, last = [], self.logits[-1]
        for _ in range(_GREEDY):
            self.greedy.append(int(last.argmax()))
            last = np.array(model(mx.array([self.greedy[-1:]]), cache=cache)[0, -1].astype(mx.float32))


@dataclass(frozen=True)
class _Way:
    """A way of running a bundle.

    Attributes:
        what: the functions.
        read: reads tokens; gives logits [n, V] with the number of tokens read after the last of them.
        state: as layout.StateLayout has it.
        cuts: tokens of each call, again and again.
    """

    what: str
    read: Callable[[Sequence[int]], list[tuple[int, np.ndarray]]]
    state: Callable[[], np.ndarray]
    cuts: Sequence[int]


def _ways(runtime: Runtime, layout: StateLayout, number: NumberType) -> list[_Way]:
    """Each of them in splits that begin and end at many phases of a mini-batch."""
    K = layout.args.mini_batch_size
    session, main = start_session(runtime, layout, number), Main(runtime, layout, number)
    return [
        _Way(
            "decode and prefill",
            lambda ids: list(session.feed(ids)),
            lambda: session.state,
            [K + 3, *[1] * K, 5 * K + 1],
        ),
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
    if not np.isfinite(given).all():
        raise CheckpointError(f"{way.what}: a logit is not a finite number")
    return Row(
        what=way.what,
        tokens=len(ids),
        logits=float(np.abs(given - wanted).max() / np.abs(wanted).max()),
        state=float(np.abs(way.state() - expected.state).max() / np.abs(expected.state).max()),
        bits=(_bits(given, positions, ids), _bits(wanted, positions, ids)),
        greedy=_parting(way, given[-1], expected.greedy),
        bound=BOUNDS[compute, way.what],
    )


def _parting(way: _Way, last: np.ndarray, greedy: Sequence[int]) -> int | None:
    """At which token the text that the bundle writes parts from this one; None: nowhere."""
    for i, token in enumerate(greedy):
        if int(last.argmax()) != token:
            return i
        last = way.read([token])[-1][1][-1]
    return None
