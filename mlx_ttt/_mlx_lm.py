"""Makes mlx-lm know the architecture "ttt" and the class of its cache, without importing mlx-lm (a second) for it.

mlx-lm looks a model up as the module mlx_lm.models.<model_type>, and the caches of a prompt file by their class names
in mlx_lm.models.cache. So the first is provided and the second completed when they are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

_ARCHITECTURE = "mlx_lm.models.ttt"
_CACHE = "mlx_lm.models.cache"


class _Architecture(Loader):
    """The module mlx_lm.models.ttt: the names that mlx-lm expects, from mlx_ttt.model."""

    def exec_module(self, module):
        model = importlib.import_module("mlx_ttt.model")
        module.Model, module.ModelArgs = model.Model, model.ModelArgs


class _Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == _ARCHITECTURE:
            return importlib.util.spec_from_loader(name, _Architecture())
        if name == _CACHE:
            spec = PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _add_cache(module)

            spec.loader.exec_module = exec_module
            return spec
        return None


def _add_cache(module) -> None:
    module.TTTCache = importlib.import_module("mlx_ttt.cache").TTTCache


def register() -> None:
    """Register with mlx-lm, imported already or not."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    if _CACHE in sys.modules:
        _add_cache(sys.modules[_CACHE])
