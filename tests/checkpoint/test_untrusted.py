"""Reading small files that nobody vouches for, and quoting them."""

from __future__ import annotations

import os

import pytest

from mlx_ttt.checkpoint.untrusted import quoted, read_bytes, read_json
from mlx_ttt.errors import CheckpointError, TokenizerError


@pytest.mark.parametrize(
    "value, text",
    [
        ("model.norm.weight", "model.norm.weight"),
        ("two  spaces", "two  spaces"),
        ("a\nb\x1b[2J", r"a\nb\x1b[2J"),
        ("\ud800", r"\ud800"),
        (7, "7"),
        ("x" * 300, "x" * 199 + "…"),
        (ValueError("first line\n  second\tline "), "first line second line"),
        (ValueError("\x1b[2J"), r"\x1b[2J"),
        (KeyError(), "KeyError"),
    ],
)
def test_quoted(value, text):
    assert quoted(value) == text


def test_bytes_up_to_the_limit(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_bytes(file, 5) == b"12345"
    with pytest.raises(TokenizerError, match=r"file: has more than 4 bytes"):
        read_bytes(file, 4, TokenizerError)


def test_what_is_no_file(tmp_path, unreadable):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "secret").touch()
    unreadable(tmp_path / "secret")
    for name, message in {
        "absent": "no such file",
        ".": "not a file",
        "pipe": "not a file",
        "loop": "Too many levels of symbolic links",
        "secret": "Permission denied",
    }.items():
        with pytest.raises(CheckpointError, match=f"{message}$"):
            read_bytes(tmp_path / name, 10)


@pytest.mark.parametrize("text, message", [("", "not valid JSON"), ("[1]", "a JSON list, not an object")])
@pytest.mark.parametrize("kind", [CheckpointError, TokenizerError])
def test_json_errors_are_of_the_kind_asked_for(tmp_path, text, message, kind):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(kind, match=rf"a\.json: .*{message}"):
        read_json(tmp_path / "a.json", kind=kind)
