"""Packages made for the tests, and reading texts through them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_ttt.coreml.interpreter import Interpreter, load
from mlx_ttt.coreml.package import FUNCTIONS, convert_function
from mlx_ttt.coreml.program import Options, build
from mlx_ttt.coreml.session import Session
from mlx_ttt.coreml.state import StateLayout
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
        return Session(self._predictors[rounding], metadata)


def read(session: Session, *parts) -> tuple[np.ndarray, np.ndarray]:
    """The positions of each call's last token and their logits, [calls] and [calls, V]."""
    offsets, logits = zip(*(answer for ids in parts for answer in session.read(ids)), strict=True)
    return np.array(offsets) - 1, np.stack([x[-1] for x in logits])


def read_all(session: Session, *parts) -> np.ndarray:
    """Logits of every token, of a package that gives them, [T, V]."""
    return np.concatenate([logits for ids in parts for _, logits in session.read(ids)])


def singly(ids) -> list[list[int]]:
    return [[token] for token in ids]


def expected(model: Model, ids) -> tuple[np.ndarray, np.ndarray]:
    """What the model itself makes of a text: its logits [T, V] and its state, packed."""
    cache = model.make_cache()
    logits = np.array(model(mx.array([list(map(int, ids))]), cache=cache)[0].astype(mx.float32))
    return logits, StateLayout.of(model.args).pack(cache, model.make_cache())


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest absolute value expected."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
