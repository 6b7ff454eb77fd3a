"""Streams of the official JAX implementation: both kinds, every parameter, and all that can be wrong with one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import msgpack
import numpy as np
import pytest

from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.inspection import inspect
from mlx_ttt.checkpoint.source import open_source
from mlx_ttt.errors import CheckpointError
from mlx_ttt.model import ModelArgs

from .jax_format import bfloat16, chunked, jax_arrays, jax_key, ndarray, record, train_state, write_stream
from .test_convert import CONFIG, assert_same_weights, configuration, official

NORM = "model.layers.1.seq_norm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


def save(folder: Path, values: dict, name: str = "streaming_params") -> Path:
    folder.mkdir(exist_ok=True)
    write_stream(folder / name, values)
    return folder


def parameters(weights: dict | None = None) -> dict:
    return jax_arrays(official() if weights is None else weights)


def key_of(name: str) -> tuple[str, ...]:
    return jax_key(name)[0]


def refused(source: Path, out: Path, message: str) -> None:
    """Check that the error is one line and that no files are left."""
    with pytest.raises(CheckpointError, match=message) as error:
        convert(source, out)
    assert str(error.value).isprintable() and len(str(error.value)) < 600
    assert not out.exists() and not [path for path in out.parent.iterdir() if path.name.startswith(".")]


class TestWhatIsRead:
    @pytest.mark.parametrize("inner", ["linear", "mlp"])
    @pytest.mark.parametrize("flags", range(8))
    def test_every_configuration_without_a_config(self, source, out, inner, flags):
        known = configuration(inner, flags)
        args = replace(
            known,
            conv_kernel=known.conv_kernel if flags & 3 else 4,  # there is no convolution
            ttt_base_lr={"linear": 1.0, "mlp": 0.1}[inner],
        )
        weights = official(args)
        save(source, train_state(parameters(weights)), "streaming_train_state")
        assert inspect(source).args == args and not inspect(source).problems
        convert(source, out)
        assert_same_weights(out, weights)

    @pytest.mark.parametrize("name", ["streaming_params", "streaming_params_5000", "weights.bin"])
    @pytest.mark.parametrize("wrap", [lambda values: values, train_state])
    def test_any_name_and_kind(self, source, out, name, wrap):
        save(source, wrap(parameters()), name)
        for path in (source, source / name):
            checkpoint = open_source(path)
            assert checkpoint.format == "JAX stream" and checkpoint.files == (source / name,)
            convert(path, out, overwrite=True)
            assert_same_weights(out, official())

    def test_parameters_after_the_optimizer(self, source, out):
        save(source, dict(reversed(train_state(parameters()).items())), "streaming_train_state")
        convert(source, out)
        assert_same_weights(out, official())

    def test_bfloat16(self, source, out):
        weights = official()
        save(source, {key: bfloat16(array) for key, array in parameters(weights).items()})
        convert(source, out)
        cut = {name: (w.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, w in weights.items()}
        assert_same_weights(out, cut, mx.bfloat16)

    @pytest.mark.parametrize("dtype", [np.float16, np.float64])
    def test_other_dtypes(self, source, out, dtype):
        weights = {name: array.astype(dtype) for name, array in official().items()}
        save(source, parameters(weights))
        convert(source, out, dtype=mx.float32)
        assert_same_weights(out, weights)

    @pytest.mark.parametrize("size", [1, 100, 444, 1000])
    def test_chunks(self, source, out, size):
        """The embedding has 37 x 12 elements; a projection is transposed, too."""
        values = parameters()
        for name in (EMBEDDING, GATE, NORM):
            values[key_of(name)] = chunked(values[key_of(name)], size)
        convert(save(source, values), out)
        assert_same_weights(out, official())

    def test_what_is_not_a_parameter_is_not_looked_at(self, source, out):
        values = train_state(parameters())
        moments = [key for key in values if key[0] == "opt_state"]
        values |= dict.fromkeys(moments[::2], "no array") | {key: [[[None, -1.5]]] for key in moments[1::2]}
        convert(save(source, values, "streaming_train_state"), out)
        assert_same_weights(out, official())

    def test_the_pickles_beside_it_are_never_opened(self, source, out, unreadable):
        save(source, parameters())
        for name in ("metadata.pkl", "dataset.pkl"):
            (source / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
            unreadable(source / name)
        convert(source, out)
        assert_same_weights(out, official())

    def test_a_config_wins(self, source, out):
        config = CONFIG | {"ttt_base_lr": 0.7, "rope_theta": 500.0, "rms_norm_eps": 1e-5}
        save(source, parameters())
        (source.parent / "mine.json").write_text(json.dumps(config))
        convert(source, out, config=source.parent / "mine.json")
        (source / "config.json").write_text(json.dumps(config))
        convert(source, out.with_name("other"))
        for written in (out, out.with_name("other")):
            assert inspect(written).args == ModelArgs.from_dict(config)

    @pytest.mark.parametrize("name", ["jax-linear-mamba", "jax-mlp-transformer"])
    def test_inferred_config_of_the_golden_ones(self, golden_dir, source, name):
        source.mkdir()
        (stream,) = golden_dir.glob(f"{name}/streaming_*")
        shutil.copy(stream, source)
        inferred, known = inspect(source).args, inspect(golden_dir / name).args
        assert inferred == replace(known, ttt_base_lr=inferred.ttt_base_lr)


def change(name: str, make: Callable[[np.ndarray], object]) -> Callable[[dict], dict]:
    """One parameter's value changed."""
    return lambda values: values | {key_of(name): make(values[key_of(name)])}


def rename(name: str, *key: str) -> Callable[[dict], dict]:
    return lambda values: {key if k == key_of(name) else k: v for k, v in values.items()}


def without(part: str) -> Callable[[dict], dict]:
    """All parameters but those with this part in their key."""
    return lambda values: {key: value for key, value in values.items() if part not in key}


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        "damage, message",
        [
            (rename(NORM, "model", "h", "1", "attention", "wq"), "h/1/attention/wq is not the name of a TTT model's"),
            (rename(NORM, "model", "h", "01", "seq_norm", "kernel"), "model/h/01/seq_norm/kernel is not the name"),
            (rename(NORM, "model", "h", "\n\x1b[2J"), r"model/h/\\n\\x1b\[2J is not the name"),
            (lambda values: {("x", *k): v for k, v in values.items()}, r"x/model/.* nor are \d\d other names"),
            (lambda values: values | {("lm_head", "bias"): np.ones(37)}, "lm_head/bias is not the name of"),
            (rename(NORM, "model", "h", "7", "seq_norm", "kernel"), r"layers\.1\.seq_norm\.weight.* missing"),
            (rename(NORM, "model", "h", "999999", "seq_norm", "kernel"), "num_hidden_layers is 1000000, more than any"),
            (without("0"), r"layers\.0\..* missing, which tells the size"),
            (without("wte"), "embed_tokens.weight is missing, which tells"),
            (without("conv_k"), r"conv_k\.weight, .* and 1 more are missing"),
            (without("wv"), r"v_proj\.weight are missing"),
            (change(NORM, lambda array: array[:5]), r"shapes give: .*seq_norm\.weight has shape \(5,\)"),
            (change(GATE, lambda array: array.T), r"gate_proj\.weight has shape|has shape"),
            (change(GATE, lambda array: array[0]), r"w1/kernel has shape \(20,\), expected 2 axes"),
            (change(EMBEDDING, lambda array: array[0]), r"embed_tokens\.weight has shape \(12,\), expected 2 axes"),
            (change(NORM, lambda array: array.astype(np.int32)), "seq_norm/kernel has dtype int32, which no weights"),
            (change(NORM, lambda array: ndarray(array, "V9\n")), r"seq_norm/kernel has dtype V9\\n, which"),
            (change(NORM, lambda array: ndarray(array, "float64")), "does not fill its place"),
            (change(NORM, lambda array: packed((11,), "float32", array.tobytes())), "does not fill its place"),
            (change(NORM, lambda array: msgpack.ExtType(1, ndarray(array).data + b"\0")), "nothing was expected"),
            (change(NORM, lambda array: ndarray(array[:0].reshape((0,) * 9))), "impossible shape"),
            (change(NORM, lambda array: packed((2**31, 0), "float32", b"")), "impossible shape"),
            (change(NORM, lambda array: packed((2**63, 2**63), "float32", b"")), "impossible shape"),
            (change(NORM, lambda array: packed((-12,), "float32", array.tobytes())), "integer was expected"),
            (change(NORM, lambda array: packed((12,), "float32")), "seq_norm/kernel is not an array"),
            (change(NORM, lambda array: packed((12,), "float32", array.tobytes(), 0)), "is not an array"),
            (change(NORM, lambda array: packed(12, "float32", array.tobytes())), "array was expected"),
            (change(NORM, lambda array: packed((12,), 4, array.tobytes())), "text was expected"),
            (change(NORM, lambda array: packed((12,), "float32", [1.0] * 12)), "binary was expected"),
            (change(NORM, lambda array: msgpack.ExtType(3, ndarray(array).data)), "extension type 1 was expected"),
            (change(NORM, lambda array: array.tolist()), "extension was expected"),
            (change(NORM, lambda array: None), "extension was expected"),
            (change(NORM, lambda array: {"shape": {"0": 12}}), "is not an array"),
            (change(NORM, lambda array: chunked(array, 5) | {"more": 1}), "is not an array"),
            (change(NORM, lambda array: pieces(array, chunks={"0": array[:5]})), "does not consist of its pieces"),
            (change(NORM, lambda array: pieces(array, chunks={})), "does not consist of its pieces"),
            (change(NORM, lambda array: pieces(array, chunks={"1": array})), "0 was expected"),
            (change(NORM, lambda array: pieces(array, chunks={"0": array.reshape(3, 4)})), "not consist of its pieces"),
            (
                change(NORM, lambda array: pieces(array, chunks={"0": array[:5], "1": array[5:].astype(np.float16)})),
                "not consist of its pieces",
            ),
            (change(NORM, lambda array: pieces(array, shape={"0": 2**62, "1": 2**62})), "impossible shape"),
            (change(NORM, lambda array: pieces(array, shape={str(i): 1 for i in range(5000)})), "5,000 pieces"),
        ],
    )
    def test_values(self, source, out, damage, message):
        refused(save(source, train_state(damage(parameters()))), out, message)

    @pytest.mark.parametrize(
        "more, message",
        [
            (record(("model", "ln_f", "kernel"), np.ones(12, np.float32)), "model/ln_f/kernel is in it twice"),
            (record((), 1), "a path of 0 names"),
            (record(["x"] * 33, 1), "a path of 33 names"),
            (record((7,), 1), "text was expected"),
            (record(("x" * 2000,), 1), "a name of 2,000 bytes"),
            (msgpack.packb((("x",), 1)), "binary was expected"),
            (msgpack.packb((("x",), b"", b"")), "a pair was expected"),
            (msgpack.packb({"x": b""}), "array was expected"),
            (b"\x00", "array was expected"),
            (b"\xc1", "array was expected .* not something else"),
            (b"\x91" * 100_000, "a pair was expected"),
            (b"\x92\x91\xa1x\xc6\xff\xff\xff\xff", "does not end before"),
            (b"\x92\xdd\xff\xff\xff\xff", "a path of 4,294,967,295 names"),
            (b"\x92\x91\xdb\xff\xff\xff\xff", "a name of 4,294,967,295 bytes"),
            (b"\x92\x91\xa2\xff\xff\xc4\x00", "is not text"),
        ],
    )
    def test_records(self, source, out, more, message):
        save(source, parameters())
        with (source / "streaming_params").open("ab") as file:
            file.write(more)
        refused(source, out, message)

    def test_deep_nesting(self, source, out):
        deep = msgpack.ExtType(1, b"\x91" * 200_000)
        refused(save(source, parameters() | {key_of(NORM): deep}), out, "seq_norm/kernel is not an array")

    def test_more_after_a_value(self, source, out):
        save(source, {})
        (source / "streaming_params").write_bytes(
            msgpack.packb((("model", "ln_f", "kernel"), msgpack.packb(ndarray(np.ones(12, np.float32))) + b"\x00"))
        )
        refused(source, out, "nothing was expected")

    def test_too_many_records(self, source, out, monkeypatch):
        monkeypatch.setattr("mlx_ttt.checkpoint.jax_stream._MOST_RECORDS", 30)
        refused(save(source, parameters()), out, "more than 30 records")

    def test_every_truncation(self, source, out):
        """A stream cut between two records lacks a parameter; cut anywhere else it is damaged."""
        save(source, parameters())
        file = source / "streaming_params"
        data = file.read_bytes()
        ends, unpacker = {0}, msgpack.Unpacker()
        unpacker.feed(data)
        for _ in unpacker:
            ends.add(unpacker.tell())
        for end in sorted({*range(1, len(data), 97), *range(1, 200), *ends} - {0, len(data)}):
            file.unlink()
            file.write_bytes(data[:end])
            with pytest.raises(CheckpointError, match="missing" if end in ends else "truncated or damaged|named like"):
                convert(source, out)
            assert not out.exists()

    @pytest.mark.parametrize(
        "content, message",
        [
            (b"", "the file is empty"),
            (b"\x80\x04\x95abc.", "named like a JAX stream, but is a pickle"),
            (b"PK\x03\x04" + bytes(100), "named like a JAX stream, but is a zip archive"),
            (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
            (b"<!DOCTYPE html>", "named like a JAX stream, but is something else"),
            (b"\x92", "is something else"),
            (msgpack.packb({"params": {}}), "is something else"),
            (b"\xff" * 1000, "is something else"),
        ],
    )
    @pytest.mark.parametrize("name", ["streaming_params", "streaming_train_state", "streaming_train_state_5000"])
    def test_other_files_with_its_name(self, source, out, content, message, name):
        source.mkdir()
        (source / name).write_bytes(content)
        for path in (source, source / name):
            refused(path, out, rf"{re.escape(str(source / name))}: .*{message}")

    def test_a_train_state_without_parameters(self, source, out):
        save(source, train_state({}), "streaming_train_state")
        refused(source, out, "step is not the name of a TTT model's parameter, nor are 1 other names")

    def test_two_streams(self, source, out):
        """They may come from different training steps."""
        save(source, parameters())
        save(source, train_state(parameters()), "streaming_train_state")
        refused(source, out, r"2 weights files \(streaming_params, streaming_train_state\); name the one to read")
        convert(source / "streaming_train_state", out)
        assert_same_weights(out, official())

    def test_a_config_of_another_model(self, source, out):
        save(source, parameters())
        (source / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
        refused(source, out, r"does not fit config\.json: num_hidden_layers is 3, but the tensors are of 2")


def packed(*content: object) -> msgpack.ExtType:
    return msgpack.ExtType(1, msgpack.packb(content))


def pieces(array: np.ndarray, shape: dict | None = None, chunks: dict | None = None) -> dict:
    """A chunked array with another shape or other chunks."""
    whole = chunked(array, 5)
    if shape is not None:
        whole["shape"] = shape
    if chunks is not None:
        whole["chunks"] = {key: ndarray(piece) for key, piece in chunks.items()}
    return whole
