"""How fast models in few bits and in half precision are on a CPU, beside float32, in turns; and peak memory.

python -m benchmarks.few_bits                                 # both inner models of 125M: decoding
python -m benchmarks.few_bits --sizes 350M --bits 4 8         # another size
python -m benchmarks.few_bits --prompt 2048 --bits 4          # reading prompts
python -m benchmarks.few_bits --rank 8 --bits 4               # with LoRA, beside the same without

A ratio is taken within each round, and the table gives the median of the rounds with the least and the largest; beside
it, the ratio of the best times. How fast memory is read is measured before and after each round.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median

from . import machine, models
from .report import table

import mlx.core as mx  # isort: skip
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ttt.backends.cpu.prepare import prepare

from .limits_worker import Limits

DECODED = 32  # tokens of a turn: two mini-batches
HALF = ("float16", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models.OURS), choices=models.OURS)
    parser.add_argument("--sizes", nargs="+", default=["125M"], choices=models.SIZES)
    parser.add_argument("--bits", nargs="+", default=["4", "8", *HALF], help="bits, or a dtype")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=0, metavar="TOKENS", help="read so many tokens instead")
    parser.add_argument("--rank", type=int, default=0, help="put LoRA of this rank on every projection")
    options = parser.parse_args()
    print(machine.describe(machine.cores())["blas"])
    columns = ["model", "weights", "GB", "milliseconds", "best", "times float32", "of the best", "peak, GB"]
    for size in options.sizes:
        for name in options.models:
            print(table(columns, compared(name, size, options)), flush=True)


def compared(name: str, size: str, options: argparse.Namespace) -> list[list[str]]:
    """A row for each precision: they take turns."""
    config = models.configuration(name, models.SIZES[size])
    built = {kind: model(config, kind, options) for kind in ["float32", *options.bits]}
    caches = {kind: m.make_cache() for kind, m in built.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in built}
    peaks: dict[str, int] = {}
    limits = Limits("float32", machine.cores())
    speeds = [limits.measure()["bytes_per_second"]]
    for i in range(options.rounds + 1):
        for kind, m in built.items():
            if options.prompt:
                mx.clear_cache()
                before = mx.get_active_memory()
                mx.reset_peak_memory()
            taken = (read if options.prompt else decode)(m, caches[kind], options)
            if options.prompt:
                own = sum(w.nbytes for _, w in tree_flatten(m.parameters()))
                peaks[kind] = mx.get_peak_memory() - before + own
            if i:
                seconds[kind].append(taken)
        speeds.append(limits.measure()["bytes_per_second"])
    print(f"{size} {name}: memory {min(speeds) / 1e9:.0f} to {max(speeds) / 1e9:.0f} GB/s")
    rows = []
    for kind, own in seconds.items():
        ratios = [a / b for a, b in zip(seconds["float32"], own, strict=True)]
        nbytes = sum(w.nbytes for _, w in tree_flatten(built[kind].parameters()))
        times = [f"{1e3 * x:.1f}" for x in (median(own), min(own))]
        spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        best = f"{min(seconds['float32']) / min(own):.2f}"
        peak = f"{peaks[kind] / 1e9:.2f}" if peaks else ""
        rows.append([f"{size} {name}", kind, f"{nbytes / 1e9:.2f}", *times, spread, best, peak])
    del built
    gc.collect()
    return rows


def model(config: dict, kind: str, options: argparse.Namespace) -> nn.Module:
    """Of random weights, quantized if `kind` is a number of bits, and prepared as `load` does it."""
    mx.random.seed(0)
    built = models.build(config, kind if kind in HALF else "float32" if kind == "float32" else "float16")
    if kind.isdigit():
        nn.quantize(
            built,
            options.group_size,
            int(kind),
            class_predicate=lambda path, m: (
                built.quant_predicate(path, m) and m.weight.shape[-1] % options.group_size == 0
            ),
        )
    if options.rank:
        keys = [f"{part}_proj" for part in ("q", "v", "o", "g", "gate", "up", "down")]
        keys = [path for path, _ in built.layers[0].named_modules() if path.split(".")[-1] in keys]
        linear_to_lora_layers(
            built, len(built.layers), {"rank": options.rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
        )
    prepare(built)
    mx.eval(built.parameters())
    mx.clear_cache()
    return built


def decode(m: nn.Module, cache: list, options: argparse.Namespace) -> float:
    """Seconds for a token of each sequence, with the logits."""
    ids = mx.array(np.random.RandomState(0).randint(0, m.args.vocab_size, (options.batch, DECODED)))
    mx.eval(ids)
    start = time.perf_counter()
    for i in range(DECODED):
        mx.eval(m(ids[:, i : i + 1], cache))
    return (time.perf_counter() - start) / DECODED


def read(m: nn.Module, _: list, options: argparse.Namespace) -> float:
    """Seconds for a prompt, with the logits of its last position."""
    ids = mx.array(np.random.RandomState(0).randint(0, m.args.vocab_size, (options.batch, options.prompt)))
    cache = m.make_cache()
    start = time.perf_counter()
    x = m.model(ids, cache)
    mx.eval(m.head(x[:, -1:]), [c.arrays for c in cache])
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
