"""Runs Metal kernels on a Linux CPU, with every memory access checked and counted. See README.md."""

from .errors import (
    CompileError,
    DataRace,
    DivergentBarrier,
    DivisionByZero,
    KernelError,
    Misaligned,
    OutOfBounds,
    ReadOnlyWrite,
    ThreadgroupMemory,
    UninitializedRead,
    Unsupported,
    UnwrittenOutput,
)
from .kernel import HostCall, HostKernel, Stats, Traffic, check_source
from .lint import Finding, lint
from .patch import Dispatches, host_metal
from .toolchain import why_unavailable
from .trace import trace, trace_call

__all__ = [
    "CompileError",
    "DataRace",
    "Dispatches",
    "DivergentBarrier",
    "DivisionByZero",
    "Finding",
    "HostCall",
    "HostKernel",
    "KernelError",
    "Misaligned",
    "OutOfBounds",
    "ReadOnlyWrite",
    "Stats",
    "ThreadgroupMemory",
    "Traffic",
    "UninitializedRead",
    "Unsupported",
    "UnwrittenOutput",
    "check_source",
    "host_metal",
    "lint",
    "trace",
    "trace_call",
    "why_unavailable",
]
