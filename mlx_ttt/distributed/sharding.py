"""A model split over the machines of a group: each has some heads, and some of the feed-forward network's units.

With N machines, machine r has the r-th part of

    q_proj, k_proj, v_proj, g_proj, conv_q, conv_k, post_norm       their output channels
    ttt_norm, the learning rates' weights, W1, b1[, W2, b2]         their heads
    gate_proj, up_proj                                              their units
    o_proj, down_proj                                               their inputs

All else is on every machine: embeddings, the norms in front of the blocks, `pre_conv`, the token factors. A head's
state is only where the head is. What a TTT layer or a feed-forward network adds to the residual stream is the sum of
what the machines add. `post_norm` runs over all heads, so the machines exchange its moments.

Per layer and call, a machine takes part in two sums of C numbers a token, and gathers two numbers a token of each
machine. Backwards it is the same again, and a sum of K numbers. A parameter that all machines have gets its whole
gradient on each of them. One that is split gets its part of the gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace

from ..errors import DistributedError
from ..network import model as network
from ..network.cache import LayerState
from ..network.model import TTT, LayerNorm, Model, SwiGLU
from ..network.rule import Learner
from .exchange import all_gather, all_sum, sum_gradients

Group = mx.distributed.Group

_PROJECTIONS = (nn.Linear, nn.QuantizedLinear)
_SPLIT_BY_INPUTS = ("o_proj", "down_proj")
_NOT_SPLIT = ("learnable_token_idx",)


class ShardedTTT(TTT):
    """Some heads of a TTT layer."""

    group: Group

    def __call__(self, x: mx.array, cache: LayerState, scale: mx.array | None = None) -> mx.array:
        return all_sum(super().__call__(sum_gradients(self.group)(x), cache, scale), self.group)

    def learner(self) -> Learner:
        """The heads' learner. All machines' heads use the same t, so its gradients are summed."""
        learner = super().learner()
        return replace(learner, t=sum_gradients(self.group)(learner.t))


class ShardedSwiGLU(SwiGLU):
    """Some units of a feed-forward network."""

    group: Group

    def __call__(self, x: mx.array) -> mx.array:
        return all_sum(super().__call__(sum_gradients(self.group)(x)), self.group)


class ShardedLayerNorm(LayerNorm):
    """A LayerNorm over the channels of all machines, of which x has those of this one."""

    group: Group

    def __call__(self, x: mx.array) -> mx.array:
        z = x.astype(mx.float32)
        mean, variance = self.moments(z)
        z = (z - mean) * mx.rsqrt(variance + self.eps)
        return (z * self.weight + self.bias).astype(x.dtype)

    def moments(self, z: mx.array) -> tuple[mx.array, mx.array]:
        """Mean and variance over all channels, [..., 1] each.

        Each machine takes the mean and variance of its own channels, and these are combined (Chan et al. 1979): the
        variance of all is the mean of the machines' variances plus the variance of their means.
        """
        own = mx.stack([z.mean(-1), z.var(-1)])[None]
        # Each machine's output depends on the moments, so the gradients that come back from all of them are summed.
        means, variances = sum_gradients(self.group)(all_gather(own, self.group)).swapaxes(0, 1)
        mean = means.mean(0)
        return mean[..., None], (variances + (means - mean).square()).mean(0)[..., None]


@network.shard.register
def shard(model: Model, group: Group | None) -> None:
    """Keep this machine's part of a model, in place. Names of parameters stay, their shapes shrink.

    Args:
        group: the machines; by default all that were started together. With one machine the model stays as it is.

    Raises:
        DistributedError: heads, units or quantization groups do not divide, or a projection is not one that can be
            split. The model is unchanged then.
    """
    group = group or mx.distributed.init()
    if group.size() == 1:
        return
    _check(model, group.size())
    for block in model.layers:
        ttt = block.seq_modeling_block
        _keep_part(ttt, ShardedTTT, group)
        ttt.num_heads //= group.size()
        ttt.post_norm.__class__, ttt.post_norm.group = ShardedLayerNorm, group  # its parameters are split already
        _keep_part(block.mlp, ShardedSwiGLU, group)
        mx.eval(block.parameters())  # so that no more than one block is whole in memory


def _keep_part(layer: nn.Module, sharded: type[nn.Module], group: Group) -> None:
    """Make a layer its part: the same modules with smaller parameters, and a class that sums over the group."""
    shard_inplace(layer, lambda path, _: _axis(path), group=group)
    layer.__class__, layer.group = sharded, group


def _axis(path: str) -> int | None:
    """Along which axis a parameter of a layer is split: heads, channels and units stand first, inputs last."""
    name = path.split(".")[0]
    return None if name in _NOT_SPLIT else -1 if name in _SPLIT_BY_INPUTS else 0


def split_axis(name: str) -> int | None:
    """Along which axis a model's parameter is split; None: all machines have it."""
    for layer in (".seq_modeling_block.", ".mlp."):
        if layer in name:
            return _axis(name.split(layer)[1])
    return None


def norm(model: Model, gradients: Mapping[str, mx.array]) -> mx.array:
    """The norm of all gradients by name. If the model is split, that of all its machines' gradients, each once."""
    split, whole = mx.array(0.0), mx.array(0.0)
    for name, gradient in gradients.items():
        square = gradient.astype(mx.float32).square().sum()
        if split_axis(name) is None:
            whole = whole + square
        else:
            split = split + square
    ttt = model.layers[0].seq_modeling_block
    if isinstance(ttt, ShardedTTT):
        split = all_sum(split, ttt.group)
    return mx.sqrt(split + whole)


def _check(model: Model, machines: int) -> None:
    H, F = model.args.num_attention_heads, model.args.intermediate_size
    if H % machines:
        raise DistributedError(f"{H} heads do not divide over {machines} machines; use as many as divide them")
    if F % machines:
        raise DistributedError(f"intermediate_size {F} does not divide over {machines} machines")
    for i, block in enumerate(model.layers):
        if isinstance(block.seq_modeling_block, ShardedTTT):
            raise DistributedError("the model is split over machines already")
        for layer in (block.seq_modeling_block, block.mlp):
            for name, projection in layer.children().items():
                if name.endswith("_proj"):
                    _check_projection(f"layer {i}, {name}", projection, machines if name in _SPLIT_BY_INPUTS else 1)


def _check_projection(place: str, projection: nn.Module, machines: int) -> None:
    """machines: over how many its inputs are split."""
    if not isinstance(projection, _PROJECTIONS):
        kind = type(projection).__name__
        raise DistributedError(f"{place}: a {kind} cannot be split over machines; fuse adapters into the model first")
    if isinstance(projection, nn.QuantizedLinear) and projection.scales.shape[-1] % machines:
        groups = f"{projection.scales.shape[-1]} quantization groups of {projection.group_size}"
        raise DistributedError(f"{place}: {groups} do not divide over {machines} machines; use a smaller --group-size")
