"""What a model has read of a text: its state, in memory and in a file."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import save_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.safetensors import read_safetensors
from ..errors import CheckpointError, OutputError, PromptError, StateError
from ..files import check_format, output_file, written_whole
from ..network.cache import TTTCache
from ..network.learning_scale import Scale, learning_scale
from ..network.model import Model
from ..network.rewind import RewindableTTTCache
from .tokenizer import encode

FORMAT = 2  # of a saved state that is frozen, learns at another rate or can take tokens back; of all others 1
# Tokens per call of the model while a prompt is read. So many take the 1.3B model at most 1.4 GB besides its weights,
# on any GPU (python -m benchmarks.launches.memory).
PREFILL_STEP_SIZE = 512
CONTEXT_TOKENS = 8  # kept for the detokenizer: more tokens than a UTF-8 character has bytes
EARLIER_BUNDLED = {  # fingerprints of bundled models that have been replaced, and the last version that had each
    "8069c8c9992b91e3f58d563e24b3e755de5e6e6491ea8517c4a305cf0e8bd946": "0.1.0",
}

Progress = Callable[[int, int], None]


@dataclass
class TextState:
    """A text that a model has read up to its last token, which is still unread. It can be continued many times.

    Attributes:
        cache: the model's state after all tokens but the last, one cache per layer.
        tokens: the last few tokens of the text. The very last one is still unread; the detokenizer needs the others
            to complete a character, and `forget` to go back to them. Empty before the first token.
        learning: how much the model learns from what it reads next: a factor of the inner learning rates. 1 is the
            model as it is; a frozen state has 0.
    """

    cache: list[TTTCache]
    tokens: list[int] = field(default_factory=list)
    learning: float = 1.0

    def __len__(self) -> int:
        """Tokens in the text."""
        return self.cache[0].offset[0] + len(self.tokens[-1:])

    def copy(self) -> TextState:
        """The same text, which can be continued on its own."""
        return replace(self, cache=[c.copy() for c in self.cache], tokens=list(self.tokens))

    def followed_by(self, tokens: Sequence[int], cache: list[TTTCache]) -> TextState:
        """The text with more tokens, of which `cache` has read all but the last."""
        back = cache[0].mini_batch_size if cache[0].is_trimmable() else 0
        return replace(self, cache=cache, tokens=[*self.tokens, *tokens][-CONTEXT_TOKENS - back :])

    def forget(self, n: int) -> TextState:
        """The text without its last n tokens, as if they had never been read.

        Args:
            n: up to a mini-batch of tokens, once as many have been read after the state was made rewindable. What has
                been taken back shortens that reach, until as many tokens have been read again.

        Returns:
            A new state. This one stays as it is.

        Raises:
            StateError: the state is not rewindable, or n is out of reach.
        """
        if not all(isinstance(c, RewindableTTTCache) for c in self.cache):
            raise StateError("this state cannot take tokens back: read the text with rewind=True")
        within = min(self._reach(), len(self.tokens) - (len(self.tokens) < len(self)))
        if not 0 <= n <= within:
            raise StateError(f"cannot take back {n} tokens of {len(self)}: within reach are {within}")
        earlier = self.copy()
        for c in earlier.cache:
            c.trim(min(n, c.offset[0]))  # type: ignore[attr-defined]
        earlier.tokens = earlier.tokens[: len(earlier.tokens) - n]
        return earlier

    def _reach(self) -> int:
        """How many tokens of the text the caches allow to take back; all, if those that they have read."""
        reach = min(r for c in self.cache for r in c.reach)  # type: ignore[attr-defined]
        return reach if reach < self.cache[0].offset[0] else len(self)

    @property
    def nbytes(self) -> int:
        """The size of the state in memory, in bytes. It does not grow with the text."""
        return sum(c.nbytes for c in self.cache)


def read(
    model: Model,
    tokenizer: TokenizerWrapper,
    prompt: str | Sequence[int],
    state: TextState | None = None,
    *,
    rewind: bool = False,
    progress: Progress | None = None,
    learning: Scale | None = None,
) -> TextState:
    """Read a text from its beginning, or go on reading after `state`.

    Args:
        prompt: text, or token ids, which are taken as they are. A text at the beginning gets the tokenizer's BOS in
            front. A text after a state gets nothing in front, because the two are one text.
        state: what has been read before. It is not changed. By default, nothing has been read.
        rewind: make a state whose last tokens can be taken back by `TextState.forget`. It needs twice the memory. A
            state that is rewindable stays so in any case.
        progress: called with the number of tokens that have been read, and the number that are to be read.
        learning: how much of its learning rates the model uses for these tokens; see `Model.__call__`. By default as
            much as the state says.

    Returns:
        The state after the prompt.

    Raises:
        PromptError: prompt and state are both empty, or a token id is outside the model's vocabulary.
    """
    state = TextState(model.make_cache()) if state is None else state.copy()
    if rewind:
        state.cache = rewindable(state.cache)
    new = token_ids(tokenizer, prompt, continues=len(state) > 0)
    for token in new:
        if not 0 <= token < model.args.vocab_size:
            raise PromptError(f"token id {token} is outside the model's vocabulary of {model.args.vocab_size}")
    if not state.tokens + new:
        raise PromptError("the prompt is empty")
    scale = state.learning if learning is None else learning
    _prefill(as_it_learns(model, scale), state.cache, [*state.tokens[-1:], *new][:-1], progress)
    return state.followed_by(new, state.cache)


def as_it_learns(model: Model, learning: Scale) -> Model:
    """The model with this learning scale."""
    return cast(Model, _Learning(model, learning))


class _Learning:
    """A model that is always called with the same learning scale, for mlx-lm's loops, which know of none."""

    def __init__(self, model: Model, learning: Scale):
        self._model, self._learning = model, learning

    def __call__(self, ids: mx.array, cache: list[TTTCache] | None = None) -> mx.array:
        return self._model(ids, cache, learning=self._learning)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def rewindable(cache: Sequence[TTTCache]) -> list[TTTCache]:
    """Caches from which tokens can be taken back: those that are read from now on, if they were plain before."""
    return [c.copy() if isinstance(c, RewindableTTTCache) else RewindableTTTCache(c) for c in cache]


def token_ids(tokenizer: TokenizerWrapper, prompt: str | Sequence[int], continues: bool) -> list[int]:
    """The token ids of a prompt, which is text or has ids already. For `continues` see `encode`."""
    if isinstance(prompt, str):
        return encode(tokenizer, prompt, continues)
    return [int(token) for token in prompt]


def _prefill(model: Any, cache: list[TTTCache], tokens: list[int], progress: Progress | None) -> None:
    """Run the model on tokens for the sake of its state only."""
    if not tokens:
        return
    steps = generate_step(
        mx.array(tokens),
        model,
        max_tokens=0,
        prompt_cache=cache,
        prefill_step_size=PREFILL_STEP_SIZE,
        prompt_progress_callback=progress,
    )
    deque(steps, maxlen=0)  # runs the generator, which yields no token
    mx.eval([c.state for c in cache])


def save_state(file: str | Path, state: TextState, model: Model, tokenizer: TokenizerWrapper) -> None:
    """Write a state to a file: safetensors, in the layout of mlx-lm's prompt caches.

    Raises:
        OutputError: the file cannot be written. An older file of this name then stays as it was.
    """
    file = output_file(file)
    text = {"tokens": json.dumps(state.tokens)}
    # A reader of the first version knows nothing else, so it must refuse a state that it would go on with wrongly.
    is_first_version = state.learning == 1 and not state.cache[0].is_trimmable()
    if not is_first_version:
        text["learning"] = json.dumps(state.learning)
    metadata = {
        **text,
        "mlx_ttt": "1" if is_first_version else str(FORMAT),
        "fingerprint": fingerprint(model, tokenizer),
        "digest": _digest(dict(tree_flatten([c.state for c in state.cache])), text),
    }
    try:
        with written_whole(file, ".safetensors") as complete:
            save_prompt_cache(str(complete), state.cache, metadata)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{file}: the state cannot be written: {error}") from error


def load_state(file: str | Path, model: Model, tokenizer: TokenizerWrapper) -> TextState:
    """Load a state that `save_state` wrote.

    Raises:
        StateError: the file is damaged, is not a state, or was made with another model or tokenizer. If that was the
            bundled model of an earlier version, the message names the version.
    """
    file = Path(file)
    try:
        read_safetensors(file)  # refuses a damaged file; MLX would map it and could crash
        loaded: Any = mx.load(str(file), format="safetensors", return_metadata=True)
        arrays, metadata = loaded
        saved = {name.removeprefix("0."): value for name, value in metadata.items() if name.startswith("0.")}
        if "mlx_ttt" not in saved:
            raise StateError(f"{file}: not a state that --save-state wrote")
        check_format(file, saved["mlx_ttt"], FORMAT, StateError)
        if saved["fingerprint"] != fingerprint(model, tokenizer):
            raise StateError(f"{file}: this state was made with {_maker(saved['fingerprint'])}")
        text = {name: saved[name] for name in ("tokens", "learning") if name in saved}
        if saved["digest"] != _digest(arrays, text):
            raise StateError(f"{file}: this state is damaged; save it again")
        layers: Any = tree_unflatten(list(arrays.items()))
        state = TextState([_cache(layer) for layer in layers], **{name: json.loads(x) for name, x in text.items()})
        learning_scale(state.learning, 1, 1, 1)  # or it would fail when the text goes on
        return state
    except (CheckpointError, RuntimeError, KeyError, ValueError) as error:
        said = str(error).removeprefix(f"{file}: ")
        raise StateError(f"{file}: the state cannot be read: {said}") from error


def _maker(saved: str) -> str:
    """What made a state whose fingerprint is not that of the model at hand, and what to do."""
    if version := EARLIER_BUNDLED.get(saved):
        return f"the model that came with mlx_ttt {version}; read the text again, or use that version"
    return "another model or tokenizer; load it with that one"


def _cache(layer: dict[str, Any]) -> TTTCache:
    """One layer's cache, of the state that was saved: its counts are arrays in a file."""
    counts = {name: [n.item() for n in layer[name]] for name in ("offset", "reach") if name in layer}
    kind = RewindableTTTCache if "reach" in layer else TTTCache
    return kind.from_state(layer | counts)


def _digest(leaves: dict[str, mx.array | int], text: dict[str, str]) -> str:
    """A hash of the state's names, shapes and values and of what a file says of its text. Detects damage."""
    digest = hashlib.sha256("".join(text.values()).encode())
    for name, leaf in sorted(leaves.items()):
        array = mx.array(leaf)  # an offset is an integer before it is saved, and an array afterwards
        digest.update(f"{name} {array.shape} {array.dtype}".encode())
        digest.update(_bytes(array.reshape(-1).view(mx.uint8)))
    return digest.hexdigest()


def fingerprint(model: Model, tokenizer: TokenizerWrapper | None = None) -> str:
    """A hash that tells models apart: of the configuration and of some values of every weight.

    With a tokenizer, its vocabulary is part of the hash.
    """
    digest = hashlib.sha256(json.dumps(asdict(model.args), sort_keys=True).encode())
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    samples = {name: _sample(w) for name, w in sorted(parameters.items())}
    mx.eval(samples)
    for name, values in samples.items():
        digest.update(name.encode() + _bytes(values))
    vocabulary = {} if tokenizer is None else tokenizer.get_vocab()
    digest.update(json.dumps(sorted(vocabulary.items())).encode())
    return digest.hexdigest()


def _sample(w: mx.array, n: int = 256) -> mx.array:
    """About n values, evenly spread over w."""
    flat = w.flatten()
    flat = flat[:: max(1, flat.size // n)]
    return flat.astype(mx.float32) if mx.issubdtype(w.dtype, mx.floating) else flat


def _bytes(array: Any) -> bytes:
    """The values of an array. MLX arrays have Python's buffer interface, but their annotations do not say so."""
    return bytes(memoryview(array))
