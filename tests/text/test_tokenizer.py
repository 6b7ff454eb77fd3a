"""Text to token ids."""

from __future__ import annotations

import pytest

from mlx_ttt.text.tokenizer import encode

from ..checkpoint.sentencepiece_models import exact


@pytest.mark.parametrize("family", ["llama-2", "shakespeare"])
def test_continued_text_gets_no_space_in_front(family, bundled):
    """Llama's tokenizer puts a space in front of every text it is given; between two parts of one there is none."""
    tokenizer = bundled[1] if family == "shakespeare" else exact(family).wrapper
    for first, second in [
        ("Once upon", " a time"),
        ("Once up", "on a time"),
        ("a\n", "b"),
        ("a", "\nb"),
        ("é", "é  é"),
    ]:
        ids = encode(tokenizer, first, continues=False)
        more = encode(tokenizer, second, continues=True)
        assert tokenizer.decode(ids + more, skip_special_tokens=True) == first + second
        assert tokenizer.bos_token_id not in more
