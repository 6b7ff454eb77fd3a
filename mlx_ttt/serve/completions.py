"""/v1/completions: a prompt, or several, and what follows."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any

from .errors import APIError
from .jobs import Ask, Read, Written
from .sampling import Likely
from .schema import CompletionRequest
from .served import Answers, Choice, Exchange, Served

LEAST_LOGPROB = -9999.0  # JSON has no infinity
MOST_TOLD = 65_536  # tokens of a prompt whose log probabilities are told: they take a hundred times their memory


@dataclass
class Completion:
    """A request on its way to its answer."""

    served: Served
    request: CompletionRequest
    prompts: list[list[int]]
    texts: list[str]  # of the prompts, if they are to be echoed
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    async def of(cls, served: Served, request: CompletionRequest) -> Completion:
        """Check what the schema cannot.

        Raises:
            APIError: it cannot be done.
        """
        served.check_stream_options(request)
        if request.prompt is None and request.state is None:
            raise APIError(400, "prompt: there is none", param="prompt", code="invalid_value")
        n, best_of = request.n or 1, request.best_of or request.n or 1
        if best_of < n:
            raise APIError(400, "best_of: must not be less than n", param="best_of", code="invalid_value")
        if best_of > n and request.stream:
            raise APIError(400, "best_of: the best is known at the end, so not with stream", param="best_of")
        served.check_samples(best_of, "best_of" if request.best_of else "n")
        prompts = await asyncio.to_thread(_prompts, served, request)
        for prompt in prompts:
            served.check_prompt(prompt)
            if request.echo and request.logprobs is not None and len(prompt) > MOST_TOLD:
                raise APIError(400, f"logprobs: of a prompt of {MOST_TOLD:,} tokens at most", param="logprobs")
        served.check_states(request, len(prompts) * best_of)
        texts = await asyncio.to_thread(_texts, served, request, prompts) if request.echo else []
        return cls(served, request, prompts, texts)

    def asks(self) -> list[Ask]:
        request, served = self.request, self.served
        n, best_of = request.n or 1, request.best_of or request.n or 1
        sampling = served.sampling(
            request,
            bias=served.bias(request.logit_bias),
            presence=request.presence_penalty,
            frequency=request.frequency_penalty,
        )
        ask = Ask(
            (),
            served.tokens(request.max_tokens),
            best_of,
            sampling,
            request.stops,
            0 if best_of > n and request.logprobs is None else request.logprobs,
            bool(request.echo) and request.logprobs is not None,
            request.learning,
            request.state,
            request.save_state,
        )
        return [Ask(**{**vars(ask), "prompt": prompt}) for prompt in self.prompts]

    async def answer(self, exchange: Exchange, asks: list[Ask]) -> dict[str, Any]:
        """The whole answer."""
        answers, n = Answers.to(asks), self.request.n or 1
        await answers.complete(exchange)
        choices: list[dict[str, Any]] = []
        for number, written in enumerate(answers.choices):
            best = sorted(written, key=lambda choice: -choice.mean_logprob)[:n] if len(written) > n else written
            for choice in best:
                choices.append(self._choice(len(choices), number, choice, answers.reads[number]))
        return {**self._head(), "choices": choices, "usage": answers.usage, **answers.state}

    def _choice(self, index: int, number: int, choice: Choice, read: Read) -> dict[str, Any]:
        echo = self.texts[number] if self.request.echo else ""
        logprobs = None
        if self.request.logprobs is not None:
            tokens = [*(self._prompt_tokens(number, read) if self.request.echo else ()), *choice.tokens]
            logprobs = self._logprobs(tokens, 0)
        return {"index": index, "text": echo + choice.text, "logprobs": logprobs, "finish_reason": choice.finish}

    async def stream(self, exchange: Exchange, asks: list[Ask]) -> AsyncIterator[dict[str, Any]]:
        """The answer, token by token."""
        request, answers, offsets = self.request, Answers.to(asks), [0] * sum(ask.samples for ask in asks)
        samples = asks[0].samples
        async for number, event in exchange.events():
            answers.add(number, event)
            if isinstance(event, Read) and request.echo:
                tokens = list(self._prompt_tokens(number, event))
                for index in range(number * samples, (number + 1) * samples):
                    yield self._part(index, self.texts[number], tokens, None, offsets)
            if isinstance(event, Written):
                tokens = [] if event.token is None else [event.token]
                yield self._part(number * samples + event.sample, event.text, tokens, event.finish, offsets)
        if request.stream_options is not None and request.stream_options.include_usage:
            yield {**self._head(), "choices": [], "usage": answers.usage, **answers.state}
        elif answers.saved is not None:
            yield {**self._head(), "choices": [], **answers.state}

    def _part(self, index: int, text: str, tokens: list[Any], finish: str | None, offsets: list[int]) -> dict[str, Any]:
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = self._logprobs(tokens, offsets[index])
            offsets[index] += sum(map(len, logprobs["tokens"]))
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head(), "choices": [choice]}

    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name}

    def _prompt_tokens(self, number: int, read: Read) -> Iterable[Likely | int]:
        """The prompt's tokens, with log probabilities but for the first of a text: nothing came before it."""
        known = read.logprobs or []
        first = self.prompts[number][: len(self.prompts[number]) - len(known)]
        return [*first, *known]

    def _logprobs(self, tokens: Iterable[Likely | int], offset: int) -> dict[str, Any]:
        """OpenAI's form: a list for each thing that is told of a token."""
        name = self.served.engine.vocabulary.name
        told: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            text = name(token.token if isinstance(token, Likely) else token)[0]
            told["tokens"].append(text)
            told["text_offset"].append(offset)
            offset += len(text)
            if isinstance(token, Likely):
                told["token_logprobs"].append(finite(token.logprob))
                top = {name(t)[0]: finite(value) for t, value in reversed(token.top)}
                # lm-evaluation-harness looks whether the token is the most likely one.
                told["top_logprobs"].append({**top, text: finite(token.logprob)} if self.request.logprobs else {})
            else:
                told["token_logprobs"].append(None)
                told["top_logprobs"].append(None)
        return told


def finite(logprob: float) -> float:
    """As JSON can have it."""
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _prompts(served: Served, request: CompletionRequest) -> list[list[int]]:
    """The prompts of a request as token ids."""
    given: Any = request.prompt if request.prompt is not None else []
    if isinstance(given, str) or not given or isinstance(given[0], int):
        given = [given]
    encode, continues = served.engine.vocabulary.encode, request.state is not None
    prompts = [encode(p, continues=continues) if isinstance(p, str) else p for p in given]
    if not continues and not all(prompts):
        raise APIError(400, "prompt: it is empty, and the tokenizer puts nothing in front", param="prompt")
    return prompts


def _texts(served: Served, request: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    """The prompts as text."""
    given: Any = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if given and isinstance(given[0], str):
        return list(given)
    return [served.engine.vocabulary.decode(prompt) for prompt in prompts]
