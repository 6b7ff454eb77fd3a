"""The model with all backends and sharding plugged in, as users, mlx-lm and saved model directories import it."""

from . import distributed
from .backends import cpu, metal
from .network.args import ModelArgs
from .network.model import Model

cpu.register()
metal.register()
distributed.register()

__all__ = ["Model", "ModelArgs"]
