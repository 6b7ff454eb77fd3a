"""Text to token ids, and the tokenizer of a model directory."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm import utils as mlx_lm_utils
from mlx_lm.tokenizer_utils import SPMStreamingDetokenizer, TokenizerWrapper

from ..checkpoint.untrusted import quoted
from ..errors import TokenizerError
from .detokenizer import SentencePieceDetokenizer


def load_tokenizer(path: Path, config: dict[str, Any]) -> TokenizerWrapper:
    """The tokenizer of a model directory, with a detokenizer that is exact for SentencePiece.

    Args:
        path: the model directory.
        config: what its config.json says; `eos_token_id` is taken from it.

    Raises:
        TokenizerError: there is no tokenizer, or it is damaged.
    """
    if not (path / "tokenizer.json").exists():  # from a tokenizer.model alone, transformers builds another tokenizer
        raise TokenizerError(
            f"{path}: no tokenizer.json; convert again with --tokenizer FILE (tokenizer.model or .json)"
        )
    log = logging.getLogger("transformers.configuration_utils")
    log.addFilter(_is_error)
    try:
        tokenizer = mlx_lm_utils.load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # a damaged file makes transformers and tokenizers raise exceptions of any kind
        raise TokenizerError(f"{path}: the tokenizer cannot be read: {quoted(error)}") from error
    finally:
        log.removeFilter(_is_error)
    if (path / "tokenizer.model").exists() or isinstance(tokenizer.detokenizer, SPMStreamingDetokenizer):
        # mlx-lm's own detokenizer is wrong for incomplete characters, control ids and spaces at the start.
        tokenizer = TokenizerWrapper(
            tokenizer._tokenizer, SentencePieceDetokenizer, eos_token_ids=tokenizer.eos_token_ids
        )
    return tokenizer


def _is_error(record: logging.LogRecord) -> bool:
    """Hides a warning: transformers does not know the model type "ttt". Only its tokenizer is used."""
    return record.levelno > logging.WARNING


def encode(tokenizer: TokenizerWrapper, text: str, continues: bool) -> list[int]:
    """Text to token ids.

    Args:
        continues: whether the text goes on from other text. If so, it gets neither a BOS token nor the space that some
            tokenizers put in front of a text.
    """
    if not text:
        return []
    if not continues:
        return tokenizer.encode(text)
    # No tokenizer adds a space after a line break. So the text is encoded behind one, whose tokens are then removed.
    line_break = tokenizer.encode("\n", add_special_tokens=False)
    both = tokenizer.encode("\n" + text, add_special_tokens=False)
    if both[: len(line_break)] == line_break:
        return both[len(line_break) :]
    return tokenizer.encode(text, add_special_tokens=False)


def encode_long(tokenizer: TokenizerWrapper, text: str, characters: int = 1 << 20) -> np.ndarray:
    """A text of any length to token ids, int32 [T], with the tokenizer's BOS in front if it has one.

    A tokenizer needs a hundred times the memory of its text. So the text is cut into pieces of about so many
    characters, in front of a line that begins with no space: no tokenizer joins a line break with what follows there.
    """
    if not text:
        return np.empty(0, np.int32)
    pieces, start = [], 0
    while start < len(text):
        cut = re.compile(r"\n(?=\S)").search(text, start + characters)
        stop = cut.end() if cut else len(text)
        pieces.append(np.array(encode(tokenizer, text[start:stop], continues=start > 0), np.int32))
        start = stop
    return np.concatenate(pieces)
