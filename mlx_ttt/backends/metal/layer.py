"""What surrounds the update rule in a block: each a kernel of metal/ttt_token.metal.

They are made for one token of each sequence. `add_norm` and `gated_norm` take any rows, so those of a prompt, too, and
`turned` is for prompts only.

Each has a twin in MLX operations. It computes what a device refuses to, and its gradient is that of the kernel.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx

from ...network.model import TTT, Conv, LayerNorm, RMSNorm
from ...network.operations import causal_conv1d, geglu, layer_norm, rms_norm, rotate, sigmoid
from ...network.rule import Tokens
from ..differentiable import differentiable
from . import rule

LARGEST_CHANNELS = 8192  # C: a thread holds 8 of them
LARGEST_CONVOLUTION = 8  # inputs that it reads, with the token's


class Part(NamedTuple):
    """Some channels of an array [B, 1, .]: the products of matrices that lie side by side are one array."""

    array: mx.array
    start: int
    stop: int

    def alone(self) -> mx.array:
        """[B, 1, stop - start]"""
        part = self.array[..., self.place]
        # One sequence's lies whole. Unless its strides say so, MLX copies what is made of it for a quantized product.
        return part.flatten().reshape(part.shape) if len(part) == 1 else part

    @property
    def place(self) -> slice:
        return slice(self.start, self.stop)


def conv_norm(x: mx.array, history: mx.array, conv: Conv, norm: RMSNorm) -> list[mx.array]:
    """x + conv(RMSNorm(x)), `norm` of that, and the inputs before the next token. x [B, 1, C], history [B, N, C]."""
    (B, _, C), N = x.shape, history.shape[1]
    arrays = [x, history.astype(x.dtype), conv.norm.weight, conv.conv.weight, conv.conv.bias, norm.weight]

    def in_mlx(
        x: mx.array, history: mx.array, weight: mx.array, taps: mx.array, bias: mx.array, next_weight: mx.array
    ) -> list[mx.array]:
        inputs = mx.concatenate([history, rms_norm.in_mlx(x, weight, conv.norm.eps)], axis=1)
        x = x + causal_conv1d.in_mlx(inputs, taps, bias)
        return [x, rms_norm.in_mlx(x, next_weight, norm.eps), inputs[:, 1:]]

    call = _Call("conv_norm", (("C", C), ("N", N)), (B, 1), _threads(C), (conv.norm.eps, norm.eps))
    return _run(call, arrays, in_mlx, [arrays[0], arrays[0], arrays[1]])


def add_norm(x: mx.array, added: mx.array, norm: RMSNorm) -> list[mx.array]:
    """x + added, and `norm` of that. [B, 1, C] each."""
    B, _, C = x.shape

    def in_mlx(x: mx.array, added: mx.array, weight: mx.array) -> list[mx.array]:
        x = x + added
        return [x, rms_norm.in_mlx(x, weight, norm.eps)]

    call = _Call("add_norm", (("C", C),), (B, 1), _threads(C), (norm.eps,))
    return _run(call, [x, added, norm.weight], in_mlx, [x, x])


def gated_norm(x: mx.array, gate: Part, norm: LayerNorm) -> mx.array:
    """`norm` of x, times gelu(gate). x [B, 1, C]."""
    (B, _, C), place = x.shape, gate.place

    def in_mlx(x: mx.array, gates: mx.array, weight: mx.array, bias: mx.array) -> list[mx.array]:
        return [geglu.in_mlx(gates[..., place], layer_norm.in_mlx(x, weight, bias, norm.eps))]

    call = _Call("gated_norm", (("C", C), ("GATE_AT", gate.start)), (B, 1), _threads(C), (norm.eps,))
    return _run(call, [x, gate.array, norm.weight, norm.bias], in_mlx, [x])[0]


def views(
    layer: TTT, x: mx.array, products: Sequence[Part], history: mx.array | None, phase: mx.array
) -> tuple[Tokens, mx.array, mx.array | None]:
    """What the update rule reads of a token.

    Args:
        x: what the layer reads, [B, 1, C].
        products: of x and the matrices for q, k and v; for q and k the same one, if they share it.
        history: the inputs of the convolutions before the token, [B, N, C]; None if there are none.
        phase: of each sequence, int32, [B] with zeros behind up to 8 of them.

    Returns:
        The tokens; the token factors, as `Learner.t`; and the inputs of the convolutions before the next token.
    """
    B, H, D, K = len(x), layer.num_heads, layer.head_dim, layer.mini_batch_size
    N = 0 if history is None else history.shape[1]
    arrays, places = [x, *(part.array for part in products)], [part.place for part in products]
    if history is not None:
        convolutions = (layer.conv_q, layer.conv_k)
        arrays += [history.astype(x.dtype), *(p for conv in convolutions for p in (conv.weight, conv.bias))]
    arrays += [layer.learnable_ttt_lr_weight, layer.learnable_ttt_lr_bias, layer.rope._cos, layer.rope._sin]
    arrays += [layer.learnable_token_idx]

    def in_mlx(x: mx.array, *arrays: mx.array) -> list[mx.array]:
        q, k, v = (array[..., place] for array, place in zip(arrays, places, strict=False))
        *of_convolutions, lr_weight, lr_bias, cos, sin, token_idx = arrays[3:]
        inputs = []
        if of_convolutions:
            before, conv_q, bias_q, conv_k, bias_k = of_convolutions
            inputs = [mx.concatenate([before, q], axis=1)]
            q, k = (causal_conv1d.in_mlx(inputs[0], *conv) for conv in ((conv_q, bias_q), (conv_k, bias_k)))
        q, k, v = (z.reshape(B, 1, H, D) for z in (q, k, v))
        q, k = (rotate.in_mlx(z, cos[phase[:B, None]], sin[phase[:B, None]]) for z in (q, k))
        gate = x.astype(mx.float32) @ lr_weight[:, 0].T + lr_bias[:, 0]
        t = mx.maximum(1 / mx.arange(1, K + 1, dtype=mx.float32) + token_idx, 0)
        return [q, k, v, layer.base_lr * sigmoid.in_mlx(gate), t, *(z[:, 1:] for z in inputs)]

    starts = zip(("Q_AT", "K_AT", "V_AT"), (part.start for part in products), strict=True)
    sizes = (("D", D), ("K", K), ("N", N), *starts, ("FEW_HEADS", H < rule.SMALL))
    name = "views" if history is None else "views_conv"
    call = _Call(name, sizes, (H, B), _VIEWS_THREADS, (layer.base_lr,), (phase,))
    view, of_heads = _Like((B, 1, H, D), x.dtype), _Like((B, 1, H), mx.float32)
    histories = [] if history is None else [_Like(history.shape, x.dtype)]
    found = _run(call, arrays, in_mlx, [view, view, view, of_heads, _Like((K,), mx.float32), *histories])
    q, k, v, lr, t, *after = found
    return Tokens(q, k, v, lr), t, after[0] if after else None


def turned(layer: TTT, q: mx.array, k: mx.array | None, phase: Sequence[int]) -> tuple[mx.array, mx.array]:
    """Queries and keys of many tokens, rotated by each token's phase. Returns q and k [B, T, H, D].

    Args:
        q, k: the products [B, T, C]; without k, those that both share, behind the inputs of the convolutions before
            them, [B, N + T, C].
        phase: of each sequence's first token.
    """
    B, H, D, K = len(q), layer.num_heads, layer.head_dim, layer.mini_batch_size
    N = layer.kernel_size - 1 if k is None else 0
    T = q.shape[1] - N
    convolutions = (layer.conv_q, layer.conv_k) if k is None else ()
    arrays = [q, *([] if k is None else [k]), *(p for conv in convolutions for p in (conv.weight, conv.bias))]
    arrays += [layer.rope._cos, layer.rope._sin]
    phases = mx.array([*phase, *[0] * (rule.SMALL - B)], mx.int32)

    def in_mlx(q: mx.array, *arrays: mx.array) -> list[mx.array]:
        *between, cos, sin = arrays
        if k is None:
            conv_q, bias_q, conv_k, bias_k = between
            q, keys = causal_conv1d.in_mlx(q, conv_q, bias_q), causal_conv1d.in_mlx(q, conv_k, bias_k)
        else:
            (keys,) = between
        slots = (phases[:B, None] + mx.arange(T)) % K
        return [rotate.in_mlx(z.reshape(B, T, H, D), cos[slots], sin[slots]) for z in (q, keys)]

    name = "turned" if k is not None else "turned_conv"
    call = _Call(name, (("D", D), ("K", K), ("N", N)), (T, B), _VIEWS_THREADS, (), (phases,))
    queries, keys = _run(call, arrays, in_mlx, [_Like((B, T, H, D), q.dtype)] * 2)
    return queries, keys


# ---- Launching -------------------------------------------------------------------------------------------------------

_VIEWS_THREADS = 128  # also those of `turned`


def _threads(C: int) -> int:
    """Threads of `Channels<C>`."""
    return 32 * min(-(-C // 128), 32)


class _Kernel(NamedTuple):
    """A kernel around a function of metal/ttt_token.metal.

    Attributes:
        memory: the struct that says how much threadgroup memory it takes; empty if it takes none.
        function: with its template arguments.
        inputs: arrays; behind them come the integers of a call, and its constants.
        arguments: of the function, up to the threadgroup memory.
    """

    memory: str
    function: str
    inputs: str
    outputs: str
    arguments: str


_CONVOLUTIONS = "history, conv_q, conv_q_bias, conv_k, conv_k_bias"
_OF_HEADS = "lr_weight, lr_bias, cos, sin, token_idx"


def _views(convolutions: str, inputs: str, history_out: str, outputs: str) -> _Kernel:
    return _Kernel(
        "Views",
        "views<D, K, N>",
        f"x q_in k_in v_in {inputs} lr_weight lr_bias cos sin token_idx phase constants",
        f"q k v lr t {outputs}",
        f"x, q_in + Q_AT, k_in + K_AT, v_in + V_AT, {convolutions}, {_OF_HEADS}, phase, constants, q, k, v, lr, t, "
        f"{history_out}, lr_weight_shape[0], q_in_shape[2], k_in_shape[2], v_in_shape[2]",
    )


def _turned(inputs: str, arguments: str) -> _Kernel:
    return _Kernel(
        "",
        "turned<D, K, N>",
        f"{inputs} cos sin phase",
        "q k",
        f"{arguments}, cos, sin, phase, q, k, q_in_shape[2], q_in_shape[1]",
    )


_KERNELS = {
    "conv_norm": _Kernel(
        "ConvNorm<C, N>",
        "conv_norm<C, N>",
        "x history norm taps bias next_norm constants",
        "sum y history_out",
        "x, history, norm, taps, bias, next_norm, constants, sum, y, history_out",
    ),
    "add_norm": _Kernel(
        "AddNorm<C>", "add_norm<C>", "x added norm constants", "sum y", "x, added, norm, constants, sum, y"
    ),
    "gated_norm": _Kernel(
        "GatedNorm<C>",
        "gated_norm<C>",
        "x gate weight bias constants",
        "y",
        "x, gate + GATE_AT, weight, bias, constants, y, gate_shape[2]",
    ),
    "views": _views(
        ", ".join(["static_cast<const device T*>(nullptr)"] * 5), "", "static_cast<device T*>(nullptr)", ""
    ),
    "views_conv": _views(_CONVOLUTIONS, _CONVOLUTIONS.replace(",", ""), "history_out", "history_out"),
    "turned": _turned("q_in k_in", "q_in, k_in, " + ", ".join(["static_cast<const device T*>(nullptr)"] * 4)),
    "turned_conv": _turned(
        "q_in conv_q conv_q_bias conv_k conv_k_bias",
        "q_in, static_cast<const device T*>(nullptr), conv_q, conv_q_bias, conv_k, conv_k_bias",
    ),
}


class _Call(NamedTuple):
    """A launch, less its arrays. Everything that its source depends on is in the name and the sizes."""

    name: str
    sizes: tuple[tuple[str, int], ...]
    groups: tuple[int, int]  # threadgroups in x and y
    threads: int  # of a threadgroup
    constants: tuple[float, ...]
    integers: tuple[mx.array, ...] = ()


class _Like(NamedTuple):
    shape: tuple[int, ...]
    dtype: mx.Dtype


@functools.cache
def _compiled(name: str) -> Callable:
    kernel = _KERNELS[name]
    place = "threadgroup_position_in_grid, thread_index_in_threadgroup"
    body = f"""
    constexpr int SIZE = ttt::{kernel.memory}::MEMORY;
    threadgroup float memory[SIZE];
    ttt::{kernel.function}({kernel.arguments}, memory, {place}, simdgroup_index_in_threadgroup,
        thread_index_in_simdgroup);
    """
    if not kernel.memory:
        body = f"""
    ttt::{kernel.function}({kernel.arguments}, {place});
    """
    return mx.fast.metal_kernel(  # type: ignore[return-value]
        name=f"ttt_{name}",
        input_names=kernel.inputs.split(),
        output_names=kernel.outputs.split(),
        header=rule.metal_source("ttt_token.metal"),
        source=body,
    )


def _run(
    call: _Call, arrays: Sequence[mx.array], in_mlx: Callable[..., list[mx.array]], outputs: Sequence[_Like | mx.array]
) -> list[mx.array]:
    """What a kernel returns, of the shapes and dtypes of `outputs`; by its twin, if the device refuses the kernel."""
    shapes = [_Like(x.shape, x.dtype) for x in outputs]

    def by_kernel(*arrays: mx.array) -> list[mx.array]:
        return _launch(call, arrays, shapes)

    if not _runs(_Trial(call, arrays, shapes)):
        return in_mlx(*arrays)
    return list(differentiable(by_kernel, in_mlx)(*arrays))


def _launch(call: _Call, arrays: Sequence[mx.array], outputs: Sequence[_Like]) -> list[mx.array]:
    function, arguments = _arguments(call, arrays, outputs)
    return function(**arguments)


def _arguments(call: _Call, arrays: Sequence[mx.array], outputs: Sequence[_Like]) -> tuple[Callable, dict]:
    """The compiled kernel and the arguments of its call."""
    return _compiled(call.name), {
        "inputs": [*arrays, *call.integers, *([mx.array(list(call.constants), mx.float32)] if call.constants else [])],
        "template": [*call.sizes, ("T", arrays[0].dtype)],
        "grid": (call.threads * call.groups[0], call.groups[1], 1),
        "threadgroup": (call.threads, 1, 1),
        "output_shapes": [x.shape for x in outputs],
        "output_dtypes": [x.dtype for x in outputs],
    }


class _Trial:
    """A launch that shows whether the device runs a kernel. All launches of one source are the same trial."""

    def __init__(self, call: _Call, arrays: Sequence[mx.array], outputs: Sequence[_Like]):
        self._call, self._outputs = call, outputs
        self._arrays = [_Like(x.shape, x.dtype) for x in arrays]
        self._source = (call.name, call.sizes, call.threads, tuple(x.dtype for x in arrays))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Trial) and self._source == other._source

    def __hash__(self) -> int:
        return hash(self._source)

    def run(self) -> None:
        integers = tuple(mx.zeros(x.shape, x.dtype) for x in self._call.integers)
        arrays = [mx.zeros(x.shape, x.dtype) for x in self._arrays]
        mx.eval(_launch(self._call._replace(integers=integers), arrays, self._outputs))

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} = {n}" for name, n in self._call.sizes)
        return f"ttt_{self._call.name} for {sizes}, {self._arrays[0].dtype}"


@functools.cache
def _runs(trial: _Trial) -> bool:
    """Whether the device runs this kernel: a first launch shows it."""
    try:
        trial.run()
    except (RuntimeError, ValueError) as refusal:
        warnings.warn(
            f"Metal kernel {trial} does not run on this device: using MLX operations ({refusal})",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
