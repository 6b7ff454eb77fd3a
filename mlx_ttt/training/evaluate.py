"""What a model makes of a text: the loss of each token, and what a position costs.

A TTT model learns while it reads. So a token far into a text should cost less than one near its beginning, and less
than the same token costs after the state has been reset. The loss by position shows whether it does.

Intervals: the losses of neighbouring tokens are correlated, so tokens are not independent samples. A band of positions
is therefore cut into blocks of about `BLOCK` tokens, and the interval is that of the mean of the blocks' means, by
Student's t. For two ways of reading the same text, the interval is that of the mean of the paired differences. It is
much narrower than the two intervals by themselves, because a token that is hard to guess is hard in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..errors import PromptError
from ..network.cache import TTTCache
from ..network.model import Model
from ..network.operations import cross_entropy
from .segments import SEGMENT

BLOCK = 256  # tokens whose mean counts as one sample
FEWEST_BLOCKS = 8  # a short band gets smaller blocks rather than fewer than these
BANDS = ((0, 2048), (2048, 8192), (8192, 16384), (16384, 32768), (32768, None))

Bands = Sequence[tuple[int, int | None]]
Progress = Callable[[int, int], None]


def losses(
    model: Model,
    ids: Sequence[int] | np.ndarray | mx.array,
    reset: int | None = None,
    segment: int = SEGMENT,
    progress: Progress | None = None,
) -> np.ndarray:
    """The cross entropy of each next token of a text that is read in one pass.

    Args:
        ids: token ids, [T + 1]. The first T are read, the last T predicted.
        reset: forget everything every so many tokens. By default the state is carried from the first token to the last.
        segment: how many tokens are read at a time. Memory depends on it, the result does not.
        progress: called with the number of tokens that have been read, and T.

    Returns:
        Nats, float32 [T].

    Raises:
        ValueError: fewer than two tokens, or a length that is not positive.
        PromptError: a token id is outside the model's vocabulary.
    """
    tokens = np.asarray(ids)
    if tokens.ndim != 1 or tokens.size < 2 or segment < 1 or (reset is not None and reset < 1):
        got = f"shape {tokens.shape}, segment {segment}, reset {reset}"
        raise ValueError(f"ids, segment and reset: {got}; expected ids [T + 1] and positive lengths")
    if outside := tokens[(tokens < 0) | (tokens >= model.args.vocab_size)].tolist():
        raise PromptError(f"token id {outside[0]} is outside the model's vocabulary of {model.args.vocab_size}")
    T = tokens.size - 1
    nats = np.empty(T, np.float32)
    a, cache = 0, model.make_cache()
    while a < T:
        b = min(a + segment, T)
        if reset is not None:
            if a % reset == 0:
                cache = model.make_cache()
            b = min(b, (a // reset + 1) * reset)
        nats[a:b] = next_token_nats(model, cache, tokens[a : b + 1])
        mx.eval([c.arrays for c in cache])
        a = b
        if progress is not None:
            progress(a, T)
    return nats


def next_token_nats(model: Model, cache: list[TTTCache], tokens: np.ndarray) -> np.ndarray:
    """The cross entropy of all tokens [n + 1] but the first. The cache then stands behind the first n."""
    ids = mx.array(tokens[None])
    return np.array(cross_entropy(model(ids[:, :-1], cache=cache), ids[:, 1:])[0])


@dataclass(frozen=True)
class Band:
    """The mean of one value a token over the positions from start to stop, with a 95 % interval around it.

    `half_width` is NaN where a band has a single token.
    """

    start: int
    stop: int
    mean: float
    half_width: float


def by_position(values: np.ndarray, bands: Bands = BANDS) -> list[Band]:
    """Means of one value a token in bands of position.

    Args:
        values: losses, or the paired differences of two ways of reading the same text, [T].
        bands: from the first position of each to the first behind it; None: the end of the text.

    Returns:
        A Band for each of `bands` that the text reaches. The last one ends where the text ends.
    """
    T = len(values)
    return [_band(values, a, T if b is None else min(b, T)) for a, b in bands if a < T]


def _band(values: np.ndarray, start: int, stop: int) -> Band:
    within = np.asarray(values[start:stop], np.float64)
    blocks = max(len(within) // BLOCK, min(len(within), FEWEST_BLOCKS))
    means = [block.mean() for block in np.array_split(within, blocks)]
    return Band(start, stop, float(within.mean()), half_width(means))


def half_width(samples: Sequence[float] | np.ndarray) -> float:
    """Half of the 95 % interval around the mean of independent samples, by Student's t; NaN for a single one."""
    n = len(samples)
    return float(_t975(n - 1) * np.std(samples, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")


def _t975(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, by its expansion at the normal one (Abramowitz and Stegun 26.7.5)."""
    z = 1.959964
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))
