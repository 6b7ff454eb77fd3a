"""Runs code that calls `mx.fast.metal_kernel` on the host, unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from .kernel import HostCall, HostKernel, Stats, signature


@dataclass
class Dispatches:
    """The kernels that ran inside one `host_metal()`, in order."""

    seed: int
    allow_unwritten: bool
    names: list[str] = field(default_factory=list)
    stats: list[Stats] = field(default_factory=list)


@contextlib.contextmanager
def host_metal(*, seed: int = 0, allow_unwritten: bool = False, available: bool = False) -> Iterator[Dispatches]:
    """Within the context, kernels made by `mx.fast.metal_kernel` run on the host when they are called.

    Kernels must also be *made* inside the context. So code that keeps its kernels must forget those made before, and
    afterwards those made here. With `available`, `mx.metal.is_available()` is true. Calls are evaluated at once, so
    they fail inside `mx.compile`. Yields the record of what ran.
    """
    record = Dispatches(seed, allow_unwritten)
    real_kernel, real_available = mx.fast.metal_kernel, mx.metal.is_available

    def metal_kernel(name: str, *args, **kwargs):
        return _HostCallable(name, real_kernel(name, *args, **kwargs), record)

    mx.fast.metal_kernel = metal_kernel
    if available:
        mx.metal.is_available = lambda: True
    try:
        yield record
    finally:
        mx.fast.metal_kernel, mx.metal.is_available = real_kernel, real_available


class _HostCallable:
    """Stands in for the object that `mx.fast.metal_kernel` returns."""

    def __init__(self, name: str, kernel, record: Dispatches):
        self._name, self._kernel, self._record = name, kernel, record
        self._traced: dict[tuple, HostKernel] = {}

    def __call__(self, *, inputs, stream=None, verbose: bool = False, **call) -> list[mx.array]:
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        key = (
            tuple(signature(x) for x in arrays),
            tuple(call.get("template") or ()),
            tuple(call["output_dtypes"]),
        )
        if key not in self._traced:
            self._traced[key] = HostKernel.from_mlx(self._kernel, arrays, **call).kernel
        outputs, stats = HostCall(self._traced[key], arrays, call).run(
            seed=self._record.seed, allow_unwritten=self._record.allow_unwritten
        )
        self._record.names.append(self._name)
        self._record.stats.append(stats)
        return outputs
