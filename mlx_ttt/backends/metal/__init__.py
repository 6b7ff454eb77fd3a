"""Apple silicon: the kernels in metal/*.metal, and the decode step as one compiled function.

rule.py          the update rule as Metal kernels
decode_step.py   one token of each sequence through the whole network, traced once
block.py         the same through a block, in a dozen launches
prompt.py        many tokens through a block
layer.py         the kernels between a block's products and its update rule
side_by_side.py  matrices that multiply the same input, as one
"""


def register() -> None:
    """Plug this backend in. Importing these modules does it."""
    from . import block, decode_step, prompt, rule, side_by_side  # noqa: F401
