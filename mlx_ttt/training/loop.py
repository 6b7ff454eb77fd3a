"""The training loop.

A step reads one batch in parts of a few sequences, adds up their gradients, clips them, and has the optimizer change
the weights. The weights and all that the optimizer keeps are float32. The model computes with a copy of the weights in
the recipe's dtype; what the inner learner learns with stays float32 in the copy, too.

The state of a training is a function of its recipe, its batches and its last state. So a training that goes on from a
saved state ends with the weights of one that was never interrupted, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from ..distributed.sharding import norm
from ..errors import TrainingError
from ..network.cache import TTTCache
from ..network.model import Model
from .checkpoint import Caches, State, random_seed
from .optimizer import Arrays, Optimizer, Schedule, clip
from .segments import SEGMENT, gradients, prefill

if TYPE_CHECKING:
    from .data import Batch, Batches


@dataclass(frozen=True)
class Recipe:
    """How a model is trained. What the batches hold is said where they are made."""

    schedule: Schedule
    micro_batch: int  # sequences that are differentiated at a time
    segment: int = SEGMENT  # tokens that are differentiated at a time
    carry: bool = False  # the state goes on from one window of a document to the next
    optimizer: str = "adamw"
    weight_decay: float = 0.1
    clip: float = 1.0  # the largest norm of the gradients; 0: any
    dtype: str = "float32"  # that the model computes in
    inner_lr_start: float | None = None  # ttt_base_lr rises from here to the model's own during the warm-up

    def inner_lr(self, step: int, own: float) -> float:
        """ttt_base_lr at a step, counted from 0."""
        if self.inner_lr_start is None or step >= self.schedule.warmup:
            return own
        return self.inner_lr_start + (own - self.inner_lr_start) * step / self.schedule.warmup


Mean = tuple[mx.array, Arrays, mx.array]  # loss, gradients, and how many predictions they are the means of


class Part(NamedTuple):
    """A part of a step is done, and others follow."""

    step: int  # which is not finished, counted from 1
    sequences: int  # done in this step
    tokens: int  # in this part
    loss: float  # of this step so far, nats a token


class Step(NamedTuple):
    """A step is done. `tokens` are those of its last part, `loss` is NaN if no prediction counts."""

    step: int
    tokens: int
    loss: float
    lr: float
    norm: float  # of the gradients, before clipping


class Sums:
    """Losses and gradients, each times the number of predictions it is the mean of: parts may have uneven numbers."""

    def __init__(self, weights: Arrays):
        self.loss, self.count = mx.array(0.0), mx.array(0.0)
        self.gradients: Arrays = {name: mx.zeros(w.shape) for name, w in weights.items()}

    def add(self, loss: mx.array, gradients: Arrays, count: float) -> None:
        self.loss, self.count = self.loss + loss * count, self.count + count
        self.gradients = {name: g + gradients[name].astype(mx.float32) * count for name, g in self.gradients.items()}
        mx.eval(self.loss, self.count, self.gradients)

    def mean(self) -> Mean:
        """The loss in nats a token, the gradients, and how many predictions they are the means of."""
        count = mx.maximum(self.count, 1)
        return self.loss / count, {name: g / count for name, g in self.gradients.items()}, self.count


class Trainer:
    """A model in training.

    Args:
        model: whose parameters are all trained. It may be split over machines: then AdamW gives each its part of the
            weights that it gives one machine; the other optimizers look at whole matrices, and do not.
        batches: what it reads at each step.
        state: that it starts from, with the weights of all parameters.
        rows: which sequences of a batch this machine reads; by default all.
        over_machines: from this machine's mean of loss and gradients and their count to those of all machines.
    """

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        batches: Batches,
        state: State,
        rows: slice = slice(None),
        over_machines: Callable[[mx.array, Arrays, mx.array], Mean] = lambda *mean: mean,
    ):
        self.model, self.recipe, self.batches = model, recipe, batches
        self._rows, self._over_machines = rows, over_machines
        self.optimizer = Optimizer(recipe.optimizer, list(state.weights), recipe.weight_decay)
        self.optimizer.arrays = state.optimizer
        self.step, self.weights, self._carried = state.step, state.weights, state.carried
        mx.random.seed(state.random)
        self._copy_weights()

    def run(self) -> Iterator[Part | Step]:
        """Train to the end. Whoever stops between two parts drops the unfinished step: the state is that before it.

        Raises:
            TrainingError: the loss or the gradients are not finite. The state is that before the step.
        """
        while self.step < self.recipe.schedule.steps:
            yield from self._one_step()

    def _one_step(self) -> Iterator[Part | Step]:
        batch = self.batches.batch(self.step)
        sums, done, tokens = Sums(self.weights), 0, 0
        carried: dict[int, Caches] = {}
        for rows in self._parts(batch.fresh):
            if done:
                yield Part(self.step + 1, done, tokens, float(sums.mean()[0]))
            carried |= self._read_part(batch, rows, sums)
            done, tokens = done + len(rows), batch.weights[rows].size
        loss, gradients, count = self._over_machines(*sums.mean())
        del sums  # as large as the weights
        lr, size = self.recipe.schedule(self.step), 0.0
        if float(count):  # else the batch was a part of a long prompt, read for the state after it
            size = self._update(float(loss), gradients, lr)
        self._carried = carried
        self.step += 1
        yield Step(self.step, tokens, float(loss) if float(count) else math.nan, lr, size)

    def _update(self, loss: float, gradients: Arrays, lr: float) -> float:
        """Change the weights by a step. Returns the norm of the gradients before clipping."""
        size = float(norm(self.model, gradients))
        if not (math.isfinite(loss) and math.isfinite(size)):
            raise TrainingError(
                f"step {self.step + 1}: the loss is {loss:g} and the norm of its gradients {size:g};"
                " try a lower --lr or a longer --warmup"
            )
        self.weights = self.optimizer.update(self.weights, clip(gradients, size, self.recipe.clip), lr)
        mx.eval(self.weights, self.optimizer.arrays)
        self._copy_weights()
        return size

    def _parts(self, fresh: np.ndarray) -> Iterator[np.ndarray]:
        """The rows of a batch in parts. With carried states, a part has rows that begin or that go on, not both."""
        mine = np.arange(len(fresh))[self._rows]
        for start in range(0, len(mine), self.recipe.micro_batch):
            rows = mine[start : start + self.recipe.micro_batch]
            groups = [rows[fresh[rows]], rows[~fresh[rows]]] if self.recipe.carry else [rows]
            yield from (group for group in groups if len(group))

    def _read_part(self, batch: Batch, rows: np.ndarray, sums: Sums) -> dict[int, Caches]:
        """Add the gradients of some rows to the sums. Returns the states after them by row, if they are carried."""
        ids, weights = mx.array(batch.ids[rows]), mx.array(batch.weights[rows])
        count = float(batch.weights[rows].sum())
        cache = self._states(batch.fresh, rows) if self.recipe.carry else None
        with _inner_lr(self.model, self.recipe.inner_lr(self.step, self.model.args.ttt_base_lr)):
            if count:
                loss, tree = gradients(self.model, ids, self.recipe.segment, weights=weights, cache=cache)
                sums.add(loss, dict(tree_flatten(tree)), count)
            elif cache is not None:  # a long prompt: nothing to learn from it, but its answer may follow
                prefill(self.model, ids[:, :-1], cache, self.recipe.segment)
        return {} if cache is None else {int(row): _row(cache, i) for i, row in enumerate(rows)}

    def _states(self, fresh: np.ndarray, rows: np.ndarray) -> Caches:
        """The states that some rows go on from, as one batch: copies."""
        if fresh[rows].all():
            return self.model.make_cache()
        return [TTTCache.merge(layers) for layers in zip(*(self._carried[int(row)] for row in rows), strict=True)]

    def _copy_weights(self) -> None:
        """Give the model the weights in the dtype that it computes in."""
        self.model.update(tree_unflatten(list(computed(self.model, self.weights, self.recipe.dtype).items())))
        mx.eval(self.model.parameters())

    @property
    def state(self) -> State:
        """All that the next step depends on."""
        return State(self.step, self.weights, self.optimizer.arrays, self._carried, random_seed())


def computed(model: Model, weights: Arrays, dtype: str) -> Arrays:
    """Weights in this dtype, except those of the inner learner, which stay float32."""
    follows = model.cast_predicate
    return {name: w.astype(getattr(mx, dtype)) if follows(name) else w for name, w in weights.items()}


def _row(caches: Caches, i: int) -> Caches:
    """The state of one sequence, in row-major order as it comes out of a file."""
    alone = [c.extract(i) for c in caches]
    for c in alone:
        c.arrays = tree_map(mx.contiguous, c.arrays)
    mx.eval([c.arrays for c in alone])
    return alone


@contextmanager
def _inner_lr(model: Model, rate: float) -> Iterator[None]:
    """Have the inner learners learn with this ttt_base_lr within the block."""
    layers = [layer.seq_modeling_block for layer in model.layers]
    try:
        for layer in layers:
            layer.base_lr = rate / layer.head_dim
        yield
    finally:
        for layer in layers:
            layer.base_lr = model.args.ttt_base_lr / layer.head_dim
