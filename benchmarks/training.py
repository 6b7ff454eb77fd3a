"""One training step at growing lengths: memory and tokens a second of `mlx_ttt.training.gradients`, beside others.

    python -m benchmarks.training [--quick] [--models bundled,125M] [--lengths N,…] [--rounds N]
        [--torch-reference ttt.py --torch-python EXE] [--beside FILE]

Each case is a process of its own, which sleeps while another one works; in a round all of them have their turn. What
does not fit into memory, or would take longer than --patience, is left out, and a line says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from . import machine, models, report
from .protocol import ROOT, Worker, WorkerError
from .training_worker import AT_ONCE, CHECKPOINTED, IN_SEGMENTS

PYTORCH = "PyTorch"
WAYS = (IN_SEGMENTS, AT_ONCE, CHECKPOINTED)
LENGTHS = {"bundled": (2048, 8192, 32768, 131072), "125M": (2048, 8192), "tiny": (64, 256)}
MOST = {AT_ONCE: 8192, CHECKPOINTED: 8192, PYTORCH: 2048}  # tokens: memory grows with them
BUNDLED = ROOT / "mlx_ttt" / "models" / "shakespeare-ttt-linear"


@dataclass(eq=False)
class Case:
    """A way to take the gradients of so many tokens, in a process of its own."""

    way: str
    tokens: int
    worker: Worker
    answers: list[dict] = field(default_factory=list)  # one for each round

    def measure(self) -> None:
        self.answers.append(self.worker.call("step", tokens=self.tokens))

    @property
    def label(self) -> str:
        return f"{self.way}, {self.tokens} tokens"


def compare(cases: list[Case], rounds: int, patience: float, say: Callable[[str], None]) -> list[str]:
    """Measure cases in turns, in rounds. Returns a line for each that is left out."""
    left_out: list[str] = []
    able = list(cases)
    for number in range(rounds):
        for case in list(able):
            reason = _too_much(case, cases, patience) if number == 0 else None
            try:
                if reason is None:
                    case.measure()
                    say(f"{case.label}: {case.answers[-1]['seconds']:.1f} s")
            except WorkerError as error:
                reason = str(error)
            if reason is not None:
                able.remove(case)
                left_out.append(f"{case.label}: left out, {reason}")
                say(left_out[-1])
            if rounds == 1:
                case.worker.stop()
    for case in cases:
        case.worker.stop()
    return left_out


def _too_much(case: Case, cases: list[Case], patience: float) -> str | None:
    """Why a case is not measured, judged by the same at fewer tokens: both grow with the tokens, at most."""
    shorter = [c for c in cases if c.way == case.way and c.tokens < case.tokens and c.answers]
    if not shorter:
        return None
    longest = max(shorter, key=lambda c: c.tokens)
    answer, times = longest.answers[0], case.tokens / longest.tokens
    needs, free = (1 if case.way == IN_SEGMENTS else times) * answer["resident_bytes"], machine.available_memory()
    if needs > free:
        return f"needs about {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    if times * answer["seconds"] > patience:
        return f"would take about {times * answer['seconds']:.0f} s, longer than --patience {patience:.0f}"
    return None


def text(title: str, cases: list[Case]) -> str:
    """A table of the cases that were measured, and what the length costs."""
    found = {(case.way, case.tokens): case.answers for case in cases if case.answers}
    if not found:
        return f"## {title}\n\nNothing was measured."
    rows = [[way, report.thousands(tokens), *_cells(way, tokens, found)] for way, tokens in found]
    head = ["", "tokens", "MLX's arrays", "… above the weights", "process", "tokens/s", "of a busy core", "beside ours"]
    return "\n\n".join([f"## {title}", report.table(head, rows), *_by_length(found)])


def _cells(way: str, tokens: int, found: dict[tuple[str, int], list[dict]]) -> list[str]:
    answers = found[way, tokens]
    arrays = [f"{max(a['peak_bytes'] for a in answers) / 1e9:.2f} GB"] if "peak_bytes" in answers[0] else [""]
    above = [f"{max(a['peak_bytes'] - a['weight_bytes'] for a in answers) / 1e9:.2f} GB"] if arrays[0] else [""]
    ours = found.get((IN_SEGMENTS, tokens))
    return [
        *arrays,
        *above,
        f"{max(a['resident_bytes'] for a in answers) / 1e9:.2f} GB",
        f"{median(tokens / a['seconds'] for a in answers):,.0f}",
        f"{median(tokens / a['busy_seconds'] for a in answers):,.0f}",
        report.ratio(report.seconds(ours), report.seconds(answers)) if ours and way != IN_SEGMENTS else "",
    ]


def _by_length(found: dict[tuple[str, int], list[dict]]) -> list[str]:
    """Tokens a second of ours at each length beside the shortest: of the clock, and of the processor."""
    lengths = [tokens for way, tokens in found if way == IN_SEGMENTS]
    lines = []
    for tokens in lengths[1:]:
        ratios = [
            report.ratio(
                [a[key] / lengths[0] for a in found[IN_SEGMENTS, lengths[0]]],
                [a[key] / tokens for a in found[IN_SEGMENTS, tokens]],
            )
            for key in ("seconds", "busy_seconds")
        ]
        lines.append(
            f"{IN_SEGMENTS}: at {report.thousands(tokens)} tokens, {ratios[0]} times the tokens/s at"
            f" {report.thousands(lengths[0])}; {ratios[1]} times those of a busy core."
        )
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def plan(name: str, given: argparse.Namespace) -> list[Case]:
    """The cases of a model, by length; ours first."""
    config = models.configuration("TTT-Linear", models.SIZES["tiny" if name == "bundled" else name])
    if name == "bundled":
        config |= {key: x for key, x in json.loads((BUNDLED / "config.json").read_text()).items() if key in config}
    model = str(BUNDLED) if name == "bundled" else config
    ways = list(WAYS)
    ways += [str(given.beside.resolve())] if given.beside else []
    ways += [PYTORCH] if given.torch_reference else []
    cases = []
    for tokens in given.lengths or LENGTHS[name]:
        for way in ways:
            if tokens > MOST.get(way, tokens):
                continue
            if way == PYTORCH:
                subject = {"file": str(given.torch_reference.resolve()), "config": config, "threads": given.threads}
                worker = Worker("torch_worker", subject, python=given.torch_python, threads=given.threads)
            else:
                worker = Worker("training_worker", {"model": model, "way": way}, threads=given.threads)
            cases.append(Case(Path(way).name, tokens, worker))
    return cases


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model and short texts, to see that it works")
    add("--models", default="bundled,125M", metavar="NAME,…", help="of bundled, 125M, tiny (%(default)s)")
    add("--lengths", type=lambda s: sorted(map(int, s.split(","))), metavar="N,…", help="tokens")
    add("--rounds", type=int, default=3, metavar="N", help="(%(default)s)")
    add("--patience", type=float, default=600, metavar="S", help="a step that takes longer is left out (%(default)s)")
    add("--threads", type=int, default=machine.cores(), metavar="N", help="of BLAS and PyTorch (%(default)s)")
    add("--torch-reference", type=Path, metavar="FILE", help="measure TTTForCausalLM and TTTConfig of this file, too")
    add("--torch-python", default=sys.executable, metavar="EXE", help="the Python that has PyTorch (this one)")
    add("--beside", type=Path, metavar="FILE", help="measure gradients(model, ids) of this Python file, too")
    return parser


def main(arguments: list[str] | None = None) -> None:
    parser = options()
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.models.split(",") if name not in LENGTHS]:
        parser.error(f"--models: {unknown[0]!r} is none of {', '.join(LENGTHS)}")
    for name in ("torch_reference", "beside"):
        if (file := getattr(given, name)) and not file.is_file():
            parser.error(f"--{name.replace('_', '-')} {file}: no such file")
    print("\n\n".join(report.head(machine.describe(given.threads))))
    if not given.torch_reference:
        print("\nPyTorch: not measured; give --torch-reference FILE")
    for name in ["tiny"] if given.quick else given.models.split(","):
        cases = plan(name, given)
        left_out = compare(cases, given.rounds, given.patience, say)
        print(f"\n{text(f'{name}, TTT-Linear, float32, one sequence', cases)}")
        if left_out:
            print(f"\n{report.bullets(left_out)}")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
