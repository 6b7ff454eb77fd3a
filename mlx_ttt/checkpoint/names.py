"""From the names that people's tools give to tensors to the official parameter names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..errors import CheckpointError
from .tensor import Tensor
from .untrusted import quoted

# What DataParallel, torch.compile and enclosing modules put in front, in any order and number.
_PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+")
# Buffers that the model computes for itself.
_BUFFERS = (".token_idx", ".rotary_emb.inv_freq")
_WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
_DEEPEST_WRAPPING = 4


def official_name(name: str) -> str:
    """`module._orig_mod.layers.0.mlp.up_proj.weight` → `model.layers.0.mlp.up_proj.weight`."""
    bare = _PREFIXES.sub("", name)
    return bare if bare.startswith("lm_head.") else f"model.{bare}"


def official_names(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors under their official names, without the buffers that someone saved.

    Raises:
        CheckpointError: two tensors would get the same name.
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


def state_dict(value: object, where: str) -> dict[str, Tensor]:
    """The tensors by name out of what torch.save wrote: a state dict, perhaps inside a training checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    tensors = _unwrapped(value, _DEEPEST_WRAPPING)
    if not tensors:
        wrappers = ", ".join(map(repr, _WRAPPERS))
        raise CheckpointError(f"{where}: holds no state dict (tensors by name, alone or under one of {wrappers})")
    return tensors


def _unwrapped(value: object, depth: int) -> dict[str, Tensor]:
    """The tensors of the innermost wrapped dict that has any; empty if there are none."""
    if not isinstance(value, dict):
        return {}
    for wrapper in _WRAPPERS if depth else ():
        if tensors := _unwrapped(value.get(wrapper), depth - 1):
            return tensors
    return {name: tensor for name, tensor in value.items() if isinstance(tensor, Tensor)}
