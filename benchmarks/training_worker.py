"""One training step of a model: gradients of the mean cross entropy of a random text, taken in one way or another."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

from .models import build
from .protocol import resident_bytes, serve

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx_lm.tuner.trainer import grad_checkpoint

from mlx_ttt.backends.cpu.prepare import prepare
from mlx_ttt.loading import load_model
from mlx_ttt.training.segments import gradients

IN_SEGMENTS, AT_ONCE, CHECKPOINTED = "gradients", "value_and_grad", "value_and_grad, checkpointed"


class Step:
    """A model in float32 and a way to differentiate it.

    Args:
        model: a model directory; or the configuration of a model with random weights.
        way: one of the three above, or a Python file that has `gradients(model, ids)`.
    """

    def __init__(self, model: str | dict, way: str):
        mx.random.seed(0)
        self.model = build(model) if isinstance(model, dict) else load_model(model)[0]
        self.model.set_dtype(mx.float32)
        prepare(self.model)
        mx.eval(self.model.parameters())
        self._gradients = _way(way, self.model)
        self.step(64)  # whatever is compiled or allocated once

    def step(self, tokens: int) -> dict:
        """Returns seconds of one step, and of the processor; the loss; the largest memory of MLX's arrays meanwhile,
        with the model's weights and the gradients, and the weights alone; the largest resident memory of the process
        so far. Memory is in bytes."""
        ids = mx.random.randint(0, self.model.args.vocab_size, (1, tokens + 1))
        mx.eval(ids)
        mx.clear_cache()
        weights = mx.get_active_memory()
        mx.reset_peak_memory()
        start, busy = time.perf_counter(), time.process_time()
        loss, tree = self._gradients(ids)
        mx.eval(loss, tree)
        seconds, busy_seconds = time.perf_counter() - start, time.process_time() - busy
        peak = mx.get_peak_memory()
        mx.clear_cache()  # while others work
        return {
            "seconds": seconds,
            "busy_seconds": busy_seconds,
            "loss": loss.item(),
            "peak_bytes": peak,
            "weight_bytes": weights,
            "resident_bytes": resident_bytes(),
        }


def _way(way: str, model: nn.Module) -> Callable:
    """A function of ids [1, T + 1]: the loss and its gradients."""
    if way in (AT_ONCE, CHECKPOINTED):
        if way == CHECKPOINTED:
            grad_checkpoint(model.layers[0])  # the class of all layers
        at_once = nn.value_and_grad(model, _loss)
        return lambda ids: at_once(model, ids)
    function = gradients if way == IN_SEGMENTS else _from_file(Path(way))
    return lambda ids: function(model, ids)


def _loss(model: nn.Module, ids: mx.array) -> mx.array:
    return nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:], reduction="mean")


def _from_file(file: Path) -> Callable:
    spec = importlib.util.spec_from_file_location("gradients_beside", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.gradients


if __name__ == "__main__":
    serve(Step)
