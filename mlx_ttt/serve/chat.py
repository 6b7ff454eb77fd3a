"""/v1/chat/completions and /v1/responses: messages, and the next one."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from .completions import finite
from .errors import APIError
from .jobs import Ask, Read, Written
from .sampling import Likely
from .schema import ChatRequest, Message, ResponseRequest
from .served import Answers, Choice, Exchange, Served


async def conversation(served: Served, messages: list[Message], continues: bool, param: str) -> list[int]:
    """Messages as token ids.

    Raises:
        APIError: the model has no chat template, or it refuses the messages.
    """
    vocabulary = served.engine.vocabulary
    if not vocabulary.has_chat_template:
        message = "the model has no chat template: use /v1/completions, or start the server with --chat-template FILE"
        raise APIError(400, message, param="model", code="no_chat_template")
    plain = [message.plain() for message in messages]
    try:
        prompt = await asyncio.to_thread(vocabulary.chat, plain, continues=continues)
    except ValueError as error:
        raise APIError(400, f"{param}: {error}", param=param, code="invalid_value") from None
    served.check_prompt(prompt, param)
    if not prompt:
        raise APIError(400, f"{param}: the chat template makes nothing of these", param=param, code="invalid_value")
    return prompt


@dataclass
class Chat:
    """A chat request on its way to its answer."""

    served: Served
    request: ChatRequest
    prompt: list[int]
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    async def of(cls, served: Served, request: ChatRequest) -> Chat:
        """Check what the schema cannot.

        Raises:
            APIError: it cannot be done.
        """
        served.check_stream_options(request)
        if request.top_logprobs and not request.logprobs:
            raise APIError(400, "top_logprobs: only with logprobs", param="top_logprobs")
        served.check_samples(request.n or 1)
        served.check_states(request, request.n or 1)
        prompt = await conversation(served, request.messages, request.state is not None, "messages")
        return cls(served, request, prompt)

    def asks(self) -> list[Ask]:
        request, served = self.request, self.served
        sampling = served.sampling(
            request,
            bias=served.bias(request.logit_bias),
            presence=request.presence_penalty,
            frequency=request.frequency_penalty,
        )
        limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        return [
            Ask(
                self.prompt,
                served.tokens(limit),
                request.n or 1,
                sampling,
                request.stops,
                (request.top_logprobs or 0) if request.logprobs else None,
                False,
                request.learning,
                request.state,
                request.save_state,
            )
        ]

    async def answer(self, exchange: Exchange, asks: list[Ask]) -> dict[str, Any]:
        answers = Answers.to(asks)
        await answers.complete(exchange)
        choices = [self._choice(index, choice) for index, choice in enumerate(answers.choices[0])]
        return {**self._head("chat.completion"), "choices": choices, "usage": answers.usage, **answers.state}

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(choice.tokens),
            "finish_reason": choice.finish,
        }

    async def stream(self, exchange: Exchange, asks: list[Ask]) -> AsyncIterator[dict[str, Any]]:
        request, answers = self.request, Answers.to(asks)
        async for _, event in exchange.events():
            answers.add(0, event)
            if isinstance(event, Read):
                for index in range(asks[0].samples):
                    yield self._part(index, {"role": "assistant", "content": ""}, None, None)
            elif isinstance(event, Written):
                tokens = [] if event.token is None else [event.token]
                delta = {"content": event.text} if event.text else {}
                yield self._part(event.sample, delta, self._logprobs(tokens), event.finish)
        usage: dict[str, Any] = {}
        if request.stream_options is not None and request.stream_options.include_usage:
            usage = {"usage": answers.usage}
        if usage or answers.saved is not None:
            yield {**self._head("chat.completion.chunk"), "choices": [], **usage, **answers.state}

    def _part(self, index: int, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name}

    def _logprobs(self, tokens: list[Likely | int]) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return {"content": [self._told(token) for token in tokens if isinstance(token, Likely)], "refusal": None}

    def _told(self, token: Likely) -> dict[str, Any]:
        top = [self._one(*likely) for likely in token.top]
        return {**self._one(token.token, token.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self.served.engine.vocabulary.name(token)
        return {"token": text, "logprob": finite(logprob), "bytes": list(data)}


@dataclass
class Respond:
    """A request of the responses API on its way to its answer: text in, text out."""

    served: Served
    request: ResponseRequest
    prompt: list[int]
    id: str = field(default_factory=lambda: f"resp_{secrets.token_hex(12)}")
    item: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    async def of(cls, served: Served, request: ResponseRequest) -> Respond:
        """Check what the schema cannot.

        Raises:
            APIError: it cannot be done.
        """
        served.check_states(request, 1)
        messages = [Message(role="user", content=request.input)] if isinstance(request.input, str) else request.input
        if request.instructions:
            messages = [Message(role="system", content=request.instructions), *messages]
        return cls(served, request, await conversation(served, messages, request.state is not None, "input"))

    def asks(self) -> list[Ask]:
        request = self.request
        return [
            Ask(
                self.prompt,
                self.served.tokens(request.max_output_tokens, "max_output_tokens"),
                sampling=self.served.sampling(request),
                learning=request.learning,
                state=request.state,
                save_state=request.save_state,
            )
        ]

    async def answer(self, exchange: Exchange, asks: list[Ask]) -> dict[str, Any]:
        answers = Answers.to(asks)
        await answers.complete(exchange)
        return self._response(answers)

    async def stream(self, exchange: Exchange, asks: list[Ask]) -> AsyncIterator[dict[str, Any]]:
        answers, number = Answers.to(asks), 0
        place = {"item_id": self.item, "output_index": 0, "content_index": 0}

        def event(kind: str, **content: Any) -> dict[str, Any]:
            nonlocal number
            number += 1
            return {"type": f"response.{kind}", "sequence_number": number - 1, **content}

        empty = {**self._response(answers), "output": [], "status": "in_progress", "usage": None}
        yield event("created", response=empty)
        yield event("in_progress", response=empty)
        begun = {"id": self.item, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        yield event("output_item.added", output_index=0, item=begun)
        yield event("content_part.added", **place, part=_part(""))
        async for _, told in exchange.events():
            answers.add(0, told)
            if isinstance(told, Written) and told.text:
                yield event("output_text.delta", **place, delta=told.text, logprobs=[])
        response, text = self._response(answers), answers.choices[0][0].text
        yield event("output_text.done", **place, text=text, logprobs=[])
        yield event("content_part.done", **place, part=_part(text))
        yield event("output_item.done", output_index=0, item=response["output"][0])
        yield event("completed" if response["status"] == "completed" else "incomplete", response=response)

    def _response(self, answers: Answers) -> dict[str, Any]:
        request, choice = self.request, answers.choices[0][0]
        cut = choice.finish == "length"
        status = "incomplete" if cut else "completed"
        message = {"id": self.item, "type": "message", "role": "assistant", "status": status}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "model": self.served.name,
            "output": [{**message, "content": [_part(choice.text)]}],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature or 0.0,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": {
                "input_tokens": answers.prompt_tokens,
                "input_tokens_details": {"cached_tokens": answers.cached_tokens},
                "output_tokens": answers.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": answers.prompt_tokens + answers.completion_tokens,
            },
            **answers.state,
        }


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
