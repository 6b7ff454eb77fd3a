"""What machines exchange. All of it runs on one stream of MLX.

A stream computes in order, but streams do not wait for each other, and all send over the same connections. On two of
them, one machine's sum can meet another machine's maximum: both get a wrong number and no error. So nothing in this
package is exchanged but by these functions, and all machines call them in the same order with the same shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Group = mx.distributed.Group

_STREAM = mx.new_thread_local_stream(mx.cpu)


def all_sum(x: mx.array, group: Group) -> mx.array:
    """The sum of the machines' arrays, the same bit for bit on all of them."""
    return mx.distributed.all_sum(x, group=group, stream=_STREAM)


def all_max(x: mx.array, group: Group) -> mx.array:
    """The maximum of the machines' arrays."""
    return mx.distributed.all_max(x, group=group, stream=_STREAM)


def all_gather(x: mx.array, group: Group) -> mx.array:
    """The machines' arrays [n, ...], one after the other: [machines · n, ...]."""
    return mx.distributed.all_gather(x, group=group, stream=_STREAM)


def average(arrays: list[mx.array], group: Group) -> list[mx.array]:
    """The means over the machines. Small arrays are sent together."""
    stream: Any = _STREAM
    return nn.average_gradients(arrays, group, communication_stream=stream)


@lru_cache
def sum_gradients(group: Group) -> Callable[[mx.array], mx.array]:
    """A function that returns its argument, and whose gradient is the sum of the machines' gradients."""

    same: Any = mx.custom_function(lambda x: x)
    same.vjp(lambda x, cotangent, _: all_sum(cotangent, group))
    return same


def wait() -> None:
    """Until all that was asked for has been exchanged, also what nobody has looked at.

    Raises:
        RuntimeError: a connection is lost.
    """
    mx.synchronize(_STREAM)
