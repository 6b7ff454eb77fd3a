"""Who is measured when: contenders take turns, and only one of them runs at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from statistics import median

from . import machine, models
from .protocol import Worker, WorkerError


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: at most so many repetitions of each measurement; at least one.
        budget: seconds after which no further round begins.
        patience: seconds; reading that would take one contender longer is skipped.
        decode_tokens: tokens of one decode measurement: whole mini-batches, so that each has its commits.
    """

    rounds: int = 5
    budget: float = 60
    patience: float = 120
    decode_tokens: int = 64


@dataclass(eq=False)
class Contender:
    """A model in a process of its own, and the configuration by which its memory is estimated."""

    name: str
    config: dict
    dtype: str
    worker: Worker
    kept: set[int] = field(default_factory=set)  # prompt lengths after which the worker holds a state

    @property
    def weight_bytes(self) -> int:
        return models.weight_bytes(self.config, self.dtype)

    def needs(self, tokens: int) -> int:
        """Bytes."""
        return models.memory_estimate(self.config, self.dtype, tokens)

    def prefill(self, tokens: int) -> dict:
        answer = self.worker.call("prefill", tokens=tokens)
        self.kept.add(tokens)
        return answer

    @property
    def invents(self) -> bool:
        """Whether the worker can write after a prompt that it has not read: keys and values can be made up."""
        return self.config["model_type"] == "llama"

    def decode(self, context: int, tokens: int) -> dict:
        if context not in self.kept and not self.invents:
            self.prefill(context)
        return self.worker.call("decode", context=context, tokens=tokens) | {"tokens": tokens}

    def stop(self) -> None:
        self.worker.stop()
        self.kept.clear()


class Comparison:
    """Contenders side by side.

    Attributes:
        result: what was measured, ready for JSON: the answers of each round by "read" or "decode", name and tokens;
            the limits of the machine, measured after each of them; a line for all that was skipped.
    """

    def __init__(
        self, title: str, contenders: list[Contender], limits: Worker, effort: Effort, say: Callable[[str], None]
    ):
        self.contenders, self.limits, self.effort, self.say = contenders, limits, effort, say
        self.result = {
            "title": title,
            "models": {c.name: _facts(c) for c in contenders},
            "read": {},
            "decode": {},
            "limits": [],
            "skipped": [],
        }

    def run(self, prompts: Iterable[int], contexts: Iterable[int]) -> dict:
        """Read prompts of these lengths; write after prompts of those, in each round as often as they are named."""
        try:
            for tokens in prompts:
                self._rounds("read", [(c, [tokens]) for c in self._able(tokens)], Contender.prefill)
            ready = {n: self._ready(n) if n in prompts else list(self._able(n)) for n in contexts}
            turns = [(c, [n for n in contexts if c in ready[n]]) for c in self.contenders]
            self._rounds("decode", turns, lambda c, n: c.decode(n, self.effort.decode_tokens))
        finally:
            for contender in self.contenders:
                contender.stop()
        return self.result

    def _ready(self, tokens: int) -> list[Contender]:
        """Those that have read so many tokens, and those that need not."""
        read, free = self.result["read"], self._free_memory()
        return [
            c for c in self.contenders if str(tokens) in read.get(c.name, {}) or (c.invents and c.needs(tokens) < free)
        ]

    def _able(self, tokens: int) -> Iterator[Contender]:
        """Those that have the memory for so many tokens and would not take too long; a line for each of the others."""
        free = self._free_memory()
        for contender in self.contenders:
            needs, seconds = contender.needs(tokens), self._prediction(contender, tokens)
            if needs > free:
                reason = f"needs about {needs / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
            elif seconds > self.effort.patience:
                reason = f"would take about {seconds:.0f} s, longer than --patience {self.effort.patience:.0f}"
            else:
                yield contender
                continue
            self._skip(contender, tokens, reason)

    def _prediction(self, contender: Contender, tokens: int) -> float:
        """Seconds to read a prompt: those of the longest that was read, growing as they did; 0 if none was."""
        read = self.result["read"].get(contender.name, {})
        points = sorted((int(n), median(answer["seconds"] for answer in answers)) for n, answers in read.items())
        if not points:
            return 0
        power = 1.0
        if len(points) > 1:
            (n, t), (longest, seconds) = points[-2:]
            power = max(power, math.log(seconds / t) / math.log(longest / n))
        longest, seconds = points[-1]
        return seconds * (tokens / longest) ** power

    def _free_memory(self) -> int:
        """Bytes, with what our own workers hold and would give back."""
        return machine.available_memory() + sum(c.weight_bytes for c in self.contenders if c.worker.alive)

    def _rounds(
        self, what: str, turns: list[tuple[Contender, list[int]]], run: Callable[[Contender, int], dict]
    ) -> None:
        """Rounds in which each contender has its turn for its lengths, as many as the effort allows.

        Where not all fit into memory together, each starts for its turn alone.
        """
        turns = [(contender, lengths) for contender, lengths in turns if lengths]
        needs = sum(c.weight_bytes for c, _ in turns) + max((c.needs(max(lengths)) for c, lengths in turns), default=0)
        alone = needs > self._free_memory()
        if alone:
            for contender in self.contenders:
                contender.stop()
        start = time.perf_counter()
        rounds = 0
        while turns and rounds < self.effort.rounds:
            if rounds and time.perf_counter() - start > self.effort.budget:
                break
            for contender, lengths in list(turns):
                try:
                    for tokens in lengths if rounds % 2 == 0 else lengths[::-1]:  # none always comes first
                        answer = run(contender, tokens)
                        self._record(what, contender, tokens, answer | {"limits": self.limits.call("measure")})
                except WorkerError as error:
                    self._skip(contender, tokens, str(error))
                    turns.remove((contender, lengths))
                    contender.stop()
                if alone:
                    contender.stop()
            rounds += 1
        if rounds:
            seconds = time.perf_counter() - start
            tokens = ", ".join(map(str, sorted({n for _, lengths in turns for n in lengths})))
            self.say(f"{self.result['title']}: {what} {tokens} tokens, {rounds} rounds in {seconds:.0f} s")

    def _record(self, what: str, contender: Contender, tokens: int, answer: dict) -> None:
        self.result["limits"].append(answer["limits"])
        self.result[what].setdefault(contender.name, {}).setdefault(str(tokens), []).append(answer)

    def _skip(self, contender: Contender, tokens: int, reason: str) -> None:
        line = f"{contender.name}, {tokens} tokens: skipped, {reason}"
        self.result["skipped"].append(line)
        self.say(f"{self.result['title']}: {line}")


def _facts(contender: Contender) -> dict:
    return {
        "config": contender.config,
        "dtype": contender.dtype,
        "parameters": models.parameters(contender.config),
        "weight_bytes": contender.weight_bytes,
    }
