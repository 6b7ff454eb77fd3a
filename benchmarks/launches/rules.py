"""What MLX's Metal backend launches for each primitive, and how it lays out the result.

Read in MLX's sources at commit 846d176 (22 August 2026, three days before 0.32.2); `SOURCES` says how far that is from
the installed version. Each rule names its place there: file and line. Files without a folder are in
mlx/backend/metal; `gpu/` and `common/` are mlx/backend/gpu and mlx/backend/common.

A rule gets an operation with its inputs, laid out, and its outputs, to lay out. It calls `encoder.launch` once for each
dispatch.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import mlx.core as mx

from .arrays import Array, Shape, collapsed, contiguity
from .fusion import BINARY, UNARY
from .gpus import Gpu
from .graph import Operation

SOURCES = "MLX 846d176 (just before 0.32.2)"

SPLIT_K_REDUCE, ROW = "sum of the parts", "row reduction"


class Encoder(Protocol):
    """Where a rule launches."""

    gpu: Gpu

    def launch(self, what: str) -> None:
        """Count a dispatch."""


class UnknownOperation(Exception):
    """An operation that no rule is known for, or that cannot be seen on this machine."""


Rule = Callable[[Encoder, Operation, Sequence[Array], Sequence[Array]], None]


class Known(NamedTuple):
    rule: Rule
    place: str


RULES: dict[str, Known] = {}


def rule(names: str, place: str) -> Callable[[Rule], Rule]:
    """Register the rule of these primitives, which is read at this place."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names.split(), Known(function, place)))
        return function

    return register


def encode(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """Launch what an operation takes.

    Raises:
        UnknownOperation: no rule is known for it.
    """
    known = RULES.get(operation.name)
    if known is None:
        raise UnknownOperation(f"{operation.name}: no rule for what MLX launches; add one to {__name__}")
    if all(x.size for x in outputs):
        known.rule(encoder, operation, inputs, outputs)
    else:
        for x in outputs:
            x.allocate()


# ---- Views: no launch -----------------------------------------------------------------------------------------------


@rule("StopGradient Copy", "common/common.cpp:56, 228")
def view(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    outputs[0].share(inputs[0])


@rule("CustomTransforms Depends", "common/common.cpp:61, 71")
def views(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """The last inputs are the outputs of a custom function; those of Depends are the first, of which there is none."""
    first = len(inputs) - len(outputs) if operation.name == "CustomTransforms" else 0
    for out, x in zip(outputs, inputs[first:], strict=False):
        out.share(x)


@rule("Broadcast BroadcastAxes", "common/broadcasting.cpp:7")
def broadcast(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x, out = inputs[0], outputs[0]
    strides = tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))
    out.share(x, (0,) * (out.ndim - x.ndim) + strides)
    if out.size > x.size:
        out.row_contiguous = out.col_contiguous = False


@rule("ExpandDims", "common/common.cpp:80")
def expand_dims(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    strides = list(inputs[0].strides)
    for axis in operation.arguments[0]:
        strides.insert(axis, 1)
    outputs[0].share(inputs[0], tuple(strides))


@rule("Squeeze", "common/common.cpp:214")
def squeeze(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    axes = set(operation.arguments[0])
    outputs[0].share(inputs[0], tuple(s for i, s in enumerate(inputs[0].strides) if i not in axes))


@rule("Transpose", "common/common.cpp:233")
def transpose(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x, out = inputs[0], outputs[0]
    out.share(x, tuple(x.strides[axis] for axis in operation.arguments[0]))
    if x.contiguous and x.data_size == x.size:
        _, out.row_contiguous, out.col_contiguous = contiguity(out.shape, out.strides)


@rule("Slice", "gpu/primitives.cpp:208, common/slicing.cpp:38")
def slice_(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    steps = operation.arguments[2]
    _sliced(inputs[0], outputs[0], tuple(s * step for s, step in zip(inputs[0].strides, steps, strict=True)))


def _sliced(x: Array, out: Array, strides: Shape) -> None:
    span = sum(abs(s) * (n - 1) for s, n in zip(strides, out.shape, strict=True)) + 1
    out.share(x, strides, span)
    elements, out.row_contiguous, out.col_contiguous = contiguity(out.shape, strides)
    out.contiguous = elements == span


@rule("Split", "common/common.cpp:162")
def split(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x = inputs[0]
    for out in outputs:
        elements, row, col = contiguity(out.shape, x.strides)
        out.share(x, x.strides, elements)
        out.row_contiguous, out.col_contiguous = row, col
        if elements == 1:
            out.contiguous = True
        elif elements != x.data_size:
            out.contiguous = x.contiguous and (row or col)


# ---- Copies ---------------------------------------------------------------------------------------------------------


def copied(encoder: Encoder, x: Array, why: str) -> Array:
    """contiguous_copy_gpu (gpu/copy.cpp:37): always a launch."""
    out = Array(x.shape, x.dtype)
    out.allocate()
    encoder.launch(f"copy: {why}")
    return out


def copy(encoder: Encoder, x: Array, out: Array, vector: bool, why: str) -> None:
    """copy_gpu (copy.cpp:13): no launch only if the buffer is donated and the dtype stays."""
    if vector and x.donatable_to(out):
        out.share(x)
        if x.dtype == out.dtype:
            return
    elif vector:
        out.allocate(like=x)
    else:
        out.allocate()
    encoder.launch(why)


@rule("Reshape Flatten Unflatten", "gpu/primitives.cpp:170, 196, 235; copy.cpp:216; common/common.cpp:109, 146")
def reshape(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x, out = inputs[0], outputs[0]
    strides = _reshaped_strides(x, out)
    if strides is None:
        out.allocate()
        encoder.launch("copy: reshape")
        return
    out.share(x, strides)
    if x.row_contiguous:
        out.col_contiguous = out.size <= 1 or out.size == max(out.shape)


def _reshaped_strides(x: Array, out: Array) -> Shape | None:
    """Strides of a view of the new shape; None if there is none."""
    if x.row_contiguous:
        return out.strides
    if x.ndim == 0:
        return (0,) * out.ndim
    sizes, strides = [x.shape[0]], [x.strides[0]]  # collapse_contiguous_dims of one array: keeps a first axis of 1
    for n, stride in list(zip(x.shape, x.strides, strict=True))[1:]:
        if n == 1:
            continue
        if stride * n == strides[-1]:
            sizes[-1] *= n
            strides[-1] = stride
        else:
            sizes.append(n)
            strides.append(stride)
    found: list[int] = []
    j = 0
    for n in out.shape:
        if j < len(sizes) and sizes[j] % n == 0:
            sizes[j] //= n
            found.append(sizes[j] * strides[j])
            j += sizes[j] == 1
        elif n == 1:
            found.append(found[-1])
        else:
            return None
    return tuple(found)


@rule("AsType", "gpu/primitives.cpp:28")
def astype(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    copy(encoder, inputs[0], outputs[0], inputs[0].contiguous, "cast")


@rule("Full", "gpu/primitives.cpp:156")
def full(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x = inputs[0]
    copy(encoder, x, outputs[0], x.data_size != 1 and x.contiguous, "fill")


@rule("Contiguous", "gpu/primitives.cpp:50")
def contiguous(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """A view if the array lies in order and its buffer is at most 16 KB larger."""
    x, out = inputs[0], outputs[0]
    assert x.buffer is not None
    in_order = x.row_contiguous or (operation.arguments[0] and x.col_contiguous)
    if in_order and x.buffer.nbytes <= out.nbytes + 16384:
        out.share(x)
    else:
        copy(encoder, x, out, False, "copy: contiguous")


@rule("Concatenate", "gpu/primitives.cpp:45, slicing.cpp:14")
def concatenate(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """One copy for each input."""
    outputs[0].allocate()
    for x in inputs:
        if x.size:
            encoder.launch("concatenate: one input")


@rule("Pad", "gpu/primitives.cpp:180, gpu/slicing.cpp:18")
def pad(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    outputs[0].allocate()
    encoder.launch("pad: fill")
    encoder.launch("pad: copy")


@rule("SliceUpdate", "indexing.cpp:733")
def slice_update(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """All that stays is copied first, unless it is donated."""
    _copy_base(encoder, inputs[0], outputs[0], inputs[0].contiguous and inputs[0].size == inputs[0].data_size)
    encoder.launch("slice update: new part")


@rule("DynamicSlice", "gpu/primitives.cpp:83, slicing.cpp:45")
def dynamic_slice(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    outputs[0].allocate()
    encoder.launch("dynamic slice: offset")
    encoder.launch("dynamic slice: copy")


@rule("DynamicSliceUpdate", "gpu/primitives.cpp:110, slicing.cpp:45")
def dynamic_slice_update(
    encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]
) -> None:
    """Copy of what stays (unless donated), offset, new part."""
    _copy_base(encoder, inputs[0], outputs[0], inputs[0].contiguous and inputs[0].size == inputs[0].data_size)
    encoder.launch("dynamic slice update: offset")
    encoder.launch("dynamic slice update: new part")


def _copy_base(encoder: Encoder, x: Array, out: Array, vector: bool) -> None:
    copy(encoder, x, out, vector and x.data_size != 1, "copy: all that an update leaves as it was")


@rule("ScatterAxis Scatter", "indexing.cpp:522, 232")
def scatter(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    _copy_base(encoder, inputs[0], outputs[0], inputs[0].row_contiguous)
    encoder.launch("scatter")


@rule("Gather GatherAxis", "indexing.cpp:57, 441")
def gather(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    outputs[0].allocate()
    encoder.launch("gather")


# ---- Elementwise ----------------------------------------------------------------------------------------------------


@rule("Arange RandomBits", "primitives.cpp:29, 134")
def generator(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    outputs[0].allocate()
    encoder.launch(operation.name.lower())


@rule(" ".join(sorted(UNARY - {"AsType", "Remainder"})), "unary.cpp:16, common/unary.h:10")
def unary(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x, out = inputs[0], outputs[0]
    if x.contiguous and x.donatable_to(out):
        out.share(x)
    else:
        out.allocate(like=x if x.contiguous else None)
    encoder.launch(operation.name)


@rule(" ".join(sorted(BINARY | {"Remainder"})), "binary.cpp:65, common/binary.h:19, 37")
def binary(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    (a, b), out = inputs, outputs[0]
    scalars = a.data_size == 1, b.data_size == 1
    donors: list[Array] = []
    like: Array | None = None
    if all(scalars):
        _scalar(out, a)
        encoder.launch(operation.name)
        return
    if scalars[0] and b.contiguous:
        donors, like = [b], b
    elif scalars[1] and a.contiguous:
        donors, like = [a], a
    elif (a.row_contiguous and b.row_contiguous) or (a.col_contiguous and b.col_contiguous):
        donors, like = [a, b], a
    else:
        donors = [x for x in (a, b) if x.row_contiguous and x.size == out.size]
    _take_over(out, donors, like)
    encoder.launch(operation.name)


@rule("Select", "ternary.cpp:11, common/ternary.h:19, 44")
def select(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    out = outputs[0]
    if all(x.data_size == 1 for x in inputs):
        _scalar(out, inputs[1])
    elif all(x.row_contiguous for x in inputs) or all(x.col_contiguous for x in inputs):
        _take_over(out, inputs, inputs[1])
    else:
        _take_over(out, [x for x in inputs if x.row_contiguous], None)
    encoder.launch(operation.name)


def _scalar(out: Array, like: Array) -> None:
    out.allocate(like=like)


def _take_over(out: Array, donors: Sequence[Array], like: Array | None) -> None:
    """Put an output into the first buffer that may be donated, or into one of its own."""
    for x in donors:
        if x.donatable_to(out):
            out.share(x)
            return
    out.allocate(like=like)


@rule("Compiled", "compiled.cpp:257, common/compiled.cpp:78, 108")
def compiled(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """One launch, however its inputs are laid out."""
    vectors = [x for x in inputs if x.ndim]
    same = [x for x in vectors if x.shape == outputs[0].shape]
    all_same = len(same) == len(vectors)
    in_order = all_same and (all(x.row_contiguous for x in same) or all(x.col_contiguous for x in same))
    if len(vectors) > 1:
        together = in_order
    elif vectors:
        together = all_same and vectors[0].contiguous
    else:
        together = not outputs[0].shape
    free = list(outputs)
    like = next((x for x in inputs if x.size == outputs[0].size), None)
    for x in vectors if together else inputs:
        fits = bool(free) and x.dtype.size == free[0].dtype.size and x.donatable
        if fits and (together or (x.row_contiguous and x.size == free[0].size)):
            free.pop(0).share(x)
    for out in free:
        out.allocate(like=like if together else None)
    encoder.launch(f"fused {_chain(operation.arguments[0])}")


def _chain(names: Sequence[str]) -> str:
    """The operations of a fused kernel without its broadcasts, at most five by name."""
    work = [name for name in names if name != "Broadcast"]
    return "·".join(work[:5]) + (f" and {len(work) - 5} more" if len(work) > 5 else "")


# ---- Norms, softmax, attention --------------------------------------------------------------------------------------


@rule("RMSNorm LayerNorm Softmax", "normalization.cpp:17, 219; softmax.cpp:15")
def norm(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """A copy first, unless rows lie whole and one behind the other."""
    x, out = inputs[0], outputs[0]
    in_place = x.contiguous and x.strides[-1] == 1
    if in_place and x.ndim > 1 and operation.name != "Softmax":
        in_place = x.strides[-2] in (0, x.shape[-1]) or x.shape[-2] == 1
    if not in_place:
        whole = copied(encoder, x, f"input of {operation.name}")
        out.share(whole)
        whole.buffer.users -= 1  # only the output stays in it
    elif x.donatable:
        out.share(x)
    else:
        out.allocate(like=x)
    encoder.launch(operation.name)


@rule("LogSumExp", "logsumexp.cpp:14")
def logsumexp(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x = inputs[0]
    if not (x.contiguous and x.strides[-1] == 1):
        copied(encoder, x, "input of LogSumExp")
    outputs[0].allocate()
    encoder.launch(operation.name)


@rule("RoPE", "rope.cpp:14")
def rope(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x, out, dims = inputs[0], outputs[0], operation.arguments[0]
    *middle, T, D = x.shape[1:]
    N = math.prod(middle)
    axes = x.ndim
    while axes > 3 and x.shape[-axes] == 1:
        axes -= 1
    heads_behind = x.ndim == 4 and x.strides[:3] == (T * N * D, D, N * D)
    if dims < D:
        copy(encoder, x, out, x.row_contiguous, "copy: dimensions that RoPE leaves as they were")
    elif x.row_contiguous and x.donatable:
        out.share(x)
    elif x.row_contiguous or axes == 3 or heads_behind:
        out.allocate()
    else:
        copy(encoder, x, out, False, "copy: input of RoPE")
    encoder.launch("RoPE")


@rule("ScaledDotProductAttention", "scaled_dot_product_attention.cpp:773")
def attention(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """Of up to 8 queries, which may take two passes over the keys, or of more, where it is one kernel."""
    q, k, v, *_ = inputs
    if q.shape[2] > 8:
        _full_attention(encoder, (q, k, v), outputs[0])
        return
    if not q.row_contiguous and not _transposed_query(q):
        copied(encoder, q, "queries")
    for x in (k, v):
        apart = 1 not in x.shape[:2] and x.strides[0] != x.strides[1] * x.shape[1]
        if x.strides[-1] != 1 or apart:
            copied(encoder, x, "keys or values")
    outputs[0].allocate()
    tokens, grouped = k.shape[2], k.shape[1] < q.shape[1]
    if (encoder.gpu.size in "ds" and tokens >= 1024) or (grouped and tokens >= 4096):
        encoder.launch("attention: pass 1")
        encoder.launch("attention: pass 2")
    else:
        encoder.launch("attention")


def _full_attention(encoder: Encoder, inputs: Sequence[Array], out: Array) -> None:
    """scaled_dot_product_attention.cpp:885. The heads of a token lie side by side in the result."""
    for x in inputs:
        if x.strides[-1] != 1:
            copied(encoder, x, "queries, keys or values")
    out.allocate()
    _, H, T, D = out.shape
    out.strides = (T * H * D, D, H * D, 1)
    out.row_contiguous = out.col_contiguous = False
    encoder.launch("attention")


def _transposed_query(q: Array) -> bool:
    if 1 not in q.shape[:2]:
        return False
    other = 1 if q.shape[0] == 1 else 0
    return q.strides[3] == 1 and q.strides[2] == q.shape[3] * q.shape[other] and q.strides[other] == q.shape[3]


# ---- Reductions -----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How a reduction reads its input."""

    kind: str  # "all", "row", "column" or "general"
    shape: list[int]  # of the reduced axes, merged
    strides: list[int]
    in_order: bool = False


@rule("Reduce", "reduce.cpp:969; common/reduce.cpp:29")
def reduce(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x, out = inputs[0], outputs[0]
    if out.size == x.size:
        copy(encoder, x, out, x.contiguous, "copy: a reduction of one")
        return
    out.allocate()
    axes = list(operation.arguments[1])
    plan = reduction_plan(x, axes)
    if plan.kind == "general":
        x = copied(encoder, x, "input of a reduction")
        plan = reduction_plan(x, axes)
    if plan.kind == "all":  # reduce.cpp:330: all_reduce_dispatch, up to 4 reads of 1024 threads
        encoder.launch("reduction of all")
        if x.size > 4 * 1024:
            encoder.launch("reduction of all: pass 2")
    elif plan.kind == "row":  # reduce.cpp:557: one of three kernels
        encoder.launch(ROW)
    else:
        reduce_columns(encoder, plan, out.size)


def reduce_columns(encoder: Encoder, plan: Plan, out_size: int) -> None:
    """strided_reduce_general_dispatch, reduce.cpp:937."""
    reduced, stride = math.prod(plan.shape), plan.strides[-1]
    encoder.launch("column reduction")
    if reduced < 32:
        return
    if (stride < 32 and reduced >= 1024) or (reduced > 256 and out_size / 32 < 1024):
        encoder.launch("column reduction: pass 2")


def reduction_plan(x: Array, axes: list[int]) -> Plan:
    """get_reduction_plan, common/reduce.cpp:29."""
    if x.size == x.data_size and len(axes) == x.ndim and x.contiguous:
        return Plan("all", [], [])
    if x.row_contiguous:
        merged = [(x.shape[axes[0]], x.strides[axes[0]])]
        for before, axis in itertools.pairwise(axes):
            if axis - 1 == before and x.shape[axis] > 1:
                merged[-1] = (merged[-1][0] * x.shape[axis], x.strides[axis])
            else:
                merged.append((x.shape[axis], x.strides[axis]))
        merged = [(n, s) for n, s in merged if n != 1]
        if merged[-1][1] >= 1:
            kind = "row" if merged[-1][1] == 1 else "column"
            return Plan(kind, [n for n, _ in merged], [s for _, s in merged], True)
    found = sorted(
        ((x.shape[a], x.strides[a]) for a in axes if x.shape[a] > 1), key=lambda pair: (pair[1] != 0, -pair[1])
    )
    for i in range(len(found) - 1, 0, -1):
        (n, s), (m, t) = found[i], found[i - 1]
        if t == n * s:
            found[i - 1 : i + 1] = [(n * m, s)]
    shape, strides = [n for n, _ in found], [s for _, s in found]
    if strides[-1] == 1:
        return Plan("row", shape, strides)
    if strides[-1] > 1 and _lies_behind(x, axes, strides[-1]):
        return Plan("column", shape, strides)
    return Plan("general", shape, strides)


def _lies_behind(x: Array, axes: list[int], stride: int) -> bool:
    """Whether all between two reduced elements is other axes in order."""
    size, expanded = 1, False
    for i in range(x.ndim - 1, -1, -1):
        if i == axes[-1] or (x.strides[i] == 0 and x.shape[i] == 1):
            continue
        if x.strides[i] == 0:
            expanded = True
            break
        if x.strides[i] != size and x.shape[i] != 1:
            break
        size *= x.shape[i]
    return size > stride or (size == stride and not expanded)


# ---- Products -------------------------------------------------------------------------------------------------------


class Product(NamedTuple):
    """A matrix product of M rows, after batches were folded into rows where they can be."""

    M: int
    N: int
    K: int
    batch: int
    transposed: tuple[bool, bool]
    leading: tuple[int, int]  # strides of the rows
    batch_strides: tuple[list[int], list[int]]

    @property
    def sizes(self) -> str:
        batch = f"{self.batch} x " if self.batch > 1 else ""
        return f"{batch}[{self.M}, {self.K}] x [{self.K}, {self.N}]"


@rule("Matmul AddMM", "matmul.cpp:1451, 1593")
def matmul(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    a, b, *c = inputs
    out = outputs[0]
    out.allocate()
    a, b, product = _product(encoder, a, b, c[0] if c else None, out)
    M, N, _, batch, *_ = product
    if not c and M == N == batch == 1 and a.row_contiguous and b.row_contiguous:
        for part in ("parts", "sum", "cast"):  # matmul.cpp:1044, dot_product
            encoder.launch(f"dot product {product.sizes}: {part}")
    elif _uses_wide_gemv(encoder.gpu, out.dtype, product):
        encoder.launch(f"wide gemv {product.sizes}")
    elif min(M, N) == 1:
        encoder.launch(f"gemv {product.sizes}")
    elif _splits_k(encoder.gpu, a.dtype, product):
        encoder.launch(f"gemm {product.sizes}: parts of K")
        encoder.launch(f"gemm {product.sizes}: {SPLIT_K_REDUCE}")
    else:
        encoder.launch(f"gemm {product.sizes}")


def _product(encoder: Encoder, a: Array, b: Array, c: Array | None, out: Array) -> tuple[Array, Array, Product]:
    """The inputs, copied where a matrix is neither of rows nor of columns; batches folded (matmul.cpp:1475)."""
    M, K, N = a.shape[-2], a.shape[-1], b.shape[-1]
    a, transpose_a, lda = _rows_or_columns(encoder, a, M == 1)
    b, transpose_b, ldb = _rows_or_columns(encoder, b, N == 1)
    folded = [x for x in (a, b, c) if x is not None]
    shape, strides = collapsed(a.shape[:-2], [x.strides[:-2] for x in folded])
    shape, strides = (shape, strides) if shape else ([1], [[0]] * len(folded))
    batch = out.size // (M * N)
    one_matrix = len(shape) == 1 and strides[1][-1] == 0
    in_order = a.strides[-2] == K and strides[0][-1] == M * K
    addend = c is None or strides[2][-1] == M * c.strides[-2]
    if batch > 1 and not transpose_a and one_matrix and in_order and addend:
        M, batch, strides = M * shape[-1], 1, [[0]] * len(folded)
    product = Product(M, N, K, batch, (transpose_a, transpose_b), (lda, ldb), (strides[0], strides[1]))
    return a, b, product


def _rows_or_columns(encoder: Encoder, x: Array, vector: bool) -> tuple[Array, bool, int]:
    """check_transpose, matmul.cpp:27: the matrix, whether its columns lie whole, and the stride of the others."""
    row, column = x.strides[-2:]
    if column == 1 and (not vector or row == x.shape[-1]):
        return x, False, row
    if row == 1 and (not vector or column == x.shape[-2]):
        return x, True, column
    return copied(encoder, x, "input of a product"), False, x.shape[-1]


def _uses_wide_gemv(gpu: Gpu, dtype: mx.Dtype, product: Product) -> bool:
    """gemv_wide_config, matmul.cpp:1299: 2 to 15 rows, half precision, from the M3 on. Offsets count as aligned."""
    aligned = all(s % 4 == 0 for s in (*product.leading, *product.batch_strides[0], *product.batch_strides[1]))
    shapes = 1 < product.M <= 15 and product.N > 1 and product.K % 4 == 0
    transposed = product.transposed == (False, True)
    return gpu.generation >= 15 and transposed and shapes and aligned and dtype in (mx.float16, mx.bfloat16)


def _splits_k(gpu: Gpu, dtype: mx.Dtype, product: Product) -> bool:
    """steel_matmul_axpby, matmul.cpp:915 to 951: whether K is cut into parts that a second kernel sums."""
    M, N, K, batch, *_ = product
    if batch > 1:
        return False
    if gpu.has_nax:  # also float32, as TF32
        longest = max(M, N)
        return 3 * longest <= K or (longest <= 1024 and 2 * longest < K)
    tiles, limit = -(-M // 16) * -(-N // 16), 2048 if gpu.size in "sd" else 1024
    return tiles <= limit and K // 16 >= 8 and max(M, N) <= K


@rule("QuantizedMatmul", "quantized.cpp:1782")
def quantized_matmul(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    x, w, *_ = inputs
    out = outputs[0]
    group_size, bits, _, transpose_w = operation.arguments
    out.allocate()
    for y in inputs:
        if not _is_matrix(y):
            copied(encoder, y, "input of a quantized product")
    K, N = x.shape[-1], out.shape[-1]
    M = x.size // K if w.ndim == 2 and (x.row_contiguous or not _is_matrix(x)) else x.shape[-2]
    sizes = f"{bits} bits [{M}, {K}] x [{K}, {N}]"
    limit = _most_rows(encoder.gpu, K, N) if transpose_w else 4
    if limit <= M:
        parts = _parts(M, N, K, group_size) if transpose_w and out.size == M * N else 1
        encoder.launch(f"qmm {sizes}" + (": parts of K" if parts > 1 else ""))
        if parts > 1:
            reduce_columns(encoder, Plan("column", [parts], [M * N], True), out.size)
    elif transpose_w or K < 1024:
        encoder.launch(f"{'qmv' if transpose_w else 'qvm'} {sizes}")
    else:
        encoder.launch(f"qvm {sizes}: parts of K")
        reduce_columns(encoder, Plan("column", [32 if K > 8192 else 8], [M * N], True), out.size)


def _is_matrix(x: Array) -> bool:
    """ensure_row_contiguous_matrix, quantized.cpp:65."""
    return x.strides[-1] == 1 and (x.ndim < 2 or x.strides[-2] == x.shape[-1])


def _most_rows(gpu: Gpu, K: int, N: int) -> int:
    """get_qmv_batch_limit, quantized.cpp:85: from how many rows on it is a matrix product."""
    if gpu.generation >= 17 and gpu.size != "d":
        limits = (33, 25, 13)
    elif gpu.generation >= 15 and gpu.size != "d":
        limits = (13, 15, 13)
    elif gpu.size == "d":
        limits = (32, 18, 12)
    else:
        limits = (14, 10, 6)
    return limits[0 if max(K, N) <= 2048 else 1 if max(K, N) <= 4096 else 2]


def _parts(M: int, N: int, K: int, group_size: int) -> int:
    """qmm_splitk, quantized.cpp:1120: into how many parts K is cut."""
    align = max(group_size, 32)
    parts = min(max(1, 512 // (-(-N // 32) * -(-M // 32))), K // align)
    while parts > 1 and K % (parts * align):
        parts -= 1
    return parts


@rule("Quantize", "quantized.cpp:231, 2109")
def quantize(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    for x in inputs:
        if not x.row_contiguous:
            copied(encoder, x, "input of a quantization")
    for out in outputs:
        out.allocate()
    encoder.launch("dequantize" if len(outputs) == 1 else "quantize")


# ---- Kernels of a user ----------------------------------------------------------------------------------------------


@rule("CustomKernel", "custom_kernel.cpp:13")
def custom_kernel(encoder: Encoder, operation: Operation, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """One launch, and a copy of each input that does not lie in order, if the kernel asks for that."""
    name = kernel_name(operation.arguments)
    if ensures_row_contiguous(operation.arguments):
        for x in inputs:
            if not x.row_contiguous:
                copied(encoder, x, f"input of {name}")
    for out in outputs:
        out.allocate()
    encoder.launch(f"kernel {name}")


def kernel_name(arguments: Sequence[Any]) -> str:
    """The name that a kernel was given, without what MLX appends: template arguments and dtypes."""
    name = arguments[0].removeprefix("custom_kernel_")
    return re.sub(r"_+(\d|float|half|bfloat|int|uint|bool|true|false).*", "", name)


def ensures_row_contiguous(arguments: Sequence[Any]) -> bool:
    """CustomKernel's state (mlx/fast_primitives.h): name, source, grid, threadgroup, what each input asks for, this."""
    return bool(arguments[9])
