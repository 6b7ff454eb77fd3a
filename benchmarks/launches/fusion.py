"""What `mx.compile` makes of a traced function: chains of elementwise operations become one kernel each.

The rules of mlx/compile.cpp, compile_fuse (line 805). From the end of the function backwards, each operation that is
not yet part of a kernel gathers what it reads, and what that reads, as long as

- it is elementwise, a select or a broadcast (is_fusable, line 78), and not more than 11 operations away
  (max_compile_depth, line 24);
- everything that reads it is gathered too. A broadcast that others read as well is done twice instead (split_one);
- the kernel reads fewer than 24 arrays (max_compile_arrays, line 25);
- it is not an output of the function of another shape. One of the same shape is a second output of the kernel.

A kernel of one operation is no kernel. A broadcast alone never begins one.
"""

from __future__ import annotations

from .graph import BEGIN, END, Graph, Operation, Value

MAX_DEPTH = 11
MAX_ARRAYS = 24


def _names(text: str) -> set[str]:
    return set(text.split())


UNARY = _names(
    "Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType Ceil Cos Conjugate Cosh Remainder Erf ErfInv Exp Floor Log"
    " Log1p LogicalNot Negative Round Sigmoid Sign Sin Sinh Square Sqrt Tan Tanh Expm1 Real Imag BitwiseInvert"
)
BINARY = _names(
    "Add Divide Equal Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr LogAddExp Maximum Minimum Multiply"
    " NotEqual Power Subtract BitwiseBinary ArcTan2"
)
FUSABLE = UNARY | BINARY | {"Select", "Broadcast"}


def fused(graph: Graph) -> Graph:
    """The graph with every compiled function in it fused, and no markers."""
    replaced: dict[Value, Value] = {}
    operations = list(graph.operations)
    for end in [x for x in graph.operations if x.name == END]:
        members = _members(end, operations)
        operations = _spliced(operations, members, _Fusion(members, end.inputs).kernels())
    for x in graph.operations:
        if x.name in (BEGIN, END):
            replaced |= dict(zip(x.outputs, x.inputs, strict=True))

    def final(x: Value) -> Value:
        while x in replaced:
            x = replaced[x]
        return x

    operations = [x for x in operations if x.name not in (BEGIN, END)]
    for operation in operations:
        operation.inputs = [final(x) for x in operation.inputs]
    return Graph(graph.inputs, [final(x) for x in graph.outputs], graph.constants, _in_order(operations))


def _members(end: Operation, operations: list[Operation]) -> list[Operation]:
    """The operations of a compiled function, in their order."""
    found: set[Operation] = set()
    open_ = [x.operation for x in end.inputs]
    while open_:
        operation = open_.pop()
        if operation is None or operation in found or operation.name in (BEGIN, END):
            continue
        found.add(operation)
        open_ += [x.operation for x in operation.inputs]
    return [x for x in operations if x in found]


def _spliced(all_: list[Operation], old: list[Operation], new: list[Operation]) -> list[Operation]:
    members = set(old)
    return [x for x in all_ if x not in members] + new


def _in_order(operations: list[Operation]) -> list[Operation]:
    """Each behind what it reads."""
    ordered: dict[Operation, None] = {}
    made_by = {x: operation for operation in operations for x in operation.outputs}

    def visit(operation: Operation) -> None:
        stack = [(operation, iter(operation.inputs))]
        while stack:
            current, inputs = stack[-1]
            following = next((made_by[x] for x in inputs if x in made_by and made_by[x] not in ordered), None)
            if following is None:
                ordered[current] = None
                stack.pop()
            else:
                stack.append((following, iter(following.inputs)))

    for operation in operations:
        if operation not in ordered:
            visit(operation)
    return list(ordered)


class _Fusion:
    """One compiled function: its operations in order, and the values that it returns."""

    def __init__(self, operations: list[Operation], outputs: list[Value]):
        self._operations, self._outputs = operations, set(outputs)
        self._readers: dict[Value, list[Operation]] = {}
        for operation in operations:
            for x in operation.inputs:
                self._readers.setdefault(x, []).append(operation)

    def kernels(self) -> list[Operation]:
        """The function's operations, the fused ones among them as one `Compiled` each, in no order."""
        made: list[Operation] = []
        done: set[Value] = set()
        for operation in reversed(self._operations):
            if any(x in done for x in operation.outputs):
                continue
            gathered = self._gathered(operation)
            if len(gathered) <= 1:
                made.append(operation)
            else:
                kernel, inner = self._kernel(operation, gathered)
                made.append(kernel)
                done |= inner
        return made

    def _gathered(self, root: Operation) -> dict[Value, None]:
        """The values that a kernel ending in this operation computes."""
        gathered: dict[Value, None] = {}
        read: dict[Value, None] = {}  # by the kernel, as far as is known yet

        def gather(x: Value, depth: int) -> None:
            operation = x.operation
            if x in gathered:
                return
            elsewhere = x in self._outputs and x.shape != shape
            if depth >= MAX_DEPTH or operation is None or operation.name not in FUSABLE or elsewhere:
                read[x] = None
                return
            readers = self._readers.get(x, []) if depth else []
            if not all(reader.outputs[0] in gathered for reader in readers):
                if operation.name == "Broadcast" and len(read) < MAX_ARRAYS:
                    gather(self._split(x, gathered), depth)
                else:
                    read[x] = None
                return
            if x in self._outputs:
                read[x] = None
            else:
                read.pop(x, None)
            if len(read) >= MAX_ARRAYS:
                return
            gathered[x] = None
            for y in list(operation.inputs):
                gather(y, depth + 1)

        if root.name != "Broadcast" and root.name in FUSABLE:
            shape = root.outputs[0].shape
            gather(root.outputs[0], 0)
        return gathered

    def _split(self, x: Value, gathered: dict[Value, None]) -> Value:
        """The same broadcast once more, for those of its readers that are gathered."""
        assert x.operation is not None
        copy = Value(x.shape, x.dtype)
        copy.operation = Operation(x.operation.name, x.operation.arguments, list(x.operation.inputs), [copy])
        inside = [r for r in self._readers[x] if r.outputs[0] in gathered]
        for reader in inside:
            reader.inputs = [copy if y is x else y for y in reader.inputs]
        self._readers[copy] = inside
        self._readers[x] = [r for r in self._readers[x] if r.outputs[0] not in gathered]
        for y in copy.operation.inputs:
            self._readers.setdefault(y, []).append(copy.operation)
        return copy

    def _kernel(self, root: Operation, gathered: dict[Value, None]) -> tuple[Operation, set[Value]]:
        """The kernel, and the values inside it."""
        tape: dict[Value, None] = {}
        inputs: dict[Value, None] = {}

        def visit(x: Value) -> None:
            if x not in gathered:
                inputs.setdefault(x)
            elif x not in tape:
                assert x.operation is not None
                for y in x.operation.inputs:
                    visit(y)
                tape[x] = None

        last = root.outputs[0]
        visit(last)
        outputs = [x for x in tape if x in self._outputs and x is not last] + [last]
        names = [x.operation.name for x in tape if x.operation is not None]
        kernel = Operation("Compiled", [names], list(inputs), outputs)
        for x in inputs:
            readers = [r for r in self._readers.get(x, []) if r.outputs[0] not in gathered]
            self._readers[x] = [*readers, kernel]
        for x in tape:
            if x in outputs:
                if x is not last:
                    self._readers[x] = [r for r in self._readers.get(x, []) if r.outputs[0] not in gathered]
            else:
                self._readers.pop(x, None)
        for x in outputs:
            x.operation = kernel
        return kernel, set(tape) - {last}
