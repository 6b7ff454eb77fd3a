"""How the next token of each text in a batch is chosen, and what is told of the choice.

Randomness comes from a request's seed and the number of the token alone. So a text does not depend on who else is in
the batch, but for the rounding of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

LEAST_TEMPERATURE = 1e-5  # below it, logits divided by the temperature overflow; the best token always wins there
_MASK = 2**64 - 1


@dataclass(frozen=True)
class Sampling:
    """What a request says of the choice of its tokens. The defaults choose the most likely token.

    Attributes:
        temperature: what logits are divided by; 0 takes the most likely token.
        top_p: sample from the fewest tokens that have this probability together.
        top_k: sample from so many of the most likely tokens; 0 for all.
        min_p: leave out tokens less likely than this share of the most likely one.
        seed: makes the choice repeatable, 64 bits.
        bias: added to the logits of some tokens.
        presence, frequency: taken off the logits of tokens that were written, once or for each time.
        repetition: logits of tokens that were read or written are divided by it if positive, multiplied if negative.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < LEAST_TEMPERATURE or self.top_p <= 0 or self.top_k == 1

    @property
    def changes_logits(self) -> bool:
        return bool(self.bias or self.presence or self.frequency or self.repetition != 1)


class Likely(NamedTuple):
    """A token, its log probability by the model itself, and the tokens that were most likely there, with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_seed(seed: int, number: int) -> int:
    """64 bits for token `number` of a text: the finalizer of SplitMix64 (Steele et al. 2014)."""
    z = (seed + (number + 1) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


class LogitChanges:
    """Bias and penalties of one text.

    The counts of its tokens are on the device: the next token is chosen before the host has seen the last one.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], written: Sequence[int], V: int):
        """
        Args:
            prompt, written: the tokens of the text so far.
            V: size of the vocabulary.
        """
        self._sampling, self._V, self._written = sampling, V, len(written)
        self._bias = _dense(V, np.float32, list(sampling.bias), list(sampling.bias.values())) if sampling.bias else None
        self._factors = _dense(V, np.float32, [*prompt, *written], sampling.repetition, others=1)
        self._counts = mx.array(np.bincount(np.array(written, np.int64), minlength=V).astype(np.int32))
        self._penalties = mx.zeros(0)  # of a token that was written 0, 1, ... times

    def changed(self, logits: mx.array) -> mx.array:
        """The logits [V] of the next token, with bias and penalties."""
        sampling, dtype = self._sampling, logits.dtype
        if sampling.repetition != 1:
            factors = self._factors.astype(dtype)
            logits = mx.where(logits > 0, logits / factors, logits * factors)
        if sampling.presence or sampling.frequency:
            if self._written >= self._penalties.size:
                self._penalties = self._table(2 * self._written + 16)
            penalties = self._penalties[self._counts]
            logits = logits + (penalties if self._bias is None else self._bias + penalties)
        elif self._bias is not None:
            logits = logits + self._bias
        return logits.astype(dtype)

    def add(self, token: mx.array) -> None:
        """The token has been chosen. The device may still compute it."""
        self._written += 1
        token = mx.minimum(token, self._V - 1)
        if self._sampling.repetition != 1:
            self._factors = mx.put_along_axis(self._factors, token[None], mx.array(self._sampling.repetition), axis=0)
        self._counts = self._counts.at[token].add(1)

    def _table(self, size: int) -> mx.array:
        penalties = self._sampling.presence + self._sampling.frequency * np.arange(size)
        penalties[0] = 0
        return mx.array(-penalties.astype(np.float32))


def _dense(V: int, dtype: Any, indices: list[int], values: Any, others: float = 0) -> mx.array:
    """[V], with these values at these places."""
    array = np.full(V, others, dtype)
    array[indices] = values
    return mx.array(array)


def choose(logits: mx.array, sampling: Sampling, seed: int, number: int) -> mx.array:
    """Token `number` of a text with this seed, from its logits [V]."""
    if sampling.is_greedy:
        return mx.argmax(logits)
    scaled = logits.astype(mx.float32) / sampling.temperature
    V = scaled.shape[0]
    if 0 < sampling.top_k < V:
        scaled = _at_least(scaled, mx.sort(scaled)[V - sampling.top_k])
    if sampling.min_p > 0:
        scaled = _at_least(scaled, scaled.max() + math.log(sampling.min_p))
    if sampling.top_p < 1:
        ordered = mx.sort(scaled)  # the most likely last
        probabilities = mx.softmax(ordered)
        above = mx.cumsum(probabilities, reverse=True, inclusive=False)  # of the tokens that are more likely
        first = mx.minimum((above >= sampling.top_p).sum(), V - 1)  # the least likely one that is needed
        scaled = _at_least(scaled, ordered[first])
    return mx.random.categorical(scaled, key=mx.random.key(token_seed(seed, number)))


def _at_least(logits: mx.array, least: mx.array) -> mx.array:
    return mx.where(logits < least, -mx.inf, logits)


def log_probabilities(logits: mx.array) -> mx.array:
    """[..., V] -> [..., V], float32."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def most_likely(logprobs: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """The `count` most likely tokens and their log probabilities, [..., count] each, the most likely first."""
    V = logprobs.shape[-1]
    count = min(count, V)
    if count == 0:
        return mx.zeros((*logprobs.shape[:-1], 0), mx.uint32), mx.zeros((*logprobs.shape[:-1], 0))
    found = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[..., :count]
    values = mx.take_along_axis(logprobs, found, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return mx.take_along_axis(found, order, axis=-1), mx.take_along_axis(values, order, axis=-1)
