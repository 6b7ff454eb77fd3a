"""Whether what this machine runs is right, and how fast it is."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import mlx.core as mx
import numpy as np

from ..errors import TTTError
from ..loading import bundled_model, load_model
from ..network import dual, reference
from ..network.inner import INNER_MODELS
from ..network.rule import Learner, State, Tokens

BOUND = 1e-5  # relative L2 error of float32 arithmetic
HALF = {mx.float16: 2e-3, mx.bfloat16: 1.6e-2}  # of y: within two roundings of its dtype
CORE_ML = 0.05  # largest difference of a logit, as a part of the largest one
_HEAD_DIMENSIONS = (16, 32, 64, 96, 128)
_ROUNDS = 5


@dataclass(frozen=True)
class Check:
    """Something that was computed in two ways.

    Attributes:
        error: how far they are apart; None if it could not be done.
        bound: how far they may be apart.
        note: why it could not be done.
    """

    name: str
    error: float | None
    bound: float
    note: str = ""

    @property
    def holds(self) -> bool | None:
        return None if self.error is None else self.error <= self.bound


@dataclass(frozen=True)
class Speed:
    """Tokens per second: the median of several rounds, the least and the largest."""

    name: str
    median: float
    least: float
    largest: float


def rule_checks(progress: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Check]:
    """The update rule as this machine runs it, against its definition in float64.

    All head dimensions that have kernels; one token at each kind of phase, and a text across several mini-batches.
    """
    calls = [
        (kind, D, T, phase, dtype)
        for kind in INNER_MODELS
        for D in _HEAD_DIMENSIONS
        for T, phase, dtype in ((1, 0, mx.float32), (1, 15, mx.float32), (37, 5, mx.float32), (37, 5, mx.bfloat16))
    ]
    for number, (kind, D, T, phase, dtype) in enumerate(calls):
        progress(number, len(calls))
        call = _call(kind, D, T, phase, dtype)
        y, state = dual.update(*call)
        expected, after = reference.update(*call)
        arrays = [(state.rows, after.rows), *zip(state.weights, after.weights, strict=True)]
        if dtype == mx.float32:
            arrays.append((y, expected))
        name = f"{kind}, D {D}, {T} tokens from phase {phase}, {str(dtype).rpartition('.')[2]}"
        yield Check(name, max(_distance(*pair) for pair in arrays), BOUND)
        if dtype != mx.float32:
            yield Check(f"{name}: y", _distance(y, expected), HALF[dtype])
    progress(len(calls), len(calls))


def _call(kind: str, D: int, T: int, phase: int, dtype: mx.Dtype) -> tuple[Tokens, Learner, State]:
    """A call of the update rule in which every term matters."""
    inner, H, K = INNER_MODELS[kind], 2, 16
    numbers = np.random.default_rng(D + T + phase)

    def normal(*shape: int, scale: float = 1.0) -> mx.array:
        return mx.array(scale * numbers.standard_normal(shape), mx.float32)

    weights = tuple(
        normal(1, H, *shape, scale=0.1 if name.startswith("b") else 1 / math.sqrt(shape[0]))
        for name, shape in inner.weight_shapes(D).items()
    )
    rows = normal(1, H, K, inner.row_width(D), scale=0.3) * (mx.arange(K) < phase)[:, None]
    q, k, v = (normal(1, T, H, D).astype(dtype) for _ in range(3))
    lr = mx.array(numbers.uniform(size=(1, T, H)) / D, mx.float32).astype(dtype)
    t = mx.maximum(1 / mx.arange(1, K + 1) + normal(K, scale=0.1), 0)
    learner = Learner(inner, t, 1 + normal(H, D, scale=0.2), normal(H, D, scale=0.2))
    return Tokens(q, k, v, lr), learner, State(weights, rows, [phase])


def _distance(found: mx.array, expected: mx.array) -> float:
    """Relative L2 distance; the absolute one where nothing is expected."""
    a, b = (np.array(x.astype(mx.float64, stream=mx.cpu)) for x in (found, expected))
    if not np.isfinite(a).all():
        return math.inf
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1))


def model_check() -> Check:
    """The bundled model: a text read at once against the same text token by token."""
    model, _ = load_model(bundled_model())
    ids = mx.array([[1, *range(300, 360)]])
    whole, cache = model(ids), model.make_cache()
    steps = mx.concatenate([model(ids[:, i : i + 1], cache) for i in range(ids.shape[1])], axis=1)
    error = (mx.abs(whole - steps).max() / mx.abs(whole).max()).item()
    return Check("bundled model, at once against token by token", error, 1e-4)  # type: ignore[arg-type]


def core_ml_checks(tokens: int = 48) -> Iterator[Check]:
    """The bundled model as a Core ML package against MLX: on a Mac in Core ML, elsewhere by an interpreter."""
    try:
        from ..export.mil import require_coremltools

        require_coremltools()
        from ..export.mil.package import export
        from ..export.verify import Refusal, verify

        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "Model.mlpackage"
            export(bundled_model(), package, companions=False)
            for found in verify(package, bundled_model(), tokens=tokens):
                if isinstance(found, Refusal):
                    yield Check(f"Core ML, {found.where}", None, CORE_ML, found.reason)
                else:
                    yield Check(f"Core ML, {found.where}", float(found.largest_difference), CORE_ML)
    except TTTError as error:
        yield Check("Core ML", None, CORE_ML, str(error))


def speeds(tokens: int = 64) -> Iterator[Speed]:
    """The bundled model, float32 on a CPU, its own dtype on a GPU."""
    model, _ = load_model(bundled_model())
    prompt = mx.array([[1 + i % 2000 for i in range(1024)]])

    def prefill() -> int:
        cache = model.make_cache()
        mx.eval(model(prompt[:, :512], cache)[:, -1:], model(prompt[:, 512:], cache)[:, -1:], [c.arrays for c in cache])
        return prompt.shape[1]

    def decode() -> int:
        cache, token = model.make_cache(), mx.array([[1]])
        for _ in range(tokens):
            token = mx.argmax(model(token, cache)[:, -1], axis=-1, keepdims=True)
            mx.eval(token)
        return tokens

    for name, run in (("prefill, 1024 tokens", prefill), (f"decode, {tokens} tokens", decode)):
        run()  # compiles what is to be compiled
        found = []
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            found.append(run() / (time.perf_counter() - start))
        yield Speed(name, median(found), min(found), max(found))
