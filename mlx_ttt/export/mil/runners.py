"""What runs a Core ML package: Core ML on macOS, on each of its compute units; elsewhere the interpreter."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import coremltools as ct

from ...errors import CheckpointError
from ..errors import first_line
from ..session import Runner, Session
from .core_ai import NAME, on_core_ai
from .session import interpreted, on_device, packages_of

COMPUTE_UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")


@contextmanager
def runners_of(package: Path) -> Iterator[list[Runner]]:
    """What can run a package here, until the end of the context.

    On macOS that is each compute unit, elsewhere the interpreter. It runs twice. Once it rounds as the package declares
    its types, once it computes in float32 throughout: then only the weights are rounded. Last, on both, comes Core AI's
    runtime, or why it is missing.

    Args:
        package: an .mlpackage; of a pair the name without -decode.

    Raises:
        CheckpointError: there is none, or Core ML cannot compile it.
    """
    sessions = _sessions(package)
    with _compiled(package) as compiled, on_core_ai(package) as second:
        runners = [Runner(name, session, partial(_devices, compiled, name)) for name, session in sessions]
        yield [*runners, Runner(NAME, second, dict, is_second=True)]


def _sessions(package: Path) -> list[tuple[str, Callable[[], Session]]]:
    if sys.platform == "darwin":
        return [(unit, lambda unit=unit: on_device(package, unit)()) for unit in COMPUTE_UNITS]
    return [
        ("interpreter", lambda: interpreted(package)()),
        ("interpreter, float32", lambda: interpreted(package, rounding=False)()),
    ]


@contextmanager
def _compiled(package: Path) -> Iterator[Mapping[str, str]]:
    """What Core ML compiles the package of each function to, until the end of the context; on macOS only."""
    compiled: dict[Path, str] = {}
    packages = packages_of(package) if sys.platform == "darwin" else {}
    with ExitStack() as stack:
        for path in set(packages.values()):
            try:
                compiled[path] = ct.models.utils.compile_model(str(path))
            except RuntimeError as error:
                raise CheckpointError(f"{path}: Core ML cannot compile it: {first_line(error)}") from error
            stack.callback(shutil.rmtree, compiled[path], ignore_errors=True)
        yield {name: compiled[path] for name, path in packages.items()}


def _devices(compiled: Mapping[str, str], unit: str) -> dict[str, dict[str, int]]:
    """Core ML's plan: on which device it prefers to run how many operations of each compiled function."""
    from coremltools.models.compute_plan import MLComputePlan

    counts = {}
    for name, path in compiled.items():
        plan = MLComputePlan.load_from_path(path, compute_units=ct.ComputeUnit[unit])
        functions = plan.model_structure.program.functions
        usages = (
            plan.get_compute_device_usage_for_mlprogram_operation(op)
            for op in functions.get(name, functions.get("main")).block.operations
        )
        counts[name] = dict(Counter(type(u.preferred_compute_device).__name__ for u in usages if u is not None))
    return counts
