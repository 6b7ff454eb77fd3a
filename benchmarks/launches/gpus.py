"""The GPUs whose rules are applied: what MLX asks of a Metal device before it chooses kernels.

mlx/backend/metal/device.cpp: Device::Device (the architecture's name ends in generation and size), is_nax_available.
"""

from __future__ import annotations

from typing import NamedTuple


class Gpu(NamedTuple):
    """A GPU's architecture, such as applegpu_g13g.

    Attributes:
        generation: 13 (M1), 14 (M2), 15 (M3), 16 (M4), 17 (M5).
        size: "g" (base and Pro), "s" (Max) or "d" (Ultra).
    """

    name: str
    generation: int
    size: str

    @property
    def has_nax(self) -> bool:
        """Whether it has the matrix units that MLX calls NAX; with macOS 26.2 or later."""
        return self.generation >= 17


GPUS = (Gpu("M1", 13, "g"), Gpu("M4 Max", 16, "s"), Gpu("M5", 17, "g"))
