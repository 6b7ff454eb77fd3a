"""The bundled model and what it writes, shared by the tests of this folder."""

from __future__ import annotations

import pytest

import mlx_ttt

PROMPT = "ROMEO:\n"


@pytest.fixture(scope="session")
def bundled():
    return mlx_ttt.load()


@pytest.fixture(scope="session")
def text(bundled):
    """200 greedy tokens after the prompt."""
    return mlx_ttt.generate(*bundled, PROMPT, max_tokens=200)
