from __future__ import annotations

import json
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from transformers import PreTrainedTokenizerFast

import mlx_ttt
from mlx_ttt.checkpoint.tokenizer import write_tokenizer
from mlx_ttt.errors import CheckpointError, TokenizerError
from mlx_ttt.export.companions.folder import _FILES, _write_readme, swift_package, write_companions
from mlx_ttt.model import Model, ModelArgs
from mlx_ttt.text.state import fingerprint
from tests.checkpoint.sentencepiece_models import APPROXIMATE, EXACT, train

SWIFT = swift_package() / "swift"
TEXTS = (
    *("", " ", "ROMEO:\nBut, soft!", "  two  spaces  ", "a\r\n\tb", "naïve café", "e\u0301 \u0301x", "日本語 한국어"),
    *(
        "🙂👩\u200d👧",
        "<s>",
        "</s>x<unk>",
        "<0x41>",
        "\0\x7f\ufeff",
        "▁ ▁",
        "the\n\nthe <mask>\t<a",
        "9" * 40,
        " " * 40,
    ),
)


def small_args(**changes) -> ModelArgs:
    sizes = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    return ModelArgs(**sizes | {"num_attention_heads": 2} | changes)


def small_model(folder: Path, **config) -> ModelArgs:
    """A model directory without a tokenizer."""
    args = small_args()
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(Model(args).parameters())))
    entries = {**vars(args), "bos_token_id": 1, "eos_token_id": 2, **config}
    (folder / "config.json").write_text(json.dumps(entries))
    return args


@pytest.fixture(scope="module")
def companions(directory, tmp_path_factory) -> Path:
    """The companions of the trained model."""
    out = tmp_path_factory.mktemp("companions")
    args = ModelArgs.from_dict(json.loads((directory / "config.json").read_text()))
    write_companions(out, directory, ["Shakespeare"], args, {"shape": [4, 4, 109, 64]})
    return out


def load(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def same_ids(ours: Path, theirs: Path) -> None:
    ours, theirs = (PreTrainedTokenizerFast.from_pretrained(folder) for folder in (ours, theirs))
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, add_special_tokens=special) == theirs.encode(text, add_special_tokens=special), (
                text
            )


# ------------------------------------------------------------------------------------------------- the README


def test_readme_names_files_that_exist(companions):
    text = (companions / "README.md").read_text()
    named = re.findall(r"^\| `([^`]+)` \|", text, re.M)
    assert set(named) | {"README.md"} == {path.name for path in companions.iterdir()}
    assert "folder `TTTKit`" in text


def test_the_source_is_the_model(companions, directory):
    model, tokenizer = mlx_ttt.load(directory)
    weights, metadata = mx.load(str(companions / "source.safetensors"), return_metadata=True)
    assert metadata["fingerprint"] == fingerprint(model, tokenizer)
    assert metadata["model"] == fingerprint(model)
    for i, cache in enumerate(model.make_cache()):
        for name, start in zip(model.args.inner_model.weight_names, cache.weights, strict=True):
            assert mx.array_equal(weights[f"{i}.{name}"], start)


def test_readme_says_sizes_and_what_has_not_been_run(companions):
    text = (companions / "README.md").read_text()
    assert "223.2 kB" in text  # 2 · 4 · 4 · 109 · 64 bytes
    size = (companions / "tokenizer.json").stat().st_size
    assert f"| `tokenizer.json` | {size / 1e3:.1f} kB |" in text
    assert "Nothing of this has run on Apple hardware yet" in text
    assert "compiled and tested on Linux" in text
    assert 'forResource: "Shakespeare"' in text
    assert "$" not in text


def test_readme_of_a_separate_pair(tmp_path):
    args, text = small_args(), {}
    for names, stateful in ((["X"], False), (["X-decode", "X-prefill"], True)):
        for name in _FILES:
            (tmp_path / name).touch()
        _write_readme(tmp_path, names, args, {"shape": [1, 2, 3, 32]}, stateful)
        text[len(names)] = (tmp_path / "README.md").read_text()
    assert "as a Core ML package for" in text[1]
    assert "load(contentsOf: model, source: source)" in text[1]
    assert text[2].startswith("# X in an app")
    assert "as two stateful Core ML packages for" in text[2]
    assert "Drag `X-decode.mlpackage` and `X-prefill.mlpackage` into" in text[2]
    assert 'let prefill = Bundle.main.url(forResource: "X-prefill"' in text[2]
    assert "load(contentsOf: decode, source: source, prefill: prefill)" in text[2]
    assert not re.search(r"X\.ml(package|modelc)|\$", text[2])


def test_readme_code_is_short(companions):
    first = (companions / "README.md").read_text().split("```swift\n")[1].split("```")[0]
    assert len(first.splitlines()) <= 30


# ------------------------------------------------------------------------------------------------- Swift


def test_the_swift_package_is_copied(companions):
    names = {
        path.relative_to(SWIFT) for folder in ("Sources", "StandIns") for path in (SWIFT / folder).rglob("*.swift")
    }
    copied = {path.relative_to(companions / "TTTKit" / "swift") for path in companions.rglob("swift/**/*.swift")}
    assert copied == names
    assert all((companions / "TTTKit" / "swift" / name).read_bytes() == (SWIFT / name).read_bytes() for name in names)
    assert (companions / "TTTKit" / "Package.swift").read_bytes() == (SWIFT.parent / "Package.swift").read_bytes()
    assert Path("Sources/TTTKit/CoreMLTTTModel.swift") in names


# ------------------------------------------------------------------------------------------------- expected outputs


def test_expected_outputs_are_those_of_the_model(companions, directory):
    model, tokenizer = mlx_ttt.load(directory)
    expected = load(companions / "expected.json")
    assert len(expected["prompts"]) >= 2
    for case in expected["prompts"]:
        ids = tokenizer.encode(case["prompt"])
        assert ids == case["prompt_ids"]
        for token in case["greedy_ids"]:
            logits = np.array(model(mx.array([ids]))[0, -1])
            if len(ids) == len(case["prompt_ids"]):
                best = np.argsort(-logits)[:5]
                assert best.tolist() == [entry["id"] for entry in case["top_logits"]]
                np.testing.assert_allclose(logits[best], [entry["logit"] for entry in case["top_logits"]], atol=1e-3)
            assert logits.max() - logits[token] < 1e-3
            ids.append(token)


def test_expected_outputs_name_the_version(companions):
    assert load(companions / "expected.json")["made_by"] == f"mlx-ttt {mlx_ttt.__version__}, MLX, float32"


def test_expected_prompts_reach_beyond_a_mini_batch(companions):
    K = load(companions / "config.json")["mini_batch_size"]
    cases = load(companions / "expected.json")["prompts"]
    assert any(len(case["prompt_ids"]) > K for case in cases)
    assert all(len(case["greedy_ids"]) > K for case in cases)


def test_expected_continuation_is_what_the_official_implementation_writes(companions, shakespeare_dir):
    official = {case["prompt"]: case for case in load(shakespeare_dir / "expected.json")["greedy"]}
    ours = load(companions / "expected.json")["prompts"][0]
    theirs = official[ours["prompt"]]
    assert ours["prompt_ids"] == theirs["prompt_ids"]
    assert ours["greedy_ids"] == theirs["generated_ids"][: len(ours["greedy_ids"])]


# ------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_gives_the_same_ids(companions, directory):
    same_ids(companions, directory)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(companions)
    for case in load(companions / "expected.json")["tokenization"]:
        assert tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("llama-2", "unigram, nmt_nfkc") else pytest.param(name, marks=pytest.mark.slow)
        for name in (*EXACT, *APPROXIMATE)
    ],
)
def test_other_tokenizers_give_the_same_ids(tmp_path, name):
    source, model, out = (tmp_path / folder for folder in ("source", "model", "out"))
    for folder in (source, model, out):
        folder.mkdir()
    options = EXACT[name] if name in EXACT else APPROXIMATE[name][0]
    (source / "tokenizer.model").write_bytes(train(**options))
    args = small_model(model)
    write_tokenizer(source, model, {})
    write_companions(out, model, ["X"], args, {"shape": [1, 2, 3, 32]})
    same_ids(out, model)


@pytest.mark.parametrize(
    ("name", "kind"), [("tokenizer_config.json", TokenizerError), ("generation_config.json", CheckpointError)]
)
def test_a_damaged_file(tmp_path, name, kind):
    out = tmp_path / "out"
    out.mkdir()
    args = small_model(tmp_path)
    write_tokenizer(mlx_ttt.bundled_model() / "tokenizer.model", tmp_path, {})
    (tmp_path / name).write_text('{"a": 1, "a": 2}')
    with pytest.raises(kind, match=rf"{name}: .*a key occurs twice"):
        write_companions(out, tmp_path, ["X"], args, {"shape": [1, 2, 3, 32]})


def test_a_tokenizer_that_swift_does_not_know(tmp_path):
    from tokenizers import Tokenizer, models, normalizers

    args, out = small_model(tmp_path), tmp_path / "out"
    out.mkdir()
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Nmt()])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: .*normalizer Nmt"):
        write_companions(out, tmp_path, ["X"], args, {"shape": [1, 2, 3, 32]})
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match="no WordLevel model"):
        write_companions(out, tmp_path, ["X"], args, {"shape": [1, 2, 3, 32]})


def test_no_tokenizer(tmp_path):
    args, out = small_model(tmp_path), tmp_path / "out"
    out.mkdir()
    with pytest.raises(TokenizerError, match="no tokenizer"):
        write_companions(out, tmp_path, ["X"], args, {"shape": [1, 2, 3, 32]})
    assert not list(out.iterdir())


# ------------------------------------------------------------------------------------------------- configuration


def test_configuration(companions, directory):
    own = load(directory / "config.json")
    del own["model_file"]  # Python
    assert load(companions / "config.json") == own
    generation = load(companions / "generation_config.json")
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (own["bos_token_id"], [own["eos_token_id"]])
    source = (SWIFT / "Sources" / "TTTKit" / "Sampler.swift").read_text()
    read = set(re.findall(r"^    let (\w+): \w+\?$", source, re.M))
    assert set(generation) - {"bos_token_id", "eos_token_id"} <= read


def test_ids_that_only_the_tokenizer_knows(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    args = small_model(tmp_path, bos_token_id=None, eos_token_id=None)
    write_tokenizer(mlx_ttt.bundled_model() / "tokenizer.model", tmp_path, {})
    write_companions(out, tmp_path, ["X"], args, {"shape": [1, 2, 3, 32]})
    generation = load(out / "generation_config.json")
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, [2])


def test_a_models_own_generation_config_is_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    args = small_model(tmp_path, quantization=None)
    write_tokenizer(mlx_ttt.bundled_model() / "tokenizer.model", tmp_path, {})
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.3, "eos_token_id": [2, 3]}')
    write_companions(out, tmp_path, ["X"], args, {"shape": [1, 2, 3, 32]})
    assert load(out / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": [2, 3], "temperature": 0.3}
    assert "quantization" not in load(out / "config.json")
    same_ids(out, mlx_ttt.bundled_model())
    assert not (out / "tokenizer.model").exists()
