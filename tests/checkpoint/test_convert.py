"""Converting checkpoints: every layout, every dtype, every kind of damage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ttt.checkpoint import convert as convert_module
from mlx_ttt.checkpoint.config import read_config
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.checkpoint.inspection import inspect
from mlx_ttt.checkpoint.parameters import Parameters
from mlx_ttt.checkpoint.safetensors import read_safetensors
from mlx_ttt.checkpoint.tensor import Tensor
from mlx_ttt.errors import CheckpointError, OutputError, TokenizerError
from mlx_ttt.loading import load_model
from mlx_ttt.model import Model, ModelArgs

from .torch_format import Storage, View, bfloat16, storage_of, tensor, write_torch

ARGS = ModelArgs(
    vocab_size=37,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=2,
    num_attention_heads=2,
    mini_batch_size=5,
    conv_kernel=3,
    pre_conv=True,
    share_qk=True,
    use_gate=True,
)
CONFIG = vars(ARGS) | {"architectures": ["TTTForCausalLM"], "eos_token_id": 2}
INNER = ("W1", "b1", "W2", "b2", "learnable_token_idx", "learnable_ttt_lr", "ttt_norm")
CONVOLUTION = "model.layers.1.seq_modeling_block.conv_k.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


def official(args: ModelArgs = ARGS) -> dict[str, np.ndarray]:
    """Random weights in the official names and PyTorch's layout, which has convolutions as [C, 1, kernel]."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, value in tree_flatten(Model(args).parameters()):
        array = rng.standard_normal(value.shape).astype(np.float32)
        is_convolution = array.ndim == 3 and ".conv" in name
        weights[name] = array.swapaxes(1, 2) if is_convolution else array
    return weights


def save(folder: Path, weights: dict, config: dict | None = CONFIG) -> Path:
    folder.mkdir(exist_ok=True)
    views = {name: tensor(value) if isinstance(value, np.ndarray) else value for name, value in weights.items()}
    write_torch(folder / "pytorch_model.bin", views)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def loaded(out: Path) -> dict[str, mx.array]:
    arrays: dict[str, mx.array] = {}
    for file in sorted(out.glob("*.safetensors")):
        arrays |= mx.load(str(file))
    return arrays


def assert_same_weights(out: Path, weights: dict[str, np.ndarray], dtype: mx.Dtype = mx.float32) -> None:
    arrays = loaded(out)
    assert arrays.keys() == weights.keys()
    for name, array in arrays.items():
        expected = weights[name].swapaxes(1, 2) if ".conv" in name and weights[name].ndim == 3 else weights[name]
        own = mx.float32 if any(f".{inner}" in name for inner in INNER) else dtype
        assert array.dtype == own, name
        assert mx.array_equal(array, mx.array(expected).astype(own)).item(), name


@pytest.mark.parametrize("name", ["linear-transformer", "mlp-transformer", "linear-mamba", "mlp-mamba"])
def test_golden_logits(golden_dir, out, name):
    convert(golden_dir / name, out)
    model, _ = load_model(out)
    expected = mx.load(str(golden_dir / name / "expected.safetensors"))
    logits = model(expected["input_ids"])
    assert mx.abs(logits - expected["logits"]).max() <= 2e-4 * mx.abs(expected["logits"]).max()


@pytest.mark.parametrize("name", ["linear-transformer-head96", "linear-mamba-sharded"])
def test_golden_logits_of_half_precision(golden_dir, out, name):
    """The golden logits were computed in float32 from the rounded weights, so these are widened first."""
    convert(golden_dir / name, out, dtype=mx.float32)
    model, _ = load_model(out)
    expected = mx.load(str(golden_dir / name / "expected.safetensors"))
    logits = model(expected["input_ids"])
    assert mx.abs(logits - expected["logits"]).max() <= 2e-4 * mx.abs(expected["logits"]).max()


def test_report_and_files(source, out):
    weights = official()
    report = convert(save(source, weights), out)
    assert {file.name for file in out.iterdir()} == {"README.md", "config.json", "model.safetensors", "ttt.py"}
    assert report.parameters == sum(w.size for w in weights.values())
    assert report.bytes_by_dtype == {"float32": 4 * report.parameters}
    assert ["--tokenizer FILE" in warning for warning in report.warnings] == [True]
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == "float32" and config["model_type"] == "ttt" and config["eos_token_id"] == 2
    assert ModelArgs.from_dict(config) == ARGS
    assert_same_weights(out, weights)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_dtype(source, out, dtype):
    weights = official()
    convert(save(source, weights), out, dtype=dtype)
    assert_same_weights(out, weights, dtype)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix("mlx.core.")


def test_own_dtypes_are_kept(source, out):
    weights = official()
    mixed = weights | {
        GATE: bfloat16(weights[GATE]),
        "model.norm.weight": tensor(weights["model.norm.weight"].astype(np.float16)),
        "model.embed_tokens.weight": tensor(weights["model.embed_tokens.weight"].astype(np.float64)),
        "model.layers.0.seq_modeling_block.W1": bfloat16(weights["model.layers.0.seq_modeling_block.W1"]),
    }
    convert(save(source, mixed), out)
    arrays = loaded(out)
    assert arrays[GATE].dtype == mx.bfloat16 and arrays["model.norm.weight"].dtype == mx.float16
    assert (
        arrays["model.embed_tokens.weight"].dtype == arrays["model.layers.0.seq_modeling_block.W1"].dtype == mx.float32
    )


def configuration(inner: str, flags: int) -> ModelArgs:
    """One of the eight backbones, with or without a head of its own."""
    return replace(
        ARGS,
        ttt_layer_type=inner,
        pre_conv=bool(flags & 1),
        share_qk=bool(flags & 2),
        use_gate=bool(flags & 4),
        tie_word_embeddings=flags % 3 == 0,
        conv_kernel=1 + flags % 4,
    )


@pytest.mark.parametrize("inner", ["linear", "mlp"])
@pytest.mark.parametrize("flags", range(8))
def test_every_configuration(source, out, inner, flags):
    args = configuration(inner, flags)
    weights = official(args)
    convert(save(source, weights, vars(args)), out)
    assert_same_weights(out, weights)
    model, _ = load_model(out)
    assert model(mx.array([[1, 2, 3]])).shape == (1, 3, 37)


def test_converted_again(source, out, tmp_path):
    """A model directory can be converted too: its convolutions are already in MLX's layout."""
    weights = official()
    convert(save(source, weights), out)
    convert(out, tmp_path / "again", dtype=mx.float16)
    assert_same_weights(tmp_path / "again", weights, mx.float16)


def test_lone_file(source, out):
    weights = official()
    save(source, {"module." + name: value for name, value in weights.items()})
    convert(source / "pytorch_model.bin", out)
    assert_same_weights(out, weights)


def test_transposed_and_shared_storage(source, out):
    weights = official()
    name = "model.layers.0.seq_modeling_block.q_proj.weight"
    both = np.concatenate([weights[GATE].reshape(-1), weights[name].T.reshape(-1)])
    storage = storage_of(both)
    views = {GATE: View(storage, weights[GATE].shape, (12, 1)), name: View(storage, (12, 12), (1, 12), 240)}
    convert(save(source, weights | views), out)
    assert_same_weights(out, weights)


def test_shards(source, out, monkeypatch):
    monkeypatch.setattr(convert_module, "LARGEST_SHARD", 3000)
    weights = official()
    convert(save(source, weights), out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in weights.values())
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    for shard in shards:
        arrays = mx.load(str(shard))
        assert {name for name, file in index["weight_map"].items() if file == shard.name} == arrays.keys()
        assert sum(array.nbytes for array in arrays.values()) <= 3000 or len(arrays) == 1
    others = {"README.md", "config.json", "model.safetensors.index.json", "ttt.py"}
    assert {file.name for file in out.iterdir()} == others | {shard.name for shard in shards}
    assert_same_weights(out, weights)
    load_model(out)
    convert(source, out, overwrite=True)  # shards and an index are recognized as a model directory


def test_progress(source, out):
    steps = []
    convert(save(source, official()), out, progress=lambda done, total: steps.append((done, total)))
    total = sum(array.nbytes for array in loaded(out).values())
    assert steps[-1] == (total, total) and [done for done, _ in steps] == sorted({done for done, _ in steps})


def test_config_from_elsewhere(source, out, tmp_path):
    weights = official()
    save(source, weights, None)
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; give one with --config FILE"):
        convert(source, out)
    (tmp_path / "mine.json").write_text(json.dumps(CONFIG))
    convert(source, out, config=tmp_path / "mine.json")
    assert_same_weights(out, weights)


def test_tokenizer_beside_the_weights(source, out, shakespeare_dir):
    source = save(source, official(replace(ARGS, vocab_size=2048)), CONFIG | {"vocab_size": 2048})
    shutil.copy(shakespeare_dir / "tokenizer.model", source)
    report = convert(source, out)
    assert (out / "tokenizer.json").is_file() and not report.warnings
    convert(source, out, overwrite=True)


def test_tokenizer_from_elsewhere(source, out, shakespeare_dir):
    source = save(source, official(replace(ARGS, vocab_size=2048)), CONFIG | {"vocab_size": 2048})
    report = convert(source, out, tokenizer=shakespeare_dir / "tokenizer.model")
    assert (out / "tokenizer.json").is_file() and not report.warnings


@pytest.mark.parametrize("place", ["empty", "source"])
def test_tokenizer_that_is_none(source, out, tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(TokenizerError, match=rf"{place}: holds neither tokenizer\.model nor"):
        convert(save(source, official()), out, tokenizer=tmp_path / place)
    assert not out.exists()


def test_tokenizer_that_cannot_be_read(source, out, unreadable, shakespeare_dir):
    source = save(source, official(replace(ARGS, vocab_size=2048)), CONFIG | {"vocab_size": 2048})
    file = unreadable(Path(shutil.copy(shakespeare_dir / "tokenizer.model", source)))
    with pytest.raises(TokenizerError, match=f"^{file}: Permission denied$"):
        convert(source, out)
    assert list(out.parent.iterdir()) == [source]


def test_generation_config(source, out):
    save(source, official())
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    convert(source, out)
    assert json.loads((out / "generation_config.json").read_text()) == {"eos_token_id": 7}


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: file.write_text("{"),
        lambda file: file.write_text("[]"),
        lambda file: file.mkdir(),
        lambda file: file.symlink_to("absent"),
    ],
)
def test_damaged_generation_config(source, out, damage):
    """The file is left out, and the rest is converted."""
    file = save(source, official()) / "generation_config.json"
    damage(file)
    report = convert(source, out)
    assert report.warnings[0].startswith(f"{file}: ") and report.warnings[0].endswith("; left out")
    assert "\n" not in report.warnings[0]
    assert not (out / file.name).exists()


class TestTiedHead:
    def test_shared_storage(self, source, out):
        weights = official()
        embedding = tensor(weights["model.embed_tokens.weight"])
        save(source, weights | {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding})
        convert(source, out)
        assert_same_weights(out, weights)

    def test_equal_copy(self, source, out):
        weights = official()
        convert(save(source, weights | {"lm_head.weight": weights["model.embed_tokens.weight"].copy()}), out)
        assert_same_weights(out, weights)

    @pytest.mark.parametrize("head", [np.ones((37, 12), np.float32), np.ones((5, 12), np.float32)])
    def test_different(self, source, out, head):
        save(source, official() | {"lm_head.weight": head})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight differs .* set it to false in the config"):
            convert(source, out)

    def test_untied_without_head(self, source, out):
        save(source, official(), CONFIG | {"tie_word_embeddings": False})
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing; .*tie_word_embeddings"):
            convert(source, out)


def without(name):
    return lambda weights: {n: w for n, w in weights.items() if n != name}


@pytest.mark.parametrize(
    "change, config, message",
    [
        (without(GATE), {}, rf"{GATE} is missing"),
        (lambda w: {n: v for n, v in w.items() if "mlp" not in n}, {}, "and 3 more are missing"),
        (lambda w: w | {"model.layers.0.extra": np.ones(3)}, {}, r"layers\.0\.extra is not in a model of this config"),
        (lambda w: w | {"model.layers.9.mlp.gate_proj.weight": w[GATE]}, {}, "tensors are of 10 layers"),
        (lambda w: w | {GATE: np.ones((20, 13))}, {}, r"gate_proj\.weight has shape \(20, 13\), .* \(20, 12\)"),
        (
            lambda w: w | {CONVOLUTION: np.ones((12, 1, 4))},
            {},
            r"conv_k\.weight has shape \(12, 4, 1\), .* \(12, 3, 1\)",
        ),
        (lambda w: w | {GATE: np.ones((20, 12), np.int8)}, {}, "holds int8, not floating-point"),
        (
            lambda w: w | {"model.layers.9.extra": np.ones(3)},
            {},
            r"model\.layers\.9\.extra is not in a model of this config",
        ),
        (
            lambda w: {f"net.{n.removeprefix('model.')}": v for n, v in w.items()},
            {},
            r"model\.net\.embed_tokens\.weight is not the name of a TTT model's parameter, nor are \d\d other names",
        ),
        (
            lambda w: {
                n.replace("seq_modeling_block", "attn").replace("mlp", "ff").replace("norm", "ln"): v
                for n, v in w.items()
                if "conv" not in n
            },
            {},
            r"model\.layers\.0\.attn\.W1 is not the name",
        ),
        (lambda w: {n: v for n, v in w.items() if "layers" not in n}, {}, "tensors are of 0 layers"),
        (lambda w: w, {"num_hidden_layers": 3}, "num_hidden_layers is 3, but the tensors are of 2"),
        (lambda w: w, {"num_hidden_layers": 10**4}, "num_hidden_layers is 10000, but"),
        (lambda w: w, {"vocab_size": 38}, r"embed_tokens\.weight has shape \(37, 12\), .* \(38, 12\)"),
        (lambda w: w, {"hidden_size": 16}, r"has shape .*more such problems"),
        (lambda w: w, {"num_attention_heads": 3}, r"has shape"),
        (lambda w: w, {"mini_batch_size": 16}, r"learnable_token_idx has shape \(5,\), .* \(16,\)"),
        (lambda w: w, {"ttt_layer_type": "mlp"}, r"W2"),
        (lambda w: w, {"share_qk": False}, r"k_proj"),
        (lambda w: w, {"use_gate": False}, r"g_proj\.weight"),
        (lambda w: w, {"model_type": "llama"}, "not a TTT"),
    ],
)
def test_tensors_and_config_that_do_not_fit(source, out, change, config, message):
    save(source, change(official()), CONFIG | config)
    with pytest.raises(CheckpointError, match=message) as error:
        convert(source, out)
    assert "\n" not in str(error.value)
    assert list(out.parent.iterdir()) == [source]
    inspection = inspect(source)
    assert any(problem in str(error.value) for problem in inspection.problems)


def test_tensor_larger_than_memory(source, out):
    """An expanded view can have any size; it must be refused before it becomes an array."""
    view = View(Storage("FloatStorage", 1, [bytes(4)]), (2**31 - 1,) * 4, (0,) * 4)
    save(source, official() | {GATE: view})
    with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape"):
        convert(source, out)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [None, mx.float16])
def test_nonfinite(source, out, value, dtype):
    weights = official()
    weights[GATE][3, 4] = value
    save(source, weights)
    with pytest.raises(CheckpointError, match=rf"source: {GATE} has 1 values that are NaN or infinite; --allow-non"):
        convert(source, out, dtype=dtype)
    assert not out.exists()
    report = convert(source, out, dtype=dtype, allow_nonfinite=True)
    assert any(GATE in warning for warning in report.warnings)
    np.testing.assert_equal(float(loaded(out)[GATE][3, 4]), value)


def test_overflow_of_float16(source, out):
    weights = official()
    weights[GATE][:2] = 1e6
    save(source, weights)
    with pytest.raises(
        CheckpointError, match=rf"source: {GATE} has 24 values that are too large for float16; bfloat16"
    ):
        convert(source, out, dtype=mx.float16)
    convert(source, out, dtype=mx.bfloat16)


def test_damage_found_on_the_way(source, out):
    save(source, official())
    file = source / "pytorch_model.bin"
    data = bytearray(file.read_bytes())
    data[data.index(official()[GATE].tobytes()) + 5] ^= 4
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        convert(source, out)
    assert list(out.parent.iterdir()) == [source]


def test_interrupted(source, out):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(save(source, official()), out, progress=interrupt)
    assert list(out.parent.iterdir()) == [source]


def test_out_exists(source, out):
    save(source, official())
    convert(source, out)
    with pytest.raises(OutputError, match="--overwrite"):
        convert(source, out)
    convert(source, out, dtype=mx.bfloat16, overwrite=True)
    assert_same_weights(out, official(), mx.bfloat16)


@pytest.mark.parametrize("place", [".", "..", "../link"])
def test_out_is_the_source(source, place):
    save(source, official())
    shutil.copy(source / "config.json", source.parent)
    (source.parent / "link").symlink_to(source)
    with pytest.raises(OutputError, match="which is to be read, lies there"):
        convert(source, source / place, overwrite=True)
    assert (source / "pytorch_model.bin").is_file()


class TestOutHoldsWhatIsRead:
    """A model directory is not overwritten if something is read from it."""

    def refused(self, out: Path, *arguments, **options) -> None:
        before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
        with pytest.raises(OutputError, match="which is to be read, lies there; choose another place"):
            convert(*arguments, overwrite=True, **options)
        assert before == {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}

    @pytest.fixture
    def old(self, source, out) -> Path:
        convert(save(source, official()), out)
        return out

    def test_the_model_itself(self, old):
        self.refused(old, old, old)
        self.refused(old, old / "model.safetensors", old)

    def test_another_name_of_the_model(self, old):
        old.with_name("link").symlink_to(old)
        self.refused(old, old.with_name("link"), old)
        self.refused(old, old, old.with_name("link"))

    def test_the_file_that_a_link_leads_to(self, old, tmp_path):
        """In the Hub's cache a snapshot's files are links to blobs."""
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        (snapshot / "config.json").write_text(json.dumps(CONFIG))
        (snapshot / "model.safetensors").symlink_to("../out/model.safetensors")
        self.refused(old, snapshot, old)

    def test_the_link(self, source, out, tmp_path):
        blob = save(source, official()) / "pytorch_model.bin"
        blob.rename(tmp_path / "blob")
        blob.symlink_to("../blob")
        self.refused(out, source, source)
        self.refused(out, blob, blob)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        shutil.copy(source / "config.json", elsewhere)
        self.refused(out, blob, source, config=elsewhere / "config.json", tokenizer=elsewhere)

    @pytest.mark.parametrize("option, name", [("config", "config.json"), ("tokenizer", "config.json")])
    def test_a_file_that_is_given(self, source, old, option, name):
        self.refused(old, source, old, **{option: old / name})
        link = old.with_name("link")
        link.symlink_to(old / name)
        self.refused(old, source, old, **{option: link})

    def test_a_folder_that_is_given(self, source, old):
        self.refused(old, source, old, tokenizer=old)

    def test_files_elsewhere(self, source, old):
        shutil.copy(old / "config.json", old.with_name("mine.json"))
        convert(source, old, overwrite=True, config=old.with_name("mine.json"))


def test_out_is_a_link_to_a_model(source, out):
    convert(save(source, official()), out)
    link = out.with_name("link")
    link.symlink_to(out)
    with pytest.raises(OutputError, match="link: is a link, so --overwrite leaves it alone"):
        convert(source, link, overwrite=True)
    assert link.is_symlink() and (out / "config.json").is_file()


def test_out_by_way_of_a_link(source, out, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to("deep")
    convert(save(source, official()), tmp_path / "link" / ".." / "out")
    assert (out / "config.json").is_file()


def test_out_is_a_link_to_itself(source, out):
    out.symlink_to(out)
    with pytest.raises(OutputError, match="out"):
        convert(save(source, official()), out)


def test_disk_full(source, out, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(OutputError, match=r"disk is full: 0\.00 GB are needed, 0\.00 GB are free"):
        convert(save(source, official()), out)
    assert list(out.parent.iterdir()) == [source]


def test_disk_with_little_to_spare(source, out, monkeypatch, shakespeare_dir):
    """The free space must hold what is written; a tokenizer needs several times its own size."""
    weights = official(replace(ARGS, vocab_size=2048))
    save(source, weights, CONFIG | {"vocab_size": 2048})
    needed = sum(array.nbytes for array in weights.values()) + 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, needed))
    convert(source, out)
    shutil.copy(shakespeare_dir / "tokenizer.model", source)
    with pytest.raises(OutputError, match="disk is full"):
        convert(source, out, overwrite=True)
    needed += 8 * (source / "tokenizer.model").stat().st_size
    convert(source, out, overwrite=True)
    assert sum(file.stat().st_size for file in out.iterdir()) <= needed


class TestInspect:
    def test_good(self, source):
        weights = official()
        tied = {"lm_head.weight": weights["model.embed_tokens.weight"]}  # stored twice, counted once
        save(source, weights | tied | {GATE: bfloat16(weights[GATE])})
        (source / "tokenizer.model").touch()
        inspection = inspect(source)
        assert inspection.format == "PyTorch" and inspection.args == ARGS
        assert inspection.tensors == len(weights)
        assert inspection.parameters == sum(w.size for w in weights.values())
        assert inspection.bytes_by_dtype == {"float32": 4 * (inspection.parameters - 240), "bfloat16": 480}
        assert inspection.tokenizer_files == ("tokenizer.model",) and inspection.problems == ()

    def test_without_config(self, source):
        inspection = inspect(save(source, official(), None))
        assert inspection.args is None and "--config FILE" in inspection.problems[0]

    def test_all_problems(self, source):
        weights = without(GATE)(official()) | {"model.norm.weight": np.ones(13), "model.x": np.ones(1)}
        problems = inspect(save(source, weights)).problems
        assert len(problems) == 3

    def test_nothing_there(self, source):
        with pytest.raises(CheckpointError, match="no such file"):
            inspect(source)

    def test_folder_that_cannot_be_read(self, source, out, unreadable):
        unreadable(save(source, official()))
        for look in (inspect, lambda source: convert(source, out)):
            with pytest.raises(CheckpointError, match=f"^{source}: Permission denied$"):
                look(source)

    def test_tokenizer_that_cannot_be_reached(self, source, unreadable):
        save(source, official())
        secret = source / "secret"
        (source / "tokenizer.model").symlink_to(secret / "tokenizer.model")
        secret.mkdir()
        unreadable(secret)
        assert inspect(source).tokenizer_files == ()


@pytest.mark.parametrize("name", ["linear-mamba", "mlp-transformer"])
def test_a_model_directory_has_no_problems(golden_dir, out, name):
    """Its convolutions have another layout than the official ones. But a wrong shape is a problem."""
    convert(golden_dir / name, out)
    args = read_config(out / "config.json").args
    tensors = read_safetensors(out / "model.safetensors")
    assert Parameters(args).problems(tensors) == []
    for changed in tensors:
        wrong = Tensor((*tensors[changed].shape[:-1], 7), mx.float32, tensors[changed].load)
        assert any(changed in problem for problem in Parameters(args).problems(tensors | {changed: wrong}))


def test_names_without_building_the_model():
    args = replace(ARGS, num_hidden_layers=3)
    expected = {name: value.shape for name, value in tree_flatten(Model(args).parameters())}
    assert Parameters(args).shapes() == expected
