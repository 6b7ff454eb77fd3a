"""What a model learns from each token that it reads, and how much each token surprises it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import PromptError
from ..network.cache import TTTCache, watched
from ..network.learning_scale import Scale
from ..network.model import Model
from ..network.operations import cross_entropy
from ..network.rule import Signals

PIECE = 2048  # tokens that are read at a time where no logits are kept; a multiple of what a CPU's prefill takes
HEAD_PIECE = 256  # tokens whose logits are compared with the next tokens at a time: bounds the memory
KINDS = ("token", "mini_batch", "layer")


@dataclass(frozen=True)
class Observation:
    """What `observe` has seen. All arrays are float32, but logits have the model's dtype.

    Attributes:
        surprisal: -log probability of each token given all before it, in nats, [B, T]. NaN for padding, and for the
            first token unless `previous` was given.
        loss: ||LN(f(k)) - (v - k)||^2 / 2 of the inner model on each token, at the weights of its mini-batch's start.
        lr: the inner learning rate of each token, scaled by `learning`.
        write_norm: the Frobenius norm of what each token adds to the inner weights when its mini-batch is committed.
        logits: of the token after each position, [B, T, V], where they were asked for.
        last_logits: those after the last token, [B, V]: the next call's `previous`.

    loss, lr and write_norm by `per`:
        "token": [layers, B, H, T]. Zero for padding.
        "mini_batch": [layers, B, H, N], for the N mini-batches that the call touches; of the first and the last it may
            hold a part. loss and lr are means over the tokens of this call. write_norm is their sum: it bounds
            what the mini-batch changes. Zero where a sequence has no token.
        "layer": [layers, B, T]. loss and lr are means over the heads. write_norm is the norm of what all heads write,
            the root of the sum of squares.
    """

    surprisal: mx.array
    loss: mx.array
    lr: mx.array
    write_norm: mx.array
    logits: mx.array | None
    last_logits: mx.array


def observe(
    model: Model,
    ids: mx.array,
    cache: list[TTTCache] | None = None,
    previous: mx.array | None = None,
    per: str = "token",
    logits: bool | None = None,
    learning: Scale = 1.0,
) -> Observation:
    """Read tokens as `model(ids, cache)` does, and say what the model learns from each.

    With logits it is one call of the model; logits and state are those of a plain call bit for bit. Without, PIECE
    tokens are read at a time, so the memory besides what is returned does not grow with the text. The state is that of
    such calls.

    Args:
        ids: token ids, [B, T], T > 0.
        cache: from `model.make_cache`; updated in place. None: a text from its start.
        previous: the logits before the first token, [B, V]: `last_logits` of the call before.
        per: how fine the signals are: "token", "mini_batch" or "layer". See :class:`Observation`.
        logits: whether to return logits. By default for "token" only.
        learning: see `Model.__call__`.

    Raises:
        ValueError: `ids`, `previous`, `per` or `learning` is not what it should be.
        PromptError: a token id is outside the model's vocabulary.
    """
    ids = mx.array(ids)
    with_logits = per == "token" if logits is None else logits
    _check(model, ids, previous, per)
    B, T = ids.shape
    cache = model.make_cache() if cache is None else cache
    for c in cache:
        c.expand(B)
    before = None if previous is None else previous.astype(mx.float32)
    shown = _Shown(per, cache[0], model.args.mini_batch_size, T)
    returned, costs = None, []
    for a, b in _pieces(T, T if with_logits else PIECE):
        part, spans = ids[:, a:b], _spans(cache[0], b - a)
        with watched(cache) as seen:
            if with_logits:
                x = returned = model(part, cache, learning)
            else:
                x = model.model(part, cache, learning)
        cost, before = _surprisal(_Outputs(model, x, with_logits), part, before, spans)
        costs.append(cost)
        shown.add([Signals.joined(signals) for signals in seen], a, spans)
        if b - a < T:  # or what has been read would add up until somebody asks for it
            mx.eval(costs, before, [c.arrays for c in cache])
    loss, lr, write_norm = shown.result()
    assert before is not None, "there is at least one piece"
    return Observation(_joined(costs), loss, lr, write_norm, returned, before)


def _check(model: Model, ids: mx.array, previous: mx.array | None, per: str) -> None:
    if ids.ndim != 2 or ids.size == 0:
        raise ValueError(f"ids has shape {ids.shape}, expected [B, T] with at least one token")
    if per not in KINDS:
        raise ValueError(f"per is {per!r}, expected one of {', '.join(KINDS)}")
    V = model.args.vocab_size
    if previous is not None and previous.shape != (ids.shape[0], V):
        raise ValueError(f"previous has shape {previous.shape}, expected {(ids.shape[0], V)}")
    tokens = np.array(ids)
    if outside := tokens[(tokens < 0) | (tokens >= V)].tolist():
        raise PromptError(f"token id {outside[0]} is outside the model's vocabulary of {V}")


def _pieces(T: int, size: int) -> Iterator[tuple[int, int]]:
    """From where to before where each piece goes. None is of one token, which a backend reads in another way."""
    start = 0
    while start < T:
        stop = start + size
        stop = T if stop + 1 >= T else stop
        yield start, stop
        start = stop


class _Spans:
    """Which of the n tokens of a piece count: `count` from `start` on, one integer per sequence."""

    def __init__(self, start: Sequence[int], count: Sequence[int], n: int):
        self.start, self.count, self.n = np.array(start), np.array(count), n

    @property
    def place(self) -> np.ndarray:
        """Of each token among those that count, [B, n]; of no meaning for padding."""
        return np.arange(self.n) - self.start[:, None]

    @property
    def counted(self) -> np.ndarray:
        """Whether each token counts, [B, n]."""
        return (self.place >= 0) & (self.place < self.count[:, None])


def _spans(cache: TTTCache, n: int) -> _Spans:
    return _Spans(cache.left_padding(n), cache.lengths(n), n)


# ---- Surprisal -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Outputs:
    """The logits of a piece, or the hidden states that they are made of: x [B, n, .]."""

    model: Model
    x: mx.array
    are_logits: bool

    def logits(self, x: mx.array) -> mx.array:
        """Of a part of x, float32."""
        return (x if self.are_logits else self.model.head(x)).astype(mx.float32)


def _surprisal(outputs: _Outputs, ids: mx.array, before: mx.array | None, spans: _Spans) -> tuple[mx.array, mx.array]:
    """The surprisal of the tokens ids [B, n], and the logits after the last that counts, [B, V].

    before: the logits before the first token that counts, [B, V], if they are known.
    """
    B, n = ids.shape
    sequences = mx.arange(B)
    start = mx.full((B, 1), mx.nan)
    if before is not None:
        first = ids[sequences, mx.array(np.minimum(spans.start, n - 1))]
        start = cross_entropy(before[:, None], first[:, None])
    costs = [start]
    for a in range(0, n - 1, HEAD_PIECE):
        b = min(a + HEAD_PIECE, n - 1)
        costs.append(cross_entropy(outputs.logits(outputs.x[:, a:b]), ids[:, a + 1 : b + 1]))
        if n > HEAD_PIECE:
            mx.eval(costs)
    cost = _joined(costs)
    if not spans.counted.all():
        cost = mx.where(mx.array(spans.place == 0), start, cost)
        cost = mx.where(mx.array(spans.counted), cost, mx.nan)
        last = mx.array(np.clip(spans.start + spans.count - 1, 0, None))
        after = outputs.logits(outputs.x[sequences, last][:, None])[:, 0]
        known = mx.full(after.shape, mx.nan) if before is None else before
        return cost, mx.where(mx.array(spans.count > 0)[:, None], after, known)
    return cost, outputs.logits(outputs.x[:, -1:])[:, 0]


def _joined(parts: list[mx.array]) -> mx.array:
    """[B, ., ...] of texts that follow one another."""
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


# ---- Signals ---------------------------------------------------------------------------------------------------------


class _Shown:
    """The signals of T tokens as `per` has them, put together from those of pieces."""

    def __init__(self, per: str, cache: TTTCache, K: int, T: int):
        self._per, self._T, self._K = per, T, K
        # Slots are counted from the start of the open mini-batch. The cache's own `phase` would take back its arrays.
        self._first = np.array(cache.offset) % K
        self._end = self._first + np.array(cache.lengths(T))
        self._slot = self._first.copy()  # of each sequence's next token
        self._arrays: list[mx.array] = []  # loss, lr, write_norm

    def add(self, signals: list[Signals], start: int, spans: _Spans) -> None:
        """The signals of each layer for a piece that begins at token `start`."""
        parts = [mx.stack(list(x)).swapaxes(2, 3) for x in zip(*signals, strict=True)]  # [layers, B, H, n]
        size = self._T
        if self._per == "layer":
            loss, lr, write_norm = parts
            parts = [loss.mean(2), lr.mean(2), mx.sqrt(write_norm.square().sum(2))]
        elif self._per == "mini_batch":
            size = max(-(-int(self._end.max()) // self._K), 1)
            members, start = self._members(spans)
            parts = [x @ members for x in parts]
        self._slot += spans.count
        if not self._arrays:
            if parts[0].shape[-1] == size:
                self._arrays = parts
                return
            self._arrays = [mx.zeros((*x.shape[:-1], size)) for x in parts]
        for array, part in zip(self._arrays, parts, strict=True):
            at = slice(start, start + part.shape[-1])
            part = part + array[..., at]
            mx.eval(part)  # so that nothing else holds the array, which is then written in place
            array[..., at] = part
        mx.eval(self._arrays)

    def _members(self, spans: _Spans) -> tuple[mx.array, int]:
        """1 where a token of the piece belongs to a mini-batch, [B, n, M], and the first of those M."""
        mini_batch = (self._slot[:, None] + spans.place) // self._K  # [B, n]
        inside = mini_batch[spans.counted]
        first, last = (int(inside.min()), int(inside.max())) if inside.size else (0, 0)
        members = (mini_batch[..., None] == np.arange(first, last + 1)) & spans.counted[..., None]
        return mx.array(members.astype(np.float32)), first

    def result(self) -> list[mx.array]:
        """loss, lr and write_norm."""
        if self._per != "mini_batch":
            return self._arrays
        loss, lr, write_norm = self._arrays
        starts = np.arange(loss.shape[-1]) * self._K
        stops = np.minimum(starts + self._K, self._end[:, None])
        counts = np.maximum(stops - np.maximum(starts, self._first[:, None]), 1)[:, None]  # [B, 1, N]
        return [loss / mx.array(counts), lr / mx.array(counts), write_norm]
