"""Test-Time Training language models (TTT-Linear, TTT-MLP) on Apple silicon.

    model, tokenizer = mlx_ttt.load()          # the bundled model, or a model directory
    print(mlx_ttt.generate(model, tokenizer, "ROMEO:\\n"))

Importing this package also teaches mlx-lm the architecture: `mlx_lm.load` works on our model directories.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import mlx_lm_plugin
from .backends.cpu import library
from .version import __version__ as __version__

library.load_before_mlx()
mlx_lm_plugin.register()

# Imported when first used: MLX, mlx-lm and transformers take a second.
_HOMES = {
    "bundled_model": "loading",
    "load": "loading",
    "load_model": "loading",
    "observe": "learning.observation",
    "Observation": "learning.observation",
    "TextState": "text.state",
    "generate": "text.generation",
    "load_state": "text.state",
    "read": "text.state",
    "save_state": "text.state",
    "stream_generate": "text.generation",
    "TTTError": "errors",
}
__all__ = [*_HOMES]

if TYPE_CHECKING:  # the same names for type checkers, which do not see a table
    from .errors import TTTError as TTTError
    from .learning.observation import Observation as Observation
    from .learning.observation import observe as observe
    from .loading import bundled_model as bundled_model
    from .loading import load as load
    from .loading import load_model as load_model
    from .text.generation import generate as generate
    from .text.generation import stream_generate as stream_generate
    from .text.state import TextState as TextState
    from .text.state import load_state as load_state
    from .text.state import read as read
    from .text.state import save_state as save_state


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
