"""Tokens after a text, by mlx-lm's loops, and the state that belongs to those that were taken.

The loops read ahead of what they yield, so that where one is broken off, its caches stand too far ahead, or, in the
middle of a step, differ from layer to layer. So each decoder keeps copies to come back from.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import mlx.core as mx
from mlx_lm.generate import generate_step, speculative_generate_step

from .cache import RewindableTTTCache, TTTCache
from .model import Model

Caches = list[TTTCache]
Sampler = Callable[[mx.array], mx.array]


class Step(NamedTuple):
    token: int
    logprobs: mx.array  # [V]
    from_draft: bool


class Decoder(Protocol):
    def steps(self) -> Iterator[Step]:
        """The tokens, one by one. To be closed."""

    def cache_at(self, offset: int) -> Caches:
        """The state after so many tokens: all but the last one yielded, or all that there were at the start."""


class PlainDecoder:
    """One token per call of the model."""

    def __init__(self, model: Model, cache: Caches, last: int, max_tokens: int, sampler: Sampler, keep: bool):
        """
        Args:
            cache: the state after all tokens of the text but the last; it is left as it is.
            last: the last token.
            max_tokens: at most so many; -1 for no limit.
            keep: whether `cache_at` will be asked. It costs a copy of the open rows per token, which are then not
                free to be written in place.
        """
        self._model, self._last, self._max_tokens = model, last, max_tokens
        self._sampler, self._keep = sampler, keep
        self._running = _copy(cache)
        # One token behind what is being sampled; mlx-lm samples one token ahead of what it yields.
        self._behind = deque([cache], maxlen=3)

    def steps(self) -> Iterator[Step]:
        steps = generate_step(
            mx.array([self._last]),
            self._model,
            max_tokens=self._max_tokens,
            sampler=self._sample,
            prompt_cache=self._running,
        )
        for token, logprobs in steps:
            yield Step(token, logprobs, False)

    def _sample(self, logprobs: mx.array) -> mx.array:
        if self._keep:
            self._behind.append(_copy(self._running))
        return self._sampler(logprobs)

    def cache_at(self, offset: int) -> Caches:
        return next(cache for cache in self._behind if cache[0].offset[0] == offset)


class SpeculativeDecoder:
    """Several tokens per call of the model: those that a smaller one proposed, as far as the model agrees.

    The tokens are the model's own, whatever the draft model proposes (Leviathan et al. 2023, arXiv 2211.17192, with
    equality for the test; so sampling with a temperature accepts less than it could).
    """

    def __init__(
        self,
        model: Model,
        cache: Caches,
        draft_model: Model,
        draft_cache: Caches,
        last: int,
        max_tokens: int,
        sampler: Sampler,
        num_draft_tokens: int,
    ):
        """
        Args:
            cache, draft_cache: the states after all tokens of the text but the last; they are left as they are.
            num_draft_tokens: how many to propose at a time, at most the mini-batch sizes of both models: more could
                not be taken back.
        """
        self._models, self._sampler = (model, draft_model), sampler
        self._last, self._max_tokens, self._num_draft_tokens = last, max_tokens, num_draft_tokens
        self._running, self._draft = _rewindable(cache), _rewindable(draft_cache)
        self._whole = _copy(self._running)

    def steps(self) -> Iterator[Step]:
        steps = speculative_generate_step(
            mx.array([self._last]),
            *self._models,
            num_draft_tokens=self._num_draft_tokens,
            max_tokens=sys.maxsize if self._max_tokens < 0 else self._max_tokens,
            sampler=self._sampler,
            prompt_cache=[*self._running, *self._draft],
        )
        try:
            for step in steps:
                self._whole = _copy(self._running)
                yield Step(*step)
        except ValueError as error:
            # Interrupted between two tokens, mlx-lm's loop takes back once more what it has taken back before.
            raise error.__context__ or error from None

    def cache_at(self, offset: int) -> Caches:
        for c in self._whole:
            c.trim(c.offset[0] - offset)
        return [c.plain() for c in self._whole]


def _copy(cache: Caches) -> Caches:
    return [c.copy() for c in cache]


def _rewindable(cache: Caches) -> list[RewindableTTTCache]:
    return [RewindableTTTCache(c) for c in cache]
