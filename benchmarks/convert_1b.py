"""Memory and time of converting a 1.3B checkpoint (24 layers, Mamba backbone, TTT-Linear) to bfloat16.

    python benchmarks/convert_1b.py [--from pytorch|jax] [--work FOLDER]

Makes the checkpoint with random weights, in float32 in shards of PyTorch's .bin format, or in bfloat16 as a JAX train
state with the two moments of Adam; converts it in a process of its own, and prints that process's time, largest
resident memory (ru_maxrss) and, on Linux, largest anonymous memory. Needs 11 GB of disk, given back at the end.
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
from collections.abc import Callable, Iterator
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


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes in PyTorch's layout, which orders a convolution's axes otherwise."""
    from mlx_ttt.checkpoint.parameters import Parameters
    from mlx_ttt.model import ModelArgs

    shapes = Parameters(ModelArgs.from_dict(CONFIG)).shapes()
    return {n: (s[0], 1, s[1]) if ".conv" in n and len(s) == 3 else s for n, s in shapes.items()}


def make_pytorch(folder: Path) -> None:
    """Write config.json, the shards and their index."""
    from mlx_ttt.checkpoint.tensor import row_major
    from tests.checkpoint.torch_format import Storage, View, write_torch

    shards: list[dict[str, View]] = [{}]
    room = SHARD_BYTES
    total = 0
    for seed, (name, shape) in enumerate(official_shapes().items()):
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


def make_jax(folder: Path) -> None:
    """Write streaming_train_state: the parameters in bfloat16, then the moments, which are zero here."""
    from tests.checkpoint.jax_format import bfloat16, jax_key, record

    shapes = official_shapes()
    with (folder / "streaming_train_state").open("wb") as file:
        for seed, (name, shape) in enumerate(shapes.items()):
            key, axes = jax_key(name)
            numbers = np.frombuffer(b"".join(random_chunks(int(np.prod(shape)), seed)), np.float32).reshape(shape)
            file.write(record(("params", "params", *key), bfloat16(np.einsum(axes, numbers))))
        for moment in ("mu", "nu"):
            for name, shape in shapes.items():
                key = ("opt_state", "1", "0", moment, "params", *jax_key(name)[0])
                file.write(record(key, bfloat16(np.zeros(shape, np.float32))))


MAKERS: dict[str, Callable[[Path], None]] = {"pytorch": make_pytorch, "jax": make_jax}


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
    parser.add_argument("--from", dest="layout", choices=MAKERS, default="pytorch")
    parser.add_argument("--work", type=Path, help="folder for the 11 GB of temporary files")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        source = Path(work) / "source"
        source.mkdir()
        start = time.perf_counter()
        MAKERS[arguments.layout](source)
        nbytes = sum(file.stat().st_size for file in source.iterdir())
        parameters = sum(int(np.prod(shape)) for shape in official_shapes().values())
        print(f"{arguments.layout}: {parameters / 1e9:.2f} B parameters, {nbytes / 1e9:.2f} GB,", end=" ")
        print(f"made in {time.perf_counter() - start:.0f} s")
        convert(source, Path(work) / "out")


if __name__ == "__main__":
    main()
