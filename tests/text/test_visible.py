"""What may be shown of a text, of tokenizers that hold text back."""

from types import SimpleNamespace

import pytest

from mlx_ttt.text.visible import VisibleText

WORDS = ["one", " two", "  ", "three"]


class HoldsBackSpaces:
    """A streaming detokenizer that shows the spaces at the end of a text only when something follows, or at the end."""

    def __init__(self):
        self._all = self.text = ""

    def add_token(self, token: int) -> None:
        self._all += WORDS[token]
        self.text = self._all.rstrip(" ")

    def finalize(self) -> None:
        self.text = self._all


def shown(tokens: list[int], stop: str) -> tuple[str, bool]:
    text = VisibleText(SimpleNamespace(detokenizer=HoldsBackSpaces()), [], [stop])
    segments = [text.add(token) for token in tokens] + [text.end()]
    return "".join(segments), text.stopped


@pytest.mark.parametrize("stop", ["two ", " two ", "o "])
def test_a_stop_string_that_is_complete_only_at_the_end(stop):
    assert shown([0, 1, 2], stop) == ("one two  "[: "one two  ".index(stop)], True)


def test_what_was_held_back_comes_at_the_end():
    assert shown([0, 1, 2], "three") == ("one two  ", False)
    assert shown([0, 1, 2, 3], "three") == ("one two  ", True)
