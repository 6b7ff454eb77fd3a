"""The Metal kernels, on a Metal device or on the host harness."""

from __future__ import annotations

import re

import pytest

from mlx_ttt.backends.cpu import library
from mlx_ttt.backends.metal import layer, rule
from tests.backends.metal.host import host_metal, why_unavailable


@pytest.fixture(scope="module", params=["host", pytest.param("device", marks=pytest.mark.metal)])
def kernels(request):
    """Makes the update rule run kernels. On the host this is the record of their launches, on a device None."""
    if request.param == "device":
        if not rule.available():
            pytest.skip("no Metal device")
        yield None
        return
    if why_unavailable():
        pytest.skip(why_unavailable())
    with pytest.MonkeyPatch.context() as patch, host_metal() as launches:
        patch.setattr(rule, "available", lambda: True)
        patch.setattr(library, "c_code", lambda: None)  # it would be asked first
        forget_kernels()
        yield launches
        forget_kernels()


@pytest.fixture
def launches(kernels):
    """The record of a test's launches, which only the host keeps. Kernels have been probed before."""
    if kernels is None:
        pytest.skip("only the host counts launches")
    del kernels.names[:], kernels.stats[:]
    return kernels


@pytest.fixture
def with_scratch(kernels):
    """Kernels whose working memory is device memory write as much of it as they need. The rest is NaN."""
    if kernels is not None:
        kernels.allow_unwritten = True
    yield kernels
    if kernels is not None:
        kernels.allow_unwritten = False


@pytest.fixture
def instead_of_kernels(monkeypatch):
    """Puts a function in the place of every launch, without a device and without the harness."""

    def put(launch):
        monkeypatch.setattr(library, "c_code", lambda: None)
        monkeypatch.setattr(rule, "available", lambda: True)
        monkeypatch.setattr(rule, "_launch", launch)
        monkeypatch.setattr(rule, "_tiles", lambda variant: 1)
        monkeypatch.setattr(layer, "_runs", lambda *call: False)

    return put


@pytest.fixture
def mutate(kernels, monkeypatch):
    """Changes one place of a Metal file, and of what it includes, for the rest of the test."""
    if kernels is None:
        pytest.skip("the host compiles mutants; a device need not")
    original = rule.metal_source

    def to(kind: str, old: str, new: str, occurrence: int = 0) -> None:
        file = f"ttt_{kind}.metal"
        source = original(file)
        at = [m.start() for m in re.finditer(re.escape(old), source)][occurrence]
        mutant = source[:at] + new + source[at + len(old) :]
        monkeypatch.setattr(rule, "metal_source", lambda name: mutant if name == file else original(name))
        forget_kernels()

    yield to
    forget_kernels()


def forget_kernels() -> None:
    """Kernels are made once; those made for one device are no good on another."""
    for function in (rule._compiled, rule._tiles, layer._compiled, layer._runs):
        function.cache_clear()
