"""Streamed text against SentencePiece's decode of all ids, whatever the ids."""

from __future__ import annotations

import json
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import mlx_ttt
from mlx_ttt.text.detokenizer import SentencePieceDetokenizer

from ..checkpoint.sentencepiece_models import APPROXIMATE, EXACT, approximate, exact, fuzz, texts

# The other models differ from one of these in training or symbols only. They are tried with the slow tests.
FAST = (
    "llama-2",
    "newline symbol, no prefix",
    "no byte fallback",
    "pad and control symbols",
    "long symbols, prefix",
    "single spaces",
    "bpe, nmt_nfkc",
    "unigram, symbols",
)


def some_slow(names, fast=FAST):
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def model(name):
    return exact(name) if name in EXACT else approximate(name)


def segments(detokenizer, ids):
    """What a user sees after each id, and at the end."""
    detokenizer.reset()
    for id in ids:
        detokenizer.add_token(id)
        yield detokenizer.last_segment
    detokenizer.finalize()
    yield detokenizer.last_segment


def id_sequences(reference):
    """Any ids, many of them bytes of whole and broken characters."""
    size = len(reference)
    anything = st.lists(st.integers(0, size - 1), max_size=4)
    if not reference.is_byte(reference.piece_to_id("<0x00>")):
        return anything
    whole = st.sampled_from(["🙂", "你", "é", "\ufffd", "\n", "\ud7ff"]).map(str.encode)
    broken = st.builds(lambda data, cut: data[:-cut], whole, st.integers(1, 3))
    data = st.one_of(whole, broken, st.binary(max_size=3))
    as_ids = data.map(lambda data: [reference.piece_to_id(f"<0x{byte:02X}>") for byte in data])
    return st.lists(st.one_of(anything, as_ids), max_size=10).map(lambda parts: list(chain(*parts)))


@pytest.mark.parametrize("name", some_slow([*EXACT, *APPROXIMATE]))
def test_segments_add_up_to_sentencepieces_text(name):
    reference = model(name).reference
    detokenizer = SentencePieceDetokenizer(model(name).tokenizer)

    @fuzz(60)
    @given(id_sequences(reference))
    def check(ids):
        expected = reference.decode(ids)
        parts = list(segments(detokenizer, ids))
        assert "".join(parts) == expected
        assert detokenizer.tokens == ids
        seen = ""
        for part in parts:  # never half a character: what was shown stays true
            seen += part
            assert expected.startswith(seen)

    check()


@pytest.mark.parametrize("name", some_slow(EXACT, fast=("llama-2", "no byte fallback")))
def test_mlx_lms_own_detokenizer_streams_any_text(name):
    """Plain mlx-lm picks its class from tokenizer.json; on ids of a text it must agree with decode."""
    wrapper, reference = model(name).wrapper, model(name).reference

    @fuzz(60)
    @given(texts(model(name).pieces))
    def check(text):
        ids = reference.encode(text)
        parts = list(segments(wrapper.detokenizer, ids))
        if not text.startswith(("▁", " ")):  # it takes all leading spaces for the prefix
            assert "".join(parts) == reference.decode(ids)
        assert text.count("\ufffd") or not any("\ufffd" in part for part in parts)

    check()


@pytest.mark.parametrize(("name", "expected"), [("llama-2", " the"), ("single spaces", "the")])
def test_spaces_in_front_of_a_text(name, expected):
    reference = model(name).reference
    ids = [reference.piece_to_id(piece) for piece in ("▁", "▁the")]
    assert 0 not in ids
    assert reference.decode(ids) == expected
    assert "".join(segments(SentencePieceDetokenizer(model(name).tokenizer), ids)) == expected


def test_continued_text_keeps_its_first_space():
    llama = exact("llama-2")
    ids = llama.reference.encode("the end")
    assert "".join(segments(SentencePieceDetokenizer(llama.tokenizer), ids)) == "the end"
    assert "".join(segments(SentencePieceDetokenizer(llama.tokenizer, continues=True), ids)) == " the end"


def test_ids_beyond_the_vocabulary_add_nothing(bundled):
    _, tokenizer = bundled
    ids = tokenizer.encode("To be", add_special_tokens=False)
    detokenizer = SentencePieceDetokenizer(tokenizer._tokenizer)
    assert "".join(segments(detokenizer, [1, *ids, len(tokenizer.get_vocab()) + 7, 2])) == "To be"


def test_a_vocabulary_with_gaps():
    model = json.loads((mlx_ttt.bundled_model() / "tokenizer.json").read_text())
    model["model"]["vocab"]["1"] = 2100
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(model)))
    (one,) = tokenizer.encode("1", add_special_tokens=False)[-1:]
    assert one == 2100
    assert "".join(segments(SentencePieceDetokenizer(tokenizer), [one, 2050])) == "1"
