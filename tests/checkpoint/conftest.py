"""Fixtures for the tests of checkpoints."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def unreadable(monkeypatch) -> Callable[[Path], Path]:
    """A function that makes a file or folder unreadable, also for root, who can read files of any mode."""

    def guard(module: object, function: str, denied: Callable[[str], bool]) -> None:
        original = getattr(module, function)

        def guarded(where, *args, **kwargs):
            if denied(str(where)):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(where))
            return original(where, *args, **kwargs)

        monkeypatch.setattr(module, function, guarded)

    def take(path: Path) -> Path:
        inside = f"{path}{os.sep}"
        guard(os, "listdir", lambda where: where == str(path))
        guard(os, "stat", lambda where: where.startswith(inside))
        for module in (io, builtins):
            guard(module, "open", lambda where: where == str(path) or where.startswith(inside))
        return path

    return take


@pytest.fixture
def source(tmp_path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"
