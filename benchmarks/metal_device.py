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

import mlx_ttt.model  # noqa: F401  which plugs the kernels in
from mlx_ttt.backends.metal.rule import available
from mlx_ttt.network.dual import update
from mlx_ttt.network.inner import INNER_MODELS, InnerModel
from mlx_ttt.network.rule import Learner, State, Tokens

K = 16
LAYERS = 24
HEADS = {64: 32, 96: 16}
REPETITIONS = 7


def random_call(inner: InnerModel, D: int, tokens: int, dtype: mx.Dtype) -> tuple[Tokens, Learner, State]:
    """The arguments of one layer's call at the start of a text."""
    H = HEADS[D]
    q, k, v = (mx.random.normal((1, tokens, H, D)).astype(dtype) for _ in range(3))
    lr = mx.random.uniform(shape=(1, tokens, H)) / D
    weights = tuple(
        mx.zeros((1, H, *shape)) if name.startswith("b") else 0.1 * mx.random.normal((1, H, *shape))
        for name, shape in inner.weight_shapes(D).items()
    )
    learner = Learner(inner, 1 / mx.arange(1, K + 1), mx.ones((H, D)), mx.zeros((H, D)))
    return Tokens(q, k, v, lr), learner, State(weights, mx.zeros((1, H, K, inner.row_width(D))), [0])


def prefill(tokens: Tokens, learner: Learner, state: State) -> None:
    results = [update(tokens, learner, state) for _ in range(LAYERS)]
    mx.eval([(y, after.weights, after.rows) for y, after in results])


def decode(tokens: Tokens, learner: Learner, state: State) -> None:
    """One mini-batch of tokens, one at a time, so that the commit has its share."""
    states = [state] * LAYERS
    for _ in range(K):
        outputs, states = zip(*(update(tokens, learner, state) for state in states), strict=True)
        mx.eval(outputs)


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

    kernels = ["1", "0"] if available() else ["0"]
    print(f"{mx.default_device()}, {options.dtype}, {LAYERS} layers, milliseconds")
    if kernels == ["0"]:
        print("no Metal device, or MLX_TTT_KERNELS=0: MLX operations only")
    print(f"{'':24}{'':>12}{f'prefill {options.prompt}':>16}{'a token':>12}")
    for inner in INNER_MODELS.values():
        for D in HEADS:
            prompt, token = (random_call(inner, D, n, dtype) for n in (options.prompt, 1))
            for switch in kernels:
                os.environ["MLX_TTT_KERNELS"] = switch
                how = "kernels" if switch == "1" else "operations"
                of_prompt = milliseconds(prefill, *prompt)
                of_token = milliseconds(decode, *token) / K
                print(f"TTT-{inner.name}, D = {D:<10}{how:>12}{of_prompt:16.2f}{of_token:12.3f}", flush=True)


if __name__ == "__main__":
    main()
