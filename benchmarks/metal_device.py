"""The update rule on this machine's Metal device, with kernels and in MLX operations.

    python -m benchmarks.metal_device [--prompt N] [--dtype float32|float16|bfloat16]

For the layers of the 1.3B (D = 64, 32 heads) and 760M (D = 96, 16 heads) models, one sequence, 24 layers: milliseconds
to prefill the prompt, and per token when decoding, each the median of repetitions after a warm-up. That is the part of
a model which the kernels replace; `generate.py --verbose` times whole ones.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import mlx.core as mx

from mlx_ttt import update
from mlx_ttt.update import metal

K = 16
LAYERS = 24
HEADS = {64: 32, 96: 16}
REPETITIONS = 7


def random_call(model: str, D: int, tokens: int, dtype: mx.Dtype) -> dict:
    """The arguments of one layer's call at the start of a text."""
    H, F = HEADS[D], D if model == "linear" else 4 * D
    weights = [0.1 * mx.random.normal((1, H, D, F)), mx.zeros((1, H, 1, F))]
    if model == "mlp":
        weights += [0.1 * mx.random.normal((1, H, F, D)), mx.zeros((1, H, 1, D))]
    call = {name: mx.random.normal((1, tokens, H, D)).astype(dtype) for name in ("q", "k", "v")}
    call |= {"lr": mx.random.uniform(shape=(1, tokens, H)) / D, "t": 1 / mx.arange(1, K + 1)}
    call |= {"gamma": mx.ones((H, D)), "beta": mx.zeros((H, D)), "weights": tuple(weights)}
    return call | {"rows": mx.zeros((1, H, K, (2 if model == "linear" else 10) * D)), "phase": [0]}


def prefill(rule: Callable, call: dict) -> None:
    mx.eval([rule(**call) for _ in range(LAYERS)])


def decode(rule: Callable, call: dict) -> None:
    """One mini-batch of tokens, one at a time, so that the commit has its share."""
    states = [{"weights": call["weights"], "rows": call["rows"]} for _ in range(LAYERS)]
    for n in range(K):
        outputs = [rule(**(call | state | {"phase": [n]})) for state in states]
        states = [{"weights": weights, "rows": rows} for _, weights, rows in outputs]
        mx.eval([y for y, _, _ in outputs])


def milliseconds(function: Callable, *arguments) -> float:
    times = []
    for _ in range(REPETITIONS + 1):
        start = time.perf_counter()
        function(*arguments)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens to prefill (512)")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    options = parser.parse_args()
    dtype = getattr(mx, options.dtype)

    kernels = ["1", "0"] if metal.available() else ["0"]
    print(f"{mx.default_device()}, {options.dtype}, {LAYERS} layers, milliseconds")
    if kernels == ["0"]:
        print("no Metal device, or MLX_TTT_KERNELS=0: MLX operations only")
    print(f"{'':24}{'':>12}{f'prefill {options.prompt}':>16}{'a token':>12}")
    for model in ("linear", "mlp"):
        rule = {"linear": update.ttt_linear, "mlp": update.ttt_mlp}[model]
        for D in HEADS:
            prompt, token = (random_call(model, D, n, dtype) for n in (options.prompt, 1))
            for switch in kernels:
                os.environ["MLX_TTT_KERNELS"] = switch
                how = "kernels" if switch == "1" else "operations"
                of_prompt = milliseconds(prefill, rule, prompt)
                of_token = milliseconds(decode, rule, token) / K
                print(f"TTT-{model}, D = {D:<10}{how:>12}{of_prompt:16.2f}{of_token:12.3f}", flush=True)


if __name__ == "__main__":
    main()
