"""Models that decode one token, as graphs: ours with its Metal kernels, and others as mlx-lm has them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache

from benchmarks.models import build
from mlx_ttt.backends.metal import layer, rule, side_by_side
from mlx_ttt.network.cache import TTTCache
from mlx_ttt.network.model import Model, prepare

from .fusion import fused
from .graph import Graph, record
from .rules import UnknownOperation


@dataclass(frozen=True)
class Case:
    """A token that is decoded, or a part of a prompt that is read in one call.

    Attributes:
        config: of the model, as its config.json.
        bits: of quantized weights; None: all as `dtype`.
        batch: sequences.
        offset: tokens that each of them has read.
        ahead: how many more the first of them has read.
        tokens: of each sequence, in one call.
    """

    config: dict[str, Any]
    bits: int | None = None
    batch: int = 1
    offset: int = 4
    ahead: int = 0
    tokens: int = 1
    dtype: str = "float16"


@dataclass(frozen=True)
class Token:
    """The graph of a token: parameters, token ids and state to logits and state."""

    graph: Graph
    parameters: list[mx.array]
    state: list[mx.array]  # none of them computed: their shapes and dtypes count


def token(case: Case) -> Token:
    """The graph of a token that a GPU would get.

    Raises:
        UnknownOperation: the model is one of mlx-lm's whose kernels are only made where there is Metal.
    """
    try:
        return _token(case)
    except TypeError as error:  # 'NoneType' object is not callable
        name = case.config["model_type"]
        if name == "ttt":
            raise
        raise UnknownOperation(
            f"mlx-lm's {name} cannot be recorded here, since it has kernels of its own: {error}"
        ) from error


def _token(case: Case) -> Token:
    dtypes: list[mx.Dtype] = []
    while True:  # until the state's dtypes are those that a token leaves
        model = _model(case)
        named = tree_flatten(model.parameters())
        caches = _caches(model, case)
        state = [x.astype(dtype) for x, dtype in zip(_arrays(caches), dtypes or _dtypes(caches), strict=True)]
        arrays = [*(x for _, x in named), mx.zeros((case.batch, case.tokens), mx.int32)]
        with on_a_gpu():
            graph = record(_Decode(model, [name for name, _ in named], caches), [*arrays, *state])
        dtypes = [x.dtype for x in graph.outputs[1:]]
        if dtypes == [x.dtype for x in state]:
            return Token(fused(graph), arrays, state)


class _Decode:
    """One token as a function of parameters, token ids and state."""

    def __init__(self, model: nn.Module, names: list[str], caches: list[Any]):
        self._model, self._names, self._caches = model, names, caches

    def __call__(self, *arrays: mx.array) -> list[mx.array]:
        n = len(self._names)
        self._model.update(tree_unflatten(list(zip(self._names, arrays[:n], strict=True))))
        caches = _with_arrays(self._caches, arrays[n + 1 :])
        return [self._model(arrays[n], cache=caches), *_arrays(caches)]


def _model(case: Case) -> nn.Module:
    model = build(case.config, case.dtype)
    if case.bits or "quantization" in case.config:
        quantize(model, case.config.get("quantization") or {"group_size": 64, "bits": case.bits})
    if isinstance(model, Model):
        with on_a_gpu():
            prepare(model)
    for _, module in model.named_modules():  # what they compute for themselves, as frequencies, is no part of a token
        mx.eval([x for name, x in module.items() if name.startswith("_") and isinstance(x, mx.array)])
    return model


@contextlib.contextmanager
def on_a_gpu() -> Iterator[None]:
    """Within the context Python believes that it is on a GPU where every kernel runs.

    Traced parameters pass for those that were laid side by side.
    """
    with (
        mock.patch.object(mx, "default_device", lambda: mx.Device(mx.gpu)),
        mock.patch.object(mx.metal, "is_available", lambda: True),
        mock.patch.object(rule, "_tiles", lambda variant: 1),
        mock.patch.object(layer, "_runs", lambda *call: True),
        mock.patch.object(side_by_side._Places, "same", lambda places: True),
        mock.patch.object(side_by_side.SideBySide, "renew", lambda model: None),
    ):
        yield


def quantize(model: nn.Module, scheme: dict[str, Any]) -> None:
    """Quantize a model as a config's "quantization" says, which may name single modules."""
    wanted = getattr(model, "quant_predicate", lambda path, module: hasattr(module, "to_quantized"))

    def predicate(path: str, module: nn.Module) -> Any:
        if not hasattr(module, "to_quantized") or module.weight.shape[-1] % scheme["group_size"]:
            return False
        return scheme[path] if path in scheme else wanted(path, module)

    nn.quantize(
        model, scheme["group_size"], scheme["bits"], mode=scheme.get("mode", "affine"), class_predicate=predicate
    )


def _caches(model: nn.Module, case: Case) -> list[Any]:
    """After `offset` tokens of each sequence, of which those of other models are read, but not evaluated."""
    caches = make_prompt_cache(model)  # of our model, its own
    if isinstance(caches[0], TTTCache):
        for c in caches:
            c.expand(case.batch)
            c.offset = [case.offset + case.ahead] + [case.offset] * (case.batch - 1)
    else:
        model(mx.zeros((case.batch, case.offset or case.tokens), mx.int32), cache=caches)
    return caches


def _named(cache: Any) -> dict[str, mx.array]:
    """The arrays of a cache in the order of their names."""
    return {name: x for name, x in sorted(tree_flatten(_parts(cache)), key=_name) if isinstance(x, mx.array)}


def _name(pair: tuple[str, Any]) -> str:
    return pair[0]


def _arrays(caches: Sequence[Any]) -> list[mx.array]:
    return [x for c in caches for x in _named(c).values()]


def _dtypes(caches: Sequence[Any]) -> list[mx.Dtype]:
    return [x.dtype for x in _arrays(caches)]


def _with_arrays(caches: Sequence[Any], arrays: Sequence[mx.array]) -> list[Any]:
    """The same caches with other arrays."""
    found, rest = [], iter(arrays)
    for c in caches:
        new = dict(zip(_named(c), rest, strict=False))
        clone = copy.copy(c)
        _put(clone, tree_unflatten([(name, new.get(name, x)) for name, x in tree_flatten(_parts(c))]))
        found.append(clone)
    return found


def _parts(cache: Any) -> Any:
    """What holds arrays in a cache: ours by name, an mlx-lm cache's attributes."""
    if isinstance(cache, TTTCache):
        return cache.arrays
    return {name: x for name, x in vars(cache).items() if isinstance(x, mx.array | list)}


def _put(cache: Any, parts: Any) -> None:
    if isinstance(cache, TTTCache):
        cache.arrays = {"history": {}, **parts, "weights": tuple(parts["weights"])}
    else:
        vars(cache).update(parts)


def kinds(case: Case) -> dict[str, Case]:
    """The kinds of tokens of a model. Only ours has several."""
    if case.tokens > 1:
        return {f"prompt of {case.tokens}": replace(case, offset=0)}
    if case.config["model_type"] != "ttt":
        return {"any token": case}
    K = case.config.get("mini_batch_size", 16)
    case = first_token(case)
    found = {"open mini-batch": case, "completes one": replace(case, offset=K - 1)}
    if case.batch > 1:
        found["one sequence completes one"] = replace(case, ahead=K - 1 - case.offset)
    return found


def first_token(case: Case) -> Case:
    """A token that leaves all mini-batches open, of the same sequences; of a prompt, the part before."""
    if case.tokens > 1:
        return case
    return replace(case, offset=min(4, case.config.get("mini_batch_size", 16) - 2), ahead=0)
