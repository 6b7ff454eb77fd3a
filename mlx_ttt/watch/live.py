"""Two texts that a model reads and writes while somebody watches, and the states that are remembered of them.

Nothing here knows of HTTP. What a page has to show is told to `publish` as events, which are JSON. A text's history are
the events that made it, so a page that comes later gets the same ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import PromptError, StateError
from ..learning.observation import observe
from ..learning.states import drift
from ..network.cache import TTTCache
from ..network.model import Model
from ..text.state import CONTEXT_TOKENS
from ..text.tokenizer import encode, encode_long
from .page import in_base64
from .reading import RESET, Figures, by_head, columns_of, token_names, token_texts

SIDES = ("A", "B")
PIECE = 128  # tokens that are read between two events
MOST_TOKENS = 200_000  # of a text: its history is kept in memory
MOST_STATES = 100
START = "start"  # the state before any text

Event = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """What a side is to read, how much it is to write then, and how.

    temperature: 0 takes the most likely token. Both sides draw with the same random numbers, from `seed`, so that a
        difference between them comes from their states.
    """

    text: str
    max_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0


@dataclass
class Text:
    """A text and what was learned from it, all of it read.

    Attributes:
        cache, logits: the state after the last token, and what the model expects next, [1, V].
        tail: the last few tokens, for the detokenizer.
        open_column: what the heads have written in the open mini-batch so far, [heads].
        forgetful, forgetful_logits: the same text read by a state that is forgotten every RESET tokens.
        behind: tokens which that state has not read yet.
        history: the events.
    """

    cache: list[TTTCache]
    forgetful: list[TTTCache]
    logits: mx.array | None = None
    forgetful_logits: mx.array | None = None
    tail: list[int] = field(default_factory=list)
    behind: list[int] = field(default_factory=list)
    open_column: np.ndarray | None = None
    history: list[Event] = field(default_factory=list)

    def __len__(self) -> int:
        return self.cache[0].offset[0]

    def copy(self) -> Text:
        return replace(
            self,
            cache=[c.copy() for c in self.cache],
            forgetful=[c.copy() for c in self.forgetful],
            behind=list(self.behind),
            history=list(self.history),
        )


@dataclass
class Side:
    """One of the two texts on the page. `learning` may be set at any time, from any thread."""

    text: Text
    name: str = START
    learning: float = 1.0


class Session:
    """What the page shows, and what it can ask for. All methods but those that say so are for one thread, the model's.

    Attributes:
        sides: A and B.
        states: what is remembered, by number, with its name.
        stopping: set it, from any thread, to end a turn at the next token.
    """

    def __init__(self, model: Model, tokenizer: TokenizerWrapper, publish: Callable[[Event], None]):
        self._model, self._tokenizer, self._publish = model, tokenizer, publish
        self._lock = threading.Lock()  # between a change of what is shown and a page that asks for all of it
        self._count = 0  # of states so far
        self.sides = {name: Side(self._blank()) for name in SIDES}
        self.states: dict[int, tuple[str, Text]] = {}
        self.stopping = threading.Event()

    def _blank(self) -> Text:
        return Text(self._model.make_cache(), self._model.make_cache())

    # ---- What a page shows -------------------------------------------------------------------------------------------

    def snapshot(self, join: Callable[[], None]) -> list[Event]:
        """All that a new page must know. From any thread.

        join: called before anything else can be published, so that the new page misses nothing.
        """
        with self._lock:
            join()
            return [self._states(), *(self._whole(name) for name in SIDES)]

    def _whole(self, name: str) -> Event:
        side = self.sides[name]
        history = list(side.text.history)
        return {"kind": "side", "side": name, "name": side.name, "learning": side.learning, "history": history}

    def _states(self) -> Event:
        states = [{"id": id, "name": name, "tokens": len(text)} for id, (name, text) in self.states.items()]
        return {"kind": "states", "states": states}

    def _show(self, event: Event) -> None:
        with self._lock:
            self._publish(event)

    # ---- Reading and writing -----------------------------------------------------------------------------------------

    def take_turn(self, names: Sequence[str], turn: Turn) -> None:
        """Read and write on some sides. They take turns token by token, so that none has to wait for another.

        Raises:
            PromptError: there is nothing to read, or the text would be too long.
        """
        self.stopping.clear()
        prompts = {name: self._tokens(self.sides[name].text, turn) for name in names}
        going = [self._turn(name, prompt, turn) for name, prompt in prompts.items()]
        while going and not self.stopping.is_set():
            going = [one for one in going if next(one, None) is not None]
        for name in names:
            self._compare(name)

    def _tokens(self, text: Text, turn: Turn) -> list[int]:
        continues = len(text) > 0
        ids = (
            encode(self._tokenizer, turn.text, True) if continues else encode_long(self._tokenizer, turn.text).tolist()
        )
        if not continues and not ids:
            raise PromptError("there is no text yet: write a prompt to begin with")
        total = len(text) + len(ids) + turn.max_tokens
        if total > MOST_TOKENS:
            raise PromptError(f"the text would have {total} tokens, and the page keeps {MOST_TOKENS}: begin a new one")
        if outside := [i for i in ids if not 0 <= i < self._model.args.vocab_size]:
            raise PromptError(f"token id {outside[0]} is outside the model's vocabulary")
        return ids

    def _turn(self, name: str, prompt: list[int], turn: Turn) -> Iterator[bool]:
        K = self._model.args.mini_batch_size
        size = max(PIECE // K, 1) * K
        while prompt:
            n = size - len(self.sides[name].text) % size
            self._read(name, prompt[:n])
            prompt = prompt[n:]
            yield True
        for i in range(turn.max_tokens):
            logits = self.sides[name].text.logits
            assert logits is not None, "there is a text"
            token = _drawn(logits, turn.temperature, turn.seed + i)
            if token in self._tokenizer.eos_token_ids:
                return
            self._read(name, [token], written=True)
            yield True

    def _read(self, name: str, ids: list[int], written: bool = False) -> None:
        """Read tokens, and tell what they taught."""
        side = self.sides[name]
        text, K = side.text, self._model.args.mini_batch_size
        start = len(text)
        seen = observe(self._model, mx.array([ids]), text.cache, text.logits, logits=False, learning=side.learning)
        mx.eval(seen.surprisal, seen.last_logits, [c.arrays for c in text.cache])
        norms = by_head(seen.write_norm)
        column, sums = columns_of(norms, start, K)
        if start % K and text.open_column is not None:
            sums[0] += text.open_column
        texts = token_texts(self._tokenizer, ids, text.tail)
        names = {start + i: known for i, known in token_names(self._tokenizer, ids, texts).items()}
        is_point = (start + len(ids)) % K == 0 or len(ids) > 1
        event = _advance(name, Figures.of(seen), texts, names)
        event |= {"column": column, "columns": _floats(sums), "written": written}
        if is_point:
            layers = drift(self._model, text.cache).of_layers().relative[:, 0].tolist()
            event["drift"] = {"at": start + len(ids), "layers": layers}
        with self._lock:
            text.logits, text.open_column = seen.last_logits, sums[-1]
            text.tail = [*text.tail, *ids][-CONTEXT_TOKENS:]
            text.behind += ids
            text.history.append(event)
            self._publish(event)

    def _compare(self, name: str) -> None:
        """Have the forgetful state read what it has not read yet. Later than the other, since many tokens at once are
        faster than one by one."""
        side = self.sides[name]
        text = side.text
        nats: list[np.ndarray] = []
        while text.behind:
            at = text.forgetful[0].offset[0]
            if at == RESET:  # of this state: it begins again
                text.forgetful, at = self._model.make_cache(), 0
            ids, text.behind = text.behind[: RESET - at], text.behind[RESET - at :]
            seen = observe(
                self._model,
                mx.array([ids]),
                text.forgetful,
                text.forgetful_logits,
                logits=False,
                learning=side.learning,
            )
            text.forgetful_logits = seen.last_logits
            nats.append(np.array(seen.surprisal)[0])
        if nats:
            heads = self._model.args.num_hidden_layers * self._model.args.num_attention_heads
            event = _advance(name, Figures.of_heads(np.empty(0), np.empty((heads, 0)), np.empty((heads, 0))), [], {})
            event["reset"] = _floats(np.concatenate(nats))
            with self._lock:
                text.history.append(event)
                self._publish(event)

    # ---- States ------------------------------------------------------------------------------------------------------

    def remember(self, name: str, called: str = "") -> None:
        """Keep the state of a side, under a name.

        Raises:
            StateError: there are too many.
        """
        if len(self.states) >= MOST_STATES:
            raise StateError(f"{MOST_STATES} states are remembered already: forget one first")
        self._count += 1
        side = self.sides[name]
        with self._lock:
            side.name = called.strip() or f"state {self._count}"
            self.states[self._count] = side.name, side.text.copy()
            self._publish(self._states())
            self._publish({"kind": "named", "side": name, "name": side.name})

    def forget(self, id: int) -> None:
        """Remember a state no more.

        Raises:
            StateError: there is none of this number.
        """
        self._remembered(id)
        with self._lock:
            del self.states[id]
            self._publish(self._states())

    def go_back(self, name: str, to: int | str) -> None:
        """Put a side into a remembered state, by its number; into that of the other side; or to START.

        Raises:
            StateError: there is no such state.
        """
        if to == START:
            called, text = START, self._blank()
        elif isinstance(to, str) and to in SIDES:
            called, text = f"{self.sides[to].name}, as on side {to}", self.sides[to].text.copy()
        else:
            called, text = self._remembered(to)
            text = text.copy()
        with self._lock:
            self.sides[name].text, self.sides[name].name = text, called
            self._publish(self._whole(name))

    def _remembered(self, id: int | str) -> tuple[str, Text]:
        if not isinstance(id, int) or id not in self.states:
            raise StateError(f"there is no state {id} (any more)")
        return self.states[id]

    def set_learning(self, name: str, learning: float) -> None:
        """How much a side learns from what it reads next. From any thread."""
        with self._lock:
            self.sides[name].learning = learning
            self._publish({"kind": "learning", "side": name, "learning": learning})


def _drawn(logits: mx.array, temperature: float, seed: int) -> int:
    """The next token, from logits [1, V]."""
    if temperature == 0:
        return np.array(mx.argmax(logits, axis=-1)).item()
    return np.array(mx.random.categorical(logits / temperature, key=mx.random.key(seed))).item()


def _advance(side: str, figures: Figures, texts: list[str], names: dict[int, str]) -> Event:
    """What a page appends to a text. Figures are base64 of float32, since JSON has no NaN."""
    return {
        "kind": "advance",
        "side": side,
        "texts": texts,
        "names": names,
        "surprisal": _floats(figures.surprisal),
        "write": _floats(figures.write_norm),
        "loss": _floats(figures.loss),
        "strongest": in_base64(figures.strongest.astype("<u2")),
        "strongestNorm": _floats(figures.strongest_norm),
        "column": 0,
        "columns": "",
        "drift": None,
        "reset": "",
        "written": False,
    }


def _floats(values: np.ndarray) -> str:
    return in_base64(values.astype("<f4"))
