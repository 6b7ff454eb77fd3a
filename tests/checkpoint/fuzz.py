"""Damages small checkpoints at random and converts them: a clean error or a correct result, in bounded memory.

    python -m tests.checkpoint.fuzz SEED COUNT [KIND ...]

COUNT mutations of each kind of file; exit status 0 when all ended well. Runs in a process of its own, because the limit
on memory holds for all of it.
"""

from __future__ import annotations

import copy
import json
import random
import re
import resource
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import msgpack
import numpy as np
from mlx.utils import tree_flatten

from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.inspection import inspect
from mlx_ttt.errors import TTTError
from mlx_ttt.model import Model, ModelArgs

from .jax_format import chunked, jax_arrays, official_arrays, read_stream, train_state, write_stream
from .torch_format import tensor, write_torch

MEMORY = 512 << 20  # bytes, above what the process has at the start
CONFIG = {
    "model_type": "ttt",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mini_batch_size": 4,
    "rope_theta": 10000.0,
    "ttt_base_lr": 1.0,
    "share_qk": True,
    "tie_word_embeddings": True,
    "ttt_layer_type": "linear",
}
KINDS = ("bin", "pickle", "safetensors", "header", "index", "config", "stream", "records")
FIELDS = [0, 1, 2, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
VALUES = [
    None,
    True,
    0,
    1,
    -1,
    2**31,
    2**64,
    1e400,
    -1e-9,
    "",
    "x",
    "../x",
    "\ud800",
    "\n",
    [],
    {},
    [0],
    {"a": 1},
    [[]],
]


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    parameters = tree_flatten(Model(ModelArgs.from_dict(CONFIG)).parameters())
    return {name: rng.standard_normal(value.shape).astype(np.float32) for name, value in parameters}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three small damages, more often near the two ends, where formats keep their directories."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(damaged) + 1)
        if rng.random() < 0.4:
            at = rng.choice((at // 8, len(damaged) - at // 8))
        elsewhere, length = rng.randrange(len(damaged) + 1), rng.choice((1, 2, 4, 8, 30, 500))
        match rng.randrange(8):
            case 0 | 1 if at < len(damaged):
                damaged[at] ^= 1 << rng.randrange(8)
            case 2:
                damaged[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                size = rng.choice((1, 2, 4, 8))
                damaged[at : at + size] = (rng.choice(FIELDS) & (256**size - 1)).to_bytes(
                    size, rng.choice(("little", "big"))
                )
            case 4:
                del damaged[at:]
            case 5:
                del damaged[at : at + length]
            case 6:
                damaged[at:at] = damaged[elsewhere : elsewhere + length]
            case 7:
                damaged[at : at + length] = damaged[elsewhere : elsewhere + length]
    return bytes(damaged)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """A byte mutation, or a value replaced somewhere in the tree."""
    if rng.random() < 0.4:
        return mutate(data, rng)
    value = json.loads(data)
    mutate_tree(value, rng)
    return json.dumps(value).encode()


def mutate_tree(node: dict | list, rng: random.Random) -> None:
    """Replace or delete a value somewhere inside."""
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.8:
            node = node[key]
            continue
        node[key] = rng.choice(VALUES)
        if rng.random() < 0.2:
            del node[key]
        return


def unpacked(value: bytes) -> object:
    """What Flax packed, with arrays as lists."""
    return msgpack.unpackb(value, ext_hook=lambda code, data: msgpack.unpackb(data))


def packed_record(record: object) -> bytes:
    """A record of a stream, packed; the inverse of `unpacked` where the record is still a pair."""

    def flax(value: object) -> object:
        if isinstance(value, dict):
            return {key: flax(member) for key, member in value.items()}
        return msgpack.ExtType(1, packb(value)) if isinstance(value, list) else value

    def packb(value: object) -> bytes:
        return msgpack.packb(value, unicode_errors="surrogatepass", default=str)  # for numbers of more than 64 bits

    match record:
        case [key, value]:
            return packb([key, packb(flax(value))])
    return packb(record)


class Campaign:
    """One kind of checkpoint, of which one file is damaged many times."""

    def __init__(self, kind: str, folder: Path):
        self.folder, self.out = folder / "source", folder / "out"
        self.folder.mkdir()
        self.weights = weights()
        (self.folder / "config.json").write_text(json.dumps(CONFIG))
        self.file, self.mutate, self.expected = getattr(self, kind)()
        self.original = self.file.read_bytes()

    def bin(self) -> tuple[Path, Callable, Callable]:
        """The result is the weights: checksums protect every byte that matters."""
        file = write_torch(self.folder / "pytorch_model.bin", {n: tensor(a) for n, a in self.weights.items()})
        return file, mutate, lambda: self.weights

    def pickle(self) -> tuple[Path, Callable, Callable]:
        """Damages the pickle and corrects its checksum. The result may be any that consists of the stored numbers."""
        file = self.bin()[0]
        code = zipfile.ZipFile(file).read("archive/data.pkl")
        storages = {f"data/{key}": array.tobytes() for key, array in enumerate(self.weights.values())}

        def damage(_: bytes, rng: random.Random) -> bytes:
            return write_torch(file, {}, extra=storages | {"data.pkl": mutate(code, rng)}).read_bytes()

        return file, damage, lambda: None

    def safetensors(self) -> tuple[Path, Callable, Callable]:
        """There are no checksums: the correct result is what MLX itself loads from the damaged file."""
        file = self.folder / "model.safetensors"
        mx.save_safetensors(str(file), {name: mx.array(array) for name, array in self.weights.items()})
        return file, mutate, lambda: {name: np.array(array) for name, array in mx.load(str(file)).items()}

    def header(self) -> tuple[Path, Callable, Callable]:
        """Damages the JSON header of safetensors, with its length corrected."""
        file, _, expected = self.safetensors()

        def damage(data: bytes, rng: random.Random) -> bytes:
            end = 8 + int.from_bytes(data[:8], "little")
            header = mutate_json(data[8:end], rng)
            return len(header).to_bytes(8, "little") + header + data[end:]

        return file, damage, expected

    def index(self) -> tuple[Path, Callable, Callable]:
        names = sorted(self.weights)
        weight_map = {}
        for number, part in enumerate((names[::2], names[1::2])):
            file = f"shard{number}.safetensors"
            mx.save_safetensors(str(self.folder / file), {name: mx.array(self.weights[name]) for name in part})
            weight_map |= dict.fromkeys(part, file)
        index = self.folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
        return index, mutate_json, lambda: self.weights

    def stream(self) -> tuple[Path, Callable, Callable]:
        """There are no checksums: the correct result is what the msgpack package reads from the damaged file."""
        (self.folder / "config.json").unlink()
        official = {n: a.swapaxes(1, 2) if ".conv" in n and a.ndim == 3 else a for n, a in self.weights.items()}
        arrays = jax_arrays(official)
        arrays["model", "wte", "embedding"] = chunked(arrays["model", "wte", "embedding"], 50)
        file = write_stream(self.folder / "streaming_train_state", train_state(arrays))
        return file, mutate, lambda: official_arrays(read_stream(file.read_bytes()), self.weights)

    def records(self) -> tuple[Path, Callable, Callable]:
        """Damages keys, shapes, dtypes and pieces, and packs them as MessagePack again."""
        file, _, expected = self.stream()
        original = [[key, unpacked(value)] for key, value in msgpack.Unpacker(file.open("rb"))]

        def damage(_: bytes, rng: random.Random) -> bytes:
            records = copy.deepcopy(original)
            mutate_tree(records, rng)
            return b"".join(map(packed_record, records))

        return file, damage, expected

    def config(self) -> tuple[Path, Callable, Callable]:
        self.bin()
        return self.folder / "config.json", mutate_json, lambda: self.weights

    def attempt(self, data: bytes) -> bool:
        """Convert the checkpoint with these bytes as its file; returns whether it was accepted."""
        self.file.write_bytes(data)
        try:
            inspect(self.folder)
            convert(self.folder, self.out)
        except TTTError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 600, message
            assert not self.out.exists()
            return False
        finally:
            assert {path.name for path in self.folder.parent.iterdir()} <= {"source", "out"}
        self.check()
        shutil.rmtree(self.out)
        return True

    def check(self) -> None:
        found = mx.load(str(self.out / "model.safetensors"))
        expected = self.expected()
        if expected is None:
            numbers = np.unique(np.concatenate([array.reshape(-1) for array in self.weights.values()]))
            assert found.keys() == self.weights.keys()
            assert all(np.isin(np.array(array), numbers).all() for array in found.values())
            return
        expected = {
            re.sub(r"^((module|_orig_mod|model)\.)*", "model.", name): array for name, array in expected.items()
        }
        for name, array in found.items():
            original = expected[name] if expected[name].shape == array.shape else expected[name].swapaxes(1, 2)
            np.testing.assert_array_equal(np.array(array), original)


def limit_memory() -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main(seed: int, count: int, *kinds: str) -> None:
    weights()  # not counted: what MLX and Python load on first use
    limit_memory()
    for kind in kinds or KINDS:
        rng, converted = random.Random(f"{kind} {seed}"), 0
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(kind, Path(folder))
            assert campaign.attempt(campaign.original)
            for number in range(count):
                try:
                    converted += campaign.attempt(campaign.mutate(campaign.original, rng))
                except BaseException:
                    print(f"{kind}: seed {seed}, mutation {number}", file=sys.stderr)
                    raise
        print(f"{kind}: {count} mutations, {converted} converted, {count - converted} refused")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
