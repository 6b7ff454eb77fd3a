"""Folders and files as people have them."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest

from mlx_ttt.checkpoint.names import official_name
from mlx_ttt.checkpoint.source import open_source
from mlx_ttt.errors import CheckpointError

from .torch_format import tensor, write_torch

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.seq_modeling_block.learnable_token_idx",
    "model.layers.11.mlp.up_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {name: rng.standard_normal((3, 5)).astype(np.float32) for name in NAMES}


def assert_holds(source, weights):
    assert source.tensors.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(np.array(source.tensors[name].load()), array)


def save_torch(path, weights):
    return write_torch(path, {name: tensor(array) for name, array in weights.items()})


def save_safetensors(path, weights):
    mx.save_safetensors(str(path), {name: mx.array(array) for name, array in weights.items()})
    return path


WRITERS = {".bin": save_torch, ".pt": save_torch, ".pth": save_torch, ".safetensors": save_safetensors}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "any.pt", "any.pth", "any.safetensors"])
@pytest.mark.parametrize("as_folder", [True, False])
def test_single_file(tmp_path, weights, name, as_folder):
    file = WRITERS[name[name.rindex(".") :]](tmp_path / name, weights)
    source = open_source(tmp_path if as_folder else file)
    assert_holds(source, weights)
    assert source.files == (file,) and source.folder == tmp_path
    assert source.format == ("safetensors" if name.endswith("safetensors") else "PyTorch")


def test_content_decides(tmp_path, weights):
    assert_holds(open_source(save_safetensors(tmp_path / "weights.safetensors", weights)), weights)
    shutil.move(tmp_path / "weights.safetensors", tmp_path / "weights.bin")
    assert_holds(open_source(tmp_path / "weights.bin"), weights)


def save_shards(folder, weights, suffix=".bin"):
    stem = "pytorch_model" if suffix == ".bin" else "model"
    weight_map = {}
    for number, half in enumerate((NAMES[:2], NAMES[2:]), 1):
        file = f"{stem}-0000{number}-of-00002{suffix}"
        WRITERS[suffix](folder / file, {name: weights[name] for name in half})
        weight_map |= dict.fromkeys(half, file)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 300}, "weight_map": weight_map}))
    return index, weight_map


@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_shards(tmp_path, weights, suffix):
    index, _ = save_shards(tmp_path, weights, suffix)
    for path in (tmp_path, index):
        source = open_source(path)
        assert_holds(source, weights)
        assert len(source.files) == 2 and source.format.endswith("2 shards")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m | {"model.extra": m[NAMES[0]]}, r"00001-of-00002\.bin: model\.extra is not in it"),
        (
            lambda m: {n: f for n, f in m.items() if n != NAMES[0]},
            r"embed_tokens\.weight is in it, but .* does not list it",
        ),
        (lambda m: m | {NAMES[0]: m[NAMES[-1]]}, r"is not in it|is in it"),
        (lambda m: m | {NAMES[0]: "absent.bin"}, r"absent\.bin: missing, but pytorch_model\.bin\.index\.json lists it"),
        (lambda m: m | {NAMES[0]: "../secret.bin"}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: "/etc/passwd"}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: "..\\secret.bin"}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: ".."}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: ""}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: "a\0b"}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: 7}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: ["x"]}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: "x" * 5000}, "not the name of a file beside it"),
        (lambda m: m | {NAMES[0]: "\ud800"}, "not the name of a file beside it"),
        (lambda m: {}, "has no weight_map"),
        (lambda m: [], "has no weight_map"),
    ],
)
def test_index_that_lies(tmp_path, weights, change, message):
    save_torch(tmp_path.parent / "secret.bin", {})
    index, weight_map = save_shards(tmp_path, weights)
    index.write_text(json.dumps({"weight_map": change(weight_map)}))
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"weight_map": {"a": "b", "a": "c"}}', "[" * 10**5])
def test_index_that_is_no_index(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not valid JSON|not an object"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: {"model": d},
        lambda d: {"state_dict": d, "epoch": 3, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]}},
        lambda d: {"model_state_dict": d, "step": 7},
        lambda d: {"model": {"state_dict": {"model": d}}},
        lambda d: d | {"version": 2, "ids": [1, 2]},
        lambda d: {"model": {"name": "ttt"}, "state_dict": d},
        lambda d: {"model": d, "step": tensor(np.ones(1))},
    ],
)
def test_wrapping_dicts(tmp_path, weights, wrap):
    write_torch(tmp_path / "a.pt", wrap({name: tensor(array) for name, array in weights.items()}))
    assert_holds(open_source(tmp_path), weights)


@pytest.mark.parametrize("value", [{}, {"model": {}}, {"step": 1}, [1, 2], 7, None, {"model": {"state_dict": 3}}])
def test_no_state_dict(tmp_path, value):
    with pytest.raises(CheckpointError, match="holds no state dict"):
        open_source(write_torch(tmp_path / "a.pt", value))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module.", "model."])
@pytest.mark.parametrize("name", NAMES)
def test_prefixes(prefix, name):
    assert official_name(prefix + name) == name


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model._orig_mod.", "module.model._orig_mod."])
@pytest.mark.parametrize("name", NAMES[:-1])
def test_bare_backbone(prefix, name):
    assert official_name(prefix + name.removeprefix("model.")) == name


def test_buffers_are_dropped(tmp_path, weights):
    block = "model.layers.0.seq_modeling_block."
    buffers = dict.fromkeys([f"{block}token_idx", f"{block}rotary_emb.inv_freq"], np.ones(3, np.float32))
    save_torch(tmp_path / "pytorch_model.bin", weights | buffers)
    assert_holds(open_source(tmp_path), weights)


def test_same_name_twice(tmp_path, weights):
    save_torch(tmp_path / "pytorch_model.bin", weights | {"module.lm_head.weight": weights["lm_head.weight"]})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is in it twice"):
        open_source(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_source(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="no weights in this folder"):
        open_source(tmp_path)


def test_folder_that_cannot_be_read(tmp_path, weights, unreadable):
    save_torch(tmp_path / "pytorch_model.bin", weights)
    with pytest.raises(CheckpointError, match=f"^{tmp_path}: Permission denied$"):
        open_source(unreadable(tmp_path))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.pt"])
def test_file_that_cannot_be_read(tmp_path, weights, unreadable, name):
    file = save_torch(tmp_path / name, weights)
    unreadable(file)
    for path in (tmp_path, file):
        with pytest.raises(CheckpointError, match=f"^{file}: Permission denied$"):
            open_source(path)


def test_shard_that_cannot_be_reached(tmp_path, weights, unreadable):
    save_shards(tmp_path, weights)
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    shard = tmp_path / "pytorch_model-00002-of-00002.bin"
    shutil.move(shard, blobs / "b")
    shard.symlink_to(blobs / "b")
    assert_holds(open_source(tmp_path), weights)
    unreadable(shard)
    with pytest.raises(CheckpointError, match=f"^{shard}: Permission denied$"):
        open_source(tmp_path)


def test_several_files(tmp_path, weights):
    for name in ("a.pt", "b.pt"):
        save_torch(tmp_path / name, weights)
    with pytest.raises(CheckpointError, match=r"2 weights files \(a\.pt, b\.pt\); name the one"):
        open_source(tmp_path)


def test_training_leftovers_are_not_weights(tmp_path, weights):
    save_torch(tmp_path / "checkpoint.pt", weights)
    for name in ("optimizer.pt", "training_args.bin", "rng_state_0.pth", "scheduler.pt"):
        (tmp_path / name).write_bytes(b"anything")
    assert_holds(open_source(tmp_path), weights)
