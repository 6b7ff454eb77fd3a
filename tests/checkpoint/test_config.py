"""Configs that people bring."""

from __future__ import annotations

import json

import pytest

from mlx_ttt.checkpoint.config import find_config, read_config, refuse_quantized, written_config
from mlx_ttt.errors import CheckpointError

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
def read(tmp_path):
    def read(config):
        path = tmp_path / "config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config))
        return read_config(path)

    return read


def test_defaults_are_the_official_ones(read):
    _, args = read(GOOD)
    assert (args.mini_batch_size, args.conv_kernel, args.rope_theta, args.rms_norm_eps) == (16, 4, 10000.0, 1e-6)
    assert args.tie_word_embeddings and not (args.pre_conv or args.share_qk or args.use_gate)


def test_without_model_type(read):
    _, args = read({name: value for name, value in GOOD.items() if name not in ("model_type", "architectures")})
    assert args.hidden_size == 64


def test_every_golden_config(golden_dir):
    for path in golden_dir.glob("*/config.json"):
        assert read_config(path)[1].model_type == "ttt"


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
def test_bad_field(read, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read(GOOD | change)
    assert "config.json" in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("field", ["quantization", "quantization_config"])
def test_quantized(read, tmp_path, field):
    """Such a model can be loaded, so the config is a good one; but it cannot be converted."""
    config, _ = read(GOOD | {field: {"bits": 4}})
    with pytest.raises(CheckpointError, match=r"config\.json: the weights are quantized; convert the original"):
        refuse_quantized(config, tmp_path / "config.json")
    refuse_quantized(GOOD, tmp_path / "config.json")


@pytest.mark.parametrize("depth", [10, 300, 900, 950, 980, 10**5])
def test_deep_value(read, depth):
    with pytest.raises(CheckpointError, match=r"hidden_act|not valid JSON"):
        read(json.dumps(GOOD)[:-1] + ', "hidden_act": ' + "[" * depth + "]" * depth + "}")


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_missing_field(read, name):
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        read({key: value for key, value in GOOD.items() if key != name})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\0", '{"hidden_size": 1, "hidden_size": 2}', "9" * 10**6])
def test_no_config(read, text):
    with pytest.raises(CheckpointError, match=r"not valid JSON|not an object"):
        read(text)


def test_too_long(read):
    with pytest.raises(CheckpointError, match="more than a checkpoint has"):
        read('{"a": "' + "x" * (17 << 20) + '"}')


def test_find(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json: no such file; give one with --config FILE"):
        find_config(tmp_path, None)
    with pytest.raises(CheckpointError, match=r"mine\.json: no such file$"):
        find_config(tmp_path, tmp_path / "mine.json")
    (tmp_path / "mine.json").write_text("{}")
    assert find_config(tmp_path, tmp_path / "mine.json") == tmp_path / "mine.json"


def test_written_config(read):
    """Complete, honest about the dtype, and without what could make another tool run code from the folder."""
    given = GOOD | {
        "torch_dtype": "float32",
        "dtype": "float32",
        "eos_token_id": 2,
        "auto_map": {"AutoModel": "evil.py"},
        "model_file": "evil.py",
    }
    written = written_config(*read(given), "bfloat16")
    assert written["torch_dtype"] == "bfloat16" and "dtype" not in written
    assert written["eos_token_id"] == 2 and written["rope_theta"] == 10000.0 and written["hidden_size"] == 64
    assert not {"auto_map", "model_file"} & written.keys()
    assert read(written)[1] == read(given)[1]
