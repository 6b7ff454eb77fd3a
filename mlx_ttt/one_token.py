"""One token through the network on a Linux CPU, in C: the blocks of layers.py without a graph.

A decoded token takes MLX some 250 operations a layer, of 10 us each whatever they do: more time than reading all
weights takes. What is read here: float32 models of the layers in layers.py, as they are, of sizes that are multiples of
8; up to 15 sequences without padding. All else goes through MLX operations: quantized and adapted models, patched
classes, rewindable caches.
"""

from __future__ import annotations

import copy
import ctypes
import operator
import weakref
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import native
from .cache import TTTCache
from .layers import TTT, Block, CausalConv1d, Conv, RoPE, SwiGLU
from .native import LANES, LARGEST_MINI_BATCH, values
from .norms import LayerNorm, RMSNorm
from .update import state_shapes, ttt_linear, ttt_mlp

MOST = 15  # sequences: FEW of blas.c

_KINDS = (Block, TTT, SwiGLU, Conv, CausalConv1d, RMSNorm, LayerNorm, nn.RMSNorm, nn.Linear, nn.Embedding)
_CALLS = [kind.__call__ for kind in _KINDS]  # which may be patched later, by one who wants to see activations, say


class _Unsupported(Exception):
    """The model has a layer, a size or a dtype that this is not made for."""


class TokenReader:
    """Reads one token of each sequence, with pointers into a model's parameters, made again where it has changed."""

    def __init__(self):
        self._forget()

    def _forget(self) -> None:
        self._parts = _Parts()
        self._embedding = self._norm = self._norm_eps = None
        self._blocks: ctypes.Array[_Block] | None = None
        self._texts: list[weakref.ref[_Text]] = []

    def __reduce__(self):
        return TokenReader, ()  # a copy of the model has parameters of its own

    def read(self, model, ids: mx.array, cache: Sequence[TTTCache] | None) -> mx.array | None:
        """What a TTTModel does with token ids [B, T] after those that the caches have read: hidden states [B, T, C].

        None if it must do it itself.
        """
        if not native.available():
            return None
        same = self._parts.same()
        if not same:
            self._forget()  # whatever is read: what was replaced need not stay in memory
        B, T = ids.shape
        if T != 1 or not cache or B > MOST or len(cache) != len(model.layers):
            return None
        if (same and self._blocks is None) or [kind.__call__ for kind in _KINDS] != _CALLS:
            return None
        if any(type(c) is not TTTCache or c.lengths(1) != [1] * B for c in cache):
            return None
        if (texts := self._going_on(cache)) is None and native.traced([(c.weights, c.rows, c.history) for c in cache]):
            return None
        if not native.have_values(ids):
            return None
        try:
            if not same:
                self._look(model)
            if texts is None:
                texts = [_Text(c, block) for c, block in zip(cache, self._blocks, strict=True)]
                self._texts = list(map(weakref.ref, texts))  # they belong to the caches
        except (_Unsupported, LookupError):
            return None
        for text in texts:
            text.prepare()
        x = self._embedding[np.array(memoryview(ids))[:, 0]]
        states = (_State * len(texts))(*(text.pointers for text in texts))
        native.call("mlx_ttt_token", self._blocks, states, len(states), self._norm, self._norm_eps, x, B)
        for c in cache:
            c.advance()
        return mx.array(x[:, None])

    def _going_on(self, cache: Sequence[TTTCache]) -> list[_Text] | None:
        """The states of these caches if they are as the last token left them."""
        texts = [text() for text in self._texts]
        same = len(texts) == len(cache) and all(t and c.defers(t.state) for t, c in zip(texts, cache, strict=True))
        return texts if same else None

    def _look(self, model) -> None:
        self._embedding = self._parts.weight(model, "embed_tokens", nn.Embedding)
        self._norm = self._parts.weight(model, "norm", nn.RMSNorm)
        self._norm_eps = float(self._parts.setting(model.norm, "eps"))
        layers = self._parts.child(model, "layers", list)
        blocks = [_block(self._parts, self._parts.child(layers, i, Block)) for i in range(len(layers))]
        if {self._norm.shape, self._embedding.shape[1:]} != {(block.C,) for block in blocks}:
            raise _Unsupported
        self._blocks = (_Block * len(blocks))(*blocks)


class _Parts:
    """What a model is made of, by where it is; all can be changed at any time, by training, say, or for LoRA.

    An array that is changed in place stays the same object, but has other memory.
    """

    def __init__(self):
        self._containers: dict[int, tuple] = {}  # each with its type and length
        self._places: tuple[list, list] = [], []  # containers and keys
        self._parts: list = []
        self._arrays: list[mx.array] = []
        self._addresses: list[int] = []
        self._kept: list = []

    def keep(self, data) -> None:
        """What must live as long as pointers into it."""
        self._kept.append(data)

    def same(self) -> bool:
        """Whether all are as they were, and nothing came to them. Not before there are any."""
        try:
            return (
                bool(self._parts)
                and all(map(operator.is_, map(operator.getitem, *self._places), self._parts))
                and all(type(c) is kind and len(c) == size for c, kind, size in self._containers.values())
                and _addresses(self._arrays) == self._addresses
            )
        except (LookupError, RuntimeError, TypeError):  # one is gone, has no value, is no longer contiguous
            return False

    def child(self, container, key, kind: type | None = None):
        """container[key], which must be of this kind, if one is named."""
        part = container[key]
        self._containers[id(container)] = container, type(container), len(container)
        self._places[0].append(container)
        self._places[1].append(key)
        self._parts.append(part)
        if kind is not None and type(part) is not kind:
            raise _Unsupported
        return part

    def parameter(self, container, key) -> np.ndarray:
        return self.array(self.child(container, key))

    def array(self, array: mx.array) -> np.ndarray:
        """A view of an array."""
        if array.dtype != mx.float32:
            raise _Unsupported
        if native.traced([array]):
            self._parts.clear()  # so that this is looked at again, until it is over
            raise _Unsupported
        try:
            self._addresses += _addresses([array])
        except (TypeError, ValueError):  # not contiguous, or empty
            raise _Unsupported from None
        self._arrays.append(array)
        self.keep(copy.copy(array))  # which shares the memory, so that no other array has this address meanwhile
        return values(array)

    def weight(self, container, key, kind: type = nn.Linear) -> np.ndarray:
        """The weight of a child that has nothing else."""
        module = self.child(container, key, kind)
        weight = self.parameter(module, "weight")
        if "bias" in module:
            raise _Unsupported
        return weight

    def setting(self, module, name: str, kind: type | None = None):
        """An attribute of a module that is no parameter."""
        return self.child(vars(module), name, kind)


def _addresses(arrays: list[mx.array]) -> list[int]:
    """Where the values of arrays are.

    Raises:
        TypeError, ValueError: one is not contiguous, or empty.
        RuntimeError: one is part of a transformation, and has no values.
    """
    return list(map(ctypes.addressof, map(ctypes.c_char.from_buffer, arrays)))


_POINTERS = (
    *("conv_norm", "conv", "conv_bias", "seq_norm", "q", "k", "v", "o", "g"),
    *("conv_q", "conv_q_bias", "conv_k", "conv_k_bias"),
    *("lr_weight", "lr_bias", "t", "gamma", "beta", "cos", "sin", "post_norm", "post_norm_bias"),
    *("ffn_norm", "gate", "up", "down"),
)


class _Block(ctypes.Structure):
    """struct block of token.c."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("C", "H", "D", "K", "intermediate", "kernel", "mlp")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_float) for name in ("rms_norm_eps", "post_norm_eps", "base_lr")),
    ]


class _State(ctypes.Structure):
    """struct state of token.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("phase", "conv", "conv_qk", "W1", "b1", "W2", "b2", "rows")]


def _block(parts: _Parts, block) -> _Block:
    """Where the parameters of a block are."""
    ttt, mlp = parts.child(block, "seq_modeling_block", TTT), parts.child(block, "mlp", SwiGLU)
    views = {name: parts.weight(ttt, f"{name}_proj") for name in "qkvog" if f"{name}_proj" in ttt}
    views |= {name: parts.weight(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
    rms_norms = {name: (block, name) for name in ("seq_norm", "ffn_norm")}
    convolutions = {name: (ttt, name) for name in ("conv_q", "conv_k") if "k" not in views}
    kernel_sizes = {parts.setting(ttt, "kernel_size")}
    if "conv" in block:
        before = parts.child(block, "conv", Conv)
        kernel_sizes.add(parts.setting(before, "kernel_size"))
        rms_norms["conv_norm"] = before, "norm"
        convolutions["conv"] = before, "conv"
    views |= {name: parts.weight(container, key, RMSNorm) for name, (container, key) in rms_norms.items()}
    rms_norm_eps = {parts.setting(container[key], "eps") for container, key in rms_norms.values()}
    for name, (container, key) in convolutions.items():
        conv = parts.child(container, key, CausalConv1d)
        views[name] = np.ascontiguousarray(parts.parameter(conv, "weight")[..., 0].T)  # [kernel, C]
        views[f"{name}_bias"] = parts.parameter(conv, "bias")
    norm = parts.child(ttt, "post_norm", LayerNorm)
    views |= {"post_norm": parts.parameter(norm, "weight"), "post_norm_bias": parts.parameter(norm, "bias")}
    views |= {"gamma": parts.parameter(ttt, "ttt_norm_weight"), "beta": parts.parameter(ttt, "ttt_norm_bias")}
    views |= {f"lr_{name}": parts.parameter(ttt, f"learnable_ttt_lr_{name}") for name in ("weight", "bias")}
    parts.parameter(ttt, "learnable_token_idx")
    rope = parts.setting(ttt, "rope", RoPE)
    views |= {name: parts.array(parts.setting(rope, name)) for name in ("cos", "sin")}
    views["t"] = values(ttt.token_factors())
    parts.keep(views)

    H, D, K = (parts.setting(ttt, name) for name in ("num_heads", "head_dim", "mini_batch_size"))
    F, kernel, eps = len(views["gate"]), kernel_sizes.pop(), rms_norm_eps.pop()
    rule = parts.setting(ttt, "update_rule")
    if kernel_sizes or rms_norm_eps or rule not in (ttt_linear, ttt_mlp):
        raise _Unsupported
    if D % LANES or F % LANES or K > LARGEST_MINI_BATCH or not _fit(views, H, D, K, F, kernel):
        raise _Unsupported
    pointers = {name: view.ctypes.data for name, view in views.items()}
    epsilons = {"rms_norm_eps": eps, "post_norm_eps": parts.setting(norm, "eps")}
    base_lr = parts.setting(ttt, "base_lr")
    return _Block(H * D, H, D, K, F, kernel, rule is ttt_mlp, base_lr=base_lr, **pointers, **epsilons)


def _fit(views: dict[str, np.ndarray], H: int, D: int, K: int, F: int, kernel: int) -> bool:
    """Whether all have the shapes that the code in C takes them to have."""
    C = H * D
    shapes = {
        **dict.fromkeys(("q", "k", "v", "o", "g"), (C, C)),
        **dict.fromkeys(("gate", "up"), (F, C)),
        **dict.fromkeys(("conv", "conv_q", "conv_k"), (kernel, C)),
        **dict.fromkeys(("cos", "sin"), (K, 1, D)),
        **dict.fromkeys(("gamma", "beta"), (H, D)),
        **{"down": (C, F), "lr_weight": (H, 1, C), "lr_bias": (H, 1), "t": (K,)},
    }
    return all(view.shape == shapes.get(name, (C,)) for name, view in views.items())


class _Text:
    """One layer's state while tokens are read, in NumPy arrays: the cache gets it back when somebody asks for it.

    Raises:
        _Unsupported: the cache is that of another block.
    """

    def __init__(self, cache: TTTCache, block: _Block):
        arrays = _by_name(cache.weights, cache.rows, cache.history)
        if {name: array.shape for name, array in arrays.items()} != _shapes(block, len(cache.offset)):
            raise _Unsupported
        self._mini_batch_size = cache.mini_batch_size
        self._kept = cache.weights  # until a mini-batch is complete
        self._weights = [values(array) for array in self._kept]
        self._rows = values(cache.rows).copy()
        self._history = {name: values(array).copy() for name, array in cache.history.items()}
        self._phase = np.array(cache.phase, np.int32)
        cache.defer(self.state)
        self.pointers = self._point()

    def _point(self) -> _State:
        arrays = {"phase": self._phase, **_by_name(self._weights, self._rows, self._history)}
        return _State(**{name: array.ctypes.data for name, array in arrays.items()})

    def prepare(self) -> None:
        """Before a token: weights that it will change must be our own."""
        if self._kept is not None and (self._phase + 1 == self._mini_batch_size).any():
            self._kept, self._weights = None, [array.copy() for array in self._weights]
            self.pointers = self._point()

    def state(self) -> dict:
        """What the cache asks for."""
        weights = tuple(map(mx.array, self._weights)) if self._kept is None else self._kept
        history = {name: mx.array(array) for name, array in self._history.items()}
        return {"weights": weights, "rows": mx.array(self._rows), "history": history}


def _by_name(weights: Sequence, rows, history: dict) -> dict:
    return {**dict(zip(("W1", "b1", "W2", "b2"), weights, strict=False)), "rows": rows, **history}


def _shapes(block: _Block, B: int) -> dict:
    """Those of the state of B sequences in a block, by the same names."""
    convolutions = {"conv": block.conv, "conv_qk": block.conv_q} if block.kernel > 1 else {}
    history = {name: (B, block.kernel - 1, block.C) for name, there in convolutions.items() if there}
    return state_shapes(10 if block.mlp else 2, B, block.H, block.D, block.K) | history
