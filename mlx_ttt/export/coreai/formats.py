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
_ROUNDS = 40  # of k-means
_BINS = 2048  # of a group's numbers, for k-means


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
    tables = _centres(groups).astype(x.dtype)
    places = np.stack([_nearest(table, group) for table, group in zip(tables.astype(np.float32), groups, strict=True)])
    return Palettized(places.reshape(N, C).T.astype(ml_dtypes.uint4), tables)


def _centres(x: np.ndarray) -> np.ndarray:
    """For each group [groups, n] 16 numbers, in order, such that the squared distances to the nearest are small.

    Lloyd's k-means on narrow bins, of which the counts and sums are kept: in order, a cluster is a stretch of bins.
    """
    groups, low = len(x), x.min(1, keepdims=True).astype(np.float64)
    width = np.maximum(x.max(1, keepdims=True) - low, 1e-30) / _BINS
    place = np.minimum((x - low) / width, _BINS - 1).astype(np.int64) + np.arange(groups)[:, None] * _BINS
    counts, sums = (
        np.pad(np.bincount(place.ravel(), given, groups * _BINS).reshape(groups, -1).cumsum(1), ((0, 0), (1, 0)))
        for given in (None, x.ravel().astype(np.float64))
    )
    ranks = counts[:, -1:] * (np.arange(TABLE) + 0.5) / TABLE
    starts = np.stack([np.searchsorted(row, rank) for row, rank in zip(counts[:, 1:], ranks, strict=True)])
    centres = low + (starts + 0.5) * width  # as many numbers are near each
    for _ in range(_ROUNDS):
        middles = (centres[:, 1:] + centres[:, :-1]) / 2
        inner = np.clip(np.rint((middles - low) / width), 0, _BINS).astype(np.int64)
        ends = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (0, _BINS)))
        number, total = (np.diff(np.take_along_axis(kept, ends, 1), axis=1) for kept in (counts, sums))
        moved = np.where(number > 0, total / np.maximum(number, 1), centres)
        if np.array_equal(moved, centres):
            break
        centres = moved
    return np.sort(centres, axis=1)


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
    return plain(x, weights).astype(np.float32)


def plain(x: np.ndarray, weights: str) -> np.ndarray:
    """x in float32 or float16, of the latter only numbers that are normal: others become 0 or ±2^-14, what is nearer.

    When a constant is cast to float32, smaller numbers than 2^-14 come out wrong on Linux, 5.55e-5 as 2.4e-7 (1.0.0b3).
    """
    if weights == "float16":
        smallest = np.float32(np.finfo(np.float16).smallest_normal)
        x = np.where(np.abs(x) < smallest, np.rint(x / smallest) * smallest, x)
    return x.astype(weights)


def table_format(weights: str) -> str:
    """The format of the embedding, and so of a head that is tied to it: small integers would cost it too much."""
    return "float32" if weights == "float32" else "float16"
