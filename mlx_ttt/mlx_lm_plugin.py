"""Teaches mlx-lm the architecture "ttt" and the classes of its caches.

mlx-lm finds an architecture as the module mlx_lm.models.<model_type>, and the caches of a prompt file by their class
names in mlx_lm.models.cache. Importing mlx-lm takes a second, so nothing is imported here. Instead, the first module is
provided and the second is completed at the moment when mlx-lm imports them.

A model directory also names a `model_file`, for an mlx-lm without this package. mlx-lm does not run such a file unless
it is told to trust it. With this package the file is not needed, so its name is hidden from mlx-lm.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_ARCHITECTURE = "mlx_lm.models.ttt"


class _Architecture(Loader):
    """Loads the module mlx_lm.models.ttt, with the names that mlx-lm expects."""

    def exec_module(self, module: Any) -> None:
        model = importlib.import_module("mlx_ttt.model")
        module.Model, module.ModelArgs = model.Model, model.ModelArgs


def _add_caches(module: Any) -> None:
    module.TTTCache = importlib.import_module("mlx_ttt.network.cache").TTTCache
    module.RewindableTTTCache = importlib.import_module("mlx_ttt.network.rewind").RewindableTTTCache


def _hide_model_file(module: Any) -> None:
    """Remove `model_file` from every config of ours that is loaded, and put it back where one is saved."""
    load_config, save_config = module.load_config, module.save_config

    @functools.wraps(load_config)
    def without_model_file(*args: Any, **kwargs: Any) -> dict:
        config = load_config(*args, **kwargs)
        if config.get("model_type") == "ttt":
            config.pop("model_file", None)
        return config

    @functools.wraps(save_config)
    def with_model_file(config: dict, *args: Any, **kwargs: Any) -> None:
        from .checkpoint.directory import MODEL_FILE

        own = {"model_file": MODEL_FILE} if config.get("model_type") == "ttt" else {}
        save_config(config | own, *args, **kwargs)

    module.load_config, module.save_config = without_model_file, with_model_file


_COMPLETED = {"mlx_lm.models.cache": _add_caches, "mlx_lm.utils": _hide_model_file}


class _Finder(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == _ARCHITECTURE:
            return importlib.util.spec_from_loader(name, _Architecture())
        if name not in _COMPLETED:
            return None
        spec: Any = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _COMPLETED[name](module)

        spec.loader.exec_module = exec_module
        return spec


def register() -> None:
    """Register with mlx-lm, whether it is imported already or not."""
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name, complete in _COMPLETED.items():
        if name in sys.modules:
            complete(sys.modules[name])
