"""Size and bits per byte of the bundled model in every precision that `convert.py mlx` writes.

    python benchmarks/quantization.py

Reads The Tempest, 38 835 tokens, in one pass. On two cores a row takes half a minute.
"""

from __future__ import annotations

import math
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx_ttt  # noqa: E402  before MLX, so that OpenBLAS is found

import mlx.core as mx  # noqa: E402  isort: skip
from mlx_ttt.checkpoint.convert import convert  # noqa: E402
from mlx_ttt.checkpoint.quantization import Scheme  # noqa: E402
from mlx_ttt.text.tokenizer import encode_long  # noqa: E402
from mlx_ttt.training.evaluate import losses  # noqa: E402

TEXT = ROOT / "tests" / "data" / "tempest.txt"
PRECISIONS = {
    "float16": {},  # as it ships
    "bfloat16": {"dtype": mx.bfloat16},
    **{f"{bits} bits": {"dtype": mx.float16, "quantize": Scheme(bits=bits)} for bits in (8, 6, 5, 4, 3, 2)},
    **{
        f"{bits} bits, groups of 32": {"dtype": mx.float16, "quantize": Scheme(bits=bits, group_size=32)}
        for bits in (4, 3)
    },
    **{
        recipe: {"dtype": mx.float16, "quantize": Scheme(), "recipe": recipe}
        for recipe in ("mixed_4_6", "mixed_3_6", "mixed_3_4", "mixed_2_6")
    },
    **{mode: {"dtype": mx.bfloat16, "quantize": Scheme(mode=mode)} for mode in ("mxfp8", "mxfp4", "nvfp4")},
}


def main() -> None:
    exact = None
    text = TEXT.read_bytes().decode("utf-8")
    print(
        "| precision | size | bits per weight | bits per byte | against float16 | seconds |\n|---|---|---|---|---|---|"
    )
    for name, options in PRECISIONS.items():
        with tempfile.TemporaryDirectory() as folder:
            report = convert(mlx_ttt.bundled_model(), Path(folder) / "model", **options)
            model, tokenizer = mlx_ttt.load(Path(folder) / "model")
        start = time.perf_counter()
        nats = losses(model, encode_long(tokenizer, text))
        found = float(nats.sum(dtype="float64")) / math.log(2) / len(text.encode())
        seconds = time.perf_counter() - start
        exact = exact or found
        per_weight, excess = 8 * report.nbytes / report.parameters, 100 * (found / exact - 1)
        size = f"{report.nbytes / 1e6:.2f} MB"
        print(f"| {name} | {size} | {per_weight:.2f} | {found:.5f} | {excess:+.3f} % | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
