"""Backends: other ways to compute what the network computes. Each is one room and registers itself.

    cpu/     C on a Linux CPU
    metal/   Metal kernels on Apple silicon, and the decode step as one compiled function

See `mlx_ttt/network/backend.py` for what a backend may replace. `mlx_ttt/model.py` plugs them in.
"""
