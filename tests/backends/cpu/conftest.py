"""What the tests of the C code share."""

from __future__ import annotations

import pytest

from mlx_ttt.backends.cpu import library

from .c_code import Spy


@pytest.fixture
def spy(monkeypatch) -> Spy:
    """Which functions in C are called."""
    spy = Spy(library.c_code())
    monkeypatch.setattr(library, "c_code", lambda: spy)
    return spy
