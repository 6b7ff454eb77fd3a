"""The formats in which a bundle stores its matrices, in NumPy: what is stored, and which numbers it stands for.

A matrix is [N, C], N outputs and C inputs. What is stored is its transpose, [C, N], because Core AI multiplies by that
and its runtime on Linux transposes constants anew in every call.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

WEIGHTS = ("float32", "float16", "int8", "int4")
BLOCK = 32  # inputs of an output that share a scale


@dataclass(frozen=True)
class Scaled:
    """A matrix of small integers: data [C, N] times the scale [blocks, N] of its block of inputs."""

    data: np.ndarray
    scale: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """The matrix, [N, C], in float32."""
        repeats = len(self.data) // len(self.scale)
        return (self.data.astype(np.float32) * np.repeat(self.scale, repeats, axis=0).astype(np.float32)).T


def scaled(x: np.ndarray, bits: int) -> Scaled:
    """Symmetric integers of so many bits with a scale for each block, or for each output where blocks do not fit.

    Args:
        x: [N, C] in the number type that the network computes in, which is also that of the scale.
    """
    N, C = x.shape
    blocks = C // BLOCK if C % BLOCK == 0 else 1
    by_block = x.astype(np.float32).T.reshape(blocks, -1, N)
    largest = 2 ** (bits - 1) - 1
    scale = (np.abs(by_block).max(1) / largest).astype(x.dtype)  # [blocks, N]
    divisor = np.where(scale == 0, 1, scale).astype(np.float32)[:, None]
    data = np.clip(np.rint(by_block / divisor), -largest, largest).reshape(C, N)
    return Scaled(data.astype(np.int8 if bits == 8 else ml_dtypes.int4), scale)


def as_stored(x: np.ndarray, weights: str) -> np.ndarray:
    """The numbers that a matrix [N, C] has in this format, in float32.

    Args:
        x: the matrix in the number type that the network computes in.
        weights: one of WEIGHTS.
    """
    if weights in ("int8", "int4"):
        return scaled(x, int(weights[3:])).numbers
    return x.astype(weights).astype(np.float32)


def table_format(weights: str) -> str:
    """The format of the embedding, and so of a head that is tied to it: small integers would cost it too much."""
    return "float32" if weights == "float32" else "float16"
