"""Makes mlx-lm know the architecture "ttt" and the classes of its cache, without importing mlx-lm (a second) for it.

mlx-lm looks a model up as the module mlx_lm.models.<model_type>, and the caches of a prompt file by their class names
in mlx_lm.models.cache. So the first is provided and the second completed when they are imported. A model directory
also names a `model_file`, for a plain mlx-lm, which runs no such file unasked; here it is not needed, and not run.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import PathFinder

_ARCHITECTURE = "mlx_lm.models.ttt"
MODEL_FILE = "ttt.py"


class _Architecture(Loader):
    """The module mlx_lm.models.ttt: the names that mlx-lm expects, from mlx_ttt.model."""

    def exec_module(self, module):
        model = importlib.import_module("mlx_ttt.model")
        module.Model, module.ModelArgs = model.Model, model.ModelArgs


def _add_caches(module) -> None:
    cache = importlib.import_module("mlx_ttt.cache")
    module.TTTCache, module.RewindableTTTCache = cache.TTTCache, cache.RewindableTTTCache


def _pass_over_model_file(module) -> None:
    load_config, save_config = module.load_config, module.save_config

    @functools.wraps(load_config)
    def without_model_file(*args, **kwargs) -> dict:
        config = load_config(*args, **kwargs)
        if config.get("model_type") == "ttt":
            config.pop("model_file", None)
        return config

    @functools.wraps(save_config)
    def with_model_file(config: dict, *args, **kwargs) -> None:
        own = {"model_file": MODEL_FILE} if config.get("model_type") == "ttt" else {}
        save_config(config | own, *args, **kwargs)

    module.load_config, module.save_config = without_model_file, with_model_file


_COMPLETED = {"mlx_lm.models.cache": _add_caches, "mlx_lm.utils": _pass_over_model_file}


class _Finder(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == _ARCHITECTURE:
            return importlib.util.spec_from_loader(name, _Architecture())
        if name in _COMPLETED:
            spec = PathFinder.find_spec(name, path)
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                _COMPLETED[name](module)

            spec.loader.exec_module = exec_module
            return spec
        return None


def register() -> None:
    """Register with mlx-lm, imported already or not."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, complete in _COMPLETED.items():
        if name in sys.modules:
            complete(sys.modules[name])
