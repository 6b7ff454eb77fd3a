"""Learning scales and signals of exported functions beside those of the model."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

import mlx_ttt
from mlx_ttt.export.functions import SIGNALS
from mlx_ttt.export.layout import StateLayout
from mlx_ttt.export.session import Session
from mlx_ttt.model import Model

from .texts import error, singly


def uneven(model: Model) -> np.ndarray:
    """A learning scale that is another one for each layer and head, [layers, H]."""
    layers, H = model.args.num_hidden_layers, model.args.num_attention_heads
    return np.linspace(0.25, 1.75, layers * H, dtype=np.float32).reshape(layers, H)


def parts_of(ids, K: int) -> list:
    """An incomplete block, single tokens through the end of a mini-batch, whole blocks, an incomplete one."""
    return [ids[: K + 2], *singly(ids[K + 2 : 2 * K + 1]), *singly(ids[2 * K + 1 : 3 * K]), ids[3 * K :]]


def compare(model: Model, session: Session, ids, learning: np.ndarray | None, bound: float) -> None:
    """Read a text, the second part with another scale than the first, and compare logits, state and signals."""
    K = model.args.mini_batch_size
    cache, wanted, expected, seen, positions, found = model.make_cache(), [], [], [], [], []
    for i, part in enumerate(parts_of(ids, K)):
        scale = None if learning is None else learning if i else learning[::-1, ::-1].copy()
        shown = mlx_ttt.observe(
            model, mx.array([list(map(int, part))]), cache, learning=1.0 if scale is None else mx.array(scale)
        )
        wanted.append(np.array(shown.logits[0].astype(mx.float32)))
        expected.append({name: np.array(getattr(shown, field)[:, 0]) for name, field in SIGNALS.items()})
        session.learning = scale
        mine: list[dict[str, np.ndarray]] = []
        for offset, logits in session.feed(part):
            positions.append(offset - 1)
            found.append(logits[-1])
            mine.append(session.signals)
        seen.append({name: np.concatenate([x[name] for x in mine], axis=-1) for name in SIGNALS})
    assert error(np.stack(found), np.concatenate(wanted)[positions]) <= bound
    assert error(session.state, StateLayout.of(model.args).pack(cache, model.make_cache())) <= bound
    for name in SIGNALS:
        a, b = (np.concatenate([x[name] for x in parts], axis=-1) for parts in (seen, expected))
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= bound * np.abs(b).max(), name  # where t_{K-1} is 0 nothing is ever written
