"""Launches of one token: of a layer, and of what is around the layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .decoding import Case, Token, first_token, token
from .evaluation import Device, drop
from .gpus import Gpu

FEW = 2  # layers of the smaller of two models, whose difference is one layer
BEFORE = 2  # tokens that are read before the one that counts


@dataclass(frozen=True)
class Count:
    """Launches by what they do.

    Attributes:
        layer: of one layer.
        around: of embedding, last norm and head.
    """

    layer: Counter[str]
    around: Counter[str]


class Tokens:
    """The graphs of a case, for two numbers of layers. Made once for all GPUs."""

    def __init__(self, case: Case):
        self._sequences = [self._sequence(with_layers(case, n)) for n in (FEW, FEW + 1)]

    @staticmethod
    def _sequence(case: Case) -> list[Token]:
        counted = token(case)
        start = first_token(case)
        return [counted if start == case else token(start)] * BEFORE + [counted]

    def count(self, gpu: Gpu, running: int = 1) -> Count:
        """Launches on a GPU that still runs that many tokens when the next one is given to it.

        mlx-lm gives out a token's work while the last one runs.
        """
        few, more = (launches(sequence, gpu, running) for sequence in self._sequences)
        layer = Counter(more)
        layer.subtract(few)
        around = Counter(few)
        for _ in range(FEW):
            around.subtract(layer)
        return Count(_without_zeros(layer), _without_zeros(around))


def _without_zeros(counter: Counter[str]) -> Counter[str]:
    return Counter({what: n for what, n in counter.items() if n})


def with_layers(case: Case, n: int) -> Case:
    return replace(case, config=case.config | {"num_hidden_layers": n})


def launches(tokens: Sequence[Token], gpu: Gpu, running: int) -> Counter[str]:
    """What is launched for the last of several tokens, which are read one after the other.

    The logits are evaluated. What no logits need yet, such as a row that is appended, is left to the next token.
    """
    device = Device(gpu)
    parameters = [device.array(x.shape, x.dtype) for x in tokens[0].parameters]
    state = [device.array(x.shape, x.dtype) for x in tokens[0].state]
    for x in tokens:
        device.wait(running)
        device.launches.clear()
        logits, *after = device.call(x.graph, [*parameters, *state])
        for y in state:
            drop(y)
        state = after
        device.eval([logits])
        drop(logits)
    return device.launches
