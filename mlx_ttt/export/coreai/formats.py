"""The formats in which a bundle stores its matrices, in NumPy: what is stored, and which numbers it stands for.

A matrix is [N, C], N outputs and C inputs. What is stored is its transpose, [C, N], because Core AI multiplies by that
and its runtime on Linux transposes constants anew in every call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

WEIGHTS = ("float32", "float16", "int8", "int4", "lut4")
BLOCK = 32  # inputs of an output that share a scale
GROUP = 16  # outputs that share a table
TABLE = 16  # numbers in a table
_ROUNDS = 40  # of k-means; it is nearly always done before


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


@dataclass(frozen=True)
class Palettized:
    """A matrix of places in tables: places [C, N] from 0 to 15, and for each group of outputs a table, [groups, 16]."""

    places: np.ndarray
    tables: np.ndarray

    @property
    def numbers(self) -> np.ndarray:
        """The matrix, [N, C], in float32."""
        groups = len(self.tables)
        places = self.places.T.astype(np.int64).reshape(groups, -1)
        numbers = np.take_along_axis(self.tables.astype(np.float32), places, axis=1)
        return numbers.reshape(self.places.shape[::-1])


def palettized(x: np.ndarray) -> Palettized:
    """Each number is replaced by the nearest of the 16 that k-means finds for its group of outputs.

    Args:
        x: [N, C] in the number type that the network computes in, which is also that of the tables. Where N is no
            multiple of 16, groups are as large as divides both.
    """
    N, C = x.shape
    groups = x.astype(np.float32).reshape(N // math.gcd(N, GROUP), -1)
    tables = np.stack([_centres(group) for group in groups]).astype(x.dtype)
    places = np.stack([_nearest(table, group) for table, group in zip(tables.astype(np.float32), groups, strict=True)])
    return Palettized(places.reshape(N, C).T.astype(ml_dtypes.uint4), tables)


def _centres(x: np.ndarray) -> np.ndarray:
    """16 numbers, in order, such that the squared distances of x [n] to the nearest are small: Lloyd's k-means.

    In order, a cluster is a stretch of x, and its mean a difference of sums.
    """
    x = np.sort(x).astype(np.float64)
    sums = np.concatenate([[0], np.cumsum(x)])
    ends = np.linspace(0, len(x), TABLE + 1).astype(int)
    centres = x[(ends[:-1] + ends[1:]) // 2]
    for _ in range(_ROUNDS):
        inner = np.searchsorted(x, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate([[0], inner, [len(x)]])
        counts = np.diff(ends)
        moved = np.where(counts > 0, np.diff(sums[ends]) / np.maximum(counts, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _nearest(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The place in a table, which is in order, of the number nearest to each of x."""
    return np.searchsorted((table[1:] + table[:-1]) / 2, x).astype(np.uint8)


def as_stored(x: np.ndarray, weights: str) -> np.ndarray:
    """The numbers that a matrix [N, C] has in this format, in float32.

    Args:
        x: the matrix in the number type that the network computes in.
        weights: one of WEIGHTS.
    """
    if weights in ("int8", "int4"):
        return scaled(x, int(weights[3:])).numbers
    if weights == "lut4":
        return palettized(x).numbers
    return x.astype(weights).astype(np.float32)


def table_format(weights: str) -> str:
    """The format of the embedding, and so of a head that is tied to it: small integers would cost it too much."""
    return "float32" if weights == "float32" else "float16"
