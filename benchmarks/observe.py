"""What looking costs: reading and decoding while `observe` looks, beside plain calls, in turns; and memory by length.

python -m benchmarks.observe                     # both inner models of 125M: seconds
python -m benchmarks.observe --memory 300000     # the bundled model reads so many tokens: peak memory
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from statistics import median

from . import machine, models
from .report import table

import mlx.core as mx  # isort: skip

import mlx_ttt
from mlx_ttt.backends.cpu.prepare import prepare

PROMPT, DECODED = 2048, 16  # tokens of a turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(models.OURS), choices=models.OURS)
    parser.add_argument("--rounds", type=int, default=11, help="turns of each way of reading")
    parser.add_argument("--only", choices=("prefill", "decode"))
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="plain and some of those that the table names")
    parser.add_argument("--memory", type=int, metavar="TOKENS", help="measure memory instead, up to so many tokens")
    options = parser.parse_args()
    print(machine.describe(machine.cores())["blas"])
    if options.memory:
        print(memory(options.memory))
        return
    rows = []
    for name in options.models:
        model = models.build(models.configuration(name, models.SIZES["125M"]))
        prepare(model)
        for what, make in (("decode", decodes), ("prefill", prefills)):
            if options.only in (None, what):
                ways = {way: f for way, f in make(model).items() if way in (options.ways or [way])}
                rows += [[name, what, *cells] for cells in in_turns(ways, options.rounds)]
    print(table(["model", "", "", "milliseconds", "of a plain call", "processor time of a plain call"], rows))


def prefills(model) -> dict[str, Callable]:
    """Ways to read a prompt from an empty state, with all that they return."""
    ids = mx.random.randint(0, model.args.vocab_size, (1, PROMPT))

    def read(function: Callable) -> Callable:
        def run() -> None:
            cache = model.make_cache()
            mx.eval(function(cache), [c.arrays for c in cache])

        return run

    def look(**options) -> Callable:
        return read(lambda cache: list(vars(mlx_ttt.observe(model, ids, cache, **options)).values()))

    return {
        "plain": read(lambda cache: model(ids, cache)),
        "observe": look(),
        "per mini-batch": look(per="mini_batch"),
        "per layer": look(per="layer"),
        "learning 0.5": read(lambda cache: model(ids, cache, learning=0.5)),
    }


def decodes(model) -> dict[str, Callable]:
    """Ways to read tokens one by one after a short prompt: a whole mini-batch of them."""
    ids = mx.random.randint(0, model.args.vocab_size, (1, DECODED))
    start = model.make_cache()
    mx.eval(model(ids, start), [c.arrays for c in start])

    def read(function: Callable) -> Callable:
        cache = [c.copy() for c in start]

        def run() -> None:
            for i in range(DECODED):
                mx.eval(function(ids[:, i : i + 1], cache))

        return run

    return {
        "plain": read(lambda token, cache: model(token, cache)),
        "observe": read(lambda token, cache: list(vars(mlx_ttt.observe(model, token, cache)).values())),
        "learning 0.5": read(lambda token, cache: model(token, cache, learning=0.5)),
    }


def in_turns(ways: dict[str, Callable], rounds: int) -> list[list[str]]:
    """A row for each way, each with the median, the least and the largest. The ratios are those within a round.

    On a machine that others use, too, the ratios of processor time say more.
    """
    clocks = (time.perf_counter, time.process_time)
    taken: dict[str, list[list[float]]] = {name: [] for name in ways}  # of each round: by each clock
    for i in range(rounds + 1):
        for name, run in ways.items():
            start = [clock() for clock in clocks]
            run()
            if i:
                taken[name].append([clock() - at for clock, at in zip(clocks, start, strict=True)])
    plain = taken[next(iter(ways))]
    rows = []
    for name, times in taken.items():
        ratios = [[a / b for a, b in zip(x, y, strict=True)] for x, y in zip(times, plain, strict=True)]
        seconds, _ = zip(*times, strict=True)
        rows.append([name, spread([1e3 * x for x in seconds], 1), *(spread(x, 3) for x in zip(*ratios, strict=True))])
    return rows


def spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{x:.{digits}f}" for x in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"


def memory(most: int) -> str:
    """Peak memory of MLX's arrays beside what is returned, for texts that get ten times as long."""
    model, _ = mlx_ttt.load()
    rows = []
    for per in ("token", "mini_batch", "layer"):
        for tokens in (most // 100, most // 10, most):
            ids = mx.random.randint(0, model.args.vocab_size, (1, tokens))
            mx.eval(ids)
            mx.clear_cache()
            mx.reset_peak_memory()
            before, start = mx.get_active_memory(), time.perf_counter()
            seen = mlx_ttt.observe(model, ids, per=per, logits=False)
            returned = [x for x in vars(seen).values() if x is not None]
            mx.eval(returned)
            peak, size = mx.get_peak_memory() - before, sum(x.nbytes for x in returned)
            megabytes = [f"{x / 1e6:.1f}" for x in (peak, size, peak - size)]
            rows.append([per, f"{tokens:,}", *megabytes, f"{time.perf_counter() - start:.0f}"])
    return table(["per", "tokens", "peak, MB", "returned, MB", "beside it, MB", "seconds"], rows)


if __name__ == "__main__":
    main()
