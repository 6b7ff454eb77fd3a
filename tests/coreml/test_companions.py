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
from mlx_ttt.coreml.companions import _FILES, _write_readme, write_companions
from mlx_ttt.detokenizer import SentencePieceDetokenizer
from mlx_ttt.errors import CheckpointError, TokenizerError
from mlx_ttt.model import Model, ModelArgs
from tests.checkpoint.sentencepiece_models import APPROXIMATE, EXACT, train

SWIFT = Path(mlx_ttt.__file__).parent / "coreml" / "swift"
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
def companions(tmp_path_factory) -> Path:
    """The companions of the bundled model."""
    out = tmp_path_factory.mktemp("companions")
    config = json.loads((mlx_ttt.bundled_model() / "config.json").read_text())
    write_companions(
        out, mlx_ttt.bundled_model(), ["Shakespeare"], ModelArgs.from_dict(config), {"shape": [4, 4, 109, 64]}
    )
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
    assert (companions / "TTTKit" / "Sources" / "TTTKit" / "TTTGenerator.swift").is_file()
    assert "`TTTKit/Sources/TTTKit`" in text


def test_readme_says_sizes_and_what_has_not_been_run(companions):
    text = (companions / "README.md").read_text()
    assert "223.2 kB" in text  # 2 · 4 · 4 · 109 · 64 bytes
    size = (companions / "tokenizer.json").stat().st_size
    assert f"| `tokenizer.json` | {size / 1e3:.1f} kB |" in text
    assert "Nothing of this has run on Apple hardware yet" in text
    assert "parsed, not compiled" in text
    assert 'forResource: "Shakespeare"' in text
    assert "$" not in text


def test_readme_of_a_separate_pair(tmp_path):
    args, text = small_args(), {}
    for names, stateful in ((["X"], False), (["X-decode", "X-prefill"], True)):
        for name in _FILES:
            (tmp_path / name).touch()
        _write_readme(tmp_path, names, args, {"shape": [1, 2, 3, 32]}, stateful, {"model": {"type": "BPE"}})
        text[len(names)] = (tmp_path / "README.md").read_text()
    assert "as a Core ML package for" in text[1]
    assert "load(contentsOf: model)" in text[1]
    assert text[2].startswith("# X in an app")
    assert "as two stateful Core ML packages for" in text[2]
    assert "Drag `X-decode.mlpackage` and `X-prefill.mlpackage` into" in text[2]
    assert 'let prefill = Bundle.main.url(forResource: "X-prefill"' in text[2]
    assert "load(contentsOf: decode, prefill: prefill)" in text[2]
    assert not re.search(r"X\.ml(package|modelc)|\$", text[2])


def test_readme_code_is_short(companions):
    first = (companions / "README.md").read_text().split("```swift\n")[1].split("```")[0]
    assert len(first.splitlines()) <= 30


# ------------------------------------------------------------------------------------------------- Swift


def swift_files() -> list[Path]:
    return sorted(path for path in SWIFT.rglob("*.swift") if ".build" not in path.parts)


def test_swift_files_are_copied(companions):
    copied = {path.relative_to(companions / "TTTKit"): path for path in companions.rglob("*.swift")}
    assert copied.keys() == {path.relative_to(SWIFT) for path in swift_files()}
    assert all(copy.read_bytes() == (SWIFT / name).read_bytes() for name, copy in copied.items())
    assert {"Package.swift", "TTTGenerator.swift", "CoreMLTTTModel.swift"} <= {path.name for path in copied}


def test_swift_parses(companions):
    tree_sitter = pytest.importorskip("tree_sitter")
    language = tree_sitter.Language(pytest.importorskip("tree_sitter_swift").language())
    parser = tree_sitter.Parser(language)
    readme = (companions / "README.md").read_text()
    sources = {path.name: path.read_bytes() for path in swift_files()}
    sources |= {f"README, block {i}": code.encode() for i, code in enumerate(swift_blocks(readme))}
    assert len(sources) > 10
    assert not [name for name, source in sources.items() if parser.parse(source).root_node.has_error]
    assert parser.parse(sources["TTTModel.swift"].replace(b"{", b"(", 1)).root_node.has_error


def swift_blocks(markdown: str) -> list[str]:
    return re.findall(r"```swift\n(.*?)```", markdown, re.S)


def test_no_number_of_a_model_stands_in_the_swift_code():
    """Mini-batch size, vocabulary and ids come from the package's metadata at run time."""
    allowed = {
        "StateFile.swift": {16, 24},  # bytes of the file's parts
        "Sampler.swift": {256, 11, 27, 30, 31, 53},  # the default length, SplitMix64, bits of a Double
        "CoreMLTTTModel.swift": {11, 15, 18},  # system versions
    }
    for path in (SWIFT / "Sources").rglob("*.swift"):
        code = re.sub(r"//.*", "", path.read_text())
        numbers = {int(number) for number in re.findall(r"(?<![\w.])\d+(?![\w.])", code)}
        assert {number for number in numbers if number > 8} <= allowed.get(path.name, set()), path.name


def test_swift_asks_for_metadata_that_packages_have(tmp_path):
    pytest.importorskip("coremltools")
    from coremltools.models.utils import load_spec

    from mlx_ttt.coreml.package import export

    small_model(tmp_path)
    export(tmp_path, tmp_path / "x.mlpackage", companions=False)
    description = load_spec(str(tmp_path / "x.mlpackage")).description
    source = (SWIFT / "Sources" / "TTTKit" / "TTTModel.swift").read_text()
    asked = set(re.findall(r'entry\("(\w+)"', source)) | set(re.findall(r'metadata\["com\.mlx-ttt\.(\w+)"\]', source))
    given = {key.removeprefix("com.mlx-ttt."): value for key, value in description.metadata.userDefined.items()}
    assert len(asked) == 6
    assert asked <= given.keys()
    for name in ("format", "mini_batch_size", "vocab_size", "prefill_tokens"):
        assert isinstance(json.loads(given[name]), int)
    assert json.loads(given["eos_token_id"]) == [2]

    adapter = (SWIFT / "Sources" / "TTTKit" / "CoreMLTTTModel.swift").read_text()
    features = {
        function.name: {feature.name for feature in (*function.input, *function.output, *function.state)}
        for function in description.functions
    }
    assert set(re.findall(r'function: "(\w+)"', adapter)) == features.keys()
    for name in set.union(*features.values()):
        assert f'"{name}"' in adapter


# ------------------------------------------------------------------------------------------------- expected outputs


def test_expected_outputs_are_those_of_the_model(companions):
    model, tokenizer = mlx_ttt.load()
    model.set_dtype(mx.float32)
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


def test_pieces_add_up_to_the_text(companions):
    pieces = load(companions / "pieces.json")
    for case in load(companions / "expected.json")["prompts"]:
        for ids, text in ((case["greedy_ids"], case["greedy_text"]), (case["prompt_ids"], case["prompt"])):
            assert joined(pieces, ids) == text


def joined(pieces: list, ids: list[int]) -> str:
    parts = (pieces[id] for id in ids)
    return b"".join(part.encode() if isinstance(part, str) else bytes(part) for part in parts).decode()


# ------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer_gives_the_same_ids(companions):
    same_ids(companions, mlx_ttt.bundled_model())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(companions)
    for case in load(companions / "expected.json")["tokenization"]:
        assert tokenizer.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("name", [*EXACT, *APPROXIMATE])
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

    content, settings = load(out / "tokenizer.json"), load(out / "tokenizer_config.json")
    assert not any(token["special"] for token in content["added_tokens"])
    unigram = content["model"]["type"] == "Unigram"
    assert settings["tokenizer_class"] == ("T5TokenizerFast" if unigram else "PreTrainedTokenizerFast")
    assert unigram or settings["unk_token"] == content["model"]["unk_token"]
    pieces = load(out / "pieces.json")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    detokenizer = SentencePieceDetokenizer(tokenizer, continues=True)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        detokenizer.reset()
        for id in ids:
            detokenizer.add_token(id)
        assert joined(pieces, ids) == detokenizer.text


def test_a_byte_level_tokenizer(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["naïve café " * 20, "the cat sat on the mat " * 20], trainer)
    tokenizer.add_tokens(["[é new]"])
    args, out = small_model(tmp_path), tmp_path / "out"
    out.mkdir()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_companions(out, tmp_path, ["X"], args, {"shape": [1, 2, 3, 32]})
    pieces = load(out / "pieces.json")
    for text in ("naïve café the cat", "日本語 🙂\n\0 \x7f\xa0\xad", "a [é new] b"):
        assert joined(pieces, tokenizer.encode(text).ids) == text
    assert pieces[tokenizer.token_to_id("<|end|>")] == ""
    assert [0xE6] in pieces
    # Without split_special_tokens, special tokens in a text are what they say.
    assert "<|end|>" in [token["content"] for token in load(out / "tokenizer.json")["added_tokens"]]


def test_a_tokenizer_with_unused_ids_and_few_characters(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    args, out = small_model(tmp_path), tmp_path / "out"
    out.mkdir()
    tokenizer = Tokenizer(models.BPE({"q": 0, "t": 5}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_companions(out, tmp_path, ["X"], args, {"shape": [1, 2, 3, 32]})
    assert load(out / "pieces.json") == ["q", "", "", "", "", "t"]
    # The other prompt has no "t".
    assert [case["prompt_ids"] for case in load(out / "expected.json")["prompts"]] == [[5, 5]]


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


def test_a_tokenizer_that_swift_transformers_does_not_know(tmp_path):
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


def test_configuration(companions):
    own = load(mlx_ttt.bundled_model() / "config.json")
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
