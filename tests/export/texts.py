"""Reading texts through exported functions, and what the model makes of them."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_ttt.export.layout import StateLayout
from mlx_ttt.export.session import Session
from mlx_ttt.model import Model


def feed(session: Session, *parts) -> tuple[np.ndarray, np.ndarray]:
    """The positions of each call's last token and their logits, [calls] and [calls, V]."""
    offsets, logits = zip(*(answer for ids in parts for answer in session.feed(ids)), strict=True)
    return np.array(offsets) - 1, np.stack([x[-1] for x in logits])


def feed_all(session: Session, *parts) -> np.ndarray:
    """Logits of every token, of a package that gives them, [T, V]."""
    return np.concatenate([logits for ids in parts for _, logits in session.feed(ids)])


def singly(ids) -> list[list[int]]:
    return [[token] for token in ids]


def expected(model: Model, ids) -> tuple[np.ndarray, np.ndarray]:
    """What the model itself makes of a text: its logits [T, V] and its state, packed."""
    cache = model.make_cache()
    logits = np.array(model(mx.array([list(map(int, ids))]), cache=cache)[0].astype(mx.float32))
    return logits, StateLayout.of(model.args).pack(cache, model.make_cache())


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Largest difference, relative to the largest absolute value expected."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())
