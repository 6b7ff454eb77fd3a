"""A model directory as a Core ML package: program, packaging, verification, and what an app needs beside it."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys

from ..errors import TTTError


def require_coremltools() -> None:
    """Import coremltools without its remarks.

    Raises:
        TTTError: it is not installed, or has no native parts for this Python.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it imports transformers, if that is there
    if importlib.util.find_spec("coremltools") is None:
        raise TTTError('Core ML packages need coremltools: pip install "mlx-ttt[coreml]"')
    if importlib.util.find_spec("coremltools.libmilstoragepython") is None:
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise TTTError(f"coremltools has no native parts for Python {here}: use Python 3.10 to 3.13")
