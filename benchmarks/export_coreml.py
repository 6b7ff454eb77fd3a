"""How long an export to Core ML takes, and how much memory: random models of the released sizes.

    python benchmarks/export_coreml.py 350M
    python benchmarks/export_coreml.py 1.3B --weights int8 --kind mlp
    python benchmarks/export_coreml.py 125M --weights lut4 --coreai

The model directory and the package are made in a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIZES = {  # hidden size, intermediate size, layers, heads
    "125M": (768, 2048, 12, 12),
    "350M": (1024, 2736, 24, 16),
    "760M": (1536, 4096, 24, 16),
    "1.3B": (2048, 5504, 24, 32),
}


def make(folder: Path, size: str, kind: str) -> None:
    """A random float16 model with all flags set."""
    from mlx_ttt.loading import bundled_model  # before MLX, so that OpenBLAS is found
    from mlx_ttt.model import Model, ModelArgs

    import mlx.core as mx  # isort: skip
    from mlx.utils import tree_flatten  # isort: skip

    hidden, intermediate, layers, heads = SIZES[size]
    args = ModelArgs(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ttt_layer_type=kind,
        pre_conv=True,
        share_qk=True,
        use_gate=True,
    )
    model = Model(args)
    follows = model.cast_predicate
    weights = tree_flatten(model.parameters())
    del model
    mx.save_safetensors(
        str(folder / "model.safetensors"), {name: w.astype(mx.float16) if follows(name) else w for name, w in weights}
    )
    (folder / "config.json").write_text(json.dumps(asdict(args)))
    for file in bundled_model().glob("tokenizer*"):  # of another vocabulary: a bundle wants some tokenizer
        shutil.copyfile(file, folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--kind", choices=["linear", "mlp"], default="linear")
    parser.add_argument("--weights", choices=["float16", "int8", "int4", "lut4"], default="float16")
    parser.add_argument("--coreai", action="store_true", help="a bundle for Core AI instead")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.make:
        make(given.make, given.size, given.kind)
        return
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder, "model"), Path(folder, "Model.mlpackage")
        model.mkdir()
        # In a process of its own, so that its memory is not counted.
        subprocess.run([sys.executable, __file__, given.size, "--kind", given.kind, "--make", model], check=True)
        if given.coreai:
            from mlx_ttt.cli.coreai import coreai

            coreai([str(model), str(Path(folder, "Bundle")), "--weights", given.weights], standalone_mode=False)
            print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
            return
        from mlx_ttt.cli.coreml import coreml

        coreml([str(model), str(out), "--weights", given.weights, "--no-companions"])


if __name__ == "__main__":
    main()
