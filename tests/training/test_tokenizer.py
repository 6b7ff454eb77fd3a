"""A tokenizer trained on the data."""

from __future__ import annotations

import json

import pytest
import sentencepiece

from mlx_ttt.errors import OutputError, TrainingDataError
from mlx_ttt.text.tokenizer import load_tokenizer
from mlx_ttt.training import tokenizer as training_tokenizer
from mlx_ttt.training.tokenizer import BOS, EOS, train_tokenizer

TEXT = "ROMEO:\nBut, soft! what light through yonder window breaks?\n  It is the east,\n\n and Juliet is the sun 12.\n"
WORDS = "".join(f"{a}{b}{c} " + "\n" * (c == "e") for a in "bcdfghkl" for b in "aeiou" for c in "mnprste")


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").write_text(TEXT + WORDS)
    (tmp_path / "data" / "b.jsonl").write_text(json.dumps({"prompt": "Who is the sun?", "completion": "Juliet."}))
    return tmp_path / "data"


def trained(data, out, vocab_size=400):
    out.mkdir()
    train_tokenizer([data], out, vocab_size)
    return load_tokenizer(out, {"eos_token_id": EOS})


def test_gives_any_text_back(data, tmp_path):
    tokenizer = trained(data, tmp_path / "out")
    for text in (TEXT, "  two  spaces\n\n\n\tnaïve 日本 🙂\n", " Juliet\n"):
        ids = tokenizer.encode(text)
        assert ids[0] == BOS
        assert tokenizer.decode(ids[1:]) == text
        assert max(ids) < 400
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (BOS, EOS)
    assert len(tokenizer.encode("Juliet", add_special_tokens=False)) < 6


def test_files_agree(data, tmp_path):
    tokenizer = trained(data, tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    assert processor.get_piece_size() == 400
    assert processor.encode(TEXT) == tokenizer.encode(TEXT, add_special_tokens=False)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"]


def test_like_the_bundled_one(data, tmp_path, shakespeare_dir):
    """The same kinds of pieces in the same places, and the same treatment of spaces."""
    trained(data, tmp_path / "out")
    own, bundled = (
        sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        for folder in (tmp_path / "out", shakespeare_dir)
    )
    assert [own.id_to_piece(i) for i in range(260)] == [bundled.id_to_piece(i) for i in range(260)]
    text = "  a \n\n b"
    assert own.decode(own.encode(text)) == bundled.decode(bundled.encode(text)) == text


def test_deterministic(data, tmp_path):
    trained(data, tmp_path / "one")
    trained(data, tmp_path / "two")
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_large_data_is_sampled(data, monkeypatch):
    all_lines = list(training_tokenizer._lines([data]))
    monkeypatch.setattr(training_tokenizer, "MOST_CHARACTERS", len("".join(all_lines)) // 2)
    assert list(training_tokenizer._lines([data])) == all_lines[::3]  # line breaks count, too


@pytest.mark.parametrize(
    ("content", "vocab_size", "message"),
    [
        (b"hello", 2048, r"too little for a vocabulary of 2048: .* --vocab-size \d+ or less"),
        (b"hello", 20, r"vocabulary of 20 is too small for this data; take --vocab-size \d+ or more"),
        (b"\n\n", 400, "there is no text"),
        (b"", 400, "there is no text"),
        (b"good\nb\xffd", 400, r"b\.txt, line 2: not UTF-8"),
        (b"nu\0ll", 400, r"b\.txt: not a text file"),
    ],
)
def test_bad_data(tmp_path, content, vocab_size, message):
    (tmp_path / "b.txt").write_bytes(content)
    with pytest.raises(TrainingDataError, match=message) as error:
        train_tokenizer([tmp_path / "b.txt"], tmp_path, vocab_size)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_no_folder(data, tmp_path):
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        train_tokenizer([data], tmp_path / "nothing", 400)
