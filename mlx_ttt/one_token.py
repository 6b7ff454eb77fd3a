"""One token through the network on a Linux CPU, in C: the blocks of layers.py without a graph.

A decoded token takes MLX some 250 operations a layer, of 10 us each whatever they do: more time than reading all
weights takes. Float32 models with their own layers are read here; quantized and adapted ones, and texts with padding,
go through MLX operations.
"""

from __future__ import annotations

import ctypes
import itertools
import operator
import weakref
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import native
from .cache import TTTCache
from .native import LANES, values
from .norms import LayerNorm, RMSNorm

MOST = 15  # sequences: FEW of blas.c


class _Unsupported(Exception):
    """The model has a layer, a size or a dtype that this is not made for."""


class TokenReader:
    """Reads one token of each sequence, with views of a model's parameters, made again where those have changed."""

    def __init__(self):
        self._parts = _Parts()
        self._blocks: ctypes.Array[_Block] | None = None
        self._texts: list[weakref.ref[_Text]] = []

    def __reduce__(self):
        return TokenReader, ()  # a copy of the model has parameters of its own

    def read(self, model, ids: mx.array, cache: Sequence[TTTCache]) -> mx.array | None:
        """What a TTTModel does with token ids [B, 1] after those that the caches have read: hidden states [B, 1, C].

        None if it must do it itself.
        """
        B = ids.shape[0]
        if B > MOST or not native.available() or len(cache) != len(model.layers):
            return None
        if any(type(c) is not TTTCache or c.lengths(1) != [1] * B for c in cache):
            return None
        if (texts := self._going_on(cache)) is None and native.traced([(c.weights, c.rows, c.history) for c in cache]):
            return None
        if not native.have_values(ids):
            return None
        if not self._parts.same() or (self._blocks is not None and len(self._blocks) != len(cache)):
            self._look(model)
        if self._blocks is None:
            return None
        if texts is None:
            texts = [_Text(c) for c in cache]
            self._texts = list(map(weakref.ref, texts))  # they belong to the caches
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
        self._parts, self._blocks = _Parts(), None
        try:
            self._embedding = self._parts.weight(model, "embed_tokens", nn.Embedding)
            self._norm = self._parts.weight(model, "norm", nn.RMSNorm)
            self._norm_eps = self._parts.setting(model.norm, "eps")
            blocks = self._parts.child(model, "layers", list)
            blocks = [_block(self._parts, self._parts.child(blocks, i)) for i in range(len(blocks))]
            self._blocks = (_Block * len(blocks))(*blocks)
        except _Unsupported:
            pass


class _Parts:
    """What a model is made of, by where it is; all can be replaced at any time, by training, say, or for LoRA."""

    def __init__(self):
        self._seen: tuple[list, list, list] = [], [], []  # containers, keys, parts
        self._without_bias: list[nn.Module] = []
        self._views: list[dict[str, np.ndarray]] = []

    def keep(self, views: dict[str, np.ndarray]) -> None:
        """Views that must live as long as pointers into them."""
        self._views.append(views)

    def same(self) -> bool:
        """Whether all are still there. Not before there are any."""
        containers, keys, parts = self._seen
        try:
            same = all(map(operator.is_, map(operator.getitem, containers, keys), parts))
        except LookupError:
            return False
        return same and bool(parts) and not any(map(operator.contains, self._without_bias, itertools.repeat("bias")))

    def child(self, container, key, kind: type | None = None):
        """container[key], which must be of this kind, if one is named."""
        part = container[key]
        for seen, value in zip(self._seen, (container, key, part), strict=True):
            seen.append(value)
        if kind is not None and type(part) is not kind:
            raise _Unsupported
        return part

    def parameter(self, container, key) -> np.ndarray:
        array = self.child(container, key)
        if array.dtype != mx.float32:
            raise _Unsupported
        if native.traced([array]):
            self._seen = [], [], []  # until it is over
            raise _Unsupported
        return values(array)

    def weight(self, container, key, kind: type = nn.Linear) -> np.ndarray:
        """The weight of a child that has nothing else."""
        module = self.child(container, key, kind)
        self._without_bias.append(module)
        if "bias" in module:
            raise _Unsupported
        return self.parameter(module, "weight")

    def setting(self, module: nn.Module, name: str):
        """An attribute of a module that is no parameter."""
        return self.child(vars(module), name)


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
    ttt, mlp = parts.child(block, "seq_modeling_block"), parts.child(block, "mlp")
    views = {name: parts.weight(ttt, f"{name}_proj") for name in "qkvog" if f"{name}_proj" in ttt}
    views |= {name: parts.weight(mlp, f"{name}_proj") for name in ("gate", "up", "down")}
    rms_norms = {name: (block, name) for name in ("seq_norm", "ffn_norm")}
    convolutions = {name: (ttt, name) for name in ("conv_q", "conv_k") if name in ttt}
    if "conv" in block:
        before = parts.child(block, "conv")
        rms_norms["conv_norm"] = before, "norm"
        convolutions["conv"] = before, "conv"
    views |= {name: parts.weight(container, key, RMSNorm) for name, (container, key) in rms_norms.items()}
    rms_norm_eps, *others = {parts.setting(container[key], "eps") for container, key in rms_norms.values()}
    for name, (container, key) in convolutions.items():
        conv = parts.child(container, key)
        views[name] = np.ascontiguousarray(parts.parameter(conv, "weight")[..., 0].T)  # [kernel, C]
        views[f"{name}_bias"] = parts.parameter(conv, "bias")
    norm = parts.child(ttt, "post_norm", LayerNorm)
    views |= {"post_norm": parts.parameter(norm, "weight"), "post_norm_bias": parts.parameter(norm, "bias")}
    views |= {"gamma": parts.parameter(ttt, "ttt_norm_weight"), "beta": parts.parameter(ttt, "ttt_norm_bias")}
    views |= {f"lr_{name}": parts.parameter(ttt, f"learnable_ttt_lr_{name}") for name in ("weight", "bias")}
    parts.parameter(ttt, "learnable_token_idx")
    rope = parts.setting(ttt, "rope")
    views |= {"t": values(ttt.token_factors()), "cos": values(rope.cos), "sin": values(rope.sin)}

    (F, C), H, D, K = views["gate"].shape, ttt.num_heads, ttt.head_dim, ttt.mini_batch_size
    if D % LANES or F % LANES or others:
        raise _Unsupported
    pointers = {name: view.ctypes.data for name, view in views.items()}
    parts.keep(views)
    epsilons = {"rms_norm_eps": rms_norm_eps, "post_norm_eps": parts.setting(norm, "eps")}
    base_lr = parts.setting(ttt, "base_lr")
    return _Block(C, H, D, K, F, ttt.kernel_size, "W2" in ttt, base_lr=base_lr, **pointers, **epsilons)


class _Text:
    """One layer's state while tokens are read, in NumPy arrays: the cache gets it back when somebody asks for it."""

    def __init__(self, cache: TTTCache):
        self._mini_batch_size = cache.mini_batch_size
        self._kept = cache.weights  # until a mini-batch is complete
        self._weights = [values(array) for array in self._kept]
        self._rows = values(cache.rows).copy()
        self._history = {name: values(array).copy() for name, array in cache.history.items()}
        self._phase = np.array(cache.phase, np.int32)
        cache.defer(self.state)
        self.pointers = self._point()

    def _point(self) -> _State:
        arrays = {"phase": self._phase, "rows": self._rows, **self._history}
        arrays |= zip(("W1", "b1", "W2", "b2"), self._weights, strict=False)
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
