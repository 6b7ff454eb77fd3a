"""The Metal kernels, on a Metal device or on the host harness."""

from __future__ import annotations

import pytest

from mlx_ttt import native
from mlx_ttt.update import metal
from tests.metal_host import host_metal, why_unavailable


@pytest.fixture(scope="module", params=["host", pytest.param("device", marks=pytest.mark.metal)])
def kernels(request):
    """Makes `mlx_ttt.update` run kernels. On the host it is the record of their launches, on a device None."""
    if request.param == "device":
        if not metal.available():
            pytest.skip("no Metal device")
        yield None
        return
    if why_unavailable():
        pytest.skip(why_unavailable())
    with pytest.MonkeyPatch.context() as patch, host_metal() as launches:
        patch.setattr(metal, "available", lambda: True)
        patch.setattr(native, "available", lambda: False)  # a CPU's own code, which would pass them by
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


def forget_kernels() -> None:
    """Kernels are made once; those made for one device are no good on another."""
    metal._kernel.cache_clear()
    metal._tiles.cache_clear()
