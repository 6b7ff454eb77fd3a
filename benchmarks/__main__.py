"""Measure the models of this project beside others of their size; print tables, write them, JSON and plots."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from . import machine, models, report, startup
from .measure import Comparison, Contender, Effort
from .protocol import Worker, WorkerError

import mlx.core as mx  # isort: skip

LENGTHS = (128, 512, 2048, 8192, 32768)
NAMES = (*models.OURS, *models.OTHERS)
PARTS = ("torch", "models", "startup")


def plan(size: str, on_cpu: bool) -> tuple[Iterable[int], Iterable[int]]:
    """Lengths of the prompts to read, and of those to write after: what two cores can do in half an hour."""
    if not on_cpu or size == "125M":
        return LENGTHS, LENGTHS
    if size == "350M":
        return LENGTHS[:3], LENGTHS[:3]
    return (), 2 * LENGTHS[:1]  # twice in a turn: loading takes longer


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--sizes", type=_names(models.SIZES), metavar="SIZE,…", help="125M,350M,1.3B unless given; there is 760M, too")
    add("--models", type=_names(NAMES), metavar="NAME,…", help=f"of {', '.join(NAMES)}; all but Mamba unless given")
    add("--lengths", type=_numbers, metavar="N,…", help="tokens; unless given, what the device can do in half an hour")
    add("--dtype", choices=["float32", "float16", "bfloat16"], help="bfloat16 unless given, on a CPU float32")
    add("--rounds", type=int, default=Effort.rounds, metavar="N", help="repetitions, at most (%(default)s)")
    add("--budget", type=float, default=Effort.budget, metavar="S", help="seconds until the last round (%(default)s)")
    add(
        "--patience",
        type=float,
        default=Effort.patience,
        metavar="S",
        help="what takes longer is skipped (%(default)s)",
    )
    add("--threads", type=int, default=machine.cores(), metavar="N", help="of BLAS and PyTorch (%(default)s)")
    add("--quick", action="store_true", help="a tiny model and short prompts, to see that it works")
    add("--only", choices=PARTS, action="append", help="a part of the benchmarks; can be given again for another")
    add("--torch-reference", type=Path, metavar="FILE", help="compare with TTTForCausalLM and TTTConfig of this file")
    add("--torch-python", default=sys.executable, metavar="EXE", help="the Python that has PyTorch (this one)")
    add("--out", type=Path, default=Path("build/benchmarks"), metavar="FOLDER", help="(%(default)s)")
    add("--report", type=Path, metavar="JSON", help="measure nothing; write tables and plots of earlier results")
    return parser


def _names(known: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return sorted(int(n) for n in text.split(","))


def main(arguments: list[str] | None = None) -> None:
    parser = options()
    given = parser.parse_args(arguments)
    if given.torch_reference and not given.torch_reference.is_file():
        parser.error(f"--torch-reference {given.torch_reference}: no such file")
    if "torch" in (given.only or ()) and not given.torch_reference:
        parser.error("--only torch needs --torch-reference FILE")
    given.out.mkdir(parents=True, exist_ok=True)
    try:
        results = json.loads(given.report.read_text()) if given.report else measure(given)
    except (OSError, ValueError, WorkerError) as error:
        raise SystemExit(f"Error: {error}") from None
    text = report.text(results)
    (given.out / "results.md").write_text(text)
    print(text)
    try:
        from . import plots
    except ImportError:
        say(f'no plots: pip install ".[bench]", then python -m benchmarks --report {given.out / "results.json"}')
    else:
        plots.write(results, given.out)
    say(f"written to {given.out}")


def measure(given: argparse.Namespace) -> dict:
    """Everything that was asked for. What is known is in results.json after each part."""
    on_cpu = mx.default_device() == mx.cpu
    dtype = given.dtype or ("float32" if on_cpu else "bfloat16")
    effort = Effort(given.rounds, given.budget, given.patience)
    sizes = given.sizes or ["125M", "350M", "1.3B"]
    lengths = given.lengths
    if given.quick:
        effort, sizes, lengths = Effort(rounds=2, budget=5, patience=10, decode_tokens=16), ["tiny"], [32, 128]
    names = given.models or [name for name in NAMES if name != "Mamba"]
    parts = given.only or PARTS
    limits = Worker("limits_worker", {"dtype": dtype, "threads": given.threads}, threads=given.threads)
    start = time.perf_counter()
    results = {"machine": machine.describe(given.threads), "comparisons": []}

    def save() -> None:
        results["seconds"] = time.perf_counter() - start
        (given.out / "results.json").write_text(json.dumps(results, indent=1))

    if "torch" in parts and given.torch_reference:
        results["torch"] = against_torch(given, sizes[0], 64 if given.quick else 2048, limits, effort)
        save()
    for size in sizes if "models" in parts else []:
        prompts, contexts = (lengths, lengths) if lengths else plan(size, on_cpu)
        contenders = [_mlx(name, size, dtype, given.threads) for name in names]
        results["comparisons"].append(
            Comparison(f"{size}, {dtype}", contenders, limits, effort, say).run(prompts, contexts)
        )
        save()
    limits.stop()
    if "startup" in parts:
        results["startup"] = startup.measure(effort.rounds)
    save()
    return results


def against_torch(given: argparse.Namespace, size: str, tokens: int, limits: Worker, effort: Effort) -> dict:
    """Ours and theirs, both kinds of inner model, in float32: one prompt length."""
    contenders, checks = [], {}
    for name in models.OURS:
        checks[name] = check(name, given)
        contenders += [_mlx(name, size, "float32", given.threads), _torch(name, size, given)]
    comparison = Comparison(f"{size}, float32, beside PyTorch", contenders, limits, effort, say)
    about = contenders[1].worker.call("describe") | {"file": given.torch_reference.name, "checks": checks}
    return comparison.run([tokens], [tokens]) | {"torch": about}


def check(name: str, given: argparse.Namespace) -> dict:
    """Whether both compute the same: a small model's checkpoint and how they continue a prompt."""
    config = models.configuration(name, models.SIZES["tiny"])
    prompt = [(7 * n + n * n) % config["vocab_size"] for n in range(40)]
    ours, theirs = _mlx(name, "tiny", "float32", given.threads), _torch(name, "tiny", given)
    with tempfile.TemporaryDirectory() as folder:
        b = theirs.worker.call("check", folder=folder, config=config, prompt=prompt, tokens=24)
        a = ours.worker.call("check", folder=folder, prompt=prompt, tokens=24)
    ours.stop()
    theirs.stop()
    pairs = (pair for x, y in zip(a["logprobs"], b["logprobs"], strict=True) for pair in zip(x, y, strict=True))
    return {"same_tokens": a["tokens"] == b["tokens"], "largest_difference": max(abs(x - y) for x, y in pairs)}


def _mlx(name: str, size: str, dtype: str, threads: int) -> Contender:
    config = models.configuration(name, models.SIZES[size])
    return Contender(name, config, dtype, Worker("mlx_worker", {"config": config, "dtype": dtype}, threads=threads))


def _torch(name: str, size: str, given: argparse.Namespace) -> Contender:
    config = models.configuration(name, models.SIZES[size])
    subject = {"file": str(given.torch_reference.resolve()), "config": config, "threads": given.threads}
    worker = Worker("torch_worker", subject, python=given.torch_python, threads=given.threads)
    return Contender(f"PyTorch {name}", config, "float32", worker)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
