"""Count what MLX launches on a Mac's GPU for one decoded token, or a prompt, on any machine.

    python -m benchmarks.launches                          # the preset 125m, all cases, beside a Transformer of mlx-lm
    python -m benchmarks.launches --preset 1.3b --layer linear --bits 4 --batch 1
    python -m benchmarks.launches --model DIR              # ours, or mlx-lm's if it has no kernels of its own
    python -m benchmarks.launches --tokens 2048            # a prompt
    python -m benchmarks.launches --rules                  # where in MLX's sources each rule was read

The last line is the largest number of launches a layer, of all cases of our models and of all GPUs.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.models import SIZES, configuration

from . import report
from .decoding import Case, kinds
from .rules import UnknownOperation

MODELS = {"linear": "TTT-Linear", "mlp": "TTT-MLP"}
BACKBONES = ("mamba", "transformer")


def main() -> None:
    options = _options()
    if options.rules:
        print(report.rules())
        return
    results = {}
    try:
        for case in cases(options):
            for kind, token in kinds(case).items():
                result = report.Result(token)
                results[report.name(case), kind] = result
                if not options.brief:
                    print(report.detailed(f"## {report.name(case)}, {kind}", result), end="\n\n", flush=True)
    except (UnknownOperation, OSError, ValueError) as error:
        print(f"benchmarks.launches: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(report.overview(results))
    ours = {name: x for name, x in results.items() if name[0].startswith("TTT")} or results
    print(f"\nlaunches a layer: {max(x.worst for x in ours.values())}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, metavar="DIR", help="a model directory, of which config.json is read")
    parser.add_argument(
        "--preset", default="125m", choices=[name.lower() for name in SIZES], help="a size of the paper"
    )
    parser.add_argument("--layer", choices=list(MODELS), help="the inner model; both if not given")
    parser.add_argument("--backbone", choices=BACKBONES, help="both if not given")
    parser.add_argument(
        "--bits", type=int, choices=(2, 3, 4, 5, 6, 8, 16), help="of the weights; 16 and 4 if not given"
    )
    parser.add_argument("--batch", type=int, help="sequences; 1 and 8 if not given")
    parser.add_argument("--tokens", type=int, default=1, help="of a prompt, read in one call; 1 if not given: decoding")
    parser.add_argument("--brief", action="store_true", help="the last table only")
    parser.add_argument("--rules", action="store_true", help="where in MLX's sources each rule was read")
    return parser.parse_args()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """What the options ask for; without `--model` also a Transformer of the same size as mlx-lm runs it."""
    for config in _configurations(options):
        for bits in _bits(options, config):
            for batch in [options.batch] if options.batch else [1, 8]:
                yield Case(config, bits=None if bits == 16 else bits, batch=batch, tokens=options.tokens)


def _bits(options: argparse.Namespace, config: dict[str, Any]) -> list[int]:
    if options.bits:
        return [options.bits]
    if "quantization" in config:
        return [config["quantization"]["bits"]]
    return [16] if options.model else [16, 4]


def _configurations(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if options.model:
        import mlx_ttt  # noqa: F401  registers our models with mlx-lm

        yield json.loads((options.model / "config.json").read_text(encoding="utf-8"))
        return
    size = next(size for name, size in SIZES.items() if name.lower() == options.preset)
    for layer in [options.layer] if options.layer else MODELS:
        for backbone in [options.backbone] if options.backbone else BACKBONES:
            mamba = backbone == "mamba"
            yield configuration(MODELS[layer], size) | {"pre_conv": mamba, "share_qk": mamba, "use_gate": mamba}
    yield configuration("Transformer", size)


if __name__ == "__main__":
    main()
