"""Converting needs memory for one or two tensors, whatever the checkpoint's size. See also benchmarks/convert_1b.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.checkpoint.jax_stream import read_jax_stream
from mlx_ttt.checkpoint.parameters import Parameters
from mlx_ttt.model import ModelArgs

from .jax_format import bfloat16, jax_arrays, train_state, write_stream
from .torch_format import tensor, write_torch

CONFIG = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 2736,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "tie_word_embeddings": False,
}
STATUS = Path("/proc/self/status")
CONVERT = """
import sys
from pathlib import Path
import mlx.core as mx
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.quantization import Scheme
from mlx_ttt.checkpoint.tokenizer import write_tokenizer  # not counted: what it imports

def peak():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)

before = peak()
convert(sys.argv[1], sys.argv[2], dtype=mx.bfloat16, quantize=Scheme(bits=4) if sys.argv[3] == "quantized" else None)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("kind", ["bin", "safetensors", "stream", "quantized"])
def test_one_tensor_at_a_time(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(CONFIG))
    shapes = Parameters(ModelArgs.from_dict(CONFIG)).shapes()
    if kind == "bin":
        write_torch(source / "pytorch_model.bin", {n: tensor(np.zeros(s, np.float32)) for n, s in shapes.items()})
    elif kind == "stream":
        arrays = jax_arrays({name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
        moments = {("opt_state", "1", "0", moment): np.zeros(1 << 25, np.float32) for moment in ("mu", "nu")}
        parameters = {key: bfloat16(array) for key, array in arrays.items()}
        write_stream(source / "streaming_train_state", moments | train_state(parameters))
    else:
        mx.save_safetensors(str(source / "model.safetensors"), {n: mx.zeros(s) for n, s in shapes.items()})
    assert sum(file.stat().st_size for file in source.iterdir()) > 300e6
    result = subprocess.run(
        [sys.executable, "-c", CONVERT, source, tmp_path / "out", kind],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(result.stdout) * 1024 < 55e6  # the largest tensor has 11 MB


@pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")
def test_a_train_state_is_passed_over(tmp_path):
    """The pages that are read to find the end of each value are given back."""

    def resident() -> int:
        return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if "RssFile" in line)

    moments = {("opt_state", "mu", str(i)): np.ones(1 << 16, np.float32) for i in range(200)}
    parameter = {("params", "params", "model", "ln_f", "kernel"): np.ones(3, np.float32)}
    file = write_stream(tmp_path / "streaming_train_state", moments | parameter)
    before = resident()
    tensors = read_jax_stream(file)
    assert tensors.keys() == {"model.norm.weight"}
    assert resident() - before < 2e6  # each of them has 64 KB or more, as Linux maps them
