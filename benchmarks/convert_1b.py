"""Memory and time of converting a 1.3B float32 checkpoint (24 layers, Mamba backbone, TTT-Linear) to bfloat16.

    python benchmarks/convert_1b.py [--work FOLDER]

Makes the checkpoint with random weights, in shards of PyTorch's .bin format, converts it in a process of its own, and
prints that process's time, largest resident memory (ru_maxrss) and, on Linux, largest anonymous memory. Needs 8 GB of
disk, given back at the end.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 1_000_000_000
CHUNK = 1 << 24  # elements
CONFIG = {
    "model_type": "ttt",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "ttt_layer_type": "linear",
    "pre_conv": True,
    "share_qk": True,
    "use_gate": True,
    "tie_word_embeddings": True,
}


def random_chunks(size: int, seed: int) -> Iterator[bytes]:
    rng = np.random.default_rng(seed)
    for start in range(0, size, CHUNK):
        yield (0.02 * rng.standard_normal(min(CHUNK, size - start), np.float32)).tobytes()


def make_checkpoint(folder: Path) -> int:
    """Write config.json, the shards and their index; returns the number of parameters."""
    sys.path.insert(0, str(ROOT))
    from mlx_ttt.checkpoint.parameters import Parameters
    from mlx_ttt.checkpoint.tensor import row_major
    from mlx_ttt.model import ModelArgs
    from tests.checkpoint.torch_format import Storage, View, write_torch

    shards: list[dict[str, View]] = [{}]
    room = SHARD_BYTES
    total = 0
    for seed, (name, shape) in enumerate(Parameters(ModelArgs.from_dict(CONFIG)).shapes().items()):
        if ".conv" in name and len(shape) == 3:  # PyTorch's layout
            shape = (shape[0], 1, shape[1])
        size = int(np.prod(shape))
        if 4 * size > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = View(Storage("FloatStorage", size, random_chunks(size, seed)), shape, row_major(shape))
        room -= 4 * size
        total += size

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        write_torch(folder / file, shard)
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 4 * total}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return total


def anonymous_bytes(pid: int) -> int:
    """Memory of a process that no file stands behind; 0 where /proc does not say, and after its end."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def convert(source: Path, out: Path) -> None:
    """Run the conversion in a process of its own and print what it took."""
    command = (
        "import sys, mlx.core as mx; from mlx_ttt.checkpoint.convert import convert;"
        "convert(sys.argv[1], sys.argv[2], dtype=mx.bfloat16)"
    )
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", command, str(source), str(out)], cwd=ROOT)
    peak = 0

    def sample() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.01)

    sampler = threading.Thread(target=sample)
    sampler.start()
    sampler.join()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(process.returncode)
    resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"converted in {seconds:.1f} s")
    print(f"largest resident memory  {resident / 1e9:.2f} GB")
    print(f"largest anonymous memory {peak / 1e9:.2f} GB" if peak else "largest anonymous memory: only known on Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder for the 8 GB of temporary files")
    with tempfile.TemporaryDirectory(dir=parser.parse_args().work) as work:
        source = Path(work) / "source"
        source.mkdir()
        start = time.perf_counter()
        parameters = make_checkpoint(source)
        files = sorted(source.glob("*.bin"))
        nbytes = sum(file.stat().st_size for file in files)
        print(f"{parameters / 1e9:.2f} B parameters, {nbytes / 1e9:.2f} GB in {len(files)} .bin shards,", end=" ")
        print(f"made in {time.perf_counter() - start:.0f} s")
        convert(source, Path(work) / "out")


if __name__ == "__main__":
    main()
