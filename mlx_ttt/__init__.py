"""Test-Time Training language models (TTT-Linear, TTT-MLP) on Apple silicon.

    model, tokenizer = mlx_ttt.load()          # the bundled model, or a model directory
    print(mlx_ttt.generate(model, tokenizer, "ROMEO:\\n"))

Importing this package also teaches mlx-lm the architecture: `mlx_lm.load` works on our model directories.
"""

from __future__ import annotations

import importlib

from . import _blas, _mlx_lm

__version__ = "0.1.0"

_blas.load_before_mlx()
_mlx_lm.register()

# Imported when first used: MLX, mlx-lm and transformers take a second.
_HOMES = {
    "bundled_model": "loading",
    "load": "loading",
    "load_model": "loading",
    "TextState": "generation",
    "generate": "generation",
    "load_state": "generation",
    "read": "generation",
    "save_state": "generation",
    "stream_generate": "generation",
    "TTTError": "errors",
}
__all__ = [*_HOMES]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*globals(), *_HOMES])
