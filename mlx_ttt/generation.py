"""Text in, text out, on mlx-lm's generation loop; what has been read can be saved and resumed."""

from __future__ import annotations

import copy
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
from .decoding import Decoder, PlainDecoder, SpeculativeDecoder
from .errors import CheckpointError, OutputError, PromptError, StateError
from .model import Model

PREFILL_STEP_SIZE = 512  # tokens per call while reading a prompt: bounds memory
NUM_DRAFT_TOKENS = 3
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
        PromptError: prompt and state are both empty, or a token id is outside the model's vocabulary.
    """
    state = TextState(model.make_cache()) if state is None else state.copy()
    if isinstance(prompt, str):
        new = encode(tokenizer, prompt, continues=len(state) > 0)
    else:
        new = [int(token) for token in prompt]
    for token in new:
        if not 0 <= token < model.args.vocab_size:
            raise PromptError(f"token id {token} is outside the model's vocabulary of {model.args.vocab_size}")
    tokens = state.tokens + new
    if not tokens:
        raise PromptError("the prompt is empty")
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
    draft_model: Model | None = None,
    draft_state: TextState | None = None,
    num_draft_tokens: int = NUM_DRAFT_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[GenerationResponse]:
    """Continue a text. Yields what mlx_lm.stream_generate yields: a response for each token, with text when complete.

    The text of a response never ends in half of a UTF-8 character and never holds a part of a stop string.

    Args:
        tokenizer: an mlx-lm TokenizerWrapper, as `load` gives.
        prompt: the text to continue, or what to read after `state` first; see `read`.
        state: what has been read before. It is updated in place: however the generation ends, the state then stands
            after all tokens yielded.
        max_tokens: at most so many tokens; -1 for no limit.
        sampler: log-probabilities [n, V] -> n tokens, as mlx_lm's make_sampler makes them. Greedy by default.
        stop: strings at which the text ends. They are not part of the text, but the state has read them.
        draft_model: a smaller model of the same vocabulary that proposes tokens. A greedy text is the same, a sampled
            one has the same distribution.
        draft_state: what the draft model has read, of the same text; it is left as it is. By default it reads the
            last few tokens of `state` and the prompt; the rest it does not know then, which makes its proposals worse.
        num_draft_tokens: proposals at a time.
        progress: see `read`.

    Raises:
        ValueError: max_tokens is 0, or less than -1; or the draft model, its state or number of tokens does not fit.
        PromptError: see `read`.
    """
    if max_tokens == 0 or max_tokens < -1:
        raise ValueError(f"max_tokens is {max_tokens}: to read without writing, use read(); -1 is no limit")
    clock = time.perf_counter()
    if draft_model is not None:
        _check_draft(model, draft_model, num_draft_tokens)
    if isinstance(prompt, str):
        prompt = encode(tokenizer, prompt, continues=state is not None and len(state) > 0)
    start = read(model, tokenizer, prompt, state, progress=progress)
    prompt_tokens = len(start) - (len(state) if state is not None else 0)
    text = _Text(tokenizer, start.tokens, [stop] if isinstance(stop, str) else stop)
    decoder: Decoder
    if draft_model is None:
        decoder = PlainDecoder(model, start.cache, start.tokens[-1], max_tokens, sampler, keep=state is not None)
    else:
        if draft_state is None:
            draft_state = read(draft_model, tokenizer, [*(state.tokens if state is not None else []), *prompt])
        if draft_state.tokens[-1:] != start.tokens[-1:]:
            raise ValueError("draft_state has read another text")
        decoder = SpeculativeDecoder(
            model, start.cache, draft_model, draft_state.cache, start.tokens[-1], max_tokens, sampler, num_draft_tokens
        )
    steps = decoder.steps()
    written: list[int] = []
    try:
        with wired_limit(model, [generation_stream]):
            for token, logprobs, from_draft in steps:
                if not written:
                    prompt_tps = prompt_tokens / (time.perf_counter() - clock)
                    clock = time.perf_counter()
                written.append(token)
                if token in tokenizer.eos_token_ids:
                    segment, finish = text.end(), "stop"
                elif len(written) == max_tokens:
                    segment, finish = text.add(token), "stop" if text.stopped else "length"
                    segment += text.end()
                else:
                    segment, finish = text.add(token), "stop" if text.stopped else None
                yield GenerationResponse(
                    text=segment,
                    token=token,
                    logprobs=logprobs,
                    from_draft=from_draft,
                    prompt_tokens=prompt_tokens,
                    prompt_tps=prompt_tps,
                    generation_tokens=len(written),
                    generation_tps=len(written) / (time.perf_counter() - clock),
                    peak_memory=mx.get_peak_memory() / 1e9,
                    finish_reason=finish,
                )
                if finish:
                    break
    finally:
        steps.close()
        if state is not None:
            state.cache = decoder.cache_at(len(start) + len(written) - 1)
            state.tokens = (start.tokens + written)[-_CONTEXT:]


def most_draft_tokens(model: Model, draft_model: Model) -> int:
    """How many tokens a draft model may propose at a time: both must be able to take them back."""
    return min(model.args.mini_batch_size, draft_model.args.mini_batch_size)


def _check_draft(model: Model, draft_model: Model, num_draft_tokens: int) -> None:
    if draft_model.args.vocab_size != model.args.vocab_size:
        sizes = f"{draft_model.args.vocab_size} tokens, the model {model.args.vocab_size}"
        raise ValueError(f"the draft model has a vocabulary of {sizes}; it must be the same")
    most = most_draft_tokens(model, draft_model)
    if not 1 <= num_draft_tokens <= most:
        raise ValueError(f"num_draft_tokens is {num_draft_tokens}, expected 1 to {most}: more cannot be taken back")


class _Text:
    """What becomes visible of a text as its tokens come: whole characters, and nothing of a stop string.

    Attributes:
        stopped: a stop string has come; there is no more text.
    """

    def __init__(self, tokenizer, context: Sequence[int], stop: Sequence[str]):
        self.stopped = False
        self._detokenizer = tokenizer.detokenizer
        for token in context:
            self._detokenizer.add_token(token)
        # What the context shows is not shown again, nor what the detokenizer still holds of it, unless that is the
        # start of a character.
        context_only = copy.copy(self._detokenizer)
        context_only.finalize()
        self._shown = len(context_only.text.rstrip("\ufffd"))
        self._stops = TextStateMachine({"text": [(s, None) for s in stop]})
        self._held = self._stops.make_state("text")

    def add(self, token: int) -> str:
        """What there is to see after one more token."""
        self._detokenizer.add_token(token)
        return self._show(self._detokenizer.text)

    def end(self) -> str:
        """What was held back, now that no more tokens come; but no part of a character."""
        if self.stopped:
            return ""
        text = self._detokenizer.text
        self._detokenizer.finalize()
        segment = self._show(text + self._detokenizer.text[len(text) :].rstrip("\ufffd"))
        _, rest, _ = self._stops.flush(self._held)
        return segment + rest

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        self._held, segment, place = self._stops.step(self._held, new)
        self.stopped = place is None
        return segment


def generate(model: Model, tokenizer, prompt: str | Sequence[int] = "", **options) -> str:
    """Continue a text and return what was added. For the options and errors see `stream_generate`."""
    return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **options))


def save_state(file: str | Path, state: TextState, model: Model, tokenizer) -> None:
    """Write what has been read to a file: safetensors, in mlx-lm's prompt-cache layout.

    Raises:
        OutputError: the file cannot be written. One that was there before is then as it was.
    """
    file = state_file(file)
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


def state_file(file: str | Path) -> Path:
    """Where `save_state` would write, links followed.

    Raises:
        OutputError: something else than a file is there, or the folder does not exist or is not writable.
    """
    path = Path(os.path.realpath(file))
    if path.exists() and not path.is_file():
        raise OutputError(f"{file}: exists and is not a file; choose another name for the state")
    if not path.parent.is_dir():
        raise OutputError(f"{file}: there is no such folder")
    if not os.access(path.parent, os.W_OK):
        raise OutputError(f"{file}: the folder is not writable")
    return path


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


def fingerprint(model: Model, tokenizer=None) -> str:
    """A hash of the configuration, of values spread over every weight, and of the tokenizer's vocabulary, if given."""
    digest = hashlib.sha256(json.dumps(asdict(model.args), sort_keys=True).encode())
    samples = {name: _sample(w) for name, w in sorted(tree_flatten(model.parameters()))}
    mx.eval(samples)
    for name, values in samples.items():
        digest.update(name.encode() + bytes(memoryview(values)))
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    digest.update(json.dumps(sorted(vocabulary.items())).encode())
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
