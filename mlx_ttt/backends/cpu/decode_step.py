"""One token of each sequence through the network in C: the blocks of network/model.py without a graph.

For a decoded token MLX runs some 250 operations a layer, of 10 us each whatever they do. That is more time than it
takes to read all weights. In C it is one call for the whole network.

It is made for the layers of network/model.py as they are, in any precision that weights.py knows, with LoRA or without,
for sizes that are multiples of 8, and up to 15 sequences without padding. All else goes through MLX operations: other
layers, patched classes, rewindable caches.
"""

from __future__ import annotations

import copy
import ctypes
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...network.backend import Kept, Watch
from ...network.cache import TTTCache
from ...network.inner import TTT_LINEAR, TTT_MLP, InnerModel
from ...network.model import (
    TTT,
    Block,
    CausalConv1d,
    Conv,
    LayerNorm,
    RMSNorm,
    RoPE,
    SwiGLU,
    TTTModel,
    computes_when_called,
    hidden_states,
)
from ...network.rule import Signals, state_shapes
from .calls import LANES, LARGEST_MINI_BATCH, available, call, have_values, traced, values
from .weights import LAYERS, Matrix, Unsupported, Weights, addresses

MOST = 15  # sequences, as many rows as C multiplies without copying a matrix

_LAYERS = (Block, TTT, SwiGLU, Conv, CausalConv1d, RMSNorm, LayerNorm, RoPE, nn.RMSNorm, *LAYERS)
_CALLS = [layer.__call__ for layer in _LAYERS]  # somebody may patch them later, to see activations, say


@hidden_states.register
def decode_step(
    model: TTTModel, ids: mx.array, cache: list[TTTCache] | None, scales: mx.array | None = None
) -> mx.array:
    if not available():
        return NotImplemented
    return DecodeStep.of(model)(model, ids, cache, scales)


@computes_when_called.register
def computes_now() -> bool:
    return available() or NotImplemented


class DecodeStep(Kept):
    """Where a model's parameters are, and its states in C. Made again when the model has changed."""

    _watch: Watch | None = None
    _parameters: _Parameters | None = None  # None with a watch: the model is not supported
    _states: Sequence[weakref.ref[_State]] = ()  # they belong to the caches

    def __call__(
        self, model: TTTModel, ids: mx.array, cache: Sequence[TTTCache] | None, scales: mx.array | None
    ) -> mx.array:
        if self._watch is None or not self._watch.same() or (self._parameters and not self._parameters.unmoved()):
            self.forget()  # even if this call is not for C: parameters that were replaced need not stay in memory
        B, T = ids.shape
        if T != 1 or not cache or B > MOST or len(cache) != len(model.layers):
            return NotImplemented
        if (self._watch and not self._parameters) or [layer.__call__ for layer in _LAYERS] != _CALLS:
            return NotImplemented
        if any(type(c) is not TTTCache or c.lengths(1) != [1] * B for c in cache) or not have_values(ids):
            return NotImplemented
        try:
            parameters = self._parameters or self._look(model)
            states = self._kept_states(cache) or self._take_states(parameters, cache)
        except (Unsupported, LookupError):
            return NotImplemented
        return _run(parameters, states, ids, cache, scales)

    def _look(self, model: TTTModel) -> _Parameters:
        if traced(model.parameters()):  # so look again at the next token
            raise Unsupported
        self._watch = Watch(model)
        self._parameters = _Parameters(model)
        return self._parameters

    def _kept_states(self, cache: Sequence[TTTCache]) -> list[_State] | None:
        """The states of these caches in C, if they are as the last token left them."""
        states = [state for reference in self._states if (state := reference()) is not None]
        same = len(states) == len(cache) and all(c.lent_to(s) for s, c in zip(states, cache, strict=True))
        return states if same else None

    def _take_states(self, parameters: _Parameters, cache: Sequence[TTTCache]) -> list[_State]:
        if traced([c.arrays for c in cache]):
            raise Unsupported
        states = [_State(c, block) for c, block in zip(cache, parameters.blocks, strict=True)]
        for c, state in zip(cache, states, strict=True):
            c.lend(state)
        self._states = list(map(weakref.ref, states))
        return states


def _run(
    parameters: _Parameters,
    states: list[_State],
    ids: mx.array,
    cache: Sequence[TTTCache],
    scales: mx.array | None,
) -> mx.array:
    """Hidden states [B, 1, C] of token ids [B, 1]; the states and the caches are one token further."""
    for state in states:
        state.prepare()
    p, B = parameters, len(ids)
    V, C = p.embedding.shape
    rows, x = np.array(memoryview(ids), np.int64)[:, 0], np.empty((B, C), np.float32)  # type: ignore[arg-type]
    if rows.min() < -V or rows.max() >= V:
        raise IndexError(f"a token is {rows.max()}, the vocabulary has {V}")
    rows = np.where(rows < 0, rows + V, rows)
    pointers = (_StateStruct * len(states))(*(state.pointers for state in states))
    embedding = ctypes.addressof(p.embedding.struct)
    network = _NetworkStruct(ctypes.addressof(p.blocks), len(states), embedding, p.norm.ctypes.data, p.norm_eps)
    learning = _Learning((len(states), B, p.blocks[0].H), scales, any(c.seen is not None for c in cache))
    call("mlx_ttt_token", ctypes.byref(network), pointers, ctypes.byref(learning.pointers), rows, x, B)
    for c, signals in zip(cache, learning.signals(), strict=True):
        c.advance(signals=signals)
    return mx.array(x[:, None])


# ---- Where the parameters are ----------------------------------------------------------------------------------------


_POINTERS = (
    *("conv_norm", "conv", "conv_bias", "seq_norm", "q", "k", "v", "o", "g", "lr_weight"),
    *("conv_q", "conv_q_bias", "conv_k", "conv_k_bias"),
    *("lr_bias", "t", "gamma", "beta", "cos", "sin", "post_norm", "post_norm_bias"),
    *("ffn_norm", "gate", "up", "down"),
)


class _BlockStruct(ctypes.Structure):
    """struct block of c/decode_step.c."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("C", "H", "D", "K", "intermediate", "kernel", "mlp")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_float) for name in ("rms_norm_eps", "post_norm_eps", "base_lr")),
    ]


class _NetworkStruct(ctypes.Structure):
    """struct network of c/decode_step.c."""

    _fields_ = [
        ("blocks", ctypes.c_void_p),
        ("layers", ctypes.c_size_t),
        ("embedding", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("norm_eps", ctypes.c_float),
    ]


class _Parameters:
    """Where the parameters of a model are in memory.

    Attributes:
        embedding: of the tokens, [V, C].
        norm, norm_eps: of the last RMSNorm, [C].
        blocks: a struct for each block.

    Raises:
        Unsupported: C is not made for this model.
    """

    def __init__(self, model: TTTModel):
        self._arrays: list[mx.array] = []
        self._kept: list = []  # must live as long as pointers into it
        self.embedding = self._matrix(model["embed_tokens"])
        self.norm = self._weight(model["norm"], nn.RMSNorm)
        self.norm_eps = float(model.norm.eps)
        blocks = [self._block(_of_kind(block, Block)) for block in model.layers]
        self._addresses = addresses(self._arrays)
        if self._addresses is None or {self.norm.shape, self.embedding.shape[1:]} != {(block.C,) for block in blocks}:
            raise Unsupported
        self.blocks = (_BlockStruct * len(blocks))(*blocks)

    def unmoved(self) -> bool:
        """Whether the arrays are where they were. One that was changed in place has other memory."""
        return addresses(self._arrays) == self._addresses

    def _array(self, array: mx.array) -> np.ndarray:
        """A view of an array, or a copy of one in half precision."""
        if array.dtype not in (mx.float32, mx.float16, mx.bfloat16):
            raise Unsupported
        self._arrays.append(array)
        self._kept.append(copy.copy(array))  # it shares the memory, so that no other array gets this address meanwhile
        return values(array)

    def _weight(self, module: nn.Module, kind: type) -> np.ndarray:
        """The weight of a module that has no other parameter."""
        if "bias" in _of_kind(module, kind):
            raise Unsupported
        return self._array(module["weight"])

    def _matrix(self, layer: nn.Module) -> Matrix:
        """The matrix of a linear layer or embedding that has no bias."""
        if "bias" in layer.get("linear", layer):  # that LoRA adapts
            raise Unsupported
        matrix = Matrix(layer)
        self._arrays += matrix.arrays
        self._kept.append(matrix)
        return matrix

    def _block(self, block: Block) -> _BlockStruct:
        ttt, mlp = _of_kind(block["seq_modeling_block"], TTT), _of_kind(block["mlp"], SwiGLU)
        matrices = {name: self._matrix(ttt[f"{name}_proj"]) for name in "qkvog" if f"{name}_proj" in ttt}
        matrices |= {name: self._matrix(mlp[f"{name}_proj"]) for name in ("gate", "up", "down")}
        rms_norms = {name: block[name] for name in ("seq_norm", "ffn_norm")}
        convolutions = {name: ttt[name] for name in ("conv_q", "conv_k") if "k" not in matrices}
        kernel_sizes = {ttt.kernel_size}
        if "conv" in block:
            before = _of_kind(block["conv"], Conv)
            kernel_sizes.add(before.kernel_size)
            rms_norms["conv_norm"], convolutions["conv"] = before["norm"], before["conv"]
        views = {name: self._weight(norm, RMSNorm) for name, norm in rms_norms.items()}
        for name, conv in convolutions.items():
            taps = self._array(_of_kind(conv, CausalConv1d)["weight"])
            views[name] = np.ascontiguousarray(taps[..., 0].T)  # [kernel, C]
            views[f"{name}_bias"] = self._array(conv["bias"])
        post_norm, rope = _of_kind(ttt["post_norm"], LayerNorm), _of_kind(ttt["rope"], RoPE)
        arrays = {
            "post_norm": post_norm["weight"],
            "post_norm_bias": post_norm["bias"],
            "gamma": ttt["ttt_norm_weight"],
            "beta": ttt["ttt_norm_bias"],
            "cos": rope["_cos"],
            "sin": rope["_sin"],
            "lr_weight": ttt["learnable_ttt_lr_weight"],
            "lr_bias": ttt["learnable_ttt_lr_bias"],
        }
        views |= {name: self._array(array) for name, array in arrays.items()}
        self._array(ttt["learnable_token_idx"])  # of which t is made
        views["t"] = values(ttt.token_factors())
        learning_rate = Weights(n=len(views["lr_weight"]), at=views["lr_weight"].ctypes.data)
        self._kept += [views, learning_rate]

        kernel, *more_kernels = kernel_sizes
        eps, *more_eps = {norm.eps for norm in rms_norms.values()}
        H, D, K, F = ttt.num_heads, ttt.head_dim, ttt.mini_batch_size, matrices["gate"].shape[0]
        sizes = {"C": H * D, "H": H, "D": D, "K": K, "intermediate": F, "kernel": kernel}
        known = ttt.inner_model in (TTT_LINEAR, TTT_MLP) and K <= LARGEST_MINI_BATCH and D % LANES == F % LANES == 0
        if not known or more_kernels or more_eps or not _fit({**matrices, **views}, sizes):
            raise Unsupported
        pointers = {name: view.ctypes.data for name, view in views.items()}
        structs = {name: matrix.struct for name, matrix in matrices.items()} | {"lr_weight": learning_rate}
        pointers |= {name: ctypes.addressof(struct) for name, struct in structs.items()}
        settings = {"rms_norm_eps": eps, "post_norm_eps": post_norm.eps, "base_lr": ttt.base_lr}
        return _BlockStruct(**sizes, mlp=ttt.inner_model is TTT_MLP, **pointers, **settings)


def _of_kind(module: Any, kind: type) -> Any:
    if type(module) is not kind:
        raise Unsupported
    return module


def _fit(arrays: Mapping[str, np.ndarray | Matrix], sizes: dict[str, int]) -> bool:
    """Whether all parameters have the shapes that the C code takes them to have."""
    C, H, D, K, F, kernel = sizes.values()
    shapes = {
        **dict.fromkeys(("q", "k", "v", "o", "g"), (C, C)),
        **dict.fromkeys(("gate", "up"), (F, C)),
        **dict.fromkeys(("conv", "conv_q", "conv_k"), (kernel, C)),
        **dict.fromkeys(("cos", "sin"), (K, 1, D)),
        **dict.fromkeys(("gamma", "beta"), (H, D)),
        **{"down": (C, F), "lr_weight": (H, 1, C), "lr_bias": (H, 1), "t": (K,)},
    }
    return all(array.shape == shapes.get(name, (C,)) for name, array in arrays.items())


# ---- The learning ----------------------------------------------------------------------------------------------------


class _LearningStruct(ctypes.Structure):
    """struct learning of c/decode_step.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("scale", "loss", "lr", "write_norm")]


class _Learning:
    """How a token of each sequence is learned from in all layers: shape [layers, B, H].

    Args:
        scales: see `hidden_states`.
        is_watched: whether the signals are wanted.
    """

    def __init__(self, shape: tuple[int, int, int], scales: mx.array | None, is_watched: bool):
        self._layers = shape[0]
        self._scale = None if scales is None else np.ascontiguousarray(np.broadcast_to(values(scales)[:, :, 0], shape))
        self._signals = np.empty((3, *shape), np.float32) if is_watched else None
        given = [None if self._scale is None else self._scale.ctypes.data]
        shown = [None] * 3 if self._signals is None else [x.ctypes.data for x in self._signals]
        self.pointers = _LearningStruct(*given, *shown)

    def signals(self) -> list[Signals] | list[None]:
        """Of each layer."""
        if self._signals is None:
            return [None] * self._layers
        of_layers = self._signals[:, :, :, None].swapaxes(0, 1)  # [layers, 3, B, 1, H]
        return [Signals(*map(mx.array, layer)) for layer in of_layers]


# ---- The state -------------------------------------------------------------------------------------------------------


class _StateStruct(ctypes.Structure):
    """struct state of c/decode_step.c."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("phase", "conv", "conv_qk", "W1", "b1", "W2", "b2", "rows")]


class _State:
    """One layer's state in NumPy arrays that C writes to, while its cache lends it.

    Raises:
        Unsupported: the cache is that of another block.
    """

    def __init__(self, cache: TTTCache, block: _BlockStruct):
        self._mini_batch_size = block.K
        self._lent: tuple[mx.array, ...] | None = cache.weights  # not ours to write to, until a mini-batch is complete
        self._weights = dict(zip(_inner_model(block).weight_names, map(values, cache.weights), strict=False))
        self._rows = values(cache.rows).copy()
        self._history = {name: values(array).copy() for name, array in cache.history.items()}
        self._phase = np.array(cache.phase, np.int32)
        if {name: array.shape for name, array in self._by_name().items()} != _shapes(block, len(cache.offset)):
            raise Unsupported
        self.pointers = self._point()

    def _by_name(self) -> dict[str, np.ndarray]:
        return {"phase": self._phase, **self._weights, "rows": self._rows, **self._history}

    def _point(self) -> _StateStruct:
        return _StateStruct(**{name: array.ctypes.data for name, array in self._by_name().items()})

    def prepare(self) -> None:
        """Before a token: copy the weights if it will change them, and they are not our own yet."""
        if self._lent is not None and (self._phase + 1 == self._mini_batch_size).any():
            self._lent, self._weights = None, {name: array.copy() for name, array in self._weights.items()}
            self.pointers = self._point()

    def arrays(self) -> dict[str, Any]:
        """For the cache, when somebody asks for its arrays."""
        weights = tuple(map(mx.array, self._weights.values())) if self._lent is None else self._lent
        history = {name: mx.array(array) for name, array in self._history.items()}
        return {"weights": weights, "rows": mx.array(self._rows), "history": history}


def _shapes(block: _BlockStruct, B: int) -> dict[str, tuple[int, ...]]:
    """Those of the state of B sequences in a block, by the same names."""
    convolutions = {"conv": block.conv, "conv_qk": block.conv_q} if block.kernel > 1 else {}
    history = {name: (B, block.kernel - 1, block.C) for name, there in convolutions.items() if there}
    return {"phase": (B,)} | state_shapes(_inner_model(block), B, block.H, block.D, block.K) | history


def _inner_model(block: _BlockStruct) -> InnerModel:
    return TTT_MLP if block.mlp else TTT_LINEAR
