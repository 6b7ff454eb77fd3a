"""What may be shown of a text that is still being written: complete characters, and no part of a stop string."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from mlx_lm.generate import TextStateMachine
from mlx_lm.tokenizer_utils import TokenizerWrapper

_REPLACEMENT = "\ufffd"


class VisibleText:
    """Tokens in, the text to show out.

    Attributes:
        stopped: a stop string has come, so no more text is shown.
    """

    def __init__(self, tokenizer: TokenizerWrapper, context: Sequence[int], stop: Sequence[str]):
        """
        Args:
            context: the tokens before the first new one. They can hold the first bytes of a character.
            stop: strings at which the text ends.
        """
        self.stopped = False
        self._detokenizer = tokenizer.detokenizer
        for token in context:
            self._detokenizer.add_token(token)
        # The text of the context is not shown again. That includes spaces that the detokenizer still holds back, but
        # not the first bytes of a character: that character is new.
        context_only = copy.copy(self._detokenizer)
        context_only.finalize()
        self._shown = len(context_only.text.rstrip(_REPLACEMENT))
        self._stops = TextStateMachine({"text": [(s, None) for s in stop]})
        self._held = self._stops.make_state("text")

    def add(self, token: int) -> str:
        """The text that one more token makes visible."""
        self._detokenizer.add_token(token)
        return self._show(self._detokenizer.text)

    def end(self) -> str:
        """The text that was held back, when no more tokens come. An incomplete character is dropped."""
        text = self._detokenizer.text
        self._detokenizer.finalize()
        held_back = self._detokenizer.text[len(text) :].rstrip(_REPLACEMENT)
        segment = "" if self.stopped else self._show(text + held_back)
        return segment if self.stopped else segment + self._stops.flush(self._held)[1]

    def after(self, token: int, *, is_eos: bool, is_last: bool) -> tuple[str, str | None]:
        """The text that one more token makes visible, and the reason if the text ends with it: "stop" or "length"."""
        if is_eos:
            return self.end(), "stop"
        segment = self.add(token)
        if is_last:
            segment += self.end()
        return segment, "stop" if self.stopped else "length" if is_last else None

    def _show(self, text: str) -> str:
        new = text[self._shown :]
        self._shown = max(self._shown, len(text))
        self._held, segment, place = self._stops.step(self._held, new)
        self.stopped = place is None
        return segment
