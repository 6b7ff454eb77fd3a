"""A training step on this machine's CPU, with the update rule's backward in C and without it.

    python -m benchmarks.backward [--model bundled] [--tokens 2048] [--rounds 5]

Without it, MLX differentiates the rule in its own operations; all else is C in both. The two take turns. A step is the
loss of a text and its gradients, as `mlx_ttt.training` computes them; the optimizer is left out.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from . import machine, models
from .report import table

import mlx.core as mx  # isort: skip
from mlx.nn import Module

import mlx_ttt
from mlx_ttt.backends.cpu import rule
from mlx_ttt.training import gradients

MODELS = ("bundled", *models.OURS)
WITH, WITHOUT = rule.LARGEST_BACKWARD, 0  # tokens of the largest mini-batch whose backward is C


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=MODELS, help="TTT-Linear and TTT-MLP are 125M")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{machine.describe(machine.cores())['blas']}; {options.tokens} tokens, {options.rounds} rounds\n")
    head = ["", "tokens/s with", "without", "times as fast", "peak GB with", "without"]
    rows = [[name, *_cells(_model(name), options.tokens, options.rounds)] for name in options.model]
    print(table(head, rows))


def _model(name: str) -> Module:
    if name == "bundled":
        return mlx_ttt.load_model(mlx_ttt.bundled_model())[0]
    return models.build(models.configuration(name, models.SIZES["125M"]))


def _cells(model: Module, tokens: int, rounds: int) -> list[str]:
    """What a step takes with the backward in C and without, in turns."""
    ids = mx.random.randint(0, model.args.vocab_size, (1, tokens + 1), key=mx.random.key(0))
    seconds: dict[int, list[float]] = {WITH: [], WITHOUT: []}
    memory = dict.fromkeys(seconds, 0)
    for _ in range(rounds + 1):
        for largest, measured in seconds.items():
            rule.LARGEST_BACKWARD = largest
            mx.clear_cache()
            mx.reset_peak_memory()
            start = time.perf_counter()
            mx.eval(gradients(model, ids))
            measured.append(time.perf_counter() - start)
            memory[largest] = mx.get_peak_memory()
    rule.LARGEST_BACKWARD = WITH
    of_c, of_operations = (measured[1:] for measured in seconds.values())  # the first of each is not counted
    ratios = [b / a for a, b in zip(of_c, of_operations, strict=True)]
    return [
        *(f"{tokens / median(measured):,.0f}" for measured in (of_c, of_operations)),
        f"{median(ratios):.2f} ({min(ratios):.2f}…{max(ratios):.2f})",
        *(f"{peak / 1e9:.2f}" for peak in memory.values()),
    ]


if __name__ == "__main__":
    main()
