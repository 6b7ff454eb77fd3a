"""A tokenizer as the server uses it, from several threads and for many texts at a time."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

from mlx_lm.tokenizer_utils import StreamingDetokenizer, TokenizerWrapper

from .detokenizer import SentencePieceDetokenizer
from .tokenizer import encode


class Vocabulary:
    """Text to token ids and back. A tokenizer is not made for two threads, so they take turns."""

    def __init__(self, tokenizer: TokenizerWrapper):
        self._tokenizer, self._turn = tokenizer, threading.Lock()
        self._detokenizer = tokenizer.detokenizer  # takes long to make, so that it is made once
        self.size = max(tokenizer.get_vocab().values()) + 1

    @property
    def detokenizer(self) -> StreamingDetokenizer:
        """One for a new text."""
        new = copy.copy(self._detokenizer)
        new.reset()
        return new

    def encode(self, text: str, *, continues: bool = False, special: bool = True) -> list[int]:
        """Text to token ids.

        Args:
            continues: the text goes on from other text; see `text.tokenizer.encode`.
            special: put in front what the tokenizer puts in front of a text.
        """
        with self._turn:
            if continues:
                return encode(self._tokenizer, text, continues=True)
            return self._tokenizer.encode(text, add_special_tokens=special)

    def decode(self, tokens: Sequence[int]) -> str:
        detokenizer = self.detokenizer
        for token in tokens:
            detokenizer.add_token(token)
        detokenizer.finalize()
        return detokenizer.text

    def name(self, token: int) -> tuple[str, bytes]:
        """What a token stands for, as text and as bytes. The text of an incomplete character is its bytes in hex."""
        if isinstance(self._detokenizer, SentencePieceDetokenizer):
            pieces = self._detokenizer.pieces
            piece = pieces[token] if token < len(pieces) else ""
            if not piece:  # a special token
                piece = self._written(token)
            data = piece if isinstance(piece, bytes) else piece.replace("\u2581", " ").encode()
        else:
            with self._turn:
                data = self._tokenizer.decode([token]).encode()
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def _written(self, token: int) -> str:
        with self._turn:
            name: Any = self._tokenizer.convert_ids_to_tokens(token) if token < self.size else None
        return name or ""

    @property
    def has_chat_template(self) -> bool:
        return bool(self._tokenizer._tokenizer.chat_template)

    def use_chat_template(self, template: str) -> None:
        self._tokenizer._tokenizer.chat_template = template

    def chat(self, messages: list[dict[str, Any]], *, continues: bool) -> list[int]:
        """The token ids of a conversation, up to where the answer begins.

        Args:
            continues: the conversation goes on from a saved state, so that nothing stands in front of it.

        Raises:
            ValueError: the template refuses these messages.
        """
        with self._turn:
            try:
                text: Any = self._tokenizer._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            except Exception as error:  # a template is a program, and may fail in any way
                raise ValueError(f"the chat template refuses these messages: {error}") from error
        if continues:
            text = text.removeprefix(self._tokenizer.bos_token or "")
        return self.encode(text, continues=continues, special=False)
