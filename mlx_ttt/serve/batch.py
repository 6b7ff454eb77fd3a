"""The continuations that are written in one batch, and the steps that a device has been given for them.

A step is given to the device before the host has seen the token of the step before. So the tokens that a step reads are
an array like the state, and who has ended is known a step late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from ..network.cache import TTTCache
from ..text.state import TextState
from ..text.visible import VisibleText
from .jobs import Failed, Job
from .sampling import LogitChanges, choose, token_seed

BROKEN = "the model failed on this request; the server's log says why"


@dataclass(eq=False)
class Writer:
    """A continuation that is being written.

    Attributes:
        start: what the prompt follows.
        context: tokens before the first one written: the prompt, behind the last few tokens of a saved state.
        learning: the learning scale of all that is read and written.
        written: tokens so far.
        asked: tokens so far, with those that the device still computes.
        changes: of the logits, once they are needed.
    """

    job: Job
    sample: int
    start: TextState
    context: list[int]
    learning: float
    text: VisibleText
    written: list[int] = field(default_factory=list)
    asked: int = 0
    changes: LogitChanges | None = None
    over: bool = False

    @property
    def last(self) -> int:
        """The token that is still unread."""
        return self.written[-1] if self.written else self.context[-1]

    @property
    def seed(self) -> int:
        """Each sample has a seed of its own."""
        seed = self.job.ask.sampling.seed
        return token_seed(seed, -1 - self.sample) if self.sample else seed

    @property
    def is_over(self) -> bool:
        return self.over or self.job.is_over

    @property
    def is_asked_for(self) -> bool:
        """Whether the device has been given all of its tokens."""
        return self.asked == self.job.ask.max_tokens

    @property
    def is_choosy(self) -> bool:
        """Whether it takes other tokens than the most likely ones."""
        sampling = self.job.ask.sampling
        return sampling.changes_logits or not sampling.is_greedy

    def chosen(self, logits: mx.array) -> mx.array:
        """Its next token, from logits [V]."""
        sampling = self.job.ask.sampling
        if not sampling.changes_logits:
            return choose(logits, sampling, self.seed, self.asked)
        if self.changes is None:
            self.changes = LogitChanges(sampling, self.job.ask.prompt, self.written, logits.shape[0])
        token = choose(self.changes.changed(logits), sampling, self.seed, self.asked)
        self.changes.add(token)
        return token

    def fail(self, message: str = BROKEN, status: int = 500) -> None:
        self.over = True
        self.job.tell(Failed(status, message))

    def forget_asked(self) -> None:
        """What the host has not seen will not come."""
        self.asked, self.changes = len(self.written), None


class Choice(NamedTuple):
    """A token that has been chosen, to be computed yet: all arrays.

    Attributes:
        token: its id, a number.
        logprob, top, values: its log probability and the likeliest tokens with theirs, if asked for.
    """

    token: mx.array
    logprob: mx.array | None = None
    top: mx.array | None = None
    values: mx.array | None = None

    @property
    def told(self) -> list[mx.array]:
        return [x for x in self[1:] if x is not None]


@dataclass(frozen=True, eq=False)
class Step:
    """A token of each continuation, which the device has been given to compute.

    Attributes:
        tokens: [B]
        choices: the same, with what is told of them.
        cache: the state after the tokens before these. It is that of those who end with this token.
    """

    writers: list[Writer]
    tokens: mx.array
    choices: list[Choice]
    cache: list[TTTCache]

    @property
    def arrays(self) -> list[mx.array]:
        """All that the host will look at."""
        return [self.tokens, *(x for choice in self.choices for x in choice.told)]

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it."""
        return all(writer.is_over for writer in self.writers)


class Batch:
    """Continuations, their state, and the token of each that is still unread.

    Attributes:
        cache: a batch of as many sequences as there are writers; empty if there are none.
        unread: [B]; it may be that the device still computes them.
    """

    def __init__(self, writers: Sequence[Writer] = (), cache: Sequence[TTTCache] = ()):
        """
        Args:
            cache: the state of each writer's text up to its last token, which the host knows.
        """
        self.writers, self.cache = list(writers), list(cache)
        self.unread = mx.array([writer.last for writer in writers], mx.uint32)

    def keep(self, indices: list[int]) -> None:
        """Go on with these writers only."""
        if len(indices) == len(self.writers):
            return
        self.writers = [self.writers[i] for i in indices]
        if not indices:
            self.cache = []
            return
        self.unread = self.unread[mx.array(indices)]
        for c in self.cache:
            c.filter(indices)

    def extend(self, other: Batch) -> None:
        """Take in the writers of another batch."""
        if self.writers and other.writers:
            self.cache = merged([self.cache, other.cache])
            self.unread = mx.concatenate([self.unread, other.unread])
        elif other.writers:
            self.cache, self.unread = other.cache, other.unread
        self.writers = self.writers + other.writers

    @property
    def scale(self) -> Any:
        """The learning scale as the model takes it."""
        return scale([writer.learning for writer in self.writers])


def merged(caches: Sequence[list[TTTCache]]) -> list[TTTCache]:
    """The sequences of several lists of caches in one, layer by layer."""
    if len(caches) == 1:
        return [c.copy() for c in caches[0]]
    return [layers[0].merge(layers) for layers in zip(*caches, strict=True)]


def scale(scales: list[float]) -> Any:
    """The learning scale as the model takes it: one number if it is 1 for all, which costs nothing."""
    return 1.0 if all(scale == 1 for scale in scales) else scales
