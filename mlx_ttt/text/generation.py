"""Text in, text out: read a prompt, and write what follows it, on mlx-lm's generation loops."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse, generation_stream, wired_limit
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..network.learning_scale import Scale
from ..network.model import Model
from ..network.rule import Signals
from .decoding import PlainDecoder, Sampler, Sampling, SpeculativeDecoder, check_draft_model
from .state import Progress, TextState, read, token_ids
from .visible import VisibleText


@dataclass(kw_only=True)
class ObservedResponse(GenerationResponse):
    """A response with what the model has learned from its token.

    Attributes:
        surprisal: -log probability of the token, in nats.
        signals: loss, lr and write_norm, [layers, H] each; see `mlx_ttt.observe`. The model reads the token while its
            response is here: to look at them waits for that. Look when the next response has come, and nothing waits.
    """

    surprisal: float
    signals: Signals


def stream_generate(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int] = "",
    *,
    state: TextState | None = None,
    max_tokens: int = 256,
    sampler: Sampler = greedy_sampler,
    stop: str | Sequence[str] = (),
    draft_model: Model | None = None,
    draft_state: TextState | None = None,
    num_draft_tokens: int = 3,
    progress: Progress | None = None,
    observe: bool = False,
    learning: Scale | None = None,
) -> Iterator[GenerationResponse]:
    """Continue a text. Yields one response for each token, as mlx_lm.stream_generate does.

    The text of a response never ends inside a UTF-8 character and never holds a part of a stop string.

    Args:
        tokenizer: an mlx-lm TokenizerWrapper, as `load` returns it.
        prompt: the text to continue, or what to read after `state` first; see `read`.
        state: what has been read before. It is updated in place. However the generation ends, the state then includes
            all tokens that were yielded.
        max_tokens: the largest number of tokens; -1 for no limit.
        sampler: log-probabilities [n, V] -> n tokens, as mlx_lm's make_sampler returns it. Greedy by default.
        stop: one or more strings at which the text ends. They are not part of the text, but the state includes them.
        draft_model: a smaller model of the same vocabulary that proposes tokens. A greedy text stays the same, and a
            sampled one keeps its distribution.
        draft_state: what the draft model has read of the same text. It is not changed. By default the draft model reads
            the last few tokens of `state` and the prompt. It knows nothing of the text before them, so its proposals
            are worse.
        num_draft_tokens: how many tokens are proposed at a time.
        progress: see `read`.
        observe: whether to say what the model learns from each token. Each response is an `ObservedResponse` then.
        learning: the learning scale of all tokens that are read and written; see `Model.__call__`. By default that of
            `state`.

    Raises:
        ValueError: max_tokens is 0, or less than -1; the draft model, its state or number of tokens does not fit; there
            is a draft model with `observe` or `learning`; or `learning` is no learning scale.
        PromptError: see `read`.
    """
    if max_tokens == 0 or max_tokens < -1:
        raise ValueError(f"max_tokens is {max_tokens}: to read without writing, use read(); -1 is no limit")
    if draft_model is not None:
        if observe or learning is not None:
            raise ValueError("observe and learning do not go together with a draft model, which reads tokens ahead")
        check_draft_model(model, draft_model, num_draft_tokens)
    started = time.perf_counter()
    before, context = (0, []) if state is None else (len(state), state.tokens)
    prompt = token_ids(tokenizer, prompt, continues=before > 0)
    start = read(model, tokenizer, prompt, state, progress=progress, learning=learning)
    sampling = Sampling(sampler, max_tokens, start.learning if learning is None else learning, observe)
    decoder: PlainDecoder | SpeculativeDecoder
    if draft_model is None:
        decoder = PlainDecoder(model, start, sampling, keep=state is not None)
    else:
        if draft_state is None:
            draft_state = read(draft_model, tokenizer, context + prompt)
        if draft_state.tokens[-1:] != start.tokens[-1:]:
            raise ValueError("draft_state has read another text")
        decoder = SpeculativeDecoder((model, draft_model), start, draft_state, sampling, num_draft_tokens)

    text = VisibleText(tokenizer, start.tokens, [stop] if isinstance(stop, str) else stop)
    written: list[int] = []
    first_at = 0.0  # when the first token came: the time up to then is the prompt's
    streams: list[Any] = [generation_stream]
    try:
        with closing(decoder.tokens()) as tokens, wired_limit(model, streams):
            for token, logprobs, from_draft in tokens:
                first_at = first_at or time.perf_counter()
                written.append(token)
                is_eos = token in tokenizer.eos_token_ids
                segment, finish = text.after(token, is_eos=is_eos, is_last=len(written) == max_tokens)
                response = GenerationResponse(
                    text=segment,
                    token=token,
                    logprobs=logprobs,
                    from_draft=from_draft,
                    prompt_tokens=len(start) - before,
                    prompt_tps=(len(start) - before) / (first_at - started),
                    generation_tokens=len(written),
                    generation_tps=len(written) / (time.perf_counter() - first_at),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=finish,
                )
                if isinstance(decoder, PlainDecoder) and observe:
                    fields = vars(response)
                    response = ObservedResponse(**fields, surprisal=decoder.surprisal, signals=decoder.signals)
                yield response
                if finish:
                    break
    finally:
        if state is not None:
            after = start.followed_by(written, decoder.cache_at(len(start) + len(written) - 1))
            state.cache, state.tokens = after.cache, after.tokens


def generate(model: Model, tokenizer: TokenizerWrapper, prompt: str | Sequence[int] = "", **options: Any) -> str:
    """Continue a text and return what was added. For the options and errors see `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))
