"""The network as a Core ML program: the functions `decode` and `prefill`.

Both read tokens with the same arithmetic (the dual form, see update/dual.py): `decode` one token at any phase of a
mini-batch, `prefill` a block of whole mini-batches from phase 0. Nothing depends on data but numbers: shapes are
static, there is no control flow, and the state is read once and written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from coremltools import target
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, Var, types

from ..model import Model
from .call import Decode, Prefill
from .network import Network
from .ops import cast, concat, split
from .state import StateLayout
from .weights import array, block_weights, embedding, head

COMPUTE = {  # type of the network, type of the inner model's update
    "float16": (np.float16, np.float16),
    "mixed": (np.float16, np.float32),
    "float32": (np.float32, np.float32),
}


@dataclass(frozen=True)
class Options:
    """How a program computes and what it takes and gives.

    Attributes:
        compute: a key of COMPUTE.
        state_mode: "state", or "io": the state as input `tttState` and output `tttStateOut`.
        split_head: the number of products that make up the logits.
        prefill_tokens: that `prefill` reads, a multiple of K; 0: K.
        all_logits: logits of all tokens, [1, T, V]: for verification.
    """

    compute: str = "float16"
    state_mode: str = "state"
    split_head: int = 1
    prefill_tokens: int = 0
    all_logits: bool = False


def build(model: Model, function: str, options: Options, progress: Callable[[], None] = lambda: None) -> Program:
    """The program of `function`, "decode" or "prefill"; `progress` is called after each block."""
    args, layout = model.args, StateLayout.of(model.args)
    T = {"decode": 1, "prefill": options.prefill_tokens or args.mini_batch_size}[function]
    where = {"decode": "position", "prefill": "length"}[function]
    state_type = mb.state_tensor_placeholder if options.state_mode == "state" else mb.placeholder
    inputs = {
        "inputIds": mb.placeholder((1, T), dtype=types.int32),
        where: mb.placeholder((1,), dtype=types.int32),
        "tttState": state_type(layout.shape, dtype=types.fp16),
    }
    with Function(inputs, opset_version=target.iOS18) as program_function:
        ids, place, state = program_function.inputs.values()
        network = Network(args, *COMPUTE[options.compute])
        call = {"decode": Decode, "prefill": Prefill}[function](network, model, T, place)
        old = mb.read_state(input=state) if options.state_mode == "state" else state
        table = mb.const(val=network.const(embedding(model)), name="embed_tokens")

        x = mb.gather(x=table, indices=ids, axis=0)  # [1, T, C]
        parts = []
        for index, (block, old_parts) in enumerate(zip(model.layers, _unpack(old, layout), strict=True)):
            weights = block_weights(block, args)
            x, new_parts = network.block(x, weights, old_parts, call, index)
            parts.append(new_parts)
            progress()

        new = _pack(parts, layout)
        if not options.all_logits:
            x = call.last(x)
        x = network.rms_norm(x, array(model.model.norm.weight), args.rms_norm_eps)
        if not args.tie_word_embeddings:
            table = mb.const(val=network.const(head(model)), name="lm_head")
        logits = _logits(x, table, options.split_head)
        if options.state_mode == "state":
            mb.coreml_update_state(state=state, value=new)
            program_function.set_outputs([logits])
        else:
            program_function.set_outputs([logits, mb.identity(x=new, name="tttStateOut")])
    program = Program()
    program.add_function("main", program_function)
    return program


def _logits(x: Var, table: Var, pieces: int) -> Var:
    """x [1, ., C] against every row of the table [V, C], in float16."""
    rows = np.array_split(table.val, pieces) if pieces > 1 else [table]
    logits = concat([mb.linear(x=x, weight=w, name=head_name(i)) for i, w in enumerate(rows)], axis=-1)
    logits = cast(logits, np.float16)
    logits.name = "logits"
    return logits


def head_name(piece: int) -> str:
    """Of the operation that computes a piece of the logits."""
    return f"lm_head_{piece}"


def _unpack(state: Var, layout: StateLayout) -> Iterator[dict[str, Var]]:
    """The state's parts by layer, [1, H, rows, D] each."""
    if layout.width != layout.head_dim:
        state = mb.slice_by_size(x=state, begin=[0, 0, 0, 0], size=[*layout.shape[:3], layout.head_dim])
    for layer in split(state, [1] * layout.layers, axis=0):
        yield dict(zip(layout.parts, split(layer, list(layout.parts.values()), axis=2), strict=True))


def _pack(layers: Sequence[dict[str, Var]], layout: StateLayout) -> Var:
    """The parts of each layer, [1, H, rows, D], as one state in float16."""
    state = concat([concat([cast(parts[name], np.float16) for name in layout.parts], 2) for parts in layers], 0)
    padding = layout.width - layout.head_dim
    if padding:
        state = mb.pad(x=state, pad=[0, 0, 0, 0, 0, 0, 0, padding], mode="constant", constant_val=np.float16(0))
    return state
