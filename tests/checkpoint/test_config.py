"""Configs that people bring."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import mlx.core as mx
import pytest

from mlx_ttt.checkpoint.config import config_of, find_config, read_config, written_config
from mlx_ttt.checkpoint.source import Source
from mlx_ttt.checkpoint.tensor import Tensor
from mlx_ttt.errors import CheckpointError

from .test_convert import ARGS, official

MLP = replace(ARGS, ttt_layer_type="mlp", pre_conv=False, share_qk=False, use_gate=False, conv_kernel=4)
BLOCK = "layers.0.seq_modeling_block."
GOOD = {
    "model_type": "ttt",
    "architectures": ["TTTForCausalLM"],
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.fixture
def parsed(tmp_path):
    def parsed(config):
        path = tmp_path / "config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return read_config(path)

    return parsed


def test_defaults_are_the_official_ones(parsed):
    args = parsed(GOOD).args
    assert (args.mini_batch_size, args.conv_kernel, args.rope_theta, args.rms_norm_eps) == (16, 4, 10000.0, 1e-6)
    assert args.tie_word_embeddings and not (args.pre_conv or args.share_qk or args.use_gate)


def test_without_model_type(parsed):
    args = parsed({name: value for name, value in GOOD.items() if name not in ("model_type", "architectures")}).args
    assert args.hidden_size == 64


def test_every_golden_config(golden_dir):
    for path in golden_dir.glob("*/config.json"):
        assert read_config(path).args.model_type == "ttt"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "llama"}, "model of type llama, not a TTT"),
        ({"model_type": ["ttt"]}, "not a TTT"),
        ({"model_type": 7}, "model of type 7"),
        ({"architectures": ["LlamaForCausalLM"]}, "model of type LlamaForCausalLM"),
        ({"architectures": "MambaForCausalLM"}, "model of type MambaForCausalLM"),
        ({"hidden_size": 63}, "hidden_size"),
        ({"hidden_size": 66, "num_attention_heads": 6}, "hidden_size 66"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": 2**40}, "hidden_size is 1099511627776, more than any model"),
        ({"num_attention_heads": 1, "hidden_size": 2**16}, "head_dim is 65536, more"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"vocab_size": 10**4000}, "vocab_size"),
        ({"mini_batch_size": 0}, "mini_batch_size"),
        ({"mini_batch_size": 10**8}, "mini_batch_size is 100000000, more"),
        ({"conv_kernel": -1}, "conv_kernel"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_theta": float("nan")}, "rope_theta"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"ttt_base_lr": "1.0"}, "ttt_base_lr"),
        ({"ttt_layer_type": "attention"}, "ttt_layer_type is 'attention'"),
        ({"ttt_layer_type": None}, "ttt_layer_type"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"share_qk": "yes"}, "share_qk"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ],
)
def test_bad_field(parsed, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        parsed(GOOD | change)
    assert "config.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("depth", [10, 300, 900, 950, 980, 10**5])
def test_deep_value(parsed, depth):
    with pytest.raises(CheckpointError, match=r"hidden_act|not valid JSON"):
        parsed(json.dumps(GOOD)[:-1] + ', "hidden_act": ' + "[" * depth + "]" * depth + "}")


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_missing_field(parsed, name):
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        parsed({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\0", '{"hidden_size": 1, "hidden_size": 2}', "9" * 10**6])
def test_no_config(parsed, text):
    with pytest.raises(CheckpointError, match=r"not valid JSON|not an object"):
        parsed(text)


def test_too_long(parsed):
    with pytest.raises(CheckpointError, match="more than a checkpoint has"):
        parsed('{"a": "' + "x" * (17 << 20) + '"}')


def test_find(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; give one with --config FILE"):
        find_config(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"mine\.json: no such file$"):
        find_config(tmp_path, tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text("{}")
    assert find_config(tmp_path, tmp_path / "mine.json") == tmp_path / "mine.json"


def test_written_config(parsed):
    """It has every field and the true dtype, and none that could make another tool run code from the folder."""
    given = GOOD | {
        "torch_dtype": "float32",
        "dtype": "float32",
        "eos_token_id": 2,
        "auto_map": {"AutoModel": "evil.py"},
        "model_file": "evil.py",
    }
    written = written_config(parsed(given), "bfloat16")
    assert written["torch_dtype"] == "bfloat16" and "dtype" not in written
    assert written["eos_token_id"] == 2 and written["rope_theta"] == 10000.0 and written["hidden_size"] == 64
    assert "auto_map" not in written and written["model_file"] == "ttt.py"
    assert parsed(written).args == parsed(given).args


class TestWhereTheConfigComesFrom:
    """`config_of`: the given file, the one beside the weights, or what the tensors tell."""

    @pytest.fixture
    def stream(self, tmp_path):
        tensors = {name: Tensor(array.shape, mx.float32, None) for name, array in official().items()}
        return Source(tmp_path, "JAX stream", (tmp_path / "streaming_params",), tensors)

    def test_inferred(self, stream):
        config = config_of(stream)
        assert config.args == ARGS and config.path is None
        assert re.search(
            r"^no config: .* has 2 layers and an lm_head tied .* ttt_base_lr 1, rope_theta 10000, rms_norm_eps 1e-06 "
            r"\(--ttt-base-lr, --rope-theta, --rms-norm-eps\)$",
            *config.warnings,
        )

    def test_base_lr_of_the_inner_model(self, stream):
        mlp = replace(stream, tensors={n: Tensor(a.shape, mx.float32, None) for n, a in official(MLP).items()})
        assert config_of(mlp).args == replace(MLP, ttt_base_lr=0.1)

    def test_untied(self, stream):
        stream.tensors["lm_head.weight"] = stream.tensors["model.embed_tokens.weight"]
        assert config_of(stream).args == replace(ARGS, tie_word_embeddings=False)

    def test_assumptions(self, stream):
        given = {"ttt_base_lr": 0.3, "rope_theta": 500.0}
        config = config_of(stream, None, given)
        assert config.args == replace(ARGS, **given)
        assert "rms_norm_eps 1e-06 (--rms-norm-eps)" in config.warnings[0] and "rope" not in config.warnings[0]
        assert config_of(stream, None, given | {"rms_norm_eps": 1e-5}).warnings[0].endswith("tied to the embedding")

    @pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e30])
    @pytest.mark.parametrize("name", ["ttt_base_lr", "rope_theta", "rms_norm_eps"])
    def test_bad_assumption(self, stream, name, value):
        with pytest.raises(CheckpointError, match=f"^{stream.path}: {name} is "):
            config_of(stream, None, {name: value})

    @pytest.mark.parametrize("kind", ["JAX stream", "PyTorch"])
    def test_a_file_wins(self, stream, kind):
        source = replace(stream, format=kind)
        for name, given in (("config.json", None), ("mine.json", stream.path / "mine.json")):
            (stream.path / name).write_text(json.dumps(GOOD | {"bos_token_id": len(name)}))
            config = config_of(source, given)
            assert config.args.hidden_size == 64 and config.path.name == config.name == name and not config.warnings
            assert config.fields["bos_token_id"] == len(name)
            with pytest.raises(CheckpointError, match=rf"{name}: set rope_theta in there; the option is for"):
                config_of(source, given, {"rope_theta": 500.0})

    def test_only_a_stream_can_do_without(self, stream):
        for source, given in ((replace(stream, format="PyTorch"), None), (stream, stream.path / "config.json")):
            with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
                config_of(source, given, {"rope_theta": 500.0})

    @pytest.mark.parametrize(
        "name",
        ["embed_tokens.weight", "layers.0.mlp.gate_proj.weight", f"{BLOCK}W1", f"{BLOCK}learnable_token_idx"],
    )
    def test_what_it_needs(self, stream, name):
        name = f"model.{name}"
        tensor = stream.tensors.pop(name)
        with pytest.raises(CheckpointError, match=rf"{name} is missing, which tells the size"):
            config_of(stream)
        stream.tensors[name] = Tensor((*tensor.shape, 1), mx.float32, None)
        with pytest.raises(CheckpointError, match=rf"{name} has shape \(.*, 1\), expected {len(tensor.shape)} axes"):
            config_of(stream)

    def test_sizes_that_no_model_has(self, stream):
        stream.tensors["model.embed_tokens.weight"] = Tensor((2**30, 12), mx.float32, None)
        with pytest.raises(CheckpointError, match="vocab_size is 1073741824, more than any model has"):
            config_of(stream)
        stream.tensors["model.embed_tokens.weight"] = Tensor((37, 13), mx.float32, None)
        with pytest.raises(CheckpointError, match="hidden_size 13 does not divide into 2 heads"):
            config_of(stream)
