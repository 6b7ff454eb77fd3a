"""What the server's front and its generation loop say to each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from .sampling import Likely, Sampling


@dataclass(frozen=True)
class Ask:
    """A prompt, and what is wanted of it. Everything in it has been checked.

    Attributes:
        prompt: token ids.
        samples: how many continuations, each with a seed of its own.
        max_tokens: of each; 0 only reads.
        stop: texts at which a continuation ends.
        logprobs: how many likely tokens to tell of at each token; None: no log probabilities at all.
        prompt_logprobs: tell of the prompt's tokens, too.
        learning: the learning scale of what is read and written; None: as the state says.
        state: the name of a saved state to go on from.
        save_state: the name that the state after the text is saved under. Only with one sample.
    """

    prompt: Sequence[int]
    max_tokens: int
    samples: int = 1
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    learning: float | None = None
    state: str | None = None
    save_state: str | None = None


@dataclass(frozen=True)
class Read:
    """The prompt has been read.

    Attributes:
        tokens: of the prompt.
        cached: how many of them a state from before had read.
        logprobs: of each token but the first, if they were asked for.
    """

    tokens: int
    cached: int
    logprobs: list[Likely] | None = None


@dataclass(frozen=True)
class Written:
    """One more token of a continuation.

    Attributes:
        sample: which continuation.
        text: what the token makes visible, often nothing.
        token: the token, with its log probability if asked for. None if nothing was to be written.
        finish: "stop" or "length" if the continuation ends here.
    """

    sample: int
    text: str
    token: Likely | int | None
    finish: str | None = None


@dataclass(frozen=True)
class Saved:
    """The state has been saved; a text of so many tokens."""

    name: str
    tokens: int


@dataclass(frozen=True)
class Failed:
    """The job has ended early. Nothing comes after this."""

    status: int
    message: str
    code: str | None = None


@dataclass(frozen=True)
class Done:
    """All of the job is done. Nothing comes after this."""


Event = Read | Written | Saved | Failed | Done


class Job:
    """An ask on its way through the loop.

    Attributes:
        cancelled: set by the front when nobody waits any more. The loop drops the job before its next step.
        unfinished: continuations that have not ended.
    """

    def __init__(self, ask: Ask, listen: Callable[[Event], Any], seconds: float):
        """
        Args:
            listen: called by the loop, in its thread, with every event.
            seconds: the time that the job may take, waiting included.
        """
        self.ask, self._listen = ask, listen
        self.started = time.monotonic()
        self.deadline = self.started + seconds
        self.unfinished = ask.samples
        self.cancelled = False
        self.ended = False

    def tell(self, event: Event) -> None:
        """Tell the front, unless the job has ended."""
        if self.ended:
            return
        self.ended = isinstance(event, Failed | Done)
        if not self.cancelled:
            self._listen(event)

    @property
    def is_over(self) -> bool:
        """Whether the loop need do nothing more for it."""
        return self.ended or self.cancelled
