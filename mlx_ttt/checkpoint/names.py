"""Turns the names that training tools give to tensors into the official parameter names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..errors import CheckpointError
from .tensor import Tensor
from .untrusted import quoted

# Prefixes of DataParallel, torch.compile and enclosing modules, in any order and number.
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
# Buffers that some checkpoints have and the model computes itself.
_BUFFERS = (".token_idx", ".rotary_emb.inv_freq")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_DEEPEST_WRAPPING = 4


def official_name(name: str) -> str:
    """`module._orig_mod.layers.0.mlp.up_proj.weight` → `model.layers.0.mlp.up_proj.weight`."""
    bare = _PREFIXES.sub("", name)
    return bare if bare.startswith("lm_head.") else f"model.{bare}"


def official_names(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors under their official names, without buffers.

    Raises:
        CheckpointError: two tensors have the same official name.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        official = official_name(name)
        if official.endswith(_BUFFERS):
            continue
        if official in renamed:
            raise CheckpointError(f"{where}: {quoted(official)} is in it twice, under different prefixes")
        renamed[official] = tensor
    return renamed


def unknown_names(names: Sequence[str]) -> str:
    """The sentence for an error about tensors with names that no parameter of a TTT model has."""
    more = f", nor are {len(names) - 1} other names" if len(names) > 1 else ""
    return f"{quoted(names[0])} is not the name of a TTT model's parameter{more}"


def state_dict(value: object, where: str) -> dict[str, Tensor]:
    """The state dict in the value that torch.save wrote: the value itself, or part of a training checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    tensors = _unwrapped(value, _DEEPEST_WRAPPING)
    if not tensors:
        wrappers = ", ".join(map(repr, _WRAPPERS))
        raise CheckpointError(f"{where}: holds no state dict (tensors by name, alone or under one of {wrappers})")
    return tensors


def _unwrapped(value: object, depth: int) -> dict[str, Tensor]:
    """The tensors of the innermost wrapped dict that has some; empty if none has."""
    if not isinstance(value, dict):
        return {}
    for wrapper in _WRAPPERS if depth else ():
        if tensors := _unwrapped(value.get(wrapper), depth - 1):
            return tensors
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
