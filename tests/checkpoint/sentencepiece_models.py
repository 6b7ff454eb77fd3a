"""Small SentencePiece models, trained on made-up text, and texts to try them on."""

from __future__ import annotations

import functools
import io
import json
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import sentencepiece
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from mlx_lm import tokenizer_utils

from mlx_ttt.checkpoint.tokenizer import TokenizerReport, write_tokenizer

LLAMA_2 = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.9995,
}
SYMBOLS = ["\n", "\n\n", "▁▁", "<mask>", "the", "th", "<a"]

# Models whose tokenizer.json gives SentencePiece's ids on every text.
EXACT = {
    "llama-2": LLAMA_2,
    "llama-2, pieces across words": LLAMA_2
    | {"split_by_whitespace": False, "split_by_unicode_script": False, "split_by_number": False, "split_digits": False},
    "newline symbol, no prefix": LLAMA_2 | {"add_dummy_prefix": False, "user_defined_symbols": ["\n"]},
    "newline symbol, prefix": LLAMA_2 | {"user_defined_symbols": ["\n", "\t"]},
    "long symbols, no prefix": LLAMA_2 | {"add_dummy_prefix": False, "user_defined_symbols": SYMBOLS},
    "no byte fallback": LLAMA_2 | {"byte_fallback": False},
    "pad and control symbols": LLAMA_2 | {"pad_id": 3, "control_symbols": ["<sep>", "<|x|>"]},
    "no bos": LLAMA_2 | {"bos_id": -1},
}
# Models whose tokenizer.json may give other ids, and a word of the warning (None: only decoding differs).
APPROXIMATE = {
    "long symbols, prefix": (LLAMA_2 | {"user_defined_symbols": SYMBOLS}, "user-defined"),
    "single spaces": (LLAMA_2 | {"remove_extra_whitespaces": True}, None),
    "single spaces, no prefix": (LLAMA_2 | {"remove_extra_whitespaces": True, "add_dummy_prefix": False}, None),
    "bpe, nmt_nfkc": ({"model_type": "bpe"}, "nmt_nfkc"),
    "unigram, identity": (LLAMA_2 | {"model_type": "unigram"}, "UNIGRAM"),
    "unigram, nmt_nfkc": ({"model_type": "unigram"}, "UNIGRAM"),
    "unigram, symbols": (LLAMA_2 | {"model_type": "unigram", "user_defined_symbols": SYMBOLS}, "UNIGRAM"),
}


@functools.cache
def corpus() -> tuple[str, ...]:
    """Invented text: prose, code with indentation, numbers, other scripts and long runs."""
    choice = random.Random(0)
    syllables = ["the", "an", "in", "er", "s", "to", "ra", "mi", "lo", "ing", "qu", "ha", "be", "o", "st", "ck", "é"]
    words = ["".join(choice.choices(syllables, k=choice.randint(1, 4))) for _ in range(400)]
    weights = [1 / (rank + 1) for rank in range(len(words))]

    def sentence(length: int, join: str = " ") -> str:
        return join.join(choice.choices(words, weights, k=length))

    lines = []
    for _ in range(250):
        lines.append(sentence(12).capitalize() + choice.choice([".", "!", "?", ";", " ..."]))
        lines.append(" " * choice.randint(0, 24) + f"{sentence(2, '_')}({choice.randint(0, 9999)}) == {sentence(1)}")
        lines.append("\t" * choice.randint(0, 4) + sentence(3, "-") + "<a>" + "=" * choice.randint(0, 40))
    lines += [
        "Москва и Ελλάδα, 日本語 한국어 עברית ½ ﬁ ① 🙂 🙂",
        "naïve café e\u0301 o\u0302 hahaha hohoho ------",
    ] * 40
    return tuple(lines)


def train(vocab_size: int = 700, **options) -> bytes:
    """A SentencePiece model, serialized."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    return model.getvalue()


@dataclass(frozen=True)
class Converted:
    """A SentencePiece model, and what mlx-lm loads after its conversion."""

    reference: sentencepiece.SentencePieceProcessor
    wrapper: tokenizer_utils.TokenizerWrapper
    report: TokenizerReport

    @property
    def tokenizer(self):
        return self.wrapper._tokenizer

    @functools.cached_property
    def pieces(self) -> list[str]:
        """Pieces as they look in a text."""
        names = [self.reference.id_to_piece(id) for id in range(len(self.reference))]
        return [name.replace("▁", " ") for name in names]

    def differs(self, text: str) -> bool:
        """Whether ids or decoded text differ from SentencePiece's."""
        ids = self.reference.encode(text)
        same = self.wrapper.encode(text, add_special_tokens=False) == ids
        return not (same and self.wrapper.decode(ids, skip_special_tokens=True) == self.reference.decode(ids))


def convert(model: bytes | Path) -> Converted:
    """Convert a model as if it came with a checkpoint, and load it as mlx-lm does."""
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "source"), Path(folder, "out")
        source.mkdir()
        out.mkdir()
        data = model.read_bytes() if isinstance(model, Path) else model
        (source / "tokenizer.model").write_bytes(data)
        report = write_tokenizer(source, out, {"vocab_size": 32000})
        (out / "config.json").write_text(json.dumps({"model_type": "ttt"}))
        wrapper = tokenizer_utils.load(out)
    return Converted(sentencepiece.SentencePieceProcessor(model_proto=data), wrapper, report)


@functools.cache
def exact(name: str) -> Converted:
    return convert(train(**EXACT[name]))


@functools.cache
def approximate(name: str) -> Converted:
    return convert(train(**APPROXIMATE[name][0]))


def texts(pieces: list[str]) -> st.SearchStrategy[str]:
    """Any Unicode text, mixed with pieces of the vocabulary, runs, and the names of reserved pieces."""
    anything = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    runs = st.builds(
        lambda mark, count: mark * count, st.sampled_from([" ", "\n", "\t", "▁", "=", "ha", "0"]), st.integers(1, 40)
    )
    reserved = st.sampled_from(["<s>", "</s>", "<unk>", "<0x0A>", "<0xF0>", "<mask>", "<|x|>", "\0", "\x1b", "\u0301"])
    return st.lists(st.one_of(anything, runs, reserved, st.sampled_from(pieces)), max_size=12).map("".join)


def fuzz(examples: int):
    """Settings for a property-based test with so many examples."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
