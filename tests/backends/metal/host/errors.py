"""What a kernel can do wrong on the host. Each error's text names the source line."""

from __future__ import annotations


class KernelError(Exception):
    """A Metal kernel broke a rule of Metal while running, or could not be run."""


class OutOfBounds(KernelError):
    """A load or store outside the buffer, threadgroup array or thread array that it belongs to."""


class Misaligned(KernelError):
    """A load or store of a vector at an address that is not a multiple of its size."""


class DivisionByZero(KernelError):
    """An integer divided by zero, which Metal leaves undefined."""


class ReadOnlyWrite(KernelError):
    """A store to an input."""


class UninitializedRead(KernelError):
    """A load of threadgroup memory or of an output that nothing has written."""


class UnwrittenOutput(KernelError):
    """The kernel finished without writing every element of an output."""


class DataRace(KernelError):
    """Two threads access a byte, one of them writes, and no barrier for that memory is between the accesses."""


class DivergentBarrier(KernelError):
    """A barrier or simdgroup operation that not all threads of its group reach."""


class ThreadgroupMemory(KernelError):
    """More than 32 KB of threadgroup memory."""


class Unsupported(KernelError):
    """Something that Metal allows and the harness does not know."""


class CompileError(KernelError):
    """clang rejects the kernel, in the build that runs or in one that only checks."""


BY_NAME = {c.__name__: c for c in KernelError.__subclasses__()}
