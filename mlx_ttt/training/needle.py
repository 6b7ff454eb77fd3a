"""The needle test: does a model remember a made-up name and number from far back in a text?

A sentence with a name and a number that nobody has ever written is put into a text. Some tokens later the sentence is
asked for again, as far as the name, and the probability of the number is measured. The same is done in the text without
the sentence. The gain is the difference of the two, in nats: 0 if nothing is left of the sentence.

A model could gain something merely because it has seen that there are numbers. So the probability of another number,
which was not in the text, is measured, too. Only what the right number gains beyond that is memory.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..network.cache import TTTCache
from ..network.model import Model
from ..text.tokenizer import encode
from .evaluate import half_width, next_token_nats
from .segments import SEGMENT, prefill

DISTANCES = (100, 300, 1000, 3000, 10_000, 30_000)  # tokens of the text between the sentence and the question
NEEDLES = 8
PLACE = 256  # tokens of the text before the sentence
_SYLLABLES = ("bra", "vel", "quon", "thir", "sma", "dro", "lun", "keth", "pax", "ori", "zim", "wex", "gul", "fen")

Caches = list[TTTCache]


@dataclass(frozen=True)
class Gain:
    """How much more probable something is with the sentence in the text than without: nats, with a 95 % interval."""

    mean: float
    half_width: float


@dataclass(frozen=True)
class Recall:
    """What is left of the sentence after so many tokens of text.

    Attributes:
        name: gain of the name's tokens together, after the sentence's beginning.
        number: gain of the number's tokens together, after the name.
        other: the same for a number that was not in the text.
    """

    distance: int
    name: Gain
    number: Gain
    other: Gain


@dataclass(frozen=True)
class _Needle:
    """A sentence in parts, so that their tokens can be told apart."""

    beginning: list[int]
    name: list[int]
    middle: list[int]
    number: list[int]
    other: list[int]
    end: list[int]

    @classmethod
    def random(cls, tokenizer: TokenizerWrapper, source: random.Random) -> _Needle:
        name = " ".join("".join(source.sample(_SYLLABLES, 3)).capitalize() for _ in range(2))
        number, other = (f"{n}" for n in source.sample(range(10_000, 100_000), 2))
        parts = ("\nThe secret number of", f" {name}", " is", f" {number}", f" {other}", ".\n")
        return cls(*(encode(tokenizer, part, continues=True) for part in parts))

    @property
    def sentence(self) -> list[int]:
        return [*self.beginning, *self.name, *self.middle, *self.number, *self.end]

    def nats(self, model: Model, state: Caches) -> np.ndarray:
        """What its name, its number and the other number cost after a state, which stays as it is. [3]"""
        asked = [*self.beginning, *self.name, *self.middle]
        by_token = _after(model, state, [*asked, *self.number])
        a, b = len(self.beginning) - 1, len(asked) - 1
        other = _after(model, state, [*asked, *self.other])[b:]
        return np.array([by_token[a : a + len(self.name)].sum(), by_token[b:].sum(), other.sum()])


def needle_test(
    model: Model,
    tokenizer: TokenizerWrapper,
    ids: Sequence[int] | np.ndarray,
    distances: Sequence[int] = DISTANCES,
    count: int = NEEDLES,
    progress: Callable[[int, int], None] | None = None,
) -> list[Recall]:
    """Ask for sentences that were put into a text.

    The sentences are made up with a fixed seed. Each is put into a copy of the text, `PLACE` tokens from its beginning
    or in the middle of a short text. All copies, and the text without a sentence, are read together. So the intervals
    say how much sentences differ, not texts.

    Args:
        ids: the text's tokens.
        distances: in tokens between the end of the sentence and the question.
        count: how many sentences.
        progress: called with the tokens of the text that have been read, and those that are to be read.

    Returns:
        A Recall for each distance that the text is long enough for.
    """
    source = random.Random(0)
    needles = [_Needle.random(tokenizer, source) for _ in range(count)]
    ids = np.asarray(ids)
    place = min(PLACE, len(ids) // 2)
    text = ids[place:]
    reached = sorted(d for d in distances if 0 < d <= len(text))

    without = model.make_cache()
    prefill(model, mx.array(ids[None, :place]), without)
    texts = [_copy(without) for _ in needles]
    for needle, state in zip(needles, texts, strict=True):
        prefill(model, mx.array([needle.sentence]), state)
    together = [TTTCache.merge(layers) for layers in zip(*texts, without, strict=True)]
    recalls, position = [], 0
    for distance in reached:
        while position < distance:
            piece = text[position : min(position + SEGMENT, distance)]
            prefill(model, mx.array(np.tile(piece, (count + 1, 1))), together)
            position += len(piece)
            if progress is not None:
                progress(position, reached[-1])
        *texts, without = ([layer.extract(i) for layer in together] for i in range(count + 1))
        gains = [n.nats(model, without) - n.nats(model, state) for n, state in zip(needles, texts, strict=True)]
        recalls.append(Recall(distance, *(Gain(float(g.mean()), half_width(g)) for g in np.array(gains).T)))
    return recalls


def _copy(state: Caches) -> Caches:
    return [layer.copy() for layer in state]


def _after(model: Model, state: Caches, ids: list[int]) -> np.ndarray:
    """What each of these tokens but the first costs after a state, which stays as it is."""
    return next_token_nats(model, _copy(state), np.array(ids))
