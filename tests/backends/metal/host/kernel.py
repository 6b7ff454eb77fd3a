"""A Metal kernel that runs on the host."""

from __future__ import annotations

import ctypes
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from . import toolchain
from .debug_lines import LineTable
from .errors import BY_NAME, KernelError, UnwrittenOutput
from .lower import Buffer, lower
from .thread_sanitizer import race_reports
from .trace import trace_call

_MOST_THREADS, _MOST_BUFFERS = 1024, 31


@dataclass(frozen=True)
class Traffic:
    """Bytes between the threads of one dispatch and one buffer."""

    read: int  # every load of every thread
    written: int  # every store of every thread
    fetched: int  # distinct bytes loaded per threadgroup and barrier interval: repeated loads count once
    stored: int  # the same for stores


@dataclass(frozen=True)
class Stats:
    """What one dispatch did."""

    buffers: dict[str, Traffic]
    threadgroups: int
    threadgroup_memory: int  # bytes of threadgroup arrays, per threadgroup
    threadgroup_read: int  # bytes, every load of every thread
    threadgroup_written: int
    barriers: int  # threadgroup barriers, summed over threadgroups
    barriers_per_thread: int  # most that one thread passed
    simdgroup_barriers: int  # summed over simdgroups
    shuffles: int  # simdgroup-wide calls, summed over simdgroups
    reductions: int
    multiplies: int  # 8 by 8 by 8 simdgroup matrix products

    def _total(self, field: str) -> int:
        return sum(getattr(traffic, field) for traffic in self.buffers.values())

    @property
    def device_read(self) -> int:
        """Bytes, every load of every thread."""
        return self._total("read")

    @property
    def device_written(self) -> int:
        """Bytes, every store of every thread."""
        return self._total("written")

    @property
    def device_fetched(self) -> int:
        """Bytes, each once per threadgroup and barrier interval."""
        return self._total("fetched")

    @property
    def device_stored(self) -> int:
        """Bytes, each once per threadgroup and barrier interval."""
        return self._total("stored")


class HostKernel:
    """A kernel of `source` as C++, which the first run compiles.

    `kernel` names it where the source has several, and `template` gives its template arguments as in "<float, 64>".
    """

    def __init__(self, source: str, kernel: str | None = None, template: str | None = None):
        self.source = source
        self._lowered = lower(source, kernel, template)
        self.buffers = self._lowered.buffers
        if len(self.buffers) > _MOST_BUFFERS:
            raise ValueError(f"{len(self.buffers)} buffers: a Metal kernel has at most {_MOST_BUFFERS}")

    @functools.cached_property
    def _library(self) -> Path:
        """The compiled kernel. Compiling takes seconds where a kernel is large, and the checks do without it."""
        return toolchain.compile_kernel(self._lowered.cpp)

    @functools.cached_property
    def _entry(self) -> Callable:
        toolchain.runtime()  # whose functions the kernel calls
        return ctypes.CDLL(str(self._library)).msl_entry

    @classmethod
    def from_mlx(cls, kernel: Callable, inputs: Sequence, **call) -> HostCall:
        """Returns the call `kernel(inputs=inputs, **call)` of an `mx.fast.metal_kernel`, ready to run on the host."""
        arrays = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        return HostCall(_compiled(trace_call(kernel, arrays, **call)), arrays, call)

    def check_address_spaces(self) -> None:
        """Raises CompileError if the kernel mixes address spaces."""
        toolchain.check(self._lowered.cpp, "ADDRESS_SPACES")

    def check_conversions(self) -> None:
        """Raises CompileError if the kernel makes a bfloat of another number, or a half of a bfloat, implicitly."""
        toolchain.check(self._lowered.cpp, "CONVERSIONS")

    def run(
        self,
        buffers: Mapping[str, np.ndarray],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        *,
        seed: int = 0,
        initialised: Sequence[str] = (),
        allow_unwritten: bool = False,
    ) -> Stats:
        """Runs the kernel over `grid` threads in groups of `threadgroup`, and returns what it did.

        `buffers` has a C-contiguous array for each of the kernel's buffers; those that it may write are changed in
        place. The kernel may not read what they hold at first, unless they are named in `initialised`. `seed` 0 runs
        threads in order, others shuffle them. Raises the errors of errors.py, CompileError among them.
        """
        size = _threadgroup_size(grid, threadgroup)
        arguments = (_Buffer * len(self.buffers))()
        for argument, (buffer, array, known) in zip(arguments, self._arrays(buffers, initialised), strict=True):
            argument.name = buffer.name.encode()
            argument.data = array.ctypes.data
            argument.bytes = array.nbytes
            argument.writable = buffer.writable
            argument.initialised = known
        report = _Report()
        three = ctypes.c_uint32 * 3
        failed = toolchain.runtime().msl_dispatch(
            self._entry,
            arguments,
            len(arguments),
            three(*grid),
            three(*size),
            ctypes.c_uint64(seed),
            ctypes.byref(report),
        )
        if failed:
            raise self._error(report.message.decode())
        for argument in arguments:
            if argument.unwritten and not allow_unwritten:
                missing = f"{argument.unwritten} of {argument.bytes} bytes"
                raise UnwrittenOutput(f"{missing} of output '{argument.name.decode()}' were not written")
        return _stats(arguments, report)

    def thread_sanitizer(
        self,
        buffers: Mapping[str, np.ndarray],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        *,
        seed: int = 0,
        initialised: Sequence[str] = (),
    ) -> list[str]:
        """Returns the races that clang's ThreadSanitizer sees in the same dispatch; `buffers` stay as they are."""
        arrays = self._arrays(buffers, initialised)
        size = _threadgroup_size(grid, threadgroup)
        return race_reports(self._lowered, arrays, grid, size, seed, self._line)

    def _arrays(
        self, arrays: Mapping[str, np.ndarray], initialised: Sequence[str]
    ) -> list[tuple[Buffer, np.ndarray, bool]]:
        """Each buffer with its array, and whether the array's contents are known to the kernel."""
        for buffer in self.buffers:
            if buffer.name not in arrays:
                raise ValueError(f"no array for buffer '{buffer.name}'")
            if not arrays[buffer.name].flags.c_contiguous:
                raise ValueError(f"the array for buffer '{buffer.name}' is not C-contiguous")
        return [(b, arrays[b.name], not b.writable or b.name in initialised) for b in self.buffers]

    def _error(self, message: str) -> KernelError:
        reports = [line.split("|", 1) for line in message.split("\n")]
        reports.sort(key=lambda report: report[0] != "DataRace")  # the cause of the others, if there is one
        texts = [re.sub(r"\{site:(\d+)\}", lambda m: self._where(int(m[1])), text) for _, text in reports]
        return BY_NAME[reports[0][0]]("\n".join(texts))

    def _where(self, site: int) -> str:
        if site >> 31:
            runtime = toolchain.runtime()
            runtime.msl_site_file.restype = ctypes.c_char_p
            return self._line((runtime.msl_site_file(ctypes.c_uint32(site)).decode(), site & 0xFFFFFF))
        return self._line(self._line_table.find(site))

    def _line(self, place: tuple[str, int]) -> str:
        text = self._lowered.lines.get(place)
        return f"{place[0]}:{place[1]}" + (f" `{text}`" if text else "")

    @functools.cached_property
    def _line_table(self) -> LineTable:
        return LineTable(self._library)


def check_source(source: str) -> None:
    """Raises CompileError as both checks of HostKernel do, without a kernel that can be run: that takes longer."""
    cpp = lower(source).cpp
    for rule in ("ADDRESS_SPACES", "CONVERSIONS"):
        toolchain.check(cpp, rule)


class HostCall:
    """One call of an `mx.fast.metal_kernel`. Only the values and shapes of its inputs may change."""

    def __init__(self, kernel: HostKernel, inputs: Sequence[mx.array], call: Mapping):
        self.kernel = kernel
        self._inputs = list(inputs)
        self._call = dict(call)
        outputs = len(call["output_shapes"])
        self._input_buffers = kernel.buffers[:-outputs]
        self._output_buffers = kernel.buffers[-outputs:]

    @property
    def source(self) -> str:
        """The Metal source that MLX generated."""
        return self.kernel.source

    def check_address_spaces(self) -> None:
        """Raises CompileError if the kernel mixes address spaces."""
        self.kernel.check_address_spaces()

    def check_conversions(self) -> None:
        """Raises CompileError if the kernel makes a bfloat of another number, or a half of a bfloat, implicitly."""
        self.kernel.check_conversions()

    def run(
        self, inputs: Sequence | None = None, *, seed: int = 0, allow_unwritten: bool = False
    ) -> tuple[list[mx.array], Stats]:
        """Returns what the kernel returns for `inputs` (default: those of the call), and what it did.

        `seed` and errors are those of `HostKernel.run`.
        """
        dispatch = self._dispatch(inputs)
        stats = self.kernel.run(**dispatch, seed=seed, allow_unwritten=allow_unwritten)
        outputs = [dispatch["buffers"][buffer.name] for buffer in self._output_buffers]
        return [_to_mlx(x, dtype) for x, dtype in zip(outputs, self._call["output_dtypes"], strict=True)], stats

    def thread_sanitizer(self, inputs: Sequence | None = None, *, seed: int = 0) -> list[str]:
        """Returns the races that clang's ThreadSanitizer sees in the same call."""
        return self.kernel.thread_sanitizer(**self._dispatch(inputs), seed=seed)

    def _dispatch(self, inputs: Sequence | None) -> dict:
        """The arguments of `HostKernel.run`."""
        arrays = self._inputs if inputs is None else [mx.array(x) for x in inputs]
        for i, (array, traced) in enumerate(zip(arrays, self._inputs, strict=True)):
            if signature(array) != signature(traced):
                raise ValueError(
                    f"input {i} is {array.dtype} {array.shape}, the call was made for {traced.dtype} {traced.shape}"
                )
        buffers = self._bind(arrays)
        initial = self._call.get("init_value")
        outputs = zip(self._call["output_shapes"], self._call["output_dtypes"], strict=True)
        for buffer, (shape, dtype) in zip(self._output_buffers, outputs, strict=True):
            buffers[buffer.name] = _to_numpy(mx.full(shape, initial or 0, dtype=dtype))
        return {
            "buffers": buffers,
            "grid": self._call["grid"],
            "threadgroup": self._call["threadgroup"],
            "initialised": () if initial is None else [buffer.name for buffer in self._output_buffers],
        }

    def _bind(self, arrays: Sequence[mx.array]) -> dict[str, np.ndarray]:
        """The kernel's input buffers by name: each array, then what the kernel uses of its shape, strides and ndim."""
        bound, left, about = {}, iter(arrays), {}
        for buffer in self._input_buffers:
            if buffer.name not in about:
                array = next(left)
                bound[buffer.name] = _to_numpy(array)
                about = {f"{buffer.name}_{what}": x for what, x in _metadata(array).items()}
            else:
                bound[buffer.name] = about[buffer.name]
        return bound


def signature(array: mx.array) -> tuple:
    """What MLX's source depends on: arrays of fewer than 8 elements are in constant memory, scalars are references."""
    return array.dtype, array.ndim == 0, array.size < 8


def _metadata(array: mx.array) -> dict[str, np.ndarray]:
    """What MLX passes for an array whose name the kernel uses with _shape, _strides or _ndim."""
    strides = [math.prod(array.shape[i + 1 :]) for i in range(array.ndim)]
    return {
        "shape": np.array(array.shape, np.int32),
        "strides": np.array(strides, np.int64),
        "ndim": np.array([array.ndim], np.int32),
    }


def _threadgroup_size(grid: Sequence[int], threadgroup: Sequence[int]) -> list[int]:
    """MLX makes a threadgroup no larger than the grid."""
    size = [min(t, g) for t, g in zip(threadgroup, grid, strict=True)]
    if not 0 < math.prod(size) <= _MOST_THREADS:
        raise ValueError(f"threadgroup {tuple(threadgroup)}: a threadgroup has 1 to {_MOST_THREADS} threads")
    return size


@functools.cache
def _compiled(source: str) -> HostKernel:
    return HostKernel(source)


def _to_numpy(array: mx.array) -> np.ndarray:
    """A copy of `array`; bfloat16, which numpy lacks, as its bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, order="C")


def _to_mlx(array: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(array).view(dtype) if dtype == mx.bfloat16 else mx.array(array)


class _Buffer(ctypes.Structure):
    """`msl_buffer` of runtime/abi.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("writable", ctypes.c_int32),
        ("initialised", ctypes.c_int32),
        *((counter, ctypes.c_uint64) for counter in ("read", "written", "fetched", "stored", "unwritten")),
    )


class _Report(ctypes.Structure):
    """`msl_report` of runtime/abi.h."""

    _fields_ = (
        *((counter, ctypes.c_uint64) for counter in ("threadgroup_read", "threadgroup_written", "threadgroup_memory")),
        *((counter, ctypes.c_uint64) for counter in ("threadgroups", "barriers", "barriers_per_thread")),
        *((counter, ctypes.c_uint64) for counter in ("simdgroup_barriers", "shuffles", "reductions", "multiplies")),
        ("message", ctypes.c_char * 4096),
    )


def _stats(buffers: Sequence[_Buffer], report: _Report) -> Stats:
    traffic = {b.name.decode(): Traffic(b.read, b.written, b.fetched, b.stored) for b in buffers}
    counters = {name: getattr(report, name) for name, _ in _Report._fields_ if name != "message"}
    return Stats(buffers=traffic, **counters)
