"""Trains a tokenizer on the data that a model is to be trained on."""

from __future__ import annotations

import io
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from ..checkpoint.tokenizer import write_tokenizer
from ..checkpoint.untrusted import quoted
from ..errors import OutputError, TrainingDataError
from .data import read_texts

UNKNOWN, BOS, EOS = 0, 1, 2  # ids
MOST_CHARACTERS = 100_000_000  # read by the trainer, which takes up to 15 bytes for each


def train_tokenizer(paths: Iterable[str | Path], out: str | Path, vocab_size: int) -> None:
    """Train a SentencePiece model, and write it into a model directory as all tokenizers there are written.

    It is a BPE model that gives any text back unchanged: line breaks and runs of spaces are kept, and characters that
    it does not know become bytes. The same data gives the same model. Of data with more than `MOST_CHARACTERS`, every
    second line is used, or every third, and so on.

    Args:
        paths: training data, as for `read_documents`.
        out: an existing folder.
        vocab_size: tokens, among them UNKNOWN, BOS, EOS, the line break and 256 bytes.

    Raises:
        TrainingDataError: the data is too little for so many tokens, or has more different characters than tokens, or
            cannot be read.
        OutputError: `out` cannot be written to.
    """
    paths = list(paths)
    model = _trained(_lines(paths), vocab_size)
    try:
        with tempfile.TemporaryDirectory(prefix=".tokenizer-", dir=out) as folder:
            file = Path(folder) / "tokenizer.model"
            file.write_bytes(model)
            write_tokenizer(file, Path(out), {"vocab_size": vocab_size, "bos_token_id": BOS, "eos_token_id": EOS})
    except OSError as error:
        raise OutputError(f"{out}: the tokenizer cannot be written: {error.strerror}") from error


def _trained(lines: Iterator[str], vocab_size: int) -> bytes:
    """The bytes of a SentencePiece model."""
    model, sentences = io.BytesIO(), _Sentences(lines)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            byte_fallback=True,
            user_defined_symbols=["\n"],
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            unk_id=UNKNOWN,
            bos_id=BOS,
            eos_id=EOS,
            pad_id=-1,
            max_sentence_length=1 << 30,  # longer ones would be left out
            num_threads=1,  # it is written into the model, which is not to depend on the machine
            minloglevel=2,
        )
    except RuntimeError as error:
        if sentences.error is not None:
            raise sentences.error from None
        raise TrainingDataError(_explained(str(error), vocab_size)) from None
    return model.getvalue()


class _Sentences:
    """An iterator that remembers its exception, since SentencePiece raises another one in its place."""

    def __init__(self, lines: Iterator[str]):
        self.lines = lines
        self.error: Exception | None = None

    def __iter__(self) -> _Sentences:
        return self

    def __next__(self) -> str:
        try:
            return next(self.lines)
        except StopIteration:
            raise
        except Exception as error:
            self.error = error
            raise


def _explained(message: str, vocab_size: int) -> str:
    if found := re.search(r"Vocabulary size too high .*<= (\d+)", message):
        return (
            f"the data is too little for a vocabulary of {vocab_size}: take more of it, "
            f"or --vocab-size {found[1]} or less"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"a vocabulary of {vocab_size} is too small for this data; take --vocab-size {found[1]} or more"
    if "sentences_.empty()" in message:
        return "there is no text in the training data"
    return f"no tokenizer can be trained on this data: {quoted(message)}"


def _lines(paths: list[str | Path]) -> Iterator[str]:
    """The lines of the data; not all, if they are many."""
    size = sum(len(text) for text in read_texts(paths))
    every = -(-size // MOST_CHARACTERS)
    lines = (line for text in read_texts(paths) for line in text.split("\n") if line)
    return (line for i, line in enumerate(lines) if i % every == 0)
