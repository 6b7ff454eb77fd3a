"""Fixtures for the tests of checkpoints."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants

from .hub_server import Hub


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


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub without repositories, empty caches, and nobody logged in."""
    monkeypatch.setenv("MLX_TTT_CACHE", str(tmp_path / "converted"))
    with Hub() as hub:
        url = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub
