"""Token ids to text, one at a time. The segments add up to what SentencePiece decodes from all ids together."""

from __future__ import annotations

import re
from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer

SPACE = "\u2581"  # SentencePiece writes a space as this character
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN = " \u2047 "  # SentencePiece shows the unknown piece as this text
_REPLACEMENT = "\ufffd"


class SentencePieceDetokenizer(StreamingDetokenizer):
    """mlx-lm's streaming interface, for tokenizers made of SentencePiece pieces.

    A byte is held back until its character is complete. A byte that is part of no character becomes one U+FFFD.
    Control ids add no text, nor do ids beyond the vocabulary, which a padded embedding can produce.
    The time is linear in the number of ids.

    Attributes:
        pieces: what each id stands for: text, in which a space is written as U+2581, or one byte.
    """

    def __init__(self, tokenizer: Any, continues: bool = False):
        """
        Args:
            tokenizer: a transformers tokenizer.
            continues: whether the text goes on from other text. If so, a space at its start is kept. If not, the space
                that the tokenizer puts in front of every text is removed.
        """
        super().__init__()
        last = max(tokenizer.get_vocab().values())  # the vocabulary may have gaps
        names = tokenizer.convert_ids_to_tokens(list(range(last + 1)))
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.pieces = [_content(name, id in special) for id, name in enumerate(names)]
        unknown = tokenizer.convert_tokens_to_ids("<unk>") if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        if unknown is not None:
            self.pieces[unknown] = _UNKNOWN
        self._strips = not continues and tokenizer.convert_tokens_to_string([f"{SPACE}a"]) == "a"
        doubled, single = (tokenizer.encode(text, add_special_tokens=False) for text in ("a  a", "a a"))
        self._strips_all = doubled == single  # the tokenizer makes one space of several, so none is kept at the start
        self.reset()

    def reset(self) -> None:
        self.offset = 0
        self.text = ""
        self.tokens: list[int] = []
        self._bytes = b""  # the first bytes of a character that is not complete
        self._at_start = self._strips

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        piece = self.pieces[token] if token < len(self.pieces) else ""
        if isinstance(piece, bytes):
            text, self._bytes = _complete_characters(self._bytes + piece)
            self.text += text
            return
        self.finalize()
        self._at_start = self._at_start and not self.text
        if self._at_start and piece.startswith(SPACE):
            piece = piece[1:]
            self._at_start = self._strips_all
        self.text += piece.replace(SPACE, " ")

    def finalize(self) -> None:
        self.text += _REPLACEMENT * len(self._bytes)
        self._bytes = b""


def _content(name: str | None, special: bool) -> str | bytes:
    """What a piece stands for: text, or one byte."""
    if name is None or special:
        return ""
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name


def _complete_characters(data: bytes) -> tuple[str, bytes]:
    """UTF-8 to text, with U+FFFD for each wrong byte, and the bytes at the end that may still become a character."""
    text = ""
    while data:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            data = data[error.start :]
            if error.reason == "unexpected end of data":
                return text, data
            text += _REPLACEMENT
            data = data[1:]
    return text, data
