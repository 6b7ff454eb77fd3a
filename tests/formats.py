"""Writes a file of each format as this version writes it: `python -m tests.formats`, once for each new format.

What lies in tests/data/formats stays there and is read by the tests of every later version. A new format gets a folder
of its own beside the others; none is ever written again.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx_ttt

import mlx.core as mx  # isort: skip
from click.testing import CliRunner
from mlx.utils import tree_flatten
from tokenizers import Tokenizer, models

from mlx_ttt.cli import main
from mlx_ttt.learning import states
from mlx_ttt.model import Model
from mlx_ttt.training import checkpoint
from mlx_ttt.training.optimizer import Optimizer

from .models import configuration, official_weights

FORMATS = Path(__file__).parent / "data" / "formats"
READ = "abcabd"  # what the saved states have read
NEXT = "cabba"  # what is read after them


def write_model(out: Path) -> None:
    """A model directory of 8 kB of weights and a tokenizer with a token for each of a few letters."""
    args = configuration("linear", "111", hidden_size=8, intermediate_size=12, vocab_size=8)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        mx.save_safetensors(str(source / "model.safetensors"), official_weights(Model(args)))
        (source / "config.json").write_text(json.dumps({**vars(args), "model_type": "ttt"}))
        Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2, "c": 3, "d": 4}, [], unk_token="<unk>")).save(
            str(source / "tokenizer.json")
        )
        result = CliRunner().invoke(main, ["convert", "mlx", str(source), str(out)])
        assert result.exit_code == 0, result.output
    for name in ("ttt.py", "README.md"):
        (out / name).unlink()


def logits_after(model: Any, tokenizer: Any, state: mlx_ttt.TextState) -> list[list[float]]:
    """What the model says while it reads NEXT after a state."""
    ids = [*state.tokens[-1:], *tokenizer.encode(NEXT)]
    return model(mx.array([ids]), [c.copy() for c in state.cache], learning=state.learning)[0].tolist()


def write(out: Path) -> None:
    """The folder of a format. `out` does not exist."""
    out.mkdir(parents=True)
    write_model(out / "model")
    model, tokenizer = mlx_ttt.load(out / "model")
    plain = mlx_ttt.read(model, tokenizer, READ)
    rewindable = mlx_ttt.read(model, tokenizer, READ, rewind=True, learning=0.5)
    rewindable.learning = 0.5
    made = {"plain": plain, "rewindable": rewindable, "frozen": states.freeze(model, plain)}
    for name, state in made.items():
        mlx_ttt.save_state(out / f"{name}.state", state, model, tokenizer)

    weights = dict(tree_flatten(model.parameters()))
    optimizer = Optimizer("adamw", list(weights), 0.1)
    weights = optimizer.update(weights, weights, 1e-3)
    saved = checkpoint.State(3, weights, optimizer.arrays, {1: plain.cache}, random=7)
    (out / "training").mkdir()
    checkpoint.save(out / "training", saved, {"options": {"steps": 5}})

    for kind in ("coreml", "coreai"):
        target = out / ("package.mlpackage" if kind == "coreml" else "bundle")
        result = CliRunner().invoke(main, ["convert", kind, str(out / "model"), str(target)])
        assert result.exit_code == 0, result.output
    companions = out / "package-companions"
    shutil.move(companions / "source.safetensors", out)
    shutil.rmtree(companions)
    for name in ("README.md", "tokenizer"):
        left = out / "bundle" / name
        shutil.rmtree(left) if left.is_dir() else left.unlink()

    expected = {
        "version": mlx_ttt.__version__,
        "logits": {name: logits_after(model, tokenizer, state) for name, state in made.items()},
        "training": {"step": 3, "random": 7, "offset": plain.cache[0].offset, "weights": sum_of(weights)},
    }
    (out / "expected.json").write_text(json.dumps(expected))


def sum_of(weights: dict[str, mx.array]) -> float:
    return float(sum(w.astype(mx.float32).abs().sum().item() for w in weights.values()))


if __name__ == "__main__":
    write(FORMATS / mlx_ttt.__version__)
