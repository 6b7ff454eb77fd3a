"""A model that the server was started with, and what its requests may ask for."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .engine import Engine
from .errors import APIError
from .jobs import Ask, Done, Event, Failed, Job, Read, Saved, Written
from .sampling import Likely, Sampling
from .states import StateRefused, States
from .worker import Worker

if TYPE_CHECKING:
    from .schema import ChatRequest, CompletionRequest, _Generation


@dataclass(frozen=True)
class Limits:
    """What a request may ask for at most.

    Attributes:
        body: bytes of a request.
        prompt: tokens of a prompt.
        max_tokens, default_tokens: tokens of a continuation; so many if the request does not say.
        seconds: from a request to its complete answer.
        requests: at a time, over all clients.
    """

    body: int = 16 << 20
    prompt: int = 1_000_000
    max_tokens: int = 32_768
    default_tokens: int = 512
    seconds: float = 600.0
    requests: int = 1000


@dataclass(frozen=True)
class Served:
    """A model by the name that requests have for it."""

    name: str
    engine: Engine
    worker: Worker
    limits: Limits
    created: int

    @property
    def states(self) -> States:
        """
        Raises:
            APIError: the server keeps no states.
        """
        if self.engine.states is None:
            raise APIError(400, "this server keeps no states: start it with --states FOLDER", code="no_states")
        return self.engine.states

    def sampling(self, request: _Generation, **more: Any) -> Sampling:
        """How a request's tokens are chosen. Without a temperature, the most likely one is taken."""
        given = {
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": None if request.top_k is None else max(request.top_k, 0),
            "min_p": request.min_p,
            "repetition": request.repetition_penalty,
            "seed": secrets.randbits(64) if request.seed is None else request.seed % 2**64,
            **more,
        }
        return Sampling(**{name: value for name, value in given.items() if value is not None})

    def bias(self, given: dict[str, float] | None) -> dict[int, float] | None:
        """The `logit_bias` of a request, by token."""
        V, bias = self.engine.model.args.vocab_size, {}
        for name, value in (given or {}).items():
            if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < V):
                message = f"logit_bias: {ascii(name)[:50]} is no token of the model, which has 0 to {V - 1}"
                raise APIError(400, message, param="logit_bias", code="invalid_value")
            bias[int(name)] = value
        return bias or None

    def tokens(self, asked: int | None, param: str = "max_tokens") -> int:
        """How many tokens a continuation may have."""
        if asked is None:
            return min(self.limits.default_tokens, self.limits.max_tokens)
        if asked > self.limits.max_tokens:
            message = f"{param}: this server writes {self.limits.max_tokens} tokens at most"
            raise APIError(400, message, param=param, code="invalid_value")
        return asked

    @staticmethod
    def check_stream_options(request: CompletionRequest | ChatRequest) -> None:
        if request.stream_options is not None and not request.stream:
            raise APIError(400, "stream_options: only with stream", param="stream_options")

    def check_samples(self, count: int, param: str = "n") -> int:
        """That so many continuations of a prompt have room."""
        if count > self.engine.room.writing:
            message = f"{param}: this server writes {self.engine.room.writing} texts at a time at most"
            raise APIError(400, message, param=param, code="invalid_value")
        return count

    def check_prompt(self, prompt: Sequence[int], param: str = "prompt") -> None:
        V = self.engine.model.args.vocab_size
        if len(prompt) > self.limits.prompt:
            message = f"{param}: it has {len(prompt):,} tokens; this server reads {self.limits.prompt:,} at most"
            raise APIError(400, message, param=param, code="context_length_exceeded")
        if prompt and max(prompt) >= V:
            message = f"{param}: token {max(prompt)} is outside the model's vocabulary of {V}"
            raise APIError(400, message, param=param, code="invalid_value")

    def check_states(self, request: _Generation, texts: int) -> None:
        """That the states which a request names can be read and written."""
        if request.state is not None:
            try:
                self.states.existing(request.state)
            except StateRefused as error:
                raise APIError(error.status, str(error), param="state", code="state_not_found") from None
        if request.save_state is not None:
            self.states.path(request.save_state)
            if texts != 1:
                message = "save_state: a state is that of one text; ask for one prompt and one continuation"
                raise APIError(400, message, param="save_state", code="invalid_value")

    def exchange(self, asks: Sequence[Ask]) -> Exchange:
        """Hand asks to the loop.

        Raises:
            APIError: there is no room for all of them.
        """
        if len(asks) > self.engine.room.queue:
            raise APIError(400, f"prompt: this server takes {self.engine.room.queue} prompts at a time at most")
        return Exchange(self, asks)


class Exchange:
    """The jobs of a request, and what the loop tells of them."""

    def __init__(self, served: Served, asks: Sequence[Ask]):
        self._served, self._loop = served, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        seconds = served.limits.seconds
        self._jobs = [Job(ask, self._listener(i), seconds) for i, ask in enumerate(asks)]
        if not served.worker.submit(served.engine, self._jobs):
            raise APIError(429, "too many requests are waiting; come again later", code="queue_full")

    def _listener(self, number: int) -> Any:
        def listen(event: Event) -> None:
            try:
                self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))
            except RuntimeError:  # the server has ended
                self._jobs[number].cancelled = True

        return listen

    async def events(self) -> AsyncIterator[tuple[int, Read | Written | Saved]]:
        """What happens, each with the number of its prompt, until all is done.

        Raises:
            APIError: one of the jobs failed. The others are left.
        """
        open_jobs = len(self._jobs)
        while open_jobs:
            number, event = await self._events.get()
            if isinstance(event, Failed):
                raise APIError(event.status, event.message, code=event.code)
            if isinstance(event, Done):
                open_jobs -= 1
            else:
                yield number, event

    def leave(self) -> None:
        """Nobody waits for the answers any more."""
        for job in self._jobs:
            job.cancelled = True
        self._served.worker.wake()


@dataclass
class Choice:
    """A continuation, as far as it has come."""

    text: str = ""
    tokens: list[Likely | int] = field(default_factory=list)
    finish: str | None = None

    def add(self, event: Written) -> None:
        self.text += event.text
        if event.token is not None:
            self.tokens.append(event.token)
        self.finish = event.finish or self.finish

    @property
    def mean_logprob(self) -> float:
        values = [t.logprob for t in self.tokens if isinstance(t, Likely)]
        return sum(values) / len(values) if values else 0.0


@dataclass
class Answers:
    """All that came of a request's prompts."""

    choices: list[list[Choice]]  # of each prompt
    reads: dict[int, Read] = field(default_factory=dict)
    saved: Saved | None = None

    @classmethod
    def to(cls, asks: Sequence[Ask]) -> Answers:
        return cls([[Choice() for _ in range(ask.samples)] for ask in asks])

    def add(self, number: int, event: Read | Written | Saved) -> None:
        if isinstance(event, Read):
            self.reads[number] = event
        elif isinstance(event, Saved):
            self.saved = event
        else:
            self.choices[number][event.sample].add(event)

    async def complete(self, exchange: Exchange) -> None:
        """Wait for all of it."""
        async for number, event in exchange.events():
            self.add(number, event)

    @property
    def prompt_tokens(self) -> int:
        return sum(read.tokens for read in self.reads.values())

    @property
    def cached_tokens(self) -> int:
        return sum(read.cached for read in self.reads.values())

    @property
    def completion_tokens(self) -> int:
        return sum(len(choice.tokens) for choices in self.choices for choice in choices)

    @property
    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    @property
    def state(self) -> dict[str, Any]:
        """What is told of the state that was saved, if one was."""
        return {} if self.saved is None else {"state": {"id": self.saved.name, "tokens": self.saved.tokens}}
