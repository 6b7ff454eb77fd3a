"""Data parallel training: each machine reads some sequences of a batch, and their gradients are summed."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..distributed.exchange import all_sum, average

Group = mx.distributed.Group


def rows(batch_size: int, group: Group | None) -> slice:
    """Which sequences of a batch this machine reads: every size-th from its rank on.

    Raises:
        ValueError: a machine would have none.
    """
    if group is None:
        return slice(None)
    if batch_size < group.size():
        raise ValueError(f"a batch of {batch_size} does not reach for {group.size()} machines; use a larger one")
    return slice(group.rank(), None, group.size())


def reduce(
    loss: mx.array, gradients: Any, count: mx.array | float, group: Group | None
) -> tuple[mx.array, Any, mx.array]:
    """The mean loss and gradients of all machines' predictions, from those of each machine's.

    Machines may have predicted different numbers of tokens, or none. So the means are multiplied by these numbers,
    summed, and divided by the sum of the numbers. Without a group the result is what was given. It is the same bit for
    bit on all machines.

    Args:
        loss, gradients: means over this machine's predictions; the gradients are a tree of arrays. A machine without
            predictions gives zeros of the same shapes.
        count: how many predictions, or the sum of their weights.

    Returns:
        Loss and gradients, means over all predictions (zeros if there are none), and how many there are.
    """
    count = mx.array(count, mx.float32)
    if group is None:
        return loss, gradients, count
    mx.eval(loss, gradients, count)  # the order of the sums below is that of a graph: it is the same on all machines
    with mx.stream(mx.cpu):  # on a GPU's stream, Metal ends what waits for longer than some seconds
        sums = all_sum(mx.stack([loss.astype(mx.float32) * count, count]), group)
        total = sums[1]
        divisor = mx.where(total > 0, total, 1)
        weight = count * group.size() / divisor  # average_gradients divides by the number of machines
        leaves: Any = tree_flatten(gradients)
        weighted = [g.astype(mx.float32) * weight for _, g in leaves]
        averaged = average(weighted, group)
        means = iter(averaged)
        reduced = tree_map(lambda g: next(means).astype(g.dtype), gradients)
    mx.eval(sums, reduced)
    return sums[0] / divisor, reduced, total


def nothing(model: nn.Module) -> tuple[mx.array, Any, float]:
    """Loss, gradients and count of a machine that has predicted nothing, for `reduce`."""
    parameters: Any = tree_flatten(model.trainable_parameters())
    zeros = tree_unflatten([(name, mx.zeros_like(p)) for name, p in parameters])
    return mx.array(0.0), zeros, 0.0
