"""Size and bits per byte of the bundled model as a Core ML package, in every precision of `convert.py coreml`.

    python benchmarks/coreml_accuracy.py

Reads The Tempest, 38 835 tokens, in one pass, with the interpreter, which rounds as the package declares. Some minutes
a row.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import mlx_ttt  # noqa: E402  before MLX, so that OpenBLAS is found

import numpy as np  # noqa: E402  isort: skip
from mlx_ttt.export.mil.package import export  # noqa: E402
from mlx_ttt.export.mil.program import Options  # noqa: E402
from mlx_ttt.export.mil.session import interpreted  # noqa: E402
from mlx_ttt.text.tokenizer import encode_long  # noqa: E402
from mlx_ttt.training.evaluate import losses  # noqa: E402

TEXT = ROOT / "tests" / "data" / "tempest.txt"
PACKAGES = [("float16", "float16"), ("float16", "mixed"), ("int8", "float16"), ("int4", "float16")]


def nats(package: Path, ids: np.ndarray) -> float:
    """The cross entropy of all tokens but the first, summed."""
    session, total, read = interpreted(package)(), 0.0, 0
    for offset, logits in session.feed(ids[:-1]):
        targets, x = ids[read + 1 : offset + 1], logits.astype(np.float64)
        largest = x.max(axis=1)
        total += float((np.log(np.exp(x - largest[:, None]).sum(axis=1)) + largest - x[range(len(x)), targets]).sum())
        read = offset
    return total


def main() -> None:
    text = TEXT.read_bytes().decode("utf-8")
    model, tokenizer = mlx_ttt.load(mlx_ttt.bundled_model())
    ids = np.array(encode_long(tokenizer, text))
    bits = np.log(2) * len(text.encode())
    exact = losses(model, ids).sum(dtype=np.float64) / bits
    print(f"MLX in float32: {exact:.5f} bits per byte\n")
    print("| package | size | bits per byte | against it |\n|---|---|---|---|")
    for weights, compute in PACKAGES:
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder, "Model.mlpackage")
            options = Options(compute, all_logits=True)
            export(mlx_ttt.bundled_model(), package, weights=weights, options=options, companions=False)
            size = sum(file.stat().st_size for file in package.rglob("*") if file.is_file()) / 1e6
            found = nats(package, ids) / bits
        name = f"`--weights {weights}`" + (f" `--compute {compute}`" if compute != "float16" else "")
        print(f"| {name} | {size:.1f} MB | {found:.5f} | {100 * (found / exact - 1):+.4f} % |", flush=True)


if __name__ == "__main__":
    main()
