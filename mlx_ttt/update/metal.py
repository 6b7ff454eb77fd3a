"""The update rule as Metal kernels: one launch per call, whatever it reads.

Each inner model has two forms, in metal/*.metal. The *step* form reads one token that completes no mini-batch: it
returns only y and the token's row, which is appended here, and the weights stay the arrays that they were. The *chunk*
form reads anything else. What the kernels do not support, and what a device refuses to run, `dual.py` computes.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from ..differentiable import differentiable
from . import dual

HEAD_DIMENSIONS = (16, 32, 64, 96, 128)
LARGEST_MINI_BATCH = 32
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
SMALL = 8  # elements below which MLX passes an array in constant memory instead of device memory

_log = logging.getLogger(__name__)


def available() -> bool:
    """Whether there is a Metal device that is not switched off, by `MLX_TTT_KERNELS=0` or by using the CPU instead."""
    if os.environ.get("MLX_TTT_KERNELS") == "0":
        return False
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def supports(q: mx.array, K: int) -> bool:
    """Whether there are kernels for tokens like q [B, T, H, D] in mini-batches of K."""
    return q.shape[3] in HEAD_DIMENSIONS and 1 <= K <= LARGEST_MINI_BATCH and q.dtype in DTYPES and q.size > 0


def ttt_linear(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-Linear, f(x) = x W1 + b1. See :func:`mlx_ttt.update.ttt_linear`."""
    return _read("linear", q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_mlp(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths=None):
    """TTT-MLP, f(x) = gelu(x W1 + b1) W2 + b2. See :func:`mlx_ttt.update.ttt_mlp`."""
    return _read("mlp", q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)


def ttt_linear_step(q, k, v, lr, t, gamma, beta, weights, rows, phase):
    """See :func:`mlx_ttt.update.ttt_linear_step`."""
    return _step("linear", q, k, v, lr, t, gamma, beta, weights, rows, phase)


def ttt_mlp_step(q, k, v, lr, t, gamma, beta, weights, rows, phase):
    """See :func:`mlx_ttt.update.ttt_mlp_step`."""
    return _step("mlp", q, k, v, lr, t, gamma, beta, weights, rows, phase)


_DUAL = {"linear": dual.ttt_linear, "mlp": dual.ttt_mlp}
_DUAL_STEP = {"linear": dual.ttt_linear_step, "mlp": dual.ttt_mlp_step}
_WEIGHTS = {"linear": ("W1", "b1"), "mlp": ("W1", "b1", "W2", "b2")}
_ROW_WIDTH = {"linear": 2, "mlp": 10}  # in head dimensions


class _Variant(NamedTuple):
    """Everything that a compiled kernel depends on."""

    model: str
    form: str  # "chunk" or "step"
    D: int
    K: int
    dtype: mx.Dtype


def _read(model, q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths):
    B, T, _, _ = q.shape
    K = rows.shape[2]
    rule = _DUAL[model]
    lengths = [T] * B if lengths is None else lengths
    is_step = T == 1 and all(p + 1 < K for p in phase) and all(lengths)
    served = _served(model, "step" if is_step else "chunk", q, k, v, K)
    if served is None:
        return rule(q, k, v, lr, t, gamma, beta, weights, rows, phase, lengths)
    if is_step:
        y, row = _step(model, q, k, v, lr, t, gamma, beta, weights, rows, phase)
        return y, weights, dual.append_row(rows, row, phase)

    def by_kernel(*arrays):
        return _launch(*served, arrays, phase, lengths)

    def by_operations(*arrays):
        y, new_weights, new_rows = rule(*arrays[:7], arrays[7:-1], arrays[-1], phase, lengths)
        return [y, *new_weights, new_rows]

    y, *state = differentiable(by_kernel, by_operations)(q, k, v, lr, t, gamma, beta, *weights, rows)
    return y, tuple(state[:-1]), state[-1]


def _step(model, q, k, v, lr, t, gamma, beta, weights, rows, phase: Sequence[int] | mx.array):
    rule = _DUAL_STEP[model]
    served = _served(model, "step", q, k, v, rows.shape[2])
    if served is None:
        return rule(q, k, v, lr, t, gamma, beta, weights, rows, phase)

    def by_kernel(*arrays):
        return _launch(*served, arrays, phase, None)

    def by_operations(*arrays):
        return list(rule(*arrays[:7], arrays[7:-1], arrays[-1], phase))

    return tuple(differentiable(by_kernel, by_operations)(q, k, v, lr, t, gamma, beta, *weights, rows))


def _served(model, form, q, k, v, K) -> tuple[_Variant, int] | None:
    """The kernel for such tokens and its tiles; None where there is none, or the device refuses it."""
    D = q.shape[3]
    if not supports(q, K) or {k.dtype, v.dtype} != {q.dtype}:
        _log.debug("no kernel for D = %d, K = %d, %s: computing with MLX operations", D, K, q.dtype)
        return None
    variant = _Variant(model, form, D, K, q.dtype)
    tiles = _tiles(variant)
    return None if tiles is None else (variant, tiles)


# ---- Launching ------------------------------------------------------------------------------------------------------


def metal_dir() -> Path:
    """The folder of the Metal files: `metal` beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "metal", package.parent / "metal"):
        if (folder / "ttt.h").is_file():
            return folder
    raise FileNotFoundError(f"the Metal files are missing from {package}: reinstall mlx-ttt")


def metal_source(name: str) -> str:
    """A Metal file with the header that it includes put in place; errors still name the file and line."""
    text = (metal_dir() / name).read_text(encoding="utf-8")
    parts = re.split(r'#include "(\w+\.h)"\n', text)
    line = 1
    source = ""
    for part, included in zip(parts[::2], [*parts[1::2], None], strict=True):
        source += f'#line {line} "{name}"\n{part}'
        line += part.count("\n") + 1
        source += metal_source(included) if included else ""
    return source


@functools.cache
def _kernel(model: str, form: str, scratch: bool) -> Callable:
    weights = _WEIGHTS[model]
    inputs = ["q", "k", "v", "lr", "t", "gamma", "beta", *weights, "rows", "phase"]
    if form == "chunk":
        inputs += ["length"]
        outputs = ["y", *(f"{name}_out" for name in weights), "rows_out"]
        outputs += ["scratch"] if scratch else []
        arguments = [*inputs, *outputs, "q_shape[1]", "q_shape[2]"]
    else:
        outputs = ["y", "row"]
        arguments = [*inputs, *outputs, "q_shape[2]"]
    if model == "mlp" and form == "chunk" and not scratch:
        arguments.insert(-2, "nullptr")
    body = f"""
    constexpr int SIZE = ttt::{model.capitalize()}{form.capitalize()}<D, K, TILES>::MEMORY;
    threadgroup float memory[SIZE];
    ttt::{model}_{form}<D, K, TILES>({", ".join(arguments)}, memory, threadgroup_position_in_grid,
        thread_index_in_threadgroup, simdgroup_index_in_threadgroup, thread_index_in_simdgroup);
    """
    return mx.fast.metal_kernel(
        name=f"ttt_{model}_{form}",
        input_names=inputs,
        output_names=outputs,
        header=metal_source(f"ttt_{model}.metal"),
        source=body,
    )


def _launch(variant: _Variant, tiles: int, arrays: Sequence[mx.array], phase, lengths) -> list[mx.array]:
    """arrays: q, k, v, lr, t, gamma, beta, the weights, rows. Returns y, new weights and rows; or y and the new row."""
    kernel, call = _call(variant, tiles, arrays, phase, lengths)
    returned = 2 if variant.form == "step" else 2 + len(_WEIGHTS[variant.model])
    return kernel(**call)[:returned]


def _call(variant: _Variant, tiles: int, arrays: Sequence[mx.array], phase, lengths) -> tuple[Callable, dict]:
    """The kernel and the arguments of its call."""
    model, form, D, K, dtype = variant
    q, lr, weights, rows = arrays[0], arrays[3], arrays[7:-1], arrays[-1]
    B, _, H, _ = q.shape
    inputs = [*arrays, _integers(phase)]
    scratch = 0
    if form == "step":
        shapes = [q.shape, (B, H, 1, rows.shape[-1])]
    else:
        inputs += [_integers(lengths)]
        shapes = [q.shape, *(w.shape for w in weights), rows.shape]
        scratch = _scratch(D, K) if model == "mlp" else 0
        shapes += [(B, H, scratch)] if scratch else []
    # MLX keeps one compiled kernel for each name and template, so whatever else the source depends on is named there:
    # the dtypes, and whether lr is so small that it is passed in constant memory.
    deduced = [("T", dtype), ("LR", lr.dtype), ("FEW_LR", lr.size < SMALL)]
    threads = _threads(variant, tiles)
    return _kernel(model, form, scratch > 0), {
        "inputs": inputs,
        "template": [("D", D), ("K", K), ("TILES", tiles), *deduced],
        "grid": (threads * H, B, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": shapes,
        "output_dtypes": [dtype] + [mx.float32] * (len(shapes) - 1),
    }


def _integers(values: Sequence[int] | mx.array) -> mx.array:
    """As int32, with zeros behind that keep a small batch out of constant memory."""
    padding = SMALL - len(values)
    if isinstance(values, mx.array):
        return mx.concatenate([values, mx.zeros(padding, mx.int32)]) if padding > 0 else values
    return mx.array([*values, *[0] * padding], mx.int32)


def _threads(variant: _Variant, tiles: int) -> int:
    """Threads of a threadgroup: twice as many where TTT-MLP's chunk form keeps W2 in their registers."""
    keeps_w2 = variant[:2] == ("mlp", "chunk") and variant.D <= 64 and variant.K <= 16 and tiles == 1
    return 8 * variant.D if keeps_w2 else 4 * variant.D // tiles


def _scratch(D: int, K: int) -> int:
    """Floats of device memory per head for TTT-MLP's chunk form, where a mini-batch does not fit threadgroup memory."""
    blocks = -(-K // 8)
    view, triangle = 8 * blocks * (D + 4), 64 * blocks * (blocks + 1) // 2
    return 3 * view if 4 * (3 * view + 2 * triangle) > 32768 else 0


@functools.cache
def _tiles(variant: _Variant) -> int | None:
    """How many tiles of columns a simdgroup takes: 1, or 2 to halve the threadgroup; None if the device refuses both.

    A kernel that needs more registers than a threadgroup of its size has is refused when it is first launched.
    """
    _, _, D, K, _ = variant
    fits = not (variant[:2] == ("linear", "chunk") and D == 128 and K > 24)  # in threadgroup memory, with 1
    served, error = None, None
    for tiles in (1, 2) if fits else (2,):
        try:
            mx.eval(_launch(variant, tiles, _tiny_arrays(variant), [0], [1]))
            served = tiles
            break
        except (RuntimeError, ValueError) as refusal:
            error = refusal
    if error:
        warnings.warn(
            f"Metal kernel ttt_{variant.model}_{variant.form} for D = {D}, K = {K}, {variant.dtype} does not run on "
            f"this device: using {'a smaller threadgroup' if served else 'MLX operations'} ({error})",
            RuntimeWarning,
            stacklevel=2,
        )
    return served


def _tiny_arrays(variant: _Variant, heads: int = SMALL) -> list[mx.array]:
    """One token of one sequence, with as many heads as make it compile like a large call."""
    model, _, D, K, dtype = variant
    B, T, H, F = 1, 1, heads, D if model == "linear" else 4 * D
    shapes = {"W1": (B, H, D, F), "b1": (B, H, 1, F), "W2": (B, H, F, D), "b2": (B, H, 1, D)}
    return [
        *(mx.zeros((B, T, H, D), dtype) for _ in range(3)),
        mx.zeros((B, T, H), dtype),
        mx.zeros(K),
        *(mx.zeros((H, D)) for _ in range(2)),
        *(mx.zeros(shapes[name]) for name in _WEIGHTS[model]),
        mx.zeros((B, H, K, _ROW_WIDTH[model] * D)),
    ]
