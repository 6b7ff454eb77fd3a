"""The tokens that follow a text, from mlx-lm's loops, and the state that belongs to them.

mlx-lm's loops run the model on tokens that they have not yielded yet. When a caller stops early, the caches are too far
ahead. After an interrupt inside a step, some layers are ahead of others. So each decoder keeps copies of the state, to
return to the last token that it has yielded.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, speculative_generate_step

from ..network.cache import TTTCache, watched
from ..network.learning_scale import Scale
from ..network.model import Model
from ..network.rule import Signals
from .state import TextState, as_it_learns, rewindable

Sampler = Callable[[mx.array], mx.array]  # log-probabilities [n, V] -> n tokens
DecodedToken = tuple[int, mx.array, bool]  # a token, its log-probabilities [V], whether a draft model proposed it


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen, how many at most (-1 for no limit), how much is learned from them, and whether to look."""

    sampler: Sampler
    max_tokens: int
    learning: Scale = 1.0
    observe: bool = False


class PlainDecoder:
    """One token per call of the model."""

    def __init__(self, model: Model, start: TextState, sampling: Sampling, keep: bool):
        """
        Args:
            start: the text to continue. It is not changed.
            keep: whether `cache_at` will be called. Keeping states costs a copy of the open rows for every token,
                because rows that are kept cannot be written in place.
        """
        self._model, self._start, self._sampling, self._keep = model, start, sampling, keep
        self._running = _copies(start.cache)
        # mlx-lm samples at most two tokens more than it has yielded. So the last three states are enough.
        self._recent = deque([start.cache], maxlen=3)
        self._read_last: Signals  # of the last token of the last call
        self._surprisals: deque[mx.array] = deque()  # of the token yielded last and of those sampled since
        self._signals: deque[Signals] = deque()  # of the token yielded last and of those read since

    def tokens(self) -> Generator[DecodedToken, None, None]:
        """The tokens, one by one. The caller closes the generator."""
        reader: Any = self._read
        steps: Iterator[Any] = generate_step(
            mx.array(self._start.tokens[-1:]),
            reader,
            max_tokens=self._sampling.max_tokens,
            sampler=self._sample,
            prompt_cache=self._running,
        )
        for token, logprobs in steps:
            yield token, logprobs, False
            for of_tokens in (self._surprisals, self._signals):
                if of_tokens:
                    of_tokens.popleft()

    def _read(self, ids: mx.array, cache: list[TTTCache]) -> mx.array:
        """The model, as the loop calls it."""
        if not self._sampling.observe:
            return self._model(ids, cache, self._sampling.learning)
        with watched(cache) as seen:
            logits = self._model(ids, cache, self._sampling.learning)
        layers = [Signals.joined(signals) for signals in seen]
        self._read_last = Signals(*(mx.stack([x[0, -1] for x in y]) for y in zip(*layers, strict=True)))
        return logits

    @property
    def surprisal(self) -> float:
        """-log probability of the token yielded last, in nats."""
        return float(self._surprisals[0])

    @property
    def signals(self) -> Signals:
        """What the learners do with the token yielded last, [layers, H] each. The device may still compute it."""
        return self._signals[1]

    def _sample(self, logprobs: mx.array) -> mx.array:
        if self._keep:
            self._recent.append(_copies(self._running))
        token = self._sampling.sampler(logprobs)
        if self._sampling.observe:
            # Given to the device with the token. Later it would have to wait for the next token.
            self._surprisals.append(-mx.take_along_axis(logprobs, token[:, None], axis=-1)[0, 0])
            self._signals.append(self._read_last)
            mx.async_eval(token, self._surprisals[-1], self._signals[-1])
        return token

    def cache_at(self, offset: int) -> list[TTTCache]:
        """The state after `offset` tokens of the text: all tokens but the last one yielded.

        Before the first token it is the state that the decoder started from.
        """
        return next(cache for cache in self._recent if cache[0].offset[0] == offset)


class SpeculativeDecoder:
    """Several tokens per call of the model: a smaller model proposes them, and the model confirms or replaces them.

    The tokens are the model's own, whatever is proposed (Leviathan et al. 2023, arXiv 2211.17192). A proposal is
    accepted if it equals the token that the model samples. With a temperature, the paper accepts more proposals.
    """

    def __init__(
        self, models: tuple[Model, Model], start: TextState, draft: TextState, sampling: Sampling, num_draft_tokens: int
    ):
        """
        Args:
            models: the model, and the one that proposes.
            start, draft: the text to continue, as each of them has read it. Neither is changed.
            num_draft_tokens: proposals at a time; see `check_draft_model`.
        """
        self._models = as_it_learns(models[0], start.learning), as_it_learns(models[1], draft.learning)
        self._start, self._sampling, self._num_draft_tokens = start, sampling, num_draft_tokens
        self._running, self._draft = rewindable(start.cache), rewindable(draft.cache)
        self._complete = _copies(self._running)  # all layers are at the same token

    def tokens(self) -> Generator[DecodedToken, None, None]:
        """As in PlainDecoder."""
        max_tokens = self._sampling.max_tokens
        steps: Iterator[Any] = speculative_generate_step(
            mx.array(self._start.tokens[-1:]),
            *self._models,
            num_draft_tokens=self._num_draft_tokens,
            max_tokens=sys.maxsize if max_tokens < 0 else max_tokens,
            sampler=self._sampling.sampler,
            prompt_cache=[*self._running, *self._draft],
        )
        try:
            for step in steps:
                self._complete = _copies(self._running)
                yield step
        except ValueError as error:
            # After an interrupt, mlx-lm's loop takes the same tokens back a second time, which fails. The interrupt is
            # what the caller must see.
            raise error.__context__ or error from None

    def cache_at(self, offset: int) -> list[TTTCache]:
        """As in PlainDecoder."""
        for c in self._complete:
            c.trim(c.offset[0] - offset)
        if self._start.cache[0].is_trimmable():
            return list(self._complete)
        return [c.plain() for c in self._complete]


def most_draft_tokens(model: Model, draft_model: Model) -> int:
    """How many tokens may be proposed at a time. A cache can take back at most one mini-batch of tokens."""
    return min(model.args.mini_batch_size, draft_model.args.mini_batch_size)


def check_draft_model(model: Model, draft_model: Model, num_draft_tokens: int) -> None:
    """Check that a draft model can propose so many tokens for the model.

    Raises:
        ValueError: the vocabularies differ in size, or the number of tokens is not possible.
    """
    if draft_model.args.vocab_size != model.args.vocab_size:
        sizes = f"{draft_model.args.vocab_size} tokens, the model {model.args.vocab_size}"
        raise ValueError(f"the draft model has a vocabulary of {sizes}; it must be the same")
    most = most_draft_tokens(model, draft_model)
    if not 1 <= num_draft_tokens <= most:
        raise ValueError(f"num_draft_tokens is {num_draft_tokens}, expected 1 to {most}: more cannot be taken back")


def _copies(cache: list) -> list:
    return [c.copy() for c in cache]
