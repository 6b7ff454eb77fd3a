"""`main`, the function that Apple's CoreAISequentialEngine drives: any number of tokens in a call, at any phase.

It is two loops. The first has the body of `decode` and reads token by token until the open mini-batch is complete; the
second has the body of `prefill` and reads mini-batches, the last of which may be incomplete. (A branch within one loop
would be shorter, but what it gives is wrong from the second round on: Linux, 1.0.0b3.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ...network.model import Model
from ..calls import Decode, Prefill
from ..functions import Network, Options, Parts
from ..layout import StateLayout
from ..operations import NumberType
from .compiler import Value, add_function, constant, dialect, while_
from .operations import CoreAIOperations
from .state import grouped_shapes, groups

MAIN, IDS, POSITIONS, LOGITS = "main", "input_ids", "position_ids", "logits"


def add_main(
    model: Model,
    ops: CoreAIOperations,
    options: Options,
    outside: NumberType,
    progress: Callable[[], None] = lambda: None,
) -> None:
    """Add `main` to the module that is being built.

    Its inputs are token ids [1, n] and the positions of all tokens so far, [1, tokens before + n], of which only the
    number counts; its outputs are logits [1, n, V] in float16.

    Args:
        model: whose network it is.
        ops: what to compute with.
        options: how it computes.
        outside: the number type of its states.
        progress: called after each block of each body.
    """
    layout = StateLayout.of(model.args)
    inputs = {IDS: ((1, -1), np.int32), POSITIONS: ((1, -1), np.int32)}
    states = {name: (shape, outside) for name, shape in grouped_shapes(layout).items()}

    def body(ids: Value, positions: Value, *before: Value) -> tuple[dict[str, Value], dict[str, Value]]:
        main = _Main(model, ops, options, outside, progress)
        logits, after = main(ids, positions, before)
        return {LOGITS: logits}, dict(zip(states, after, strict=True))

    add_function(MAIN, inputs, states, body)


class _Main:
    """What `main` computes. The arguments are those of `add_main`."""

    def __init__(
        self,
        model: Model,
        ops: CoreAIOperations,
        options: Options,
        outside: NumberType,
        progress: Callable[[], None],
    ):
        self.model, self.ops, self.layout, self.progress = model, ops, StateLayout.of(model.args), progress
        self.network = Network(ops, model, options, outside)

    def __call__(self, ids: Value, positions: Value, states: Sequence[Value]) -> tuple[Value, list[Value]]:
        """The logits and the states after the call."""
        ops, K, C = self.ops, self.model.args.mini_batch_size, self.model.args.hidden_size
        tokens = _length(ids)
        before = dialect.sub(_length(positions), tokens)
        padding = np.zeros((1, K), np.int32)  # so that every round may read and write a whole mini-batch
        x = self.network.embed(ops.concat([ids, padding], axis=1))  # [1, n + K, C]

        def phase(done: Value) -> Value:
            return dialect.modulo(dialect.add(before, done), _number(K))

        def rest(done: Value) -> Value:
            return dialect.sub(tokens, done)

        def token_goes_on(done: Value, *_: Value) -> Value:
            is_open = dialect.greater(phase(done), _number(0))
            is_last = dialect.equal(rest(done), _number(1))
            return dialect.and_(dialect.greater(tokens, done), dialect.or_(is_open, is_last))

        def token(done: Value, x: Value, *states: Value) -> list[Value]:
            call = Decode(self.network.numbers, self.model, _vector(phase(done)))
            return [dialect.add(done, _number(1)), *self._read(x, done, call, states)]

        def mini_batch_goes_on(done: Value, *_: Value) -> Value:
            return dialect.greater(tokens, done)

        def mini_batch(done: Value, x: Value, *states: Value) -> list[Value]:
            length = dialect.minimum(rest(done), _number(K))
            call = Prefill(self.network.numbers, self.model, K, _vector(length))
            return [dialect.add(done, length), *self._read(x, done, call, states)]

        carried = while_([_number(0), x, *states], token_goes_on, token)
        _, x, *after = while_(carried, mini_batch_goes_on, mini_batch)
        x = dialect.slice_(x, _vector(0, 0, 0), _vector(1, tokens, C), _vector(1, 1, 1))
        return ops.cast(self.network.logits(x), np.float16), after

    def _read(self, x: Value, done: Value, call: Decode | Prefill, states: Sequence[Value]) -> list[Value]:
        """x with the tokens of this round after all blocks, and the states."""
        C = self.model.args.hidden_size
        begin, end = _vector(0, done, 0), _vector(1, dialect.add(done, _number(call.tokens)), C)
        ones = _vector(1, 1, 1)
        tokens = self.ops.reshape(dialect.slice_(x, begin, end, ones), [1, call.tokens, C])
        y, after = self.network.blocks(tokens, call, self._apart(states), self.progress)
        return [dialect.slice_update(x, begin, end, ones, y), *self._together(after)]

    def _apart(self, states: Sequence[Value]) -> list[Parts]:
        """The states of `main` by layer and part: state.apart."""
        layers: list[Parts] = [{} for _ in range(self.layout.shape[0])]
        for parts, x in zip(groups(self.layout).values(), states, strict=True):
            for layer, y in zip(layers, self.ops.split(x, [1] * len(layers), axis=0), strict=True):
                pieces = self.ops.split(y, [self.layout.parts[part] for part in parts], axis=2)
                layer.update(zip(parts, pieces, strict=True))
        return layers

    def _together(self, layers: Sequence[Parts]) -> list[Value]:
        """The inverse of `_apart`."""
        ops = self.ops
        return [
            ops.concat([ops.concat([layer[part] for part in parts], axis=2) for layer in layers], axis=0)
            for parts in groups(self.layout).values()
        ]


def _number(n: int) -> Value:
    return constant(np.asarray(n, np.int32))


def _vector(*numbers: int | Value) -> Value:
    """Numbers, some of which only the call knows, as one array."""
    one = constant(np.asarray([1], np.int32))
    parts = [constant(np.asarray([n], np.int32)) if isinstance(n, int) else dialect.reshape(n, one) for n in numbers]
    return parts[0] if len(parts) == 1 else dialect.concat(0, parts)


def _length(x: Value) -> Value:
    """Of the second axis: a number that only the call knows."""
    shape = dialect.cast(dialect.get_shape(x), np.int32)
    return dialect.reshape(dialect.slice_(shape, _vector(1), _vector(2), _vector(1)), constant(np.zeros(0, np.int32)))
