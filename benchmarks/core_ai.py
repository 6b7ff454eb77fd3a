"""How fast an exported model is on Core AI's runtime here, and whether its memory stays flat.

    python benchmarks/core_ai.py                     the bundled model, float32
    python benchmarks/core_ai.py MODEL --calls 10000

Figures are the median of rounds with the least and the largest. MLX runs its operations, without our C code. The
program is made in a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["MLX_TTT_KERNELS"] = "0"  # MLX operations only
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

PROMPT = 1024


def rounds(work: Callable[[], object], tokens: int, n: int) -> str:
    """Milliseconds per token: median, least and largest of n rounds."""
    seconds = []
    for _ in range(n):
        start = time.perf_counter()
        work()
        seconds.append((time.perf_counter() - start) / tokens * 1e3)
    seconds.sort()
    return f"{seconds[n // 2]:.2f} ({seconds[0]:.2f} to {seconds[-1]:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=1000, help="of decode, over which memory is watched")
    given = parser.parse_args()

    import numpy as np

    from mlx_ttt.export.coreai import require_coreai  # before MLX, so that OpenBLAS is found
    from mlx_ttt.loading import bundled_model, load_model

    import mlx.core as mx  # isort: skip

    require_coreai()
    from mlx_ttt.export.coreai.program import build, save
    from mlx_ttt.export.coreai.runtime import Main, Runtime, start_session
    from mlx_ttt.export.functions import Options
    from mlx_ttt.export.layout import StateLayout

    model, _ = load_model(given.model or bundled_model())
    layout, K = StateLayout.of(model.args), model.args.mini_batch_size
    ids = [int(id) for id in np.random.default_rng(0).integers(1, model.args.vocab_size, PROMPT)]

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        save(build(model, "float32", Options(compute="float32")), Path(folder, "model.aimodel"))
        made = time.perf_counter()
        with Runtime(Path(folder, "model.aimodel")) as runtime:
            print(f"made in {made - start:.0f} s, compiled and loaded in {time.perf_counter() - made:.0f} s")
            session, cache = start_session(runtime, layout, np.float32), model.make_cache()
            whole, single = Main(runtime, layout, np.float32), Main(runtime, layout, np.float32)

            def decode() -> None:
                for id in ids[: 4 * K]:
                    list(session.feed([id]))

            def in_mlx() -> None:
                for id in ids[: 4 * K]:
                    mx.eval(model(mx.array([[id]]), cache=cache))

            def token_by_token() -> None:
                for id in ids[: 4 * K]:
                    single.read([id])

            print("milliseconds per token: median (least to largest)")
            for name, work, tokens in (
                ("MLX operations, one token", in_mlx, 4 * K),
                ("decode", decode, 4 * K),
                ("prefill", lambda: list(session.feed(ids[: 8 * K])), 8 * K),
                ("main, one token", token_by_token, 4 * K),
                (f"main, {PROMPT} tokens", lambda: whole.read(ids), PROMPT),
            ):
                work()
                print(f"{name:28} {rounds(work, tokens, given.rounds)}", flush=True)

            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for i in range(given.calls):
                list(session.feed([ids[i % PROMPT]]))
            after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(f"peak memory {before / 1e3:.0f} MB; after {given.calls} calls of decode {after / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
