"""How long a user waits for the commands: whole processes, from their start."""

from __future__ import annotations

import subprocess
import sys
import time

from .protocol import ROOT

COMMANDS = {
    "generate.py --help": ["generate.py", "--help"],
    "convert.py --help": ["convert.py", "--help"],
    "first token of the bundled model": ["generate.py", "--prompt", "ROMEO:", "--max-tokens", "1"],
    "import mlx_lm, and what it imports to generate": ["-c", "import mlx_lm.generate"],
}


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each command in each round, to its end."""
    seconds = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, arguments in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    return seconds
