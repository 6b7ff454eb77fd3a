"""Linux CPUs: C code for what MLX's CPU operations are slow at, and weights as a CPU reads them best.

library.py       finds OpenBLAS and compiles c/*.c, before MLX is imported
calls.py         from MLX arrays to C and back
weights.py       matrices in every precision, as they lie in memory
operations.py    norms, activations, convolutions and rotations
rule.py          the update rule
prefill.py       prompts, some tokens at a time
block.py         a block whose gradient is to be taken
decode_step.py   one token of each sequence through the whole network
prepare.py       a model's layers and memory as a CPU runs them best
"""


def register() -> None:
    """Plug this backend in. Importing these modules does it; none of them may be imported before MLX can be."""
    from . import block, decode_step, operations, prefill, prepare, rule  # noqa: F401
