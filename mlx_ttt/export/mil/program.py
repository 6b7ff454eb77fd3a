"""A function of an exported model as a Core ML program: how MIL declares inputs, state and outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coremltools import target
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Function, Program, types

from ...network.model import Model
from .. import functions
from ..functions import STATE, ExportedFunction
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
    inputs = {
        name: mb.placeholder(shape, dtype=types.numpy_type_to_builtin_type(number))
        for name, (shape, number) in exported.inputs.items()
    }
    inputs[STATE] = placeholder(exported.layout.shape, dtype=types.fp16)
    with Function(inputs, opset_version=target.iOS18) as function:
        *tokens, state = function.inputs.values()
        before = mb.read_state(input=state) if keeps_state else state
        outputs, after = exported.lower(MILOperations(), tokens, before, progress)
        for output_name, value in outputs.items():
            value.name = output_name
        if keeps_state:
            mb.coreml_update_state(state=state, value=after)
            function.set_outputs(list(outputs.values()))
        else:
            function.set_outputs([*outputs.values(), mb.identity(x=after, name=f"{STATE}Out")])
    program = Program()
    program.add_function("main", function)
    return program
