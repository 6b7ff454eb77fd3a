"""Several machines: one model split over them, and how they keep together. On MLX's own `mx.distributed`.

group.py      a process joins the others
exchange.py   sums, maxima and gathered arrays, on one stream
peers.py      watches whether the neighbours are still there
files.py      files that only the first machine has, for all
sharding.py   splits a model: heads, projections and feed-forward networks

Summing gradients over machines is in `mlx_ttt/training/distributed.py`.
"""


def register() -> None:
    """Plug sharding in. Importing the module does it."""
    from . import sharding  # noqa: F401
