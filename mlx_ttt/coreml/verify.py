"""How far a package's answers are from the model's that it was made of."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import coremltools as ct
import mlx.core as mx
import numpy as np

from ..checkpoint.untrusted import quoted
from ..errors import CheckpointError, TTTError
from ..generation import fingerprint
from ..loading import load_model
from ..model import Model
from .session import Session, interpreted, on_device, packages_of, read_metadata
from .state import StateLayout

COMPUTE_UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE", "ALL")


@dataclass(frozen=True)
class Comparison:
    """Of a package's logits with the model's, over the positions that the package gives logits of.

    Attributes:
        where: what ran the package.
        positions: how many were compared.
        largest_difference: of the logits, relative to the largest absolute one.
        top1, top5: mean overlap of the best and of the five best tokens, 0 to 1.
        divergence: mean KL divergence of the package's distribution from the model's, in nats.
        state_error: of the state after the text, relative L2 of what it has learned.
        devices: on macOS, the number of operations by the device that Core ML prefers for them, by function.
    """

    where: str
    positions: int
    largest_difference: float
    top1: float
    top5: float
    divergence: float
    state_error: float
    devices: dict[str, dict[str, int]] | None = None


@dataclass(frozen=True)
class Refusal:
    """What does not run the package, and the first line of why."""

    where: str
    reason: str


def verify(
    package: Path | str,
    model_dir: Path | str,
    *,
    tokens: int = 160,
    ids: Sequence[int] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Comparison | Refusal]:
    """Read a text through the package and through the model: half of it by `prefill`, the rest by `decode`.

    On macOS once for each of Core ML's compute units; elsewhere in the interpreter, once as the package declares its
    types and once in float32 throughout, which leaves of the difference what rounded weights make.

    Args:
        package: an .mlpackage (of a separate pair: the name without -decode).
        model_dir: what it was exported from.
        tokens: how many to read; at least enough for every phase of the mini-batch.
        ids: the text; by default one that the model makes up.
        progress: called with the tokens read so far and in all.

    Raises:
        CheckpointError: one of them cannot be read, the package was made of another model, a logit is not a finite
            number, or nothing runs the package.
    """
    package = Path(package)
    metadata = read_metadata(packages_of(package)["decode"])
    model, _ = load_model(model_dir)
    if metadata["model"] != fingerprint(model):
        raise CheckpointError(f"{package}: was exported from another model than {model_dir}")
    tokens = max(tokens, 2 * metadata["prefill_tokens"], 3 * metadata["mini_batch_size"])
    ids = list(ids if ids is not None else invented_text(model, tokens))

    cache = model.make_cache()
    expected = np.array(model(mx.array([ids]), cache=cache)[0].astype(mx.float32))
    _check_finite(expected, f"{model_dir}: the model")
    layout = StateLayout.of(model.args)
    state = layout.pack(cache, model.make_cache())
    sessions = _sessions(package)
    found = []
    with _compiled(package) as compiled:
        for index, (where, session) in enumerate(sessions):

            def done(n: int, start: int = index * len(ids)) -> None:
                progress(start + n, len(sessions) * len(ids))

            try:
                devices = _devices(compiled, where) if compiled else None
                found.append(_compare(where, session(), ids, expected, state, layout, devices, done))
            except TTTError:
                raise
            except Exception as error:  # whatever Core ML says
                found.append(Refusal(where, _first_line(error)))
    if all(isinstance(result, Refusal) for result in found):
        raise CheckpointError(f"{package}: nothing runs it; {found[0].where}: {found[0].reason}")
    return found


def _first_line(error: Exception) -> str:
    return quoted((str(error).strip() or type(error).__name__).splitlines()[0])


def _check_finite(logits: np.ndarray, whose: str) -> None:
    if not np.isfinite(logits).all():
        raise CheckpointError(f"{whose} gives logits that are not finite numbers")


def invented_text(model: Model, tokens: int) -> list[int]:
    """Tokens sampled from the model itself, from a fixed seed."""
    key, cache, ids = mx.random.key(0), model.make_cache(), [1 % model.args.vocab_size]
    while len(ids) < tokens:
        key, draw = mx.random.split(key)
        ids.append(mx.random.categorical(model(mx.array([ids[-1:]]), cache=cache)[0, -1], key=draw).item())
    return ids


def _sessions(package: Path) -> list[tuple[str, Callable[[], Session]]]:
    if sys.platform == "darwin":
        return [(unit, lambda unit=unit: on_device(package, unit)()) for unit in COMPUTE_UNITS]
    return [
        ("interpreter", lambda: interpreted(package)()),
        ("interpreter, float32", lambda: interpreted(package, rounding=False)()),
    ]


def _compare(where, session: Session, ids, expected, state, layout: StateLayout, devices, done) -> Comparison:
    half = len(ids) // 2 // session.block * session.block + session.block // 2 + 1  # an incomplete block in between
    positions, logits = [], []
    for part in (ids[:half], *([token] for token in ids[half:])):
        for offset, last in session.read(part):
            positions.append(offset - 1)
            logits.append(last[-1])
            done(offset)
    found, wanted = np.stack(logits), expected[positions]
    _check_finite(found, f"the package, in {where},")
    learned = slice(0, layout.first_row("k"))
    difference = np.linalg.norm(session.state[:, :, learned] - state[:, :, learned])
    return Comparison(
        where=where,
        positions=len(positions),
        largest_difference=float(np.abs(found - wanted).max() / np.abs(wanted).max()),
        top1=overlap(found, wanted, 1),
        top5=overlap(found, wanted, 5),
        divergence=divergence(found, wanted),
        state_error=float(difference / max(np.linalg.norm(state[:, :, learned]), 1e-30)),
        devices=devices,
    )


def overlap(found: np.ndarray, wanted: np.ndarray, n: int) -> float:
    """Mean share of the n best tokens in common, logits [positions, V] each."""
    best = (np.argsort(-x, axis=-1, kind="stable")[:, :n] for x in (found, wanted))
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(*best, strict=True)]))


def divergence(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean of KL(wanted || found) in nats, logits [positions, V] each."""
    p, q = log_softmax(wanted), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@contextmanager
def _compiled(package: Path) -> Iterator[Mapping[str, str]]:
    """By function, what Core ML compiles its package to, until the end of the context; on macOS only."""
    compiled: dict[Path, str] = {}
    packages = packages_of(package) if sys.platform == "darwin" else {}
    try:
        for path in set(packages.values()):
            try:
                compiled[path] = ct.models.utils.compile_model(str(path))
            except RuntimeError as error:
                raise CheckpointError(f"{path}: Core ML cannot compile it: {_first_line(error)}") from error
        yield {name: compiled[path] for name, path in packages.items()}
    finally:
        for path in compiled.values():
            shutil.rmtree(path, ignore_errors=True)


def _devices(compiled: Mapping[str, str], unit: str) -> dict[str, dict[str, int]]:
    """Core ML's plan: how many operations of each function it prefers to run where."""
    from coremltools.models.compute_plan import MLComputePlan

    counts = {}
    for name, path in compiled.items():
        plan = MLComputePlan.load_from_path(path, compute_units=ct.ComputeUnit[unit])
        functions = plan.model_structure.program.functions
        usages = (
            plan.get_compute_device_usage_for_mlprogram_operation(op)
            for op in functions.get(name, functions.get("main")).block.operations
        )
        counts[name] = dict(Counter(type(u.preferred_compute_device).__name__ for u in usages if u is not None))
    return counts
