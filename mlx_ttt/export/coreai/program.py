"""The functions of a bundle as one Core AI program, whose functions share their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from coreai.authoring import AIProgram, Module

from ...network.model import Model
from ..functions import FUNCTIONS, ExportedFunction, Options
from ..numbers import COMPUTE
from ..operations import NumberType
from .compiler import Value, add_function
from .kernels import FORMS, KernelOperations
from .operations import CoreAIOperations
from .runner_main import MAIN, add_main
from .state import apart_shapes
from .storage import Storage

ALL = (MAIN, *FUNCTIONS)


def outside(compute: str) -> NumberType:
    """The number type of states, and of the logits of `decode` and `prefill`: that of the inner model."""
    return COMPUTE[compute][1]


def build(
    model: Model,
    weights: str,
    options: Options,
    functions: tuple[str, ...] = ALL,
    progress: Callable[[], None] = lambda: None,
) -> AIProgram:
    """The program of a model.

    Args:
        model: the model.
        weights: how its matrices are stored: one of formats.WEIGHTS.
        options: how it computes.
        functions: which ones.
        progress: called after each block of a function; `main` has each block twice.

    Raises:
        CheckpointError: a weight is not finite, or does not fit the number type.
    """
    ops = CoreAIOperations(Storage(weights), COMPUTE[options.compute][0])
    module = Module.create()
    with module:
        for name in functions:
            if name == MAIN:
                add_main(model, ops, options, outside(options.compute), progress)
            else:
                _add(ExportedFunction(model, name, options, outside(options.compute)), name, ops, progress)
    module.verify()
    return AIProgram(module)


def build_with_kernels(
    model: Model, weights: str, options: Options, progress: Callable[[], None] = lambda: None
) -> AIProgram:
    """The program for a GPU: `decode` and `prefill` with the same inputs, outputs and states; and `step`.

    `step` is `decode` for a token that completes no mini-batch, so it leaves the inner models' weights alone. Arguments
    and errors are those of `build`.
    """
    storage, number = Storage(weights), outside(options.compute)
    module = Module.create()
    with module:
        for name, form in FORMS.items():
            ops = KernelOperations(storage, COMPUTE[options.compute][0], form)
            like = name if name in FUNCTIONS else "decode"
            _add(ExportedFunction(model, like, options, number), name, ops, progress)
    module.verify()
    return AIProgram(module)


def _add(exported: ExportedFunction, name: str, ops: CoreAIOperations, progress: Callable[[], None]) -> None:
    """Add `decode` or `prefill` by some name to the module that is being built."""
    parts, states = exported.layout.parts, apart_shapes(exported.layout)

    def body(*arguments: Value) -> tuple[dict[str, Value], dict[str, Value]]:
        inputs, state = arguments[: len(exported.inputs)], arguments[len(exported.inputs) :]
        n = len(parts)
        layers = [dict(zip(parts, state[i : i + n], strict=True)) for i in range(0, len(state), n)]
        outputs, after = exported.lower_parts(ops, inputs, layers, progress)
        return outputs, dict(zip(states, (layer[part] for layer in after for part in parts), strict=True))

    add_function(name, exported.inputs, {name: (shape, exported.outside) for name, shape in states.items()}, body)


def save(program: AIProgram, path: Path) -> None:
    """Write a program to a folder NAME.aimodel."""
    program.save_asset(path)
