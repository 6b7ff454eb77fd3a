"""The update rule as Metal kernels: one launch per call, whatever it reads.

Each inner model has two forms, in metal/*.metal. The *step* form reads one token that completes no mini-batch: it
returns y and the open rows, and the weights stay the arrays that they were. The *chunk* form reads anything else. What
the kernels do not support, and what a device refuses to run, `dual.py` computes.

The gradient of the chunk form is a kernel, too: the *backward* form. That of the step form is `dual.py`'s.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx

from ...network.dual import commit, dual_form, next_phase, observed_dual_form
from ...network.inner import INNER_MODELS, TTT_LINEAR, TTT_MLP
from ...network.rule import Learner, Signals, State, Tokens, state_shapes
from ..differentiable import Backward, Signature, differentiable

HEAD_DIMENSIONS = (16, 32, 64, 96, 128)
LARGEST_MINI_BATCH = 32
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
LAUNCH = 512  # tokens of one launch of a backward form
SMALL = 8  # elements below which MLX passes an array in constant memory instead of device memory
WITH_KERNELS = (TTT_LINEAR, TTT_MLP)

_log = logging.getLogger(__name__)

Counts = Sequence[int] | mx.array  # one integer per sequence


def available() -> bool:
    """Whether there is a Metal device that is not switched off, by `MLX_TTT_KERNELS=0` or by using the CPU instead."""
    if os.environ.get("MLX_TTT_KERNELS") == "0":
        return False
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def supports(q: mx.array, K: int) -> bool:
    """Whether there are kernels for tokens like q [B, T, H, D] in mini-batches of K."""
    return q.shape[3] in HEAD_DIMENSIONS and 1 <= K <= LARGEST_MINI_BATCH and q.dtype in DTYPES and q.size > 0


@dual_form.register
def update(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State]:
    found = _by_kernel(tokens, learner, state, shown=False)
    return found if found is NotImplemented else found[:2]


@observed_dual_form.register
def observe(tokens: Tokens, learner: Learner, state: State) -> tuple[mx.array, State, Signals]:
    """By kernels that return the losses and norms of writes, too. The gradient is that of MLX operations."""
    return _by_kernel(tokens, learner, state, shown=True)


def _by_kernel(tokens: Tokens, learner: Learner, state: State, shown: bool) -> Any:
    """y, the state after the tokens and, if the learner is shown, its signals; `NotImplemented` without a kernel."""
    if not available():
        return NotImplemented
    form = "step" if _is_step(tokens, learner, state) else "chunk"
    kernel = _kernel_for(form, tokens, learner, shown)
    if kernel is None:
        return NotImplemented
    call = Signature(tokens, learner, state)

    def backward(arrays: Sequence[mx.array], cotangents: Sequence[mx.array]) -> Sequence[mx.array]:
        return _backward(call, arrays, cotangents)

    operations: Callable[..., list[mx.array]] = call.observed_dual_form if shown else call.dual_form
    if form == "step":
        operations = _without_weights(call, operations)
    own = backward if form == "chunk" and not shown else None
    found = _read(kernel, call, call.arrays(tokens, learner, state), state.phase, operations, own)
    return _after(found, call, tokens, state, shown)


def _after(
    found: Sequence[mx.array], call: Signature, tokens: Tokens, state: State, shown: bool
) -> tuple[mx.array, State, Signals | None]:
    """What a form returns, by name: y, the weights unless it was a step, the rows, and signals if they are shown."""
    signals = Signals(found[-2], tokens.where_counted(tokens.lr), found[-1]) if shown else None
    y, *weights, rows = found[:-2] if shown else found
    return y, call.after(weights or state.weights, rows), signals


def _read(
    kernel: _Kernel,
    call: Signature,
    arrays: Sequence[mx.array],
    phase: Counts,
    operations: Callable[..., Sequence[mx.array]],
    backward: Backward | None = None,
) -> list[mx.array]:
    """What a step or chunk form returns of a call: see `_launch`.

    Args:
        operations: the same in MLX operations, whose gradient it has unless there is a `backward`.
    """

    def by_kernel(*arrays: mx.array) -> list[mx.array]:
        return _launch(kernel, arrays, phase, call.counts)

    return list(differentiable(by_kernel, operations, backward)(*arrays))


class Token(NamedTuple):
    """How one token of each sequence is read in a compiled decode step.

    Attributes:
        phase: of each sequence, int32, [B] with zeros behind up to 8 of them.
        completes: whether some sequence may complete its mini-batch. Then the weights of all are written.
        shown: whether the learner shows what it does.
    """

    phase: mx.array
    completes: bool
    shown: bool


def read_token(tokens: Tokens, learner: Learner, state: State, token: Token) -> tuple[mx.array, State, Signals | None]:
    """The update rule for one token of each sequence, whose phases the device alone may know.

    Unlike in `update`, sequences may complete their mini-batches nevertheless. The state's phase is an array [B].
    """
    call = Signature(tokens, learner, state)
    arrays = call.arrays(tokens, learner, state)
    operations: Callable[..., list[mx.array]] = call.observed_dual_form if token.shown else call.dual_form
    operations = _committing(call, token.phase, operations) if token.completes else _without_weights(call, operations)
    kernel = _kernel_for("chunk" if token.completes else "step", tokens, learner, token.shown)
    found = _read(kernel, call, arrays, token.phase, operations) if kernel else operations(*arrays)
    return _after(found, call, tokens, state, token.shown)


def _committing(
    call: Signature, phase: mx.array, operations: Callable[..., list[mx.array]]
) -> Callable[..., list[mx.array]]:
    """What a chunk form returns of one token, with phases in an array: MLX operations alone leave mini-batches open."""
    n, widths = len(call.inner.weight_names), call.inner.row_widths

    def function(*arrays: mx.array) -> list[mx.array]:
        y, *after = operations(*arrays)
        weights, rows, t = after[:n], after[n], arrays[4]
        ends = list(itertools.accumulate(widths(y.shape[-1]).values()))[:-1]
        done = mx.equal(phase[: len(y)], len(t) - 1)[:, None, None, None]
        committed = commit(weights, list(mx.split(rows, ends, axis=-1)), t[-1])
        weights = [mx.where(done, new, old) for new, old in zip(committed, weights, strict=True)]
        return [y, *weights, mx.where(done, 0, rows), *after[n + 1 :]]

    return function


def _without_weights(call: Signature, operations: Callable[..., list[mx.array]]) -> Callable[..., list[mx.array]]:
    """What a step form returns: it leaves the weights as they are."""
    n = len(call.inner.weight_names)

    def function(*arrays: mx.array) -> list[mx.array]:
        y, *after = operations(*arrays)
        return [y, *after[n:]]

    return function


def _is_step(tokens: Tokens, learner: Learner, state: State) -> bool:
    """Whether this reads one token of each sequence, and completes no mini-batch."""
    if isinstance(state.phase, mx.array):
        return True
    K = learner.mini_batch_size
    return tokens.q.shape[1] == 1 and all(p + 1 < K for p in state.phase) and all(tokens.counts)


def _backward(call: Signature, arrays: Sequence[mx.array], cotangents: Sequence[mx.array]) -> Sequence[mx.array]:
    """The cotangents of the arrays of a call, from those of y, the weights and the rows after it."""
    tokens, learner, _ = call.arguments(arrays)
    forward, backward = (_kernel_for(form, tokens, learner) for form in ("chunk", "backward"))
    if forward is None or backward is None:
        return NotImplemented

    def by_kernels(*both: mx.array) -> list[mx.array]:
        return _launch_backward(forward, backward, call, both)

    def by_operations(*both: mx.array) -> list[mx.array]:  # for second derivatives
        return mx.vjp(call.dual_form, list(both[: len(arrays)]), list(both[len(arrays) :]))[1]

    return differentiable(by_kernels, by_operations)(*arrays, *cotangents)


def _launch_backward(
    forward: _Kernel, backward: _Kernel, call: Signature, arrays: Sequence[mx.array]
) -> list[mx.array]:
    """What `_backward` returns, by kernels.

    One launch takes up to LAUNCH tokens, since it keeps the weights of every mini-batch. For more tokens, the states
    in between are computed first.

    Args:
        arrays: those of the call; and the cotangents of y, the weights and the rows after it.
    """
    n = 8 + len(call.inner.weight_names)
    arrays, (dy, *after) = arrays[:n], arrays[n:]
    tokens, learner, state = call.arguments(arrays)
    (T, D), K = (tokens.q.shape[1], tokens.q.shape[3]), learner.mini_batch_size
    constants = [learner.t, learner.gamma, learner.beta]
    parts = []
    for start in range(0, T, LAUNCH):
        counts = [min(max(n - start, 0), LAUNCH) for n in call.counts]
        inputs = [x[:, start : start + LAUNCH] for x in arrays[:4]]
        parts.append(([*inputs, *constants, *state.weights, state.rows], state.phase, counts))
        if start + LAUNCH < T:
            _, *weights, rows = _launch(forward, *parts[-1])
            state = State(tuple(weights), rows, next_phase(state.phase, counts, K))

    of_tokens: list[list[mx.array]] = []
    of_constants = mx.zeros(K + 2 * D)
    for i, (inputs, phase, counts) in reversed(list(enumerate(parts))):
        part_dy = dy[:, i * LAUNCH : (i + 1) * LAUNCH].astype(tokens.q.dtype)
        found = _launch(backward, [*inputs, part_dy, *after], phase, counts)
        of_tokens.insert(0, found[:4])
        of_constants = of_constants + found[4].sum(0)  # of each head
        after = found[5:]
    dq, dk, dv, dlr = (mx.concatenate(list(x), axis=1) for x in zip(*of_tokens, strict=True))
    dt, dgamma, dbeta = mx.split(of_constants, [K, K + D], axis=-1)
    return [dq, dk, dv, dlr.astype(tokens.lr.dtype), dt.sum(0), dgamma, dbeta, *after]


class _Variant(NamedTuple):
    """Everything that a compiled kernel depends on."""

    model: str  # InnerModel.name
    form: str  # "chunk", "step" or "backward"
    D: int
    K: int
    dtype: mx.Dtype
    shown: bool = False  # whether the kernel returns what the learner does, too


class _Kernel(NamedTuple):
    variant: _Variant
    tiles: int  # of columns that a simdgroup takes: 1, or 2 to halve the threadgroup


def _kernel_for(form: str, tokens: Tokens, learner: Learner, shown: bool = False) -> _Kernel | None:
    """The kernel for such tokens; None where there is none, or the device refuses it."""
    q, K = tokens.q, learner.mini_batch_size
    D, name = q.shape[3], learner.inner.name
    if learner.inner not in WITH_KERNELS or not supports(q, K) or {tokens.k.dtype, tokens.v.dtype} != {q.dtype}:
        _log.debug(
            "no kernel for %s, D = %d, K = %d, %s: computing with MLX operations", learner.inner.title, D, K, q.dtype
        )
        return None
    variant = _Variant(name, form, D, K, q.dtype, shown)
    tiles = _tiles(variant)
    return None if tiles is None else _Kernel(variant, tiles)


# ---- Launching ------------------------------------------------------------------------------------------------------


def metal_dir() -> Path:
    """The folder of the Metal files: `metal` beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parents[2]
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


class KernelText(NamedTuple):
    """A kernel without the signature around it.

    Attributes:
        name: of the kernel.
        inputs, outputs: the names of the arrays that the body uses. Integers D, K and TILES, an array q_shape
            [B, T, H, D] and the positions that `POSITIONS` names are to be in scope, too.
        header: what stands before the kernel.
        body: what stands in it.
    """

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    header: str
    body: str


POSITIONS = {
    "threadgroup_position_in_grid": "uint3",
    "thread_index_in_threadgroup": "uint",
    "simdgroup_index_in_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
}


def kernel_text(model: str, form: str, shown: bool, scratch: bool) -> KernelText:
    """A form of an inner model, for whatever launches it: as `_Variant` has it; and whether it has working memory."""
    weights = INNER_MODELS[model].weight_names
    inputs = ["q", "k", "v", "lr", "t", "gamma", "beta", *weights, "rows", "phase"]
    after = [f"{name}_out" for name in (*weights, "rows")]
    if form == "chunk":
        inputs += ["length"]
        outputs = ["y", *after]
    elif form == "step":
        outputs = ["y", "rows_out"]
    else:
        inputs += ["dy", *(f"d{name}" for name in after)]
        outputs = ["dq", "dk", "dv", "dlr", "dconstants", *(f"d{name}" for name in (*weights, "rows"))]
    signals = ["loss", "write_norm"] if shown else []
    outputs += ["scratch"] if scratch else []
    arguments = [*inputs, *outputs, *([] if form == "step" else ["q_shape[1]"]), "q_shape[2]"]
    if form == "backward":  # phase and length are one array, since a kernel has at most 31
        arguments.insert(arguments.index("phase") + 1, "phase + q_shape[0]")
    if model == "mlp" and form == "chunk" and not scratch:
        arguments.insert(-2, "nullptr")
    template = "D, K, TILES, true" if shown else "D, K, TILES"
    lane = ", ".join(["thread_index_in_simdgroup", *signals])
    body = f"""
    constexpr int SIZE = ttt::{model.capitalize()}{form.capitalize()}<{template}>::MEMORY;
    threadgroup float memory[SIZE];
    ttt::{model}_{form}<{template}>({", ".join(arguments)}, memory, threadgroup_position_in_grid,
        thread_index_in_threadgroup, simdgroup_index_in_threadgroup, {lane});
    """
    return KernelText(
        name=f"ttt_{model}_{form}{'_shown' if shown else ''}",
        inputs=inputs,
        outputs=[*outputs, *signals],
        header=metal_source(f"ttt_{model}{'_backward' if form == 'backward' else ''}.metal"),
        body=body,
    )


@functools.cache
def _compiled(model: str, form: str, shown: bool, scratch: bool) -> Callable:
    text = kernel_text(model, form, shown, scratch)
    return mx.fast.metal_kernel(  # type: ignore[return-value]
        name=text.name, input_names=text.inputs, output_names=text.outputs, header=text.header, source=text.body
    )


class Launch(NamedTuple):
    """A step or chunk form for somebody who launches it without MLX.

    Attributes:
        text: of the kernel.
        tiles: TILES.
        threads: of a threadgroup. There is one for each head and sequence, (head, sequence) in the grid.
        scratch: floats of working memory for each head, an output [B, H, scratch]; 0: there is no such output.
    """

    text: KernelText
    tiles: int
    threads: int
    scratch: int


def launch(model: str, form: str, D: int, K: int, shown: bool) -> Launch:
    """How a form is launched on a device that does not refuse it."""
    variant = _Variant(model, form, D, K, mx.float32, shown)
    tiles, scratch = _least_tiles(variant), _uses_scratch(variant)
    text = kernel_text(model, form, shown, scratch)
    return Launch(text, tiles, _threads(_Kernel(variant, tiles)), _scratch(D, K) if scratch else 0)


def _launch(kernel: _Kernel, arrays: Sequence[mx.array], phase: Counts, lengths: Sequence[int]) -> list[mx.array]:
    """What a kernel returns of its arguments.

    The chunk form returns y, and the new weights and rows. The step form, which needs no lengths, returns y and the new
    rows. Behind these, a kernel that shows what the learner does returns its losses and norms of writes [B, T, H]. The
    backward form returns the cotangents of q, k, v and lr [B, T, H], float32; those of t, gamma and beta side by side,
    for each sequence and head [B, H, K + 2D]; and those of the weights and rows.

    Args:
        arrays: q, k, v, lr, t, gamma, beta, the weights, rows; in the backward form also the cotangents of y and of the
            weights and rows after the tokens.
    """
    function, arguments = _call(kernel, arrays, phase, lengths)
    returned = function(**arguments)
    if _uses_scratch(kernel.variant):
        del returned[-3 if kernel.variant.shown else -1]
    return returned


def _call(
    kernel: _Kernel, arrays: Sequence[mx.array], phase: Counts, lengths: Sequence[int]
) -> tuple[Callable, dict[str, Any]]:
    """The compiled kernel and the arguments of its call."""
    (model, form, D, K, dtype, shown), tiles = kernel
    q, lr = arrays[0], arrays[3]
    before = arrays[7 : 8 + len(INNER_MODELS[model].weight_names)]  # weights, rows
    after = arrays[7 + len(before) :]  # in the backward form, cotangents
    state = [x.shape for x in before]
    B, T, H, _ = q.shape
    inputs = list(arrays[: 7 + len(before)])
    shapes, dtypes = [q.shape], [dtype]
    if form == "step":
        inputs += [_integers(phase)]
        shapes += [state[-1]]
    elif form == "chunk":
        inputs += [_integers(phase), _integers(lengths)]
        shapes += state
    else:
        inputs += [_integers([*phase, *lengths]), *after]
        shapes, dtypes = [q.shape] * 3 + [lr.shape, (B, H, K + 2 * D), *state], [dtype] * 3
    if _uses_scratch(kernel.variant):
        shapes += [(B, H, _backward_scratch(kernel, T) if form == "backward" else _scratch(D, K))]
    shapes += [(B, T, H)] * 2 if shown else []
    # MLX keeps one compiled kernel for each name and template, so whatever else the source depends on is named there:
    # the dtypes, and whether lr is so small that it is passed in constant memory.
    deduced = [("T", dtype), ("LR", lr.dtype), ("FEW_LR", lr.size < SMALL)]
    threads = _threads(kernel)
    return _compiled(model, form, shown, _uses_scratch(kernel.variant)), {
        "inputs": inputs,
        "template": [("D", D), ("K", K), ("TILES", tiles), *deduced],
        "grid": (threads * H, B, 1),
        "threadgroup": (threads, 1, 1),
        "output_shapes": shapes,
        "output_dtypes": dtypes + [mx.float32] * (len(shapes) - len(dtypes)),
    }


def _integers(values: Counts) -> mx.array:
    """As int32, with zeros behind that keep a small batch out of constant memory."""
    padding = SMALL - len(values)
    if isinstance(values, mx.array):
        return mx.concatenate([values, mx.zeros(padding, mx.int32)]) if padding > 0 else values
    return mx.array([*values, *[0] * padding], mx.int32)


def _threads(kernel: _Kernel) -> int:
    """Threads of a threadgroup: twice as many where TTT-MLP's chunk form keeps W2 in their registers."""
    variant, tiles = kernel
    keeps_w2 = variant[:2] == ("mlp", "chunk") and variant.D <= 64 and variant.K <= 16 and tiles == 1
    return 8 * variant.D if keeps_w2 else 4 * variant.D // tiles


def _scratch(D: int, K: int) -> int:
    """Floats of device memory per head for TTT-MLP's chunk form, where a mini-batch does not fit threadgroup memory."""
    blocks = -(-K // 8)
    view, triangle = 8 * blocks * (D + 4), 64 * blocks * (blocks + 1) // 2
    return 3 * view if 4 * (3 * view + 2 * triangle) > 32768 else 0


def _backward_scratch(kernel: _Kernel, T: int) -> int:
    """Floats of device memory per head for the backward form: the weights that each mini-batch but the first starts
    with, and the views of a mini-batch that do not fit threadgroup memory. At least one: MLX has no empty outputs.
    """
    (model, _, D, K, *_), tiles = kernel
    blocks, simdgroups = -(-K // 8), D // (8 * tiles)
    rows, triangle, hidden = 8 * blocks, 32 * blocks * (blocks + 1), 4 * D
    if model == "linear":
        views, used, wide, start = 5, triangle + 12 * rows * simdgroups, 0, D * D + D
    else:
        views, used, wide, start = 7, 3 * triangle + rows, 9 * rows * hidden, 2 * D * hidden + hidden + D
    view = rows * (D + 4)
    local = min((32768 // 4 - used) // view, views)
    return max((T + K - 2) // K * start + (views - local) * view + wide, 1)


def _uses_scratch(variant: _Variant) -> bool:
    """Whether the kernel's last output is working memory."""
    if variant.form == "backward":
        return True
    return variant[:2] == ("mlp", "chunk") and _scratch(variant.D, variant.K) > 0


def _least_tiles(variant: _Variant) -> int:
    """The fewest with which the form fits threadgroup memory."""
    return 2 if variant[:2] == ("linear", "chunk") and variant.D == 128 and variant.K > 24 else 1


@functools.cache
def _tiles(variant: _Variant) -> int | None:
    """How many tiles of columns a simdgroup takes: 1, or 2 to halve the threadgroup; None if the device refuses both.

    A kernel that needs more registers than a threadgroup of its size has is refused when it is first launched.
    """
    _, _, D, K, *_ = variant
    served, error = None, None
    for tiles in range(_least_tiles(variant), 3):
        try:
            mx.eval(_launch(_Kernel(variant, tiles), _tiny_arrays(variant), [0], [1]))
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
    model, form, D, K, dtype, _ = variant
    view = mx.zeros((1, 1, heads, D), dtype)
    state = [mx.zeros(shape) for shape in state_shapes(INNER_MODELS[model], 1, heads, D, K).values()]
    constants = [mx.zeros(K), mx.zeros((heads, D)), mx.zeros((heads, D))]
    cotangents = [view, *state] if form == "backward" else []
    return [view, view, view, mx.zeros((1, 1, heads), dtype), *constants, *state, *cotangents]
