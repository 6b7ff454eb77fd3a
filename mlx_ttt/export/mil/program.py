"""A function of an exported model as a Core ML program: how MIL declares inputs, state and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coremltools import target
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from ...network.model import Model
from .. import functions
from ..functions import LOGITS, STATE, ExportedFunction
from .operations import MILOperations


@dataclass(frozen=True)
class Options(functions.Options):
    """How a program computes, what it takes and what it gives.

    Attributes:
        state_mode: "state": Core ML keeps the state; or "io": the state is the input `tttState` and the output
            `tttStateOut` of every call.
    """

    state_mode: str = "state"


def build(model: Model, name: str, options: Options, progress: Callable[[], None] = lambda: None) -> Program:
    """The program of one function.

    Args:
        model: the model.
        name: "decode" or "prefill".
        options: how it computes.
        progress: called after each block.

    Raises:
        CheckpointError: a weight is not finite.
    """
    mb.name_count.clear()  # or names would depend on what this process has built before
    exported = ExportedFunction(model, name, options)
    keeps_state = options.state_mode == "state"
    placeholder = mb.state_tensor_placeholder if keeps_state else mb.placeholder
    inputs = {name: mb.placeholder(shape, dtype=types.int32) for name, shape in exported.inputs.items()}
    inputs[STATE] = placeholder(exported.layout.shape, dtype=types.fp16)
    with Function(inputs, opset_version=target.iOS18) as function:
        *tokens, state = function.inputs.values()
        before = mb.read_state(input=state) if keeps_state else state
        logits, after = exported.lower(MILOperations(), tokens, before, progress)
        logits.name = LOGITS
        if keeps_state:
            mb.coreml_update_state(state=state, value=after)
            function.set_outputs([logits])
        else:
            function.set_outputs([logits, mb.identity(x=after, name=f"{STATE}Out")])
    program = Program()
    program.add_function("main", function)
    return program
