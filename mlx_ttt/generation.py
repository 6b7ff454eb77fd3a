"""Text in, text out, on mlx-lm's generation loop; what has been read can be saved and resumed."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import (
    GenerationResponse,
    TextStateMachine,
    generate_step,
    generation_stream,
    wired_limit,
)
from mlx_lm.models.cache import save_prompt_cache
from mlx_lm.sample_utils import greedy_sampler

from .cache import TTTCache
from .checkpoint.safetensors import read_safetensors
from .errors import CheckpointError, OutputError, StateError, TokenizerError
from .model import Model

PREFILL_STEP_SIZE = 2048  # tokens per call while reading a prompt: bounds memory
_CONTEXT = 8  # tokens of text that the detokenizer is shown: more than a UTF-8 character has bytes


@dataclass
class TextState:
    """A text that has been read up to, but not including, its last token: something to go on from, any number of times.

    Attributes:
        cache: the model's state after all tokens but the last.
        tokens: the last few tokens of the text. The very last is still unread; the others are context for the
            detokenizer. Empty before the first token.
    """

    cache: list[TTTCache]
    tokens: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        """Tokens in the text."""
        return self.cache[0].offset[0] + len(self.tokens[-1:])

    def copy(self) -> TextState:
        """The same text, to be continued on its own."""
        return TextState([c.copy() for c in self.cache], list(self.tokens))

    @property
    def nbytes(self) -> int:
        """The size of the state in memory: constant, however long the text is."""
        return sum(c.nbytes for c in self.cache)


def read(
    model: Model,
    tokenizer,
    prompt: str | Sequence[int],
    state: TextState | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> TextState:
    """Read a text, or go on reading after `state`.

    Args:
        prompt: text, or token ids as they are. Text at the beginning gets the tokenizer's BOS in front; text after a
            state gets nothing: the two are one text.
        state: what has been read before; it is left as it is. Nothing, by default.
        progress: called with the number of tokens read and to read.

    Raises:
        ValueError: prompt and state are both empty.
        TokenizerError: a token id is outside the model's vocabulary.
    """
    state = TextState(model.make_cache()) if state is None else state.copy()
    new = encode(tokenizer, prompt, continues=len(state) > 0) if isinstance(prompt, str) else list(prompt)
    for token in new:
        if not 0 <= token < model.args.vocab_size:
            raise TokenizerError(f"token id {token} is outside the model's vocabulary of {model.args.vocab_size}")
    tokens = state.tokens + new
    if not tokens:
        raise ValueError("the prompt is empty")
    unread = [*state.tokens[-1:], *new]
    if len(unread) > 1:
        reading = generate_step(
            mx.array(unread[:-1]),
            model,
            max_tokens=0,
            prompt_cache=state.cache,
            prefill_step_size=PREFILL_STEP_SIZE,
            prompt_progress_callback=progress,
        )
        deque(reading, maxlen=0)  # it yields no token
        mx.eval([c.state for c in state.cache])
    return TextState(state.cache, tokens[-_CONTEXT:])


def stream_generate(
    model: Model,
    tokenizer,
    prompt: str | Sequence[int] = "",
    *,
    state: TextState | None = None,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] = greedy_sampler,
    stop: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[GenerationResponse]:
    """Continue a text. Yields what mlx_lm.stream_generate yields: a response for each token, with text when complete.

    The text of a response never ends in half of a UTF-8 character and never holds a part of a stop string.

    Args:
        prompt: the text to continue, or what to read after `state` first; see `read`.
        state: what has been read before. It is updated in place: however the generation ends, the state then stands
            after all tokens yielded.
        max_tokens: at most so many tokens; -1 for no limit.
        sampler: log-probabilities [1, V] -> token, as mlx_lm's make_sampler makes them. Greedy by default.
        stop: strings at which the text ends. They are not part of the text, but the state has read them.
        progress: see `read`.

    Raises:
        ValueError: prompt and state are both empty, or max_tokens is 0.
        TokenizerError: a token id is outside the model's vocabulary.
    """
    if max_tokens == 0:
        raise ValueError("max_tokens is 0: to read without writing, use read()")
    start = time.perf_counter()
    text = read(model, tokenizer, prompt, state, progress=progress)
    prompt_tokens = len(text) - (len(state) if state is not None else 0)
    tokens = list(text.tokens)
    running = [c.copy() for c in text.cache]
    # The loop reads one token ahead of what it yields. A copy at each sampling is the state one token behind.
    behind: deque[list[TTTCache]] = deque([text.cache], maxlen=3)

    def sample(logprobs: mx.array) -> mx.array:
        if state is not None:
            behind.append([c.copy() for c in running])
        return sampler(logprobs)

    detokenizer = tokenizer.detokenizer
    for token in tokens:
        detokenizer.add_token(token)
    _ = detokenizer.last_segment  # the context is not part of what is generated
    stops = TextStateMachine({"text": [(s, None) for s in stop]})
    held = stops.make_state("text")

    steps = generate_step(
        mx.array(text.tokens[-1:]), model, max_tokens=max_tokens, sampler=sample, prompt_cache=running
    )
    try:
        with wired_limit(model, [generation_stream]):
            for n, (token, logprobs) in enumerate(steps, 1):
                if n == 1:
                    prompt_tps = prompt_tokens / (time.perf_counter() - start)
                    start = time.perf_counter()
                tokens.append(token)
                finish = "stop" if token in tokenizer.eos_token_ids else "length" if n == max_tokens else None
                if finish != "stop":
                    detokenizer.add_token(token)
                if finish:
                    detokenizer.finalize()
                segment = detokenizer.last_segment
                held, segment, place = stops.step(held, segment.rstrip("\ufffd") if finish else segment)
                if place is None:
                    finish = "stop"
                elif finish:
                    held, rest, _ = stops.flush(held)
                    segment += rest
                yield GenerationResponse(
                    text=segment,
                    token=token,
                    logprobs=logprobs,
                    from_draft=False,
                    prompt_tokens=prompt_tokens,
                    prompt_tps=prompt_tps,
                    generation_tokens=n,
                    generation_tps=n / (time.perf_counter() - start),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=finish,
                )
                if finish:
                    break
    finally:
        steps.close()
        if state is not None:
            unread = len(text) + len(tokens) - len(text.tokens) - 1
            state.cache = next(cache for cache in behind if cache[0].offset[0] == unread)
            state.tokens = tokens[-_CONTEXT:]


def generate(model: Model, tokenizer, prompt: str | Sequence[int] = "", **options) -> str:
    """Continue a text and return what was added. For the options and errors see `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def save_state(file: str | Path, state: TextState, model: Model, tokenizer) -> None:
    """Write what has been read to a file: safetensors, in mlx-lm's prompt-cache layout.

    Raises:
        OutputError: the file cannot be written. One that was there before is then as it was.
    """
    file = Path(file)
    tokens = json.dumps(state.tokens)
    metadata = {
        "mlx_ttt": "1",
        "fingerprint": fingerprint(model, tokenizer),
        "tokens": tokens,
        "digest": _digest(dict(tree_flatten([c.state for c in state.cache])), tokens),
    }
    try:
        with tempfile.TemporaryDirectory(prefix=f".{file.name}.", dir=file.parent) as beside:
            complete = Path(beside) / "state.safetensors"
            save_prompt_cache(str(complete), state.cache, metadata)
            os.replace(complete, file)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{file}: the state cannot be written: {error}") from error


def load_state(file: str | Path, model: Model, tokenizer) -> TextState:
    """What `save_state` wrote.

    Raises:
        StateError: the file is damaged, is no state, or was made with another model or tokenizer.
    """
    file = Path(file)
    try:
        read_safetensors(file)  # refuses a damaged file before MLX maps it
        arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
        saved = {name.removeprefix("0."): value for name, value in metadata.items() if name.startswith("0.")}
        if saved.get("mlx_ttt") != "1":
            raise StateError(f"{file}: not a state that --save-state wrote")
        if saved["fingerprint"] != fingerprint(model, tokenizer):
            raise StateError(f"{file}: this state was made with another model or tokenizer; load it with that one")
        if saved["digest"] != _digest(arrays, saved["tokens"]):
            raise StateError(f"{file}: this state is damaged; save it again")
        states = tree_unflatten(list(arrays.items()))
        for state in states:
            state["offset"] = [n.item() for n in state["offset"]]
        return TextState([TTTCache.from_state(state) for state in states], json.loads(saved["tokens"]))
    except (CheckpointError, RuntimeError, KeyError, ValueError) as error:
        raise StateError(f"{file}: the state cannot be read: {error}") from error


def _digest(leaves: dict[str, mx.array | int], tokens: str) -> str:
    """A hash of a state's names, shapes and values and its last tokens, the same before and after the file."""
    digest = hashlib.sha256(tokens.encode())
    for name, leaf in sorted(leaves.items()):
        array = mx.array(leaf)
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(memoryview(array.reshape(-1).view(mx.uint8)))
    return digest.hexdigest()


def fingerprint(model: Model, tokenizer) -> str:
    """A hash of the configuration, of values spread over every weight, and of the vocabulary."""
    digest = hashlib.sha256(json.dumps(asdict(model.args), sort_keys=True).encode())
    samples = {name: _sample(w) for name, w in sorted(tree_flatten(model.parameters()))}
    mx.eval(samples)
    for name, values in samples.items():
        digest.update(name.encode() + bytes(memoryview(values)))
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


def _sample(w: mx.array, n: int = 256) -> mx.array:
    flat = w.flatten()
    flat = flat[:: max(1, flat.size // n)]
    return flat.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else flat


def encode(tokenizer, text: str, continues: bool) -> list[int]:
    """Text to token ids: with BOS at the beginning of a text, bare in its middle."""
    if not text:
        return []
    if not continues:
        return tokenizer.encode(text)
    # Some tokenizers put a space in front of every text. After a line break they do not, so the text is
    # encoded behind one, and that is taken off again.
    before = tokenizer.encode("\n", add_special_tokens=False)
    both = tokenizer.encode("\n" + text, add_special_tokens=False)
    if both[: len(before)] == before:
        return both[len(before) :]
    return tokenizer.encode(text, add_special_tokens=False)
