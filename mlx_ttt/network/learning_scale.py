"""The learning scale: how much of its learning rates a model uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np

Scale: TypeAlias = float | Sequence | np.ndarray | mx.array


def is_one(learning: Scale) -> bool:
    """Whether the model is as it is, so that nothing needs to be scaled."""
    return isinstance(learning, int | float) and learning == 1


def learning_scale(learning: Scale, layers: int, B: int, H: int) -> mx.array:
    """What the learning rates of each layer are multiplied by, [layers, B or 1, 1, H or 1], float32.

    Args:
        learning: a number; [B]; [layers or 1, H or 1]; or [layers or 1, B or 1, H or 1]. The number of dimensions says
            which, so that no two of them can be taken for each other.

    Raises:
        ValueError: another shape, or a value that is negative, infinite or no number.
    """
    if isinstance(learning, mx.array):
        learning = learning.astype(mx.float32)
    try:
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused below
            scale = np.array(learning, np.float32)
    except (TypeError, ValueError):
        raise ValueError(f"learning is {learning!r}, expected numbers") from None
    if scale.ndim == 1 and scale.shape == (B,):
        full = scale[None, :, None]
    elif scale.ndim == 2 and scale.shape[0] in (1, layers) and scale.shape[1] in (1, H):
        full = scale[:, None]
    elif scale.ndim == 3 and all(n in (1, m) for n, m in zip(scale.shape, (layers, B, H), strict=True)):
        full = scale
    elif scale.ndim == 0:
        full = scale.reshape(1, 1, 1)
    else:
        expected = f"a number, [{B}] (sequences), [{layers}, {H}] (layers, heads) or [{layers}, {B}, {H}]"
        raise ValueError(f"learning has shape {scale.shape}, expected {expected}")
    if wrong := scale[~(np.isfinite(scale) & (scale >= 0))].tolist():
        raise ValueError(f"learning is {wrong[0]}, expected finite numbers that are not negative")
    return mx.array(np.ascontiguousarray(np.broadcast_to(full, (layers, *full.shape[1:]))[:, :, None]))
