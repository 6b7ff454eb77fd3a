"""Tokenizers of every kind, and the ids that Python gives to awkward texts: `python -m tests.export.swift_tokenizers`.

With a folder and a number it writes that many texts for each tokenizer there, for a longer check:

    python -m tests.export.swift_tokenizers /tmp/texts 10000
    TTT_TOKENIZERS=/tmp/texts swift test --filter JSONTokenizer
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import mlx_ttt
from mlx_ttt.checkpoint.tokenizer import write_tokenizer
from mlx_ttt.text.detokenizer import SentencePieceDetokenizer, _complete_characters
from tests.checkpoint.sentencepiece_models import APPROXIMATE, EXACT, corpus, train
from tests.export.swift_fixtures import FIXTURES, write_json

SENTENCEPIECE = {
    "llama-2": EXACT["llama-2"],
    "no-byte-fallback": EXACT["no byte fallback"],
    "symbols": APPROXIMATE["long symbols, prefix"][0],
    "single-spaces": APPROXIMATE["single spaces"][0],
    "unigram-nfkc": APPROXIMATE["unigram, nmt_nfkc"][0],
    "unigram-symbols": APPROXIMATE["unigram, symbols"][0],
}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FRAGMENTS = (
    *(
        "the",
        " the",
        "ing",
        "Москва",
        "日本語",
        "한국어",
        "עברית",
        "naïve",
        "e\u0301",
        "o\u0302\u0323",
        "½",
        "ﬁ",
        "①",
        "Å",
    ),
    *(
        "🙂",
        "👩\u200d👩\u200d👧🏽",
        "🏳\ufe0f\u200d🌈",
        "\u200d",
        "\u0301",
        "\ufeff",
        "\u00ad",
        "\u200f",
        "\ue000",
        "\U0010ffff",
    ),
    *(
        "<s>",
        "</s>",
        "<unk>",
        "<0x0A>",
        "<0xF0>",
        "<mask>",
        "<|end|>",
        "<a",
        "▁",
        "▁▁",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
    ),
    *(
        "\0",
        "\x01",
        "\x1b",
        "\x7f",
        "\x0b",
        "\x0c",
        "\x85",
        "\u00a0",
        "\u3000",
        "\u2028",
        "don't",
        "I'LL",
        "0",
        "1234",
        "3.14",
    ),
    *("a", "b", "c", "ab", "==", "-", "_(", ";", "'s", "Grüße", "Ελλάδα"),
)


def main(out: Path = FIXTURES / "tokenizers", count: int = 60) -> None:
    for name in (*SENTENCEPIECE, "bundled", "bytes-gpt-2", "bytes-llama-3"):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        if name in SENTENCEPIECE:
            with tempfile.TemporaryDirectory() as source:
                Path(source, "tokenizer.model").write_bytes(train(**SENTENCEPIECE[name]))
                write_tokenizer(Path(source), folder, {})
            (folder / "tokenizer.model").unlink()
        elif name == "bundled":
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / file).write_bytes((mlx_ttt.bundled_model() / file).read_bytes())
        else:
            byte_level(name).save(str(folder / "tokenizer.json"))
        write_json(folder / "cases.json", cases(folder, count))
        if name == "bundled" and out == FIXTURES / "tokenizers":  # they are in the model directory
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (folder / file).unlink()


def byte_level(name: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "bytes-llama-3"))
    if name == "bytes-gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(["<mask>"])
    return tokenizer


def cases(folder: Path, count: int) -> dict[str, Any]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    choice = random.Random(count)
    texts = [text(choice) for _ in range(count)]
    size = max(tokenizer.get_vocab().values()) + 1
    runs = [[choice.randrange(size) for _ in range(choice.randrange(12))] for _ in range(count)]
    texts += PARTICULAR
    runs += particular_runs(tokenizer)
    return {
        "texts": [{"text": t, "ids": tokenizer.encode(t, add_special_tokens=False)} for t in texts],
        "whole": tokenizer.encode("a", add_special_tokens=True),
        "runs": [{"ids": run, "text": decode(tokenizer, folder, run)} for run in runs],
    }


# Segmentations of the same score, where how the library reads a score decides.
PARTICULAR = ["1" * 15, "\u2460" * 17, "11111 22222"]


def particular_runs(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """What random runs seldom have: a byte that is a space, or an unknown piece, at the start; half characters."""
    vocabulary = tokenizer.get_vocab()
    space, half = (vocabulary.get(token) for token in ("<0x20>", "<0xED>"))
    unknown, end = vocabulary.get("<unk>"), vocabulary.get("</s>")
    word = next((id for token, id in sorted(vocabulary.items()) if token.startswith("\u2581") and len(token) > 2), None)
    runs = [[space, word], [unknown], [unknown, word], [half, end], [half, word], [end, word], [word, half, half, word]]
    return [run for run in runs if None not in run]


def text(choice: random.Random) -> str:
    parts = []
    for _ in range(choice.randrange(9)):
        kind = choice.random()
        if kind < 0.7:
            parts.append(choice.choice(FRAGMENTS))
        elif kind < 0.8:
            parts.append(choice.choice(FRAGMENTS) * choice.randrange(2, 20))
        else:
            parts.append(
                chr(
                    choice.choice(
                        [choice.randrange(0x250), choice.randrange(0xD800), choice.randrange(0x1F300, 0x1FAFF)]
                    )
                )
            )
    return "".join(parts)


def decode(tokenizer: PreTrainedTokenizerFast, folder: Path, ids: list[int]) -> str:
    """Complete characters only: as streaming shows them."""
    if folder.name.startswith("bytes"):
        names = tokenizer.convert_ids_to_tokens(ids)
        return _complete_characters(b"".join(byte_level_token(name) for name in names))[0]
    detokenizer = SentencePieceDetokenizer(tokenizer)
    for id in ids:
        detokenizer.add_token(id)
    return detokenizer.text


def byte_level_token(name: str) -> bytes:
    """The bytes of a token of a byte-level tokenizer, which has a character for each."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    return b"" if name == "<|end|>" else bytes(byte_of[character] for character in name)


if __name__ == "__main__":
    main(*([Path(sys.argv[1]), int(sys.argv[2])] if len(sys.argv) > 2 else []))
