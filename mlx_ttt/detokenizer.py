"""Token ids → text, as they come: the streamed segments add up to what SentencePiece decodes from all ids."""

from __future__ import annotations

import re
from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer

_SPACE = "\u2581"  # what SentencePiece writes for a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_UNKNOWN = " \u2047 "  # how SentencePiece shows the unknown piece
_REPLACEMENT = "\ufffd"


class SentencePieceDetokenizer(StreamingDetokenizer):
    """mlx-lm's streaming interface for tokenizers made of SentencePiece pieces.

    Control ids add nothing, bytes wait until their character is whole, and a byte that belongs to no character
    becomes one U+FFFD. Ids beyond the vocabulary (a padded embedding) add nothing. Linear in the number of ids.

    tokenizer: a transformers tokenizer. continues: the text goes on from other text, so a space at its start is
    part of it; otherwise the space that the tokenizer puts in front of a text is taken away again.
    """

    def __init__(self, tokenizer: Any, continues: bool = False):
        super().__init__()
        last = max(tokenizer.get_vocab().values())  # of a vocabulary that may have gaps
        names = tokenizer.convert_ids_to_tokens(list(range(last + 1)))
        special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._pieces = [_content(name, id in special) for id, name in enumerate(names)]
        unknown = tokenizer.convert_tokens_to_ids("<unk>") if tokenizer.unk_token_id is None else tokenizer.unk_token_id
        if unknown is not None:
            self._pieces[unknown] = _UNKNOWN
        self._strips = not continues and tokenizer.convert_tokens_to_string([f"{_SPACE}a"]) == "a"
        doubled, single = (tokenizer.encode(text, add_special_tokens=False) for text in ("a  a", "a a"))
        self._strips_all = doubled == single  # the tokenizer has no use for more than one space
        self.reset()

    def reset(self) -> None:
        self.offset = 0
        self.text = ""
        self.tokens: list[int] = []
        self._bytes = b""  # the start of a character
        self._at_start = self._strips

    def add_token(self, token: int) -> None:
        self.tokens.append(token)
        piece = self._pieces[token] if token < len(self._pieces) else ""
        if isinstance(piece, bytes):
            text, self._bytes = _whole_characters(self._bytes + piece)
            self.text += text
            return
        self.finalize()
        self._at_start = self._at_start and not self.text
        if self._at_start and piece.startswith(_SPACE):
            piece = piece[1:]
            self._at_start = self._strips_all
        self.text += piece.replace(_SPACE, " ")

    def finalize(self) -> None:
        self.text += _REPLACEMENT * len(self._bytes)
        self._bytes = b""


def _content(name: str | None, special: bool) -> str | bytes:
    """What a piece stands for: text, or one byte."""
    if name is None or special:
        return ""
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else name


def _whole_characters(data: bytes) -> tuple[str, bytes]:
    """The characters of `data` as UTF-8, U+FFFD for each byte of none, and the bytes that may still become one."""
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
