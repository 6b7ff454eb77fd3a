"""The network's operations, the same for `decode` and `prefill`: what differs, a `Call` does.

Shapes: T tokens of a call, n of a mini-batch, H heads, D head dimension, C = H·D, K mini-batch size. A [1, T, C] array
is flat, a [1, H, T, D] array by head; the features of a head stand in the order of state.halves_first.

Half precision: norms divide by the largest element before they square, so that nothing overflows and eps counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.mil import Var

from ..errors import CheckpointError
from ..model import ModelArgs
from .call import Call
from .ops import TYPE_NAMES, TYPES, cast, concat, split, total

EPS = 1e-6  # of the inner model's LayerNorm and of post_norm


class Network:
    """The ops of the network. `dtype` is that of its activations, `inner` that of the inner model and its update."""

    def __init__(self, args: ModelArgs, dtype: type, inner: type):
        self.args, self.dtype, self.inner = args, dtype, inner
        self.read_mini_batch = {"linear": self.ttt_linear, "mlp": self.ttt_mlp}[args.ttt_layer_type]

    def const(self, x) -> np.ndarray:
        return _finite(np.asarray(x, self.dtype))

    def inner_const(self, x) -> np.ndarray:
        return _finite(np.asarray(x, self.inner))

    def mask(self, condition: Var, dtype: type | None = None) -> Var:
        return mb.cast(x=condition, dtype=TYPE_NAMES[dtype or self.inner])

    def linear(self, x: Var, weight: np.ndarray) -> Var:
        return mb.linear(x=x, weight=self.const(weight))

    # The block

    def block(self, x: Var, w: dict, state: dict, call: Call, layer: int) -> tuple[Var, dict]:
        """x [1, T, C] and the state's parts of this layer, both after this block."""
        new = {}
        if self.args.pre_conv:
            y = call.by_head(self.rms_norm(x, w["conv_norm"], self.args.rms_norm_eps), self.args.head_dim)
            y = self.convolution(y, w["conv_taps"], w["conv_bias"], "conv", state, new, call)
            x = mb.add(x=x, y=call.flat(y))
        y = self.rms_norm(x, w["seq_norm"], self.args.rms_norm_eps)
        x = mb.add(x=x, y=self.ttt(y, w, state, new, call, layer))
        y = self.rms_norm(x, w["ffn_norm"], self.args.rms_norm_eps)
        return mb.add(x=x, y=self.swiglu(y, w)), new

    def swiglu(self, x: Var, w: dict) -> Var:
        gate, up = split(self.linear(x, w["gate_up"]), [self.args.intermediate_size] * 2, axis=-1)
        return self.linear(mb.mul(x=mb.silu(x=gate), y=up), w["down"])

    def convolution(self, x: Var, taps, bias, name: str, state: dict, new: dict, call: Call) -> Var:
        """Causal and depthwise, x [1, H, T, D]. Taps of several convolutions of the same input: their heads in turn."""
        _, H, T, D = x.shape
        kernel, _, heads = taps.shape[:3]
        if kernel > 1:
            x = mb.concat(values=[cast(state[name], self.dtype), x], axis=2)
            new[name] = call.history(x, kernel - 1)
        x = concat([x] * (heads // H), axis=1)
        shifted = [mb.slice_by_size(x=x, begin=[0, 0, i, 0], size=[1, heads, T, D]) for i in range(kernel)]
        products = [mb.mul(x=y, y=self.const(tap)) for y, tap in zip(shifted, taps, strict=True)]
        return mb.add(x=total(products), y=self.const(bias))

    def ttt(self, x: Var, w: dict, state: dict, new: dict, call: Call, layer: int) -> Var:
        C, H, D = self.args.hidden_size, self.args.num_attention_heads, self.args.head_dim
        count = 2 if self.args.share_qk else 3
        projected = split(self.linear(x, w["projections"]), [count * C] + [C] * self.args.use_gate, axis=-1)
        views = call.by_head(projected[0], D)  # [1, 2H or 3H, T, D]
        if self.args.share_qk:
            qk, v = split(views, [H, H], axis=1)
            qk = self.convolution(qk, w["qk_taps"], w["qk_bias"], "conv_qk", state, new, call)
        else:
            qk, v = split(views, [2 * H, H], axis=1)
        q, k = split(self.rotate(cast(qk, self.inner), call), [H, H], axis=1)
        v = cast(v, self.inner)
        y = self.read(q, k, v, self.learning_rates(x, w), w, state, new, call, layer)

        y = call.flat(cast(y, self.dtype))
        y, *_ = self.normalize(y, EPS, centred=True)
        y = mb.add(x=mb.mul(x=y, y=self.const(w["post_norm_weight"])), y=self.const(w["post_norm_bias"]))
        if self.args.use_gate:
            y = mb.mul(x=mb.gelu(x=projected[1], mode="TANH_APPROXIMATION"), y=y)
        return self.linear(y, w["o"])

    def rotate(self, x: Var, call: Call) -> Var:
        first, second = split(x, [self.args.head_dim // 2] * 2, axis=-1)
        swapped = mb.concat(values=[second, first], axis=-1)
        return mb.add(x=mb.mul(x=x, y=call.cos), y=mb.mul(x=swapped, y=call.sin))

    def learning_rates(self, x: Var, w: dict) -> Var:
        """ttt_base_lr / D · sigmoid(x · w + b), [1, H, T, 1]."""
        gate = mb.matmul(x=self.inner_const(w["lr_weight"]), y=cast(x, self.inner), transpose_y=True)  # [1, H, T]
        gate = mb.sigmoid(x=mb.add(x=gate, y=self.inner_const(w["lr_bias"])))
        rate = self.inner_const(self.args.ttt_base_lr / self.args.head_dim)
        return mb.mul(x=mb.expand_dims(x=gate, axes=[3]), y=rate)

    # The update rule

    def read(self, q, k, v, lr, w: dict, state: dict, new: dict, call: Call, layer: int) -> Var:
        """Run the mini-batches of a call one after the other; q, k, v [1, H, T, D], returns [1, H, T, D]."""
        names = [name for name in ("W1", "b1", "W2", "b2") if name in w]
        row_names = {"linear": ("k", "e1"), "mlp": ("k", "e1", "x2", "e2")}[self.args.ttt_layer_type]
        start = {name: self.inner_const(w[name]) for name in names}
        deltas = {name: self.widen(state[name], start[name].shape) for name in names}
        open_rows = [state[name] for name in row_names]
        norm = (self.inner_const(w["gamma"]), self.inner_const(w["beta"]))

        outputs, rows_of = [], []
        for index, tokens in enumerate(zip(*(call.mini_batches(x) for x in (q, k, v, lr)), strict=True)):
            inner = {name: mb.add(x=start[name], y=deltas[name]) for name in names}
            y, rows = self.read_mini_batch(*tokens, inner, norm, call.factors(layer), call, open_rows)
            outputs.append(y)
            rows_of.append(rows)
            step = mb.mul(x=call.committed(index), y=self.inner_const(-w["t"][-1]))
            deltas = self.commit(deltas, rows, step)

        for name, x in deltas.items():
            new[name] = self.narrow(x, state[name].shape)
        for name, rows in zip(row_names, zip(*rows_of, strict=True), strict=True):
            new[name] = self.narrow(call.kept(rows), state[name].shape)
        return concat(outputs, axis=2)

    def widen(self, x: Var, shape: tuple[int, ...]) -> Var:
        """A part of the state as the arithmetic wants it."""
        x = cast(x, self.inner)
        return x if tuple(x.shape) == tuple(shape) else mb.reshape(x=x, shape=list(shape))

    def narrow(self, x: Var, shape: tuple[int, ...]) -> Var:
        x = x if tuple(x.shape) == tuple(shape) else mb.reshape(x=x, shape=list(shape))
        return cast(x, np.float16)

    def ttt_linear(self, q, k, v, lr, inner, norm, factors, call, open_rows):
        """Tokens of one mini-batch, [1, H, n, D]. Returns the output and the mini-batch's rows, [1, H, K, ·] each."""
        n = q.shape[2]
        z = mb.matmul(x=mb.concat(values=[k, q], axis=2), y=inner["W1"])
        z_k, z_q = split(mb.add(x=z, y=inner["b1"]), [n, n], axis=2)
        e1 = mb.mul(x=lr, y=self.layer_norm_l2_grad(z_k, mb.sub(x=v, y=k), norm))
        rows = [call.rows(x, past) for x, past in zip((k, e1), open_rows, strict=True)]
        z = mb.add(x=z_q, y=self.causal_sum(q, rows[0], rows[1], factors))
        return mb.add(x=q, y=self.layer_norm(z, norm)), rows

    def ttt_mlp(self, q, k, v, lr, inner, norm, factors, call, open_rows):
        n = q.shape[2]
        z1 = mb.matmul(x=mb.concat(values=[k, q], axis=2), y=inner["W1"], transpose_y=True)  # W1 is transposed
        z1_k, z1_q = split(mb.add(x=z1, y=inner["b1"]), [n, n], axis=2)  # [1, H, n, 4D]
        x2, dx2 = self.gelu_and_grad(z1_k)
        z2 = mb.add(x=mb.matmul(x=x2, y=inner["W2"]), y=inner["b2"])
        g2 = self.layer_norm_l2_grad(z2, mb.sub(x=v, y=k), norm)
        e2 = mb.mul(x=lr, y=g2)
        e1 = mb.mul(x=mb.matmul(x=e2, y=inner["W2"], transpose_y=True), y=dx2)
        rows = [call.rows(x, past) for x, past in zip((k, e1, x2, e2), open_rows, strict=True)]
        z1 = mb.add(x=z1_q, y=self.causal_sum(q, rows[0], rows[1], factors))
        q2 = mb.gelu(x=z1, mode="TANH_APPROXIMATION")
        z2 = mb.add(x=mb.matmul(x=q2, y=inner["W2"]), y=inner["b2"])
        z2 = mb.add(x=z2, y=self.causal_sum(q2, rows[2], rows[3], factors))
        return mb.add(x=q, y=self.layer_norm(z2, norm)), rows

    def causal_sum(self, q: Var, x: Var, e: Var, factors: Var) -> Var:
        """-t_i sum_{j<=i} (q_i · x_j + 1) e_j, [1, H, n, ·]; tokens that do not count come after all that do."""
        scores = mb.add(x=mb.matmul(x=q, y=x, transpose_y=True), y=self.inner_const(1))  # [1, H, n, K]
        return mb.matmul(x=mb.mul(x=scores, y=factors), y=e)

    def commit(self, deltas: dict[str, Var], rows: Sequence[Var], step: Var) -> dict[str, Var]:
        """The inner model's change after a mini-batch: step is -t_{K-1} where it is complete, else 0."""
        changed = {}
        for W, b, x, e in (("W1", "b1", *rows[:2]), ("W2", "b2", *rows[2:]))[: len(rows) // 2]:
            e = mb.mul(x=step, y=e)
            first, second = (e, x) if W == "W1" and len(rows) == 4 else (x, e)  # TTT-MLP's W1 is transposed
            changed[W] = mb.add(x=deltas[W], y=mb.matmul(x=first, y=second, transpose_x=True))
            changed[b] = mb.add(x=deltas[b], y=mb.reduce_sum(x=e, axes=[2], keep_dims=True))
        return changed

    # Norms and activations

    def normalize(self, x: Var, eps: float, centred: bool) -> tuple[Var, Var, Var]:
        """x / s with s = sqrt(mean x² + eps), x less its mean if `centred`, along the last axis; and two factors of
        1 / s, of which neither can overflow: 1 / s = inverse / largest."""
        dtype = {tag: np_type for np_type, tag in TYPES.items()}[x.dtype]
        floor = dtype(math.sqrt(eps))
        if centred:
            x = mb.sub(x=x, y=mb.reduce_mean(x=x, axes=[-1], keep_dims=True))
        largest = mb.reduce_max(x=mb.abs(x=x), axes=[-1], keep_dims=True)
        largest = mb.maximum(x=largest, y=floor)
        scaled = mb.real_div(x=x, y=largest)  # in [-1, 1]
        mean = mb.reduce_mean(x=mb.square(x=scaled), axes=[-1], keep_dims=True)
        scaled_eps = mb.square(x=mb.real_div(x=floor, y=largest))
        inverse = mb.rsqrt(x=mb.add(x=mean, y=scaled_eps), epsilon=dtype(0))
        return mb.mul(x=scaled, y=inverse), inverse, largest

    def rms_norm(self, x: Var, weight: np.ndarray, eps: float) -> Var:
        x, *_ = self.normalize(x, eps, centred=False)
        return mb.mul(x=x, y=self.const(weight))

    def layer_norm(self, z: Var, norm) -> Var:
        gamma, beta = norm
        z_hat, *_ = self.normalize(z, EPS, centred=True)
        return mb.add(x=mb.mul(x=z_hat, y=gamma), y=beta)

    def layer_norm_l2_grad(self, z: Var, aim: Var, norm) -> Var:
        """Gradient of ||LN(z) - aim||² / 2 with respect to z, in closed form."""
        gamma, beta = norm
        z_hat, inverse, largest = self.normalize(z, EPS, centred=True)
        u = mb.mul(x=mb.sub(x=mb.add(x=mb.mul(x=z_hat, y=gamma), y=beta), y=aim), y=gamma)
        mean = mb.reduce_mean(x=u, axes=[-1], keep_dims=True)
        along = mb.reduce_mean(x=mb.mul(x=u, y=z_hat), axes=[-1], keep_dims=True)
        g = mb.sub(x=mb.sub(x=u, y=mean), y=mb.mul(x=z_hat, y=along))
        return mb.mul(x=g, y=mb.real_div(x=inverse, y=largest))

    def gelu_and_grad(self, z: Var) -> tuple[Var, Var]:
        """The tanh GELU and its derivative."""
        c, a, number = math.sqrt(2 / math.pi), 0.044715, self.inner_const
        z_sq = mb.square(x=mb.clip(x=z, alpha=number(-16), beta=number(16)))  # beyond, tanh is ±1
        inside = mb.mul(x=z, y=mb.add(x=mb.mul(x=z_sq, y=number(c * a)), y=number(c)))
        tanh = mb.tanh(x=inside)
        half = mb.add(x=mb.mul(x=tanh, y=number(0.5)), y=number(0.5))
        slope = mb.add(x=mb.mul(x=z_sq, y=number(3 * a * c / 2)), y=number(c / 2))
        bend = mb.mul(x=z, y=mb.sub(x=number(1), y=mb.square(x=tanh)))
        return mb.mul(x=z, y=half), mb.add(x=half, y=mb.mul(x=bend, y=slope))


def _finite(x: np.ndarray) -> np.ndarray:
    if not np.isfinite(x).all():
        raise CheckpointError("a weight is not a finite number; the checkpoint is damaged, or its training diverged")
    return x
