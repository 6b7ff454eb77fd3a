"""What a model learns from a text, token by token, in as few figures as a page needs.

Heads are counted through all layers: head h of layer l is l H + h. A column is what all heads write in one mini-batch,
or in a few that follow one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import PromptError
from ..learning.observation import Observation, observe
from ..learning.states import drift
from ..network.model import Model
from ..text.state import CONTEXT_TOKENS
from ..text.visible import VisibleText
from ..training.evaluate import by_position, losses

STRONGEST = 3  # heads that are named for each token
NO_HEAD = 0xFFFF  # where a model has fewer
MOST_TOKENS = 2_000_000  # that a page can hold
MOST_CELLS = 20_000_000  # of the map, heads times columns
PIECE = 2048  # tokens that are read at a time, at most
MOST_PIECES = 160  # of a text that is short enough: a piece is a point of the drift
RESET = 512  # tokens after which the state is forgotten, for comparison
TEXT_BLOCK = 4096  # tokens whose text is put together at a time: the time of a detokenizer may grow with the square

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Figures:
    """Of n tokens that follow one another.

    Attributes:
        surprisal: nats, [n]; NaN where nothing came before.
        write_norm: the norm of what all heads write of the token: the root of the sum of squares, [n].
        loss: the inner loss, the mean of all heads, [n].
        strongest: the heads with the largest write norms, the largest first, [n, STRONGEST].
        strongest_norm: their write norms.
    """

    surprisal: np.ndarray
    write_norm: np.ndarray
    loss: np.ndarray
    strongest: np.ndarray
    strongest_norm: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Figures]) -> Figures:
        return cls(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    @classmethod
    def of(cls, seen: Observation) -> Figures:
        """Of an observation per token, of one sequence."""
        loss, norms = by_head(seen.loss), by_head(seen.write_norm)
        return cls.of_heads(np.array(seen.surprisal)[0], loss, norms)

    @classmethod
    def of_heads(cls, surprisal: np.ndarray, loss: np.ndarray, norms: np.ndarray) -> Figures:
        """surprisal [n]; loss and norms [heads, n]."""
        heads, n = norms.shape
        most = min(STRONGEST, heads)
        best = np.argpartition(-norms, most - 1, axis=0)[:most]
        values = np.take_along_axis(norms, best, 0)
        order = np.argsort(-values, axis=0, kind="stable")
        strongest = np.full((n, STRONGEST), NO_HEAD, np.uint16)
        strongest_norm = np.full((n, STRONGEST), np.nan, np.float32)
        strongest[:, :most] = np.take_along_axis(best, order, 0).T
        strongest_norm[:, :most] = np.take_along_axis(values, order, 0).T
        return cls(surprisal, np.sqrt(np.square(norms).sum(0)), loss.mean(0), strongest, strongest_norm)


def by_head(signal: mx.array) -> np.ndarray:
    """[layers, 1, H, n] -> [heads, n]."""
    layers, _, H, n = signal.shape
    return np.array(signal).reshape(layers * H, n)


def columns_of(norms: np.ndarray, start: int, width: int) -> tuple[int, np.ndarray]:
    """What each column gains from some tokens: the first column, and sums of write norms, [columns, heads].

    Args:
        norms: [heads, n], n > 0.
        start: the place of the first token in its text.
        width: tokens of a column.
    """
    first, last = start // width, (start + norms.shape[1] - 1) // width
    bounds = [max(column * width - start, 0) for column in range(first, last + 1)]
    return first, np.add.reduceat(norms, bounds, axis=1).T


@dataclass(frozen=True)
class Reading:
    """A text that a model has read, and what it learned.

    Attributes:
        texts: what each token shows, T of them. Empty for a token that is no text, or not yet a whole character.
        names: the tokenizer's names of those, by their place in the text.
        width: tokens of a column.
        columns: sums of write norms, [columns, heads].
        drift_at: how many tokens had been read, [P].
        drift: how far the inner weights of each layer had come by then, relative to the norm of the start weights,
            [P, layers].
        reset_every: the state of the second reading was forgotten after so many tokens; 0: there is none.
        reset: surprisal in that reading, [T] or [0].
        gain, gain_half_width: how much less a token costs where the state is carried, in nats, with a 95 % interval.
    """

    texts: list[str]
    names: dict[int, str]
    figures: Figures
    width: int
    columns: np.ndarray
    drift_at: np.ndarray
    drift: np.ndarray
    reset_every: int
    reset: np.ndarray
    gain: float
    gain_half_width: float


def read_text(
    model: Model,
    tokenizer: TokenizerWrapper,
    ids: np.ndarray,
    reset: int | None = None,
    progress: Progress | None = None,
) -> Reading:
    """Read a text from its start, and note what a page shows of it.

    Args:
        ids: token ids, [T].
        reset: forget everything every so many tokens in a second reading, to compare. 0: do not compare. By default
            RESET, or less for a short text.
        progress: called with the number of tokens that have been read, in both readings, and that of all.

    Raises:
        PromptError: there are too few tokens or too many, or one that the model does not know.
    """
    T, K = len(ids), model.args.mini_batch_size
    if not 0 < T <= MOST_TOKENS:
        raise PromptError(f"{T} tokens: a page can hold 1 to {MOST_TOKENS}")
    every = _reset_every(T, K) if reset is None else reset if reset < T else 0
    total = 2 * T if every else T
    report = progress or (lambda done, total: None)

    width = _column_width(model, T)
    heads = model.args.num_hidden_layers * model.args.num_attention_heads
    columns = np.zeros((-(-T // width), heads), np.float32)
    cache, previous = model.make_cache(), None
    parts, drift_at, drifts = [], [0], [np.zeros(model.args.num_hidden_layers, np.float32)]
    size = min(PIECE, -(-T // MOST_PIECES // K) * K or K)
    for a in range(0, T, size):
        seen = observe(model, mx.array(ids[None, a : a + size]), cache, previous, logits=False)
        previous = seen.last_logits
        parts.append(Figures.of(seen))
        first, sums = columns_of(by_head(seen.write_norm), a, width)
        columns[first : first + len(sums)] += sums
        drift_at.append(min(a + size, T))
        drifts.append(np.array(drift(model, cache).of_layers().relative)[:, 0])
        report(drift_at[-1], total)

    figures = Figures.joined(parts)
    again, gain, half_width = np.empty(0, np.float32), 0.0, 0.0
    if every:
        nats = losses(model, ids, every, progress=lambda done, _: report(min(T + done + 1, total), total))
        again = np.concatenate([[np.nan], nats]).astype(np.float32)
        (band,) = by_position((again - figures.surprisal)[1:], [(0, None)])
        gain, half_width = band.mean, band.half_width
    texts = token_texts(tokenizer, ids.tolist())
    return Reading(
        texts,
        token_names(tokenizer, ids.tolist(), texts),
        figures,
        width,
        columns,
        np.array(drift_at, np.uint32),
        np.array(drifts, np.float32),
        every,
        again,
        gain,
        half_width,
    )


def _reset_every(T: int, K: int) -> int:
    """A quarter of a short text, in whole mini-batches; 0 where that is less than one."""
    return min(RESET, T // 4 // K * K)


def _column_width(model: Model, T: int) -> int:
    """A mini-batch, or as many as keep the map of a long text small."""
    K = model.args.mini_batch_size
    cells = model.args.num_hidden_layers * model.args.num_attention_heads * -(-T // K)
    return K * max(-(-cells // MOST_CELLS), 1)


def token_texts(tokenizer: TokenizerWrapper, ids: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    """What each token adds to the text. A character of several tokens comes with its last.

    Args:
        context: the tokens before the first.
    """
    texts: list[str] = []
    for start in range(0, len(ids), TEXT_BLOCK):
        block = ids[start : start + TEXT_BLOCK]
        visible = VisibleText(tokenizer, [*context, *ids[max(start - CONTEXT_TOKENS, 0) : start]], ())
        texts += [visible.add(token) for token in block]
        texts[-1] += visible.end()
    return texts


def token_names(tokenizer: TokenizerWrapper, ids: Sequence[int], texts: Sequence[str]) -> dict[int, str]:
    """The names of tokens that show no text, by their place."""
    bare = [i for i, text in enumerate(texts) if not text]
    return dict(zip(bare, tokenizer.convert_ids_to_tokens([ids[i] for i in bare]), strict=True))
