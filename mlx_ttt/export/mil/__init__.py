"""The exported network as a Core ML package.

    operations.py   the operations in MIL, Core ML's intermediate language
    program.py      inputs, state and outputs
    conversion.py   from a program to files
    package.py      the finished package and its companions
    interpreter.py  runs a program where there is no Core ML
    session.py      a saved package and who keeps its state
    core_ai.py       runs a saved package on Core AI's runtime
    runners.py      what runs a package on this machine

Call `require_coremltools` before importing any of them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import platform

from ...errors import TTTError


def require_coremltools() -> None:
    """Check for coremltools, and keep it from printing remarks when it is imported.

    Raises:
        TTTError: it is not installed, or has no native parts for this Python.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # of transformers, which coremltools imports
    if importlib.util.find_spec("coremltools") is None:
        raise TTTError('Core ML packages need coremltools: pip install "mlx-ttt[coreml]"')
    if importlib.util.find_spec("coremltools.libmilstoragepython") is None:
        raise TTTError(
            f"coremltools has no native parts for Python {platform.python_version()}: use Python 3.10 to 3.13"
        )
