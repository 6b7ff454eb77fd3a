"""The exported network as a bundle for Core AI.

    compiler.py      what we use of Apple's compiler; the only file that imports its unversioned part
    operations.py    the operations in Core AI's graph language
    formats.py       how matrices are stored, in NumPy
    storage.py       the same in a graph
    state.py         the two forms of the state
    runner_main.py   `main`, which Apple's runner drives
    kernels.py       the update rule as our Metal kernels
    program.py       the functions as one program
    bundle.py        the finished bundle
    runtime.py       runs a program: Apple's own runtime, on Linux too
    child.py         the same in a process of its own
    verify.py        a bundle's answers beside the model's

Call `require_coreai` before importing any of them but `formats` and `state`.
"""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from ...errors import TTTError

VERSION = "1.0.0b3"


def require_coreai() -> None:
    """Check for coreai-core in the version whose compiler this room knows.

    Raises:
        TTTError: it is not installed, in another version, or not made for this Python or machine.
    """
    try:
        found = metadata.version("coreai-core")
    except metadata.PackageNotFoundError:
        if platform.python_version_tuple()[1] in ("9", "10"):  # it is Python 3
            raise TTTError(
                f"Core AI needs coreai-core, which wants Python 3.11 to 3.14; this is {platform.python_version()}"
            ) from None
        if sys.platform == "linux" and platform.machine() != "x86_64":
            raise TTTError(f"coreai-core is not made for Linux on {platform.machine()}, only on x86-64") from None
        raise TTTError('Core AI bundles need coreai-core: pip install "mlx-ttt[coreai]"') from None
    if found != VERSION:
        raise TTTError(
            f"coreai-core is {found}, and its compiler may differ from {VERSION}, which is known here:"
            f' pip install "coreai-core=={VERSION}"'
        )
