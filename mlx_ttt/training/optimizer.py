"""How gradients change the weights: MLX's optimizers, the learning rate of each step, what decays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers as mlx_optimizers

Arrays = dict[str, mx.array]

OPTIMIZERS = ("adamw", "muon", "adafactor")
DECAYS = ("cosine", "linear")
BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each step: it rises to `peak` in a straight line, then falls to `end`."""

    peak: float
    end: float
    warmup: int  # steps
    steps: int  # in all
    decay: str = "cosine"

    def __call__(self, step: int) -> float:
        """Of a step, counted from 0. The first one already learns; the last one has nearly the rate `end`."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        done = (step - self.warmup) / max(self.steps - self.warmup, 1)  # 0 to 1
        left = (1 + math.cos(math.pi * done)) / 2 if self.decay == "cosine" else 1 - done
        return self.end + (self.peak - self.end) * left


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter: not to norms, biases and the token factors' offsets."""
    module, last = name.split(".")[-2:]
    is_bias = last.endswith("bias") or last in ("b1", "b2", "learnable_token_idx")
    return not is_bias and "norm" not in last and not (module.endswith("norm") and last == "weight")


def is_matrix(name: str) -> bool:
    """Whether a parameter is a projection inside a block: what Muon is for. Its authors leave the rest to AdamW."""
    return name.endswith("_proj.weight")


class Optimizer:
    """One of MLX's optimizers, or two that share the parameters. Its state is float32, as the weights it is given.

    Args:
        kind: "adamw", "muon" or "adafactor". With Muon, AdamW updates what is no matrix.
        names: of all parameters.
        weight_decay: of those that decay.
    """

    def __init__(self, kind: str, names: list[str], weight_decay: float):
        groups: dict[tuple[str, bool], list[str]] = {}
        for name in names:
            own = "adamw" if kind == "muon" and not is_matrix(name) else kind
            groups.setdefault((own, decays(name)), []).append(name)
        self._groups = [
            (members, _make(own, weight_decay if decaying else 0.0))
            for (own, decaying), members in sorted(groups.items())
        ]

    def update(self, weights: Mapping[str, mx.array], gradients: Mapping[str, mx.array], lr: float) -> Arrays:
        """The weights after a step with this learning rate, by name."""
        updated: Arrays = {}
        for names, optimizer in self._groups:
            optimizer.learning_rate = lr
            mine = ({name: arrays[name] for name in names} for arrays in (gradients, weights))
            updated |= optimizer.apply_gradients(*mine)
        # In row-major order, as they come out of a file: so a resumed training multiplies the same way.
        return {name: mx.contiguous(updated[name]) for name in weights}

    @property
    def arrays(self) -> Arrays:
        """The state by name. Empty before the first step."""
        arrays: Arrays = {}
        for i, (names, optimizer) in enumerate(self._groups):
            if names[0] in optimizer.state:
                arrays[f"{i}/step"] = optimizer.state["step"]
                arrays |= {f"{i}/{name}/{key}": x for name in names for key, x in optimizer.state[name].items()}
        return arrays

    @arrays.setter
    def arrays(self, arrays: Arrays) -> None:
        for path, x in arrays.items():
            i, *keys = path.split("/")
            state = self._groups[int(i)][1].state
            for key in keys[:-1]:
                state = state.setdefault(key, {})
            state[keys[-1]] = x


def _make(kind: str, weight_decay: float) -> mlx_optimizers.Optimizer:
    if kind == "adamw":
        return mlx_optimizers.AdamW(0.0, list(BETAS), weight_decay=weight_decay, bias_correction=True)
    if kind == "muon":
        return mlx_optimizers.Muon(0.0, weight_decay=weight_decay)
    # With a learning rate that means the same as for the others: neither its own nor relative to the parameter.
    return mlx_optimizers.Adafactor(0.0, weight_decay=weight_decay, relative_step=False, scale_parameter=False)


def clip(gradients: Arrays, norm: float, largest: float) -> Arrays:
    """Gradients with this norm, scaled down so that it is at most `largest` (0: any)."""
    scale = min(largest / (norm + 1e-6), 1) if largest else 1
    return {name: g * scale for name, g in gradients.items()} if scale < 1 else gradients
