"""How far the answers of an exported package are from those of its model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, TTTError
from ..loading import load_model
from ..network.cache import TTTCache, watched
from ..network.model import Model
from ..network.rule import Signals
from ..text.state import fingerprint
from .errors import first_line
from .functions import SIGNALS
from .layout import StateLayout
from .session import Runner


@dataclass(frozen=True)
class Answers:
    """What the model makes of a text of n tokens.

    Attributes:
        logits: [n, V].
        learned: the state's rows before those of the keys, after the text.
        signals: by the names that the functions' outputs have, [layers, H, n] each.
        learning: the learning scale that the text was read with, [layers, H]; None: 1.
    """

    logits: np.ndarray
    learned: np.ndarray
    signals: dict[str, np.ndarray]
    learning: np.ndarray | None


@dataclass(frozen=True)
class Comparison:
    """A package's answers beside its model's, at the positions where the package gives logits.

    Attributes:
        where: what ran the package.
        positions: how many were compared.
        largest_difference: of the logits, relative to the largest absolute one.
        top1, top5: mean overlap of the best and of the five best tokens, 0 to 1.
        divergence: mean KL divergence of the package's distribution from the model's, in nats.
        state_error: of what was learned, after the text, as relative L2.
        signals: the largest difference of a signal, relative to the largest; None: the package gives none.
        devices: the number of operations by the device that Core ML prefers for them, by function; empty but on macOS.
    """

    where: str
    positions: int
    largest_difference: float
    top1: float
    top5: float
    divergence: float
    state_error: float
    signals: float | None
    devices: dict[str, dict[str, int]]


@dataclass(frozen=True)
class Refusal:
    """Something that does not run the package, and the first line of its reason."""

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
    """Read a text with everything that can run the package here, and with the model.

    Half of the text is read by `prefill`, the rest by `decode`. A package that takes a learning scale is given another
    one for each layer and head.

    Args:
        package: an .mlpackage; of a separate pair the name without -decode.
        model_dir: the model that it was exported from.
        tokens: how many to read; raised to a number that covers every phase of a mini-batch.
        ids: the text; by default the model makes one up.
        progress: called with the tokens read so far and in all.

    Raises:
        CheckpointError: one of them cannot be read, the package was made of another model, a logit is not a finite
            number, or nothing runs the package.
    """
    # Not needed to compare, and it needs coremltools.
    from .mil.runners import runners_of
    from .mil.session import packages_of, read_metadata

    package = Path(package)
    metadata = read_metadata(packages_of(package)["decode"])
    model, _ = load_model(model_dir)
    if metadata["model"] != fingerprint(model):
        raise CheckpointError(f"{package}: was exported from another model than {model_dir}")
    tokens = max(tokens, 2 * metadata["prefill_tokens"], 3 * metadata["mini_batch_size"])
    text = list(ids if ids is not None else invented_text(model, tokens))
    expected = model_answers(model, text, uneven_scale(model) if "learning" in metadata else None)
    _check_finite(expected.logits, f"{model_dir}: the model")

    found: list[Comparison | Refusal] = []
    with runners_of(package) as runners:
        for index, runner in enumerate(runners):

            def done(read: int, index: int = index, of: int = len(runners), n: int = len(text)) -> None:
                progress(index * n + read, of * n)

            try:
                found.append(compare(runner, text, expected, done))
            except TTTError:
                raise
            except Exception as error:  # whatever runs it refuses it in its own way
                found.append(Refusal(runner.name, first_line(error)))
    own = [result for runner, result in zip(runners, found, strict=True) if not runner.is_second]
    refusals = [result for result in own if isinstance(result, Refusal)]
    if len(refusals) == len(own):
        raise CheckpointError(f"{package}: nothing runs it; {refusals[0].where}: {refusals[0].reason}")
    return found


def invented_text(model: Model, tokens: int) -> list[int]:
    """Tokens sampled from the model itself, from a fixed seed."""
    key, cache, ids = mx.random.key(0), model.make_cache(), [1 % model.args.vocab_size]
    while len(ids) < tokens:
        key, draw = mx.random.split(key)
        drawn = mx.random.categorical(model(mx.array([ids[-1:]]), cache=cache)[0, -1], key=draw)
        ids.append(int(np.array(drawn)))
    return ids


def uneven_scale(model: Model) -> np.ndarray:
    """A learning scale that is another one for each layer and head, [layers, H], from 0.5 to 1.5."""
    layers, H = model.args.num_hidden_layers, model.args.num_attention_heads
    return np.linspace(0.5, 1.5, layers * H, dtype=np.float32).reshape(layers, H)


def model_answers(model: Model, ids: list[int], learning: np.ndarray | None = None) -> Answers:
    """Read a text with the model."""
    cache, layout = model.make_cache(), StateLayout.of(model.args)
    logits, signals = observed(model, ids, cache, learning)
    return Answers(logits, layout.pack(cache, model.make_cache())[:, :, : layout.first_row("k")], signals, learning)


def observed(
    model: Model, ids: Sequence[int], cache: list[TTTCache], learning: np.ndarray | None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The logits [n, V] and the signals, [layers, H, n] each by the names of the functions' outputs."""
    scale = 1.0 if learning is None else learning
    with watched(cache) as seen:
        logits = model(mx.array([list(map(int, ids))]), cache=cache, learning=scale)
    joined = [Signals.joined(layer) for layer in seen]
    by_name = {
        name: np.stack([np.array(getattr(layer, field)[0]).T for layer in joined]) for name, field in SIGNALS.items()
    }
    return np.array(logits[0].astype(mx.float32)), by_name


def compare(runner: Runner, ids: list[int], expected: Answers, progress: Callable[[int], None]) -> Comparison:
    """Read a text in a new session.

    Args:
        runner: what runs the package.
        ids: the text.
        expected: the model's answers.
        progress: called with the tokens read so far.

    Raises:
        CheckpointError: a logit is not a finite number.
    """
    devices, session = runner.devices(), runner.open_session()
    if expected.learning is not None:
        session.learning = expected.learning
    half = len(ids) // 2 // session.block * session.block + session.block // 2 + 1  # so that one block is incomplete
    positions, logits, signals = [], [], list[dict[str, np.ndarray]]()
    parts = [ids[:half], *([token] for token in ids[half:])]
    for offset, last in chain.from_iterable(map(session.feed, parts)):
        positions.append(offset - 1)
        logits.append(last[-1])
        signals.append(session.signals)
        progress(offset)
    found, wanted, learned = np.stack(logits), expected.logits[positions], expected.learned
    _check_finite(found, f"the package, in {runner.name},")
    drift = np.linalg.norm(session.state[:, :, : learned.shape[2]] - learned)
    return Comparison(
        where=runner.name,
        positions=len(positions),
        largest_difference=float(np.abs(found - wanted).max() / np.abs(wanted).max()),
        top1=overlap(found, wanted, 1),
        top5=overlap(found, wanted, 5),
        divergence=divergence(found, wanted),
        state_error=float(drift / max(np.linalg.norm(learned), 1e-30)),
        signals=signals_error(signals, expected.signals),
        devices=devices,
    )


def signals_error(found: Sequence[Mapping[str, np.ndarray]], wanted: Mapping[str, np.ndarray]) -> float | None:
    """The largest difference of those of calls in a row, relative to the largest of a kind; None: there are none."""
    if not found or not found[0]:
        return None
    errors = []
    for name, expected in wanted.items():
        difference = np.abs(np.concatenate([part[name] for part in found], axis=-1) - expected).max()
        errors.append(difference / max(float(np.abs(expected).max()), 1e-30))
    return float(max(errors))


def _check_finite(logits: np.ndarray, whose: str) -> None:
    if not np.isfinite(logits).all():
        raise CheckpointError(f"{whose} gives logits that are not finite numbers")


def overlap(found: np.ndarray, wanted: np.ndarray, n: int) -> float:
    """Mean share of the n best tokens in common, logits [positions, V] each."""
    best = (np.argsort(-x, axis=-1, kind="stable")[:, :n] for x in (found, wanted))
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(*best, strict=True)]))


def divergence(found: np.ndarray, wanted: np.ndarray) -> float:
    """Mean of KL(wanted || found) in nats, logits [positions, V] each."""
    p, q = log_softmax(wanted), log_softmax(found)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Along the last axis, in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
