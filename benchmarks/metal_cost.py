"""What the Metal kernels cost, counted on the host harness: writes the table of metal/README.md.

    python -m benchmarks.metal_cost [--check]

Counted are the distinct bytes that each threadgroup loads and stores between two barriers, so a value that many threads
read at once counts once, and one that is read again in another stage counts again, whether or not a cache has it. The
least possible is each input, the state once in and once out, and each output, once. In the backward form, which keeps
the weights of every mini-batch, it is each input and output once, and those weights once out and once in.

The second table takes one mini-batch of the backward form apart.
"""

from __future__ import annotations

import argparse
import functools
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_ttt.backends.metal import rule
from mlx_ttt.network.inner import INNER_MODELS
from tests.backends.metal.host import HostKernel
from tests.backends.metal.host.kernel import Stats

README = Path(__file__).parents[1] / "metal" / "README.md"
BEGIN, END = "<!-- begin: python -m benchmarks.metal_cost -->", "<!-- end -->"
BEGIN_PARTS, END_PARTS = "<!-- begin: one backward mini-batch -->", "<!-- end: one backward mini-batch -->"

K = 16
PREFILL = 512  # tokens
PHASE = 8  # the open rows that a step meets, on average
DTYPE = mx.bfloat16
LAYERS = 24
HEADS = {64: 32, 96: 16}  # of the 1.3B and of the 760M model
CHIPS = {"M1": (2.6, 68), "M4 Max": (18.4, 546), "M5": (4.6, 153)}  # float32 TFLOPS, GB/s; sources: metal/README.md


@dataclass(frozen=True)
class Cost:
    """Of one head: bytes and multiplies per token, and what they are at least."""

    model: str
    form: str
    D: int
    bytes: float
    least_bytes: float
    multiplies: float  # 8 x 8 x 8
    least_multiplies: float
    barriers: int  # per mini-batch, or per token in a step
    threadgroup_memory: int

    def microseconds(self, chip: str) -> tuple[float, str]:
        """Roofline of one token in all layers and heads, and what bounds it."""
        tflops, gigabytes = CHIPS[chip]
        of_all = LAYERS * HEADS[self.D]
        bounds = {
            "arithmetic": 2 * _multiply_adds(self) * of_all / tflops / 1e6,
            "bandwidth": self.bytes * of_all / gigabytes / 1e3,
        }
        bound = max(bounds, key=bounds.get)
        return bounds[bound], bound


def _multiply_adds(cost: Cost) -> float:
    """A step computes without tiles: k, q times every matrix, and e2 W2^T."""
    if cost.form != "step":
        return 512 * cost.multiplies
    return (2 if cost.model == "linear" else 20) * cost.D**2


def measure(model: str, form: str, D: int) -> Cost:
    """Run one head on the harness."""
    if form == "step":
        stats, least = run(model, form, D, 1, PHASE), least_bytes(model, D, 1, PHASE)
        return Cost(model, form, D, moved(stats), least, 0, 0, stats.barriers_per_thread, stats.threadgroup_memory)
    stats, shorter = run(model, form, D, PREFILL, 0), run(model, form, D, PREFILL - K, 0)
    return Cost(
        model,
        form,
        D,
        moved(stats) / PREFILL,
        (least_backward_bytes(model, D, PREFILL) if form == "backward" else least_bytes(model, D, PREFILL, 0))
        / PREFILL,
        (stats.multiplies - shorter.multiplies) / K,
        (least_backward_multiplies(model, D) if form == "backward" else least_multiplies(model, D)) / K,
        stats.barriers_per_thread - shorter.barriers_per_thread,
        stats.threadgroup_memory,
    )


@functools.cache
def run(model: str, form: str, D: int, tokens: int, phase: int) -> Stats:
    variant = rule._Variant(model, form, D, K, DTYPE)
    arrays = rule._tiny_arrays(variant, heads=1)
    of_tokens = range(4) if form != "backward" else (*range(4), 8 + len(INNER_MODELS[model].weight_names))  # and dy
    arrays = [mx.repeat(x, tokens, axis=1) if i in of_tokens else x for i, x in enumerate(arrays)]
    kernel, call = rule._call(rule._Kernel(variant, 1), arrays, [phase], [tokens])
    _, stats = HostKernel.from_mlx(kernel, **call).run(allow_unwritten=form == "backward")
    return stats


def moved(stats: Stats) -> int:
    """Bytes from and to the arrays of the call, without the few that describe their shapes."""
    shapes = sum(x.fetched for name, x in stats.buffers.items() if name.endswith("_shape"))
    return stats.device_fetched + stats.device_stored - shapes


def least_bytes(model: str, D: int, tokens: int, phase: int) -> int:
    """Each input and output once; a step only reads the weights, and of the rows those that are open."""
    size, inner = DTYPE.size, INNER_MODELS[model]
    weights = sum(rows * columns for rows, columns in inner.weight_shapes(D).values())
    row = inner.row_width(D)
    floats = 2 * D + (phase + K) * row + (2 * weights + K if tokens > 1 else weights + 1)
    integers = 2 if tokens > 1 else 1  # phase, length
    return tokens * (4 * D + 1) * size + 4 * floats + 4 * integers


def least_multiplies(model: str, D: int) -> int:
    """8 x 8 x 8 products of one mini-batch in the dual form, counting of the K x K products only the causal tiles."""
    rows, causal = K // 8, K // 8 * (K // 8 + 1) // 2
    d = D // 8
    if model == "linear":
        return 3 * rows * d * d + 2 * causal * d
    return 7 * rows * d * 4 * d + 2 * causal * (d + 4 * d)


def least_backward_bytes(model: str, D: int, tokens: int) -> int:
    """q, k, v, dy, their cotangents, lr and dlr; the weights and their cotangents; and the weights that are kept."""
    weights = sum(rows * columns for rows, columns in INNER_MODELS[model].weight_shapes(D).values())
    kept = tokens // K - 1
    floats = tokens + 2 * D + 2 * K + 2 * D + (3 + 2 * kept) * weights + K * INNER_MODELS[model].row_width(D)
    return tokens * (7 * D + 1) * DTYPE.size + 4 * floats + 8


def least_backward_multiplies(model: str, D: int) -> int:
    """8 x 8 x 8 products of one mini-batch: what the formulas name, each once, and what advances the weights."""
    rows, causal = K // 8, K // 8 * (K // 8 + 1) // 2
    d = D // 8
    if model == "linear":
        return 9 * rows * d * d + 6 * causal * d
    return 21 * rows * d * 4 * d + causal * (5 * d + 6 * 4 * d)


def parts_table() -> str:
    """What one mini-batch of the backward form moves and computes, forwards and backwards together."""
    columns = [(model, D) for model in ("linear", "mlp") for D in HEADS]
    buffers = {
        "tokens in: q, k, v, dy, lr": ("q", "k", "v", "dy", "lr"),
        "cotangents of tokens out": ("dq", "dk", "dv", "dlr"),
        "device memory for the weights kept and for views": ("scratch",),
        "cotangents of the weights, in and out": ("dW1", "db1", "dW2", "db2"),
    }
    cells: dict[str, list[str]] = {name: [] for name in [*buffers, "all bytes", "multiply-adds", "per byte"]}
    for model, D in columns:
        long, short = run(model, "backward", D, PREFILL, 0), run(model, "backward", D, PREFILL - K, 0)

        def bytes_of(names: tuple[str, ...], long: Stats = long, short: Stats = short) -> int:
            both = [[x for name, x in stats.buffers.items() if name in names] for stats in (long, short)]
            more, less = (sum(x.fetched + x.stored for x in found) for found in both)
            return more - less

        for name, of in buffers.items():
            cells[name].append(f"{bytes_of(of):,}")
        moved_bytes, products = moved(long) - moved(short), 512 * (long.multiplies - short.multiplies)
        cells["all bytes"].append(f"{moved_bytes:,}")
        cells["multiply-adds"].append(f"{products:,}")
        cells["per byte"].append(f"{products / moved_bytes:.1f}")
    head = ["per mini-batch of 16 tokens and head", *(f"`{model}_backward`, D = {D}" for model, D in columns)]
    rows = [_line([name, *values]) for name, values in cells.items()]
    return "\n".join([_line(head), _line(["---"] * len(head)), *rows])


def table(costs: list[Cost]) -> str:
    counted = ["bytes", "of the least", "multiply-adds", "of the least", "barriers", "threadgroup memory"]
    head = ["kernel", "D", *counted, *CHIPS]
    return "\n".join([_line(head), _line(["---"] * len(head)), *map(row, costs)])


def row(cost: Cost) -> str:
    return _line(
        [
            f"`{cost.model}_{cost.form}`",
            f"{cost.D}",
            f"{cost.bytes:,.0f}",
            f"{cost.bytes / cost.least_bytes:.2f}",
            f"{_multiply_adds(cost):,.0f}",
            f"{cost.multiplies / cost.least_multiplies:.2f}" if cost.multiplies else "",
            f"{cost.barriers}",
            f"{cost.threadgroup_memory:,} B",
            *(f"{time:,.1f} µs ({bound})" for time, bound in map(cost.microseconds, CHIPS)),
        ]
    )


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README's table is another")
    check = parser.parse_args().check
    forms = ("chunk", "step", "backward")
    costs = [measure(model, form, D) for model in ("linear", "mlp") for form in forms for D in HEADS]
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n{table(costs)}\n{END}{after}"
    before, rest = new.split(BEGIN_PARTS)
    _, after = rest.split(END_PARTS)
    new = f"{before}{BEGIN_PARTS}\n{parts_table()}\n{END_PARTS}{after}"
    if check and new != text:
        raise SystemExit("metal/README.md: the cost table is out of date: run python -m benchmarks.metal_cost")
    README.write_text(new, encoding="utf-8")
    print(table(costs))


if __name__ == "__main__":
    main()
