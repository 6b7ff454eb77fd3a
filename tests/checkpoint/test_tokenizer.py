"""The converted tokenizer against SentencePiece itself, loaded as plain mlx-lm does."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mlx_ttt.checkpoint import sentencepiece_model
from mlx_ttt.checkpoint import tokenizer as tokenizer_module
from mlx_ttt.checkpoint.tokenizer import write_tokenizer
from mlx_ttt.errors import TokenizerError

from .sentencepiece_models import APPROXIMATE, EXACT, LLAMA_2, approximate, convert, corpus, exact, fuzz, texts, train

CONFIG = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("model") / "tokenizer.model"
    file.write_bytes(train(**LLAMA_2))
    return file


@pytest.fixture(scope="module")
def shakespeare(shakespeare_dir):
    return convert(shakespeare_dir / "tokenizer.model")


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


# ------------------------------------------------------------------------------------- equal to SentencePiece


@pytest.mark.parametrize("name", EXACT)
def test_ids_and_text_equal_sentencepiece(name):
    model = exact(name)
    assert model.report.warnings == []

    @fuzz(100)
    @given(texts(model.pieces))
    def check(text):
        assert not model.differs(text)

    check()


def test_ids_and_text_of_the_trained_model(shakespeare):
    @fuzz(100)
    @given(texts(shakespeare.pieces))
    def check(text):
        assert not shakespeare.differs(text)
        ids = shakespeare.wrapper.encode(text, add_special_tokens=False)
        assert shakespeare.wrapper.decode(ids) == text.replace("▁", " ")

    check()


def test_golden_prompts(shakespeare, shakespeare_dir):
    for case in json.loads((shakespeare_dir / "expected.json").read_text())["greedy"]:
        assert shakespeare.wrapper.encode(case["prompt"]) == case["prompt_ids"]
        assert shakespeare.wrapper.decode(case["generated_ids"]) == case["text"]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_ids_and_text_equal_sentencepiece_at_length(name):
    model, choice = exact(name), random.Random(0)
    lines = corpus()
    for _ in range(4000):
        kind = choice.random()
        if kind < 0.4:
            text = "".join(choice.choices(model.pieces, k=choice.randint(1, 40)))
        elif kind < 0.7:
            text = "\n".join(choice.choices(lines, k=choice.randint(1, 20)))[choice.randint(0, 30) :]
        else:
            text = "".join(choice.choice(" \n\t=-▁ahx0é") * choice.randint(1, 30) for _ in range(choice.randint(1, 20)))
        assert not model.differs(text)


@pytest.mark.parametrize("models", [3, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("spaces_share_a_score", [False, True])
def test_merges_of_vocabularies_that_no_training_gives(spaces_share_a_score, models):
    """Pieces in random order, long ones before short ones; or runs of spaces with one score, as in Llama."""
    choice = random.Random(0)
    trained = train(vocab_size=300, **LLAMA_2 | {"byte_fallback": False})
    for _ in range(models):
        model = ModelProto.FromString(trained)
        normal = [piece for piece in model.pieces if piece.type == ModelProto.SentencePiece.NORMAL]
        normal = [piece for piece in normal if len(piece.piece) == 1 or len(set(piece.piece)) > 1]
        for unit in ("a", "=", "▁"):
            for length in choice.sample(range(2, 15), choice.randint(2, 12)):
                normal.append(ModelProto.SentencePiece(piece=unit * length, type=ModelProto.SentencePiece.NORMAL))
        for rank, piece in enumerate(choice.sample(normal, len(normal))):
            piece.score = -1e9 if spaces_share_a_score and set(piece.piece) == {"▁"} else -rank
        kept = [piece for piece in model.pieces if piece.type != ModelProto.SentencePiece.NORMAL]
        del model.pieces[:]
        model.pieces.extend(kept + normal)
        converted = convert(model.SerializeToString())
        assert converted.report.warnings == []
        for _ in range(60):
            parts = (choice.choice(["a", "b", "=", " ", "x"]) * choice.randint(1, 40) for _ in range(6))
            assert not converted.differs("".join(parts))


@pytest.mark.parametrize("scores", [{"▁the": -3, "▁an": -3}, {"▁▁": -1, "▁▁▁": -9e8, "▁▁▁▁": -9e8}])
def test_different_pieces_of_one_score_are_reported(model_file, scores):
    model = ModelProto.FromString(model_file.read_bytes())
    for piece in model.pieces:
        piece.score = scores.pop(piece.piece, piece.score - 10)
    for name, score in scores.items():
        model.pieces.add(piece=name, score=score)
    assert "same score" in convert(model.SerializeToString()).report.warnings[0]


@pytest.mark.parametrize("name", APPROXIMATE)
def test_models_that_can_only_be_approximated_say_so(name):
    model, word = approximate(name), APPROXIMATE[name][1]
    assert any(word in warning for warning in model.report.warnings) if word else not model.report.warnings
    lines = [line for line in dict.fromkeys(corpus()) if "====" not in line]
    assert sum(map(model.differs, lines)) <= len(lines) // 50


def test_single_spaces_differ_in_decoding_only():
    model = approximate("single spaces")

    @fuzz(100)
    @given(texts(model.pieces))
    def check(text):
        assert model.wrapper.encode(text, add_special_tokens=False) == model.reference.encode(text)
        assert not model.differs("x" + text)  # only a leading U+2581 decodes to another number of spaces

    check()


# ------------------------------------------------------------------------------------------- special tokens


def test_bos_is_put_in_front_unless_asked_not_to():
    model = exact("llama-2")
    ids = model.reference.encode("Hello")
    assert model.wrapper.encode("Hello") == [1, *ids]
    assert model.wrapper.encode("") == [1]
    assert model.wrapper.encode("Hello", add_special_tokens=False) == ids
    assert model.wrapper.bos_token_id == 1
    assert model.wrapper.eos_token_id == 2
    assert exact("no bos").wrapper.encode("Hello") == exact("no bos").reference.encode("Hello")


def test_control_symbols_typed_in_a_text_are_text():
    model = exact("pad and control symbols")
    control = {id for id in range(len(model.reference)) if model.reference.is_control(id)}
    assert len(control) == 5
    for symbol in ("<s>", "</s>", "<pad>", "<sep>", "<|x|>", "a <s> b</s>"):
        assert control.isdisjoint(model.wrapper.encode(symbol, add_special_tokens=False))
    assert model.wrapper.decode([1, *model.reference.encode("a b"), 2, *control], skip_special_tokens=True) == "a b"


def test_chat_template_makes_control_symbols_of_text(model_file, tmp_path, out):
    shutil.copy(model_file, tmp_path)
    template = "<s>{{ messages[0]['content'] }}</s>"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    report = write_tokenizer(tmp_path, out, CONFIG)
    assert ["chat template" in warning for warning in report.warnings] == [True]
    tokenizer = AutoTokenizer.from_pretrained(_with_config(out))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], return_dict=False)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert 1 not in tokenizer.encode("<s>", add_special_tokens=False, split_special_tokens=True)


def test_template_file_is_copied(model_file, tmp_path, out):
    shutil.copy(model_file, tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template.jinja" in write_tokenizer(tmp_path, out, CONFIG).files
    assert (out / "chat_template.jinja").read_text() == "{{ messages }}"


def test_ids_that_disagree_with_the_config_are_reported(model_file, out):
    report = write_tokenizer(model_file, out, {"bos_token_id": 5, "eos_token_id": [2, 7], "pad_token_id": None})
    assert report.warnings == [f"{model_file}: its bos id is 1, the model's config says 5"]


# ---------------------------------------------------------------------------------------- given tokenizer.json


@pytest.fixture(scope="module")
def json_file(model_file, tmp_path_factory):
    """The tokenizer.json of a SentencePiece model."""
    folder = tmp_path_factory.mktemp("json")
    write_tokenizer(model_file, folder, CONFIG)
    return folder / "tokenizer.json"


@pytest.fixture
def json_dir(json_file, tmp_path):
    """A directory with that tokenizer.json, and nothing else."""
    folder = tmp_path / "json"
    folder.mkdir()
    shutil.copy(json_file, folder)
    return folder


def test_lone_tokenizer_json_gets_its_special_tokens_from_the_config(json_dir, out):
    report = write_tokenizer(json_dir / "tokenizer.json", out, CONFIG)
    assert sorted(report.files) == ["tokenizer.json", "tokenizer_config.json"] == sorted(p.name for p in out.iterdir())
    assert (out / "tokenizer.json").read_bytes() == (json_dir / "tokenizer.json").read_bytes()
    tokenizer = AutoTokenizer.from_pretrained(_with_config(out))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    given = Tokenizer.from_file(str(json_dir / "tokenizer.json"))
    for text in ("Hello  world\n", " a", "</s>"):
        assert tokenizer.encode(text) == given.encode(text).ids


def test_tokenizer_class_and_python_code_are_not_taken_over(json_dir, out):
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "eos_token": "</s>",
    }
    (json_dir / "tokenizer_config.json").write_text(json.dumps(settings))
    (json_dir / "evil.py").write_text("raise SystemExit('executed')")
    report = write_tokenizer(json_dir, out, CONFIG)
    assert ["Python code" in warning for warning in report.warnings] == [True]
    assert sorted(p.name for p in out.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    written = json.loads((out / "tokenizer_config.json").read_text())
    assert written == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}


def test_sentencepiece_wins_over_a_tokenizer_json_with_no_more_tokens(json_dir, model_file, out):
    content = json.loads((json_dir / "tokenizer.json").read_text())
    content["model"]["merges"].reverse()
    (json_dir / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(model_file, json_dir)
    report = write_tokenizer(json_dir, out, CONFIG)
    assert not report.warnings
    written = json.loads((out / "tokenizer.json").read_text())["model"]["merges"]
    assert written == content["model"]["merges"][::-1]


def test_tokenizer_json_with_more_tokens_is_kept_and_compared(json_dir, model_file, out):
    content = json.loads((json_dir / "tokenizer.json").read_text())
    new = dict(content["added_tokens"][0], id=len(content["model"]["vocab"]), content="<|im_start|>")
    content["added_tokens"].append(new)
    (json_dir / "tokenizer.json").write_text(json.dumps(content))
    shutil.copy(model_file, json_dir)
    assert write_tokenizer(json_dir, out, CONFIG).warnings == []
    assert "<|im_start|>" in (out / "tokenizer.json").read_text()
    content["model"]["merges"].reverse()
    (json_dir / "tokenizer.json").write_text(json.dumps(content))
    assert "get other ids" in write_tokenizer(json_dir, out, CONFIG).warnings[0]


def test_tokenizer_json_stands_in_for_an_unusable_tokenizer_model(json_dir, out):
    (json_dir / "tokenizer.model").write_bytes(b"a tiktoken file, say")
    report = write_tokenizer(json_dir, out, CONFIG)
    assert "tokenizer.json was used" in report.warnings[0]
    assert "tokenizer.model" not in report.files


# ---------------------------------------------------------------------------------------------------- bad input


def test_no_tokenizer_is_no_error(tmp_path, out):
    assert write_tokenizer(tmp_path, out, CONFIG) is None


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_vocabulary_larger_than_the_model(name, json_dir, model_file, out):
    shutil.copy(model_file, json_dir)
    size = len(exact("llama-2").reference)
    _refused(json_dir / name, out, str(size), str(size - 1), config={"vocab_size": size - 1})


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"version https://git-lfs.github.com/spec/v1\n", "half"])
def test_damaged_sentencepiece_model(data, model_file, tmp_path, out):
    whole = model_file.read_bytes()
    file = tmp_path / "tokenizer.model"
    file.write_bytes(whole[: len(whole) // 2] if data == "half" else data)
    _refused(file, out, "tokenizer.model", "copy it again")


def test_piece_that_is_not_utf8(model_file, tmp_path, out):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(model_file.read_bytes().replace("▁t".encode(), b"\xff\xfe\xfdt", 1))
    _refused(file, out, "UTF-8")


NOT_AN_OBJECT = [b"", b"{", b"[]", b"[" * 100000, b"\xff\xfe"]
NOT_A_TOKENIZER = [b"{}", b'{"model": {"type": "BPE"}}']


@pytest.mark.parametrize(
    ("name", "data"),
    [("tokenizer.json", data) for data in NOT_AN_OBJECT + NOT_A_TOKENIZER]
    + [("tokenizer_config.json", data) for data in NOT_AN_OBJECT],
)
def test_damaged_json(name, data, json_dir, out):
    (json_dir / name).write_bytes(data)
    _refused(json_dir, out, name)


@pytest.mark.parametrize("kind", ["word", "char"])
def test_other_kinds_of_model(kind, tmp_path, out):
    (tmp_path / "tokenizer.model").write_bytes(train(200, model_type=kind))
    _refused(tmp_path, out, kind.upper())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda model: setattr(model.trainer_spec, "treat_whitespace_as_suffix", True), "treat_whitespace_as_suffix"),
        (lambda model: setattr(model.normalizer_spec, "escape_whitespaces", False), "escape_whitespaces"),
        (lambda model: setattr(model.pieces[300], "type", ModelProto.SentencePiece.UNUSED), "UNUSED"),
    ],
)
def test_features_without_an_equal(change, word, model_file, tmp_path, out):
    model = ModelProto.FromString(model_file.read_bytes())
    change(model)
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    _refused(tmp_path, out, word)


def test_missing_file(tmp_path, out):
    _refused(tmp_path / "tokenizer.model", out, "tokenizer.model: No such file")


TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_file_that_cannot_be_read(name, json_dir, model_file, out, unreadable):
    """An unreadable file is not taken for a missing one: without it the tokens could be different."""
    if name == "tokenizer.model":
        (json_dir / "tokenizer.json").unlink()
        shutil.copy(model_file, json_dir)
    else:
        (json_dir / name).touch()
    unreadable(json_dir / name)
    _refused(json_dir, out, f"{json_dir / name}: Permission denied")


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_link_that_leads_nowhere(name, json_dir, out):
    (json_dir / name).unlink(missing_ok=True)
    (json_dir / name).symlink_to(name)
    if name == "tokenizer.model":
        (json_dir / "tokenizer.json").unlink()
    _refused(json_dir, out, f"{json_dir / name}: ")


def test_folder_that_cannot_be_read(json_dir, out, unreadable):
    _refused(unreadable(json_dir), out, f"{json_dir}: Permission denied")


@pytest.mark.parametrize("name", TOKENIZER_FILES)
def test_file_without_end(name, json_dir, out, monkeypatch):
    for module in (tokenizer_module, sentencepiece_model):
        monkeypatch.setattr(module, "LARGEST_FILE", 10**6)
    (json_dir / name).write_bytes(b" " * (10**6 + 1))
    if name == "tokenizer.model":
        (json_dir / "tokenizer.json").unlink()
    _refused(json_dir, out, f"{json_dir / name}: has more than 1,000,000 bytes")


def test_nothing_is_written_elsewhere(model_file, tmp_path, out, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    report = write_tokenizer(model_file, out, CONFIG)
    assert sorted(report.files) == sorted(file.name for file in out.iterdir())


def test_full_disk_is_not_the_tokenizers_fault(model_file, out, monkeypatch):
    """It is an OSError: the caller knows which disk is full, and reports it."""

    def full(file, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_tokenizer(model_file, out, CONFIG)
    assert list(out.iterdir()) == []


def test_a_conversion_that_differs_from_sentencepiece_is_refused(model_file, out, monkeypatch):
    right = sentencepiece_model._merges
    monkeypatch.setattr(sentencepiece_model, "_merges", lambda scores: right(scores)[::-1])
    _refused(model_file, out, "test texts differ")


@pytest.mark.slow
@fuzz(300)
@given(data=st.data())
def test_mutated_models_are_refused_or_right(data):
    whole = bytearray(train(400, **LLAMA_2))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        model = convert(bytes(whole))
    except TokenizerError as error:
        assert "\n" not in str(error)
    else:
        assert model.report.warnings or not model.differs("The  quick\nbrown fox 123 é <s>")


def _refused(source, out, *words, config=CONFIG):
    with pytest.raises(TokenizerError) as caught:
        write_tokenizer(source, out, config)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    assert list(out.iterdir()) == []


def _with_config(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "ttt"}))
    return folder
