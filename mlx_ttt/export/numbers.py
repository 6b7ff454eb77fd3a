"""The number types of an exported network: those of its constants, its state and its logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from ..errors import CheckpointError
from .operations import NumberType, Operations

COMPUTE: dict[str, tuple[NumberType, NumberType]] = {  # of the network, of the inner model and its update
    "float16": (np.float16, np.float16),
    "mixed": (np.float16, np.float32),
    "float32": (np.float32, np.float32),
}


class Numbers:
    """A lowering's operations together with the number types that they are used with.

    Args:
        ops: of a lowering.
        compute: a key of COMPUTE.
        outside: the number type of what leaves the network, state and logits.

    Attributes:
        network: the number type of the activations.
        inner: that of the inner model and its update.
    """

    def __init__(self, ops: Operations, compute: str, outside: NumberType):
        self.ops, self.outside = ops, outside
        self.network, self.inner = COMPUTE[compute]

    def const(self, x: ArrayLike) -> np.ndarray:
        """A constant of the network.

        Raises:
            CheckpointError: a number in it is not finite, or does not fit the number type.
        """
        return _constant(x, self.network)

    def inner_const(self, x: ArrayLike) -> np.ndarray:
        """A constant of the inner model or its update. Raises like `const`."""
        return _constant(x, self.inner)


def _constant(x: ArrayLike, number_type: NumberType) -> np.ndarray:
    if not np.isfinite(x).all():
        raise CheckpointError("a weight is not a finite number; the checkpoint is damaged, or its training diverged")
    try:
        with np.errstate(over="raise"):
            return np.asarray(x, number_type)
    except FloatingPointError:
        raise CheckpointError(
            "a weight does not fit float16, which ends at 65504; --compute mixed has the inner model's in float32"
        ) from None
