"""What mlx-lm's server has read before, for requests that begin alike."""

from __future__ import annotations

from typing import Any

from mlx_lm.models.cache import LRUPromptCache


class PromptStore(LRUPromptCache):
    """Finds the longest stored text with which a prompt begins, less its last token.

    The server needs one token to go on from, and mlx-lm 0.32.2 ends its generation thread when a store has all of a
    prompt. A cache that can be trimmed gives one back; a TTT state cannot.
    """

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> tuple[list | None, list[int]]:
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        return cache, [*rest, *tokens[-1:]]
