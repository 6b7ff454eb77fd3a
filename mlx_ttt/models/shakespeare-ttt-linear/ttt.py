"""For mlx-lm with `--trust-remote-code`; mlx-ttt itself does without this file."""

from mlx_ttt.model import Model, ModelArgs  # pip install mlx-ttt

__all__ = ["Model", "ModelArgs"]
