"""Packages made for the tests."""

from __future__ import annotations

from pathlib import Path

from mlx_ttt.export.functions import FUNCTIONS
from mlx_ttt.export.layout import StateLayout
from mlx_ttt.export.mil.conversion import convert_function
from mlx_ttt.export.mil.interpreter import Interpreter, load
from mlx_ttt.export.mil.program import Options, build
from mlx_ttt.export.mil.session import start_session
from mlx_ttt.export.session import Session
from mlx_ttt.model import Model


class Package:
    """Both functions of a model, each in a package of its own; or, without a folder, as programs never saved."""

    def __init__(self, model: Model, folder: Path | None = None, weights: str = "float16", **options):
        self.model, self.layout = model, StateLayout.of(model.args)
        self.options = Options(**options)
        self.functions = {name: self._function(name, folder, weights) for name in FUNCTIONS}
        self._predictors: dict[bool, dict[str, Interpreter]] = {}

    def _function(self, name: str, folder: Path | None, weights: str):
        if folder is None:
            return build(self.model, name, self.options).functions["main"]
        path = folder / f"{name}.mlpackage"
        convert_function(self.model, name, weights, self.options, path)
        return load(path)

    def session(self, rounding: bool = True) -> Session:
        if rounding not in self._predictors:
            self._predictors[rounding] = {name: Interpreter(f, rounding) for name, f in self.functions.items()}
        K = self.model.args.mini_batch_size
        metadata = {
            "mini_batch_size": K,
            "prefill_tokens": self.options.prefill_tokens or K,
            "state_mode": self.options.state_mode,
            "state": self.layout.description(),
        }
        return start_session(self._predictors[rounding], metadata)
