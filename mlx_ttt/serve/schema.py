"""What a request may say: every field with its type and range. Nothing runs before a request has passed this.

The names are those of OpenAI's API. Ours are `state`, `save_state`, `learning`, and `top_k`, `min_p` and
`repetition_penalty`, as other servers have them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import APIError
from .states import NAME

Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
StateName = Annotated[str, Field(pattern=f"^{NAME}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]

LEARNING = Field(default=None, ge=0, le=100)

# Known to OpenAI's API, and not done here. Each with what to do.
_REFUSED = {
    "suffix": "text cannot be filled in before a suffix: the model reads from left to right",
    "tools": "tools cannot be called",
    "tool_choice": "tools cannot be called",
    "functions": "functions cannot be called",
    "function_call": "functions cannot be called",
    "audio": "there is only text",
    "modalities": "there is only text",
    "prediction": "predicted output is not used; leave it out",
    "web_search_options": "there is no web search",
    "previous_response_id": "responses are not kept: save a state with save_state, and go on from it with state",
    "conversation": "conversations are not kept: save a state with save_state, and go on from it with state",
    "background": "responses are not made in the background",
    "include": "there is nothing else to include",
    "reasoning": "there is no reasoning",
    "prompt": None,  # of /v1/responses: a prompt template
}
_NOTHING: tuple[Any, ...] = (None, [], {}, False, "none", "auto", ["text"])


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Generation(_Body):
    """What all requests that generate have."""

    model: str | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64)
    stream: bool | None = None
    learning: float | None = LEARNING
    state: StateName | None = None
    save_state: StateName | None = None
    # Of no effect here.
    user: Any = None
    metadata: dict[str, str] | None = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None


class _Sampled(_Generation):
    """What both kinds of completions have."""

    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=2**16)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    logit_bias: dict[str, Bias] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(_Sampled):
    prompt: (
        str | Tokens | Annotated[list[str], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)] | None
    ) = None
    best_of: int | None = Field(default=None, ge=1, le=2**16)
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)


class TextPart(_Body):
    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = ""
    refusal: str = ""
    annotations: Any = None
    logprobs: Any = None


class Message(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["message"] | None = None
    id: Any = None
    status: Any = None
    refusal: Any = None
    annotations: Any = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text or part.refusal for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Messages = Annotated[list[Message], Field(min_length=1)]


class TextFormat(_Body):
    type: Literal["text"]


class ChatRequest(_Sampled):
    messages: Messages
    max_completion_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: TextFormat | None = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None


class ResponseText(_Body):
    format: TextFormat | None = None
    verbosity: Any = None


class ResponseRequest(_Generation):
    input: str | Messages
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    text: ResponseText | None = None
    truncation: Literal["disabled"] | None = None
    top_logprobs: Literal[0] | None = None
    parallel_tool_calls: Any = None
    stream_options: StreamOptions | None = None


class TokenizeRequest(_Body):
    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: list[Token]


class BranchRequest(_Body):
    name: StateName


B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], body: bytes) -> B:
    """A request's body as a request.

    Raises:
        APIError: it is not JSON, or a field is not what it should be. The message names the field.
    """
    try:
        content = pydantic_core.from_json(body)
    except ValueError as error:
        raise APIError(400, f"the body is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise APIError(400, "the body is not a JSON object")
    for name in [name for name in content if name in _REFUSED and name not in kind.model_fields]:
        value = content.pop(name)
        if value not in _NOTHING:
            why = _REFUSED[name] or "not a field of this request"
            raise APIError(400, f"{name}: {why}", param=name, code="unsupported_parameter")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> APIError:
    """The first thing that is wrong, in one line."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    name = str(first["loc"][0]) if first["loc"] else None
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        return APIError(400, f"{_short(name)}: there is no such field", param=_short(name), code="unknown_parameter")
    wrong = []
    for one in found:
        if one["loc"][:1] == first["loc"][:1] and one["msg"] not in wrong:
            wrong.append(one["msg"])
    what = "; or ".join(wrong[:4])
    return APIError(400, f"{_short(name)}: {what[:1].lower()}{what[1:]}", param=_short(name), code="invalid_value")


def _short(name: str | None) -> str:
    """A field's name as it may be shown: whoever sends it chooses it."""
    return "body" if name is None else ascii(name)[1:-1][:100]
