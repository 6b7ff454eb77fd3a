"""The functions of an exported model, `decode` and `prefill`: what each takes and gives, from token ids to logits.

Both read tokens with the same arithmetic, the dual form of the update rule: `decode` one token at any phase of a
mini-batch, `prefill` a block of whole mini-batches from phase 0. Only numbers depend on the input: shapes are static,
there is no control flow, and the state is read once and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ..network.model import Model
from .calls import Call, Decode, Prefill, Signals
from .elementwise import rms_norm
from .layout import StateLayout
from .network import Block
from .numbers import Numbers
from .operations import NumberType, Operations, Value
from .weights import array, block_weights, matrix

FUNCTIONS = ("decode", "prefill")
IDS, STATE, LOGITS, LEARNING = "inputIds", "tttState", "logits", "learning"  # the names of inputs and outputs
SIGNALS = {"loss": "loss", "lr": "lr", "writeNorm": "write_norm"}  # outputs, and what they are in calls.Signals
HEAD = "lm_head_{}"  # the name of the operation that computes a piece of the logits
Parts: TypeAlias = dict[str, Value]  # of the state of a layer, by name
_PLACE = {"decode": "position", "prefill": "length"}


@dataclass(frozen=True)
class Options:
    """How a function computes and what it gives.

    Attributes:
        compute: a key of numbers.COMPUTE.
        split_head: how many products the logits are made of.
        prefill_tokens: how many tokens `prefill` reads, a multiple of K; 0 for K.
        all_logits: give the logits of all tokens, [1, T, V]; for verification.
        learning: take the learning scale as an input, [layers, H], float32.
        signals: give what each layer and head does with each token: SIGNALS, [layers, H, T] each, float32.
    """

    compute: str = "float16"
    split_head: int = 1
    prefill_tokens: int = 0
    all_logits: bool = False
    learning: bool = False
    signals: bool = False


class ExportedFunction:
    """One function of an exported model.

    Args:
        model: whose network it is.
        name: "decode" or "prefill".
        options: how it computes.
        outside: the number type of its state and its logits.

    Attributes:
        inputs: the shapes and number types of its inputs by name: token ids [1, T]; then for `decode` the phase of the
            open mini-batch, for `prefill` how many of the tokens count, [1], all int32; and the learning scale, if it
            takes one. The state comes beside them.
        layout: of the state.
    """

    def __init__(self, model: Model, name: str, options: Options, outside: NumberType = np.float16):
        self.model, self.name, self.options, self.outside = model, name, options, outside
        self.layout = StateLayout.of(model.args)
        tokens = 1 if name == "decode" else options.prefill_tokens or model.args.mini_batch_size
        self.inputs: dict[str, tuple[tuple[int, ...], NumberType]] = {
            IDS: ((1, tokens), np.int32),
            _PLACE[name]: ((1,), np.int32),
        }
        if options.learning:
            self.inputs[LEARNING] = (self.layout.shape[:2], np.float32)

    def lower(
        self, ops: Operations, inputs: Sequence[Value], state: Value, progress: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Value], Value]:
        """Run the function in the operations of a lowering, with the state in one array.

        Args:
            ops: what to compute with.
            inputs: in the order of `self.inputs`.
            state: before the call, in `layout`.
            progress: called after each block.

        Returns:
            As `lower_parts`, with the state packed.

        Raises:
            CheckpointError: a weight is not finite.
        """
        outputs, after = self.lower_parts(ops, inputs, self._unpack(ops, state), progress)
        return outputs, self._pack(ops, after)

    def lower_parts(
        self,
        ops: Operations,
        inputs: Sequence[Value],
        layers: Iterable[Parts],
        progress: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, Value], list[Parts]]:
        """The same with the state in parts.

        Args:
            layers: for each layer the parts of the state by name, as `layout` orders them, [1, H, rows, D] each.

        Returns:
            The outputs by name: logits [1, 1, V] of the last token that counts, or [1, T, V] of all, and the signals if
            they were asked for; and the state after the call.
        """
        ids, place, *learning = inputs
        network = Network(ops, self.model, self.options, self.outside)
        tokens = self.inputs[IDS][0][1]
        if self.name == "decode":
            call: Call = Decode(network.numbers, self.model, place)
        else:
            call = Prefill(network.numbers, self.model, tokens, place)
        for scale in learning:
            call.scale_learning(scale)
        call.seen = [] if self.options.signals else None
        x, after = network.blocks(network.embed(ids), call, layers, progress)
        logits = network.logits(x if self.options.all_logits else call.last(x))
        return {LOGITS: ops.cast(logits, self.outside)} | self._signals(ops, call.seen or []), after

    def _signals(self, ops: Operations, seen: Sequence[Signals]) -> dict[str, Value]:
        """Those of all layers by the outputs' names."""
        if not seen:
            return {}
        shape = [len(seen), self.layout.shape[1], self.inputs[IDS][0][1]]
        by_name = {name: [getattr(one, field) for one in seen] for name, field in SIGNALS.items()}
        return {name: ops.reshape(ops.concat(x, axis=0), shape) for name, x in by_name.items()}

    def _unpack(self, ops: Operations, state: Value) -> Iterator[Parts]:
        """The parts of the state by layer, [1, H, rows, D] each."""
        parts, head_dim = self.layout.parts, self.model.args.head_dim
        if self.layout.width != head_dim:
            state = ops.slice(state, begin=[0, 0, 0, 0], size=[*self.layout.shape[:3], head_dim])
        for layer in ops.split(state, [1] * len(self.model.layers), axis=0):
            yield dict(zip(parts, ops.split(layer, list(parts.values()), axis=2), strict=True))

    def _pack(self, ops: Operations, layers: Sequence[Parts]) -> Value:
        """The inverse of `_unpack`."""
        state = ops.concat([ops.concat(list(parts.values()), axis=2) for parts in layers], axis=0)
        padded = self.layout.width != self.model.args.head_dim
        return ops.pad_last(state, self.layout.width) if padded else state


class Network:
    """The whole network in the operations of a lowering, for any call.

    Args:
        ops: what to compute with.
        model: whose network it is.
        options: how it computes.
        outside: the number type of the state.
    """

    def __init__(self, ops: Operations, model: Model, options: Options, outside: NumberType):
        self.ops, self.model, self.args, self.options = ops, model, model.args, options
        self.numbers = Numbers(ops, options.compute, outside)
        self._table = self.numbers.const(matrix(model.model.embed_tokens))
        self._stored = ops.constant(self._table, "embed_tokens")

    def embed(self, ids: Value) -> Value:
        """[1, T] -> [1, T, C]"""
        return self.ops.gather(self._stored, ids)

    def blocks(
        self, x: Value, call: Call, layers: Iterable[Parts], progress: Callable[[], None] = lambda: None
    ) -> tuple[Value, list[Parts]]:
        """x [1, T, C] and the state by layer and part, both after all blocks. Raises like `ExportedFunction.lower`."""
        ops, args, after = self.ops, self.args, []
        names = StateLayout.of(args).parts
        for index, (block, before) in enumerate(zip(self.model.layers, layers, strict=True)):
            x, state = Block(self.numbers, args, block_weights(block, args), call, index)(x, before)
            after.append({name: ops.cast(state[name], self.numbers.outside) for name in names})
            progress()
        return x, after

    def logits(self, x: Value) -> Value:
        """[1, T, C] -> [1, T, V]"""
        ops, pieces = self.ops, self.options.split_head
        x = rms_norm(ops, x, self.numbers.const(array(self.model.model.norm.weight)), self.args.rms_norm_eps)
        table, stored = self._table, self._stored
        if not self.args.tie_word_embeddings:
            table = self.numbers.const(matrix(self.model.lm_head))
            stored = ops.constant(table, "lm_head")
        rows = np.array_split(table, pieces) if pieces > 1 else [stored]
        return ops.concat([ops.linear(x, w, HEAD.format(i)) for i, w in enumerate(rows)], axis=-1)
