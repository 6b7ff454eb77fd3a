"""mlx-ttt watch: the file that it writes, and what it refuses in one line."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import sys

import pytest

from .test_cli import assert_one_line, run

TEXT = "ROMEO.\nBut soft, what light through yonder window breaks? <script>alert(1)</script>\n" * 4


@pytest.fixture
def book(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def test_a_page(book):
    result = run("watch", "book.txt", "-o", "report.html")
    assert result.exit_code == 0 and result.stderr == "", result.output
    assert re.fullmatch(
        r"report\.html: \d+ tokens, -?\d\.\d{3} nats a token saved by remembering, 0\.1 MB\n", result.stdout
    )
    page = (book / "report.html").read_text(encoding="utf-8")
    facts = json.loads(re.search('id="about">(.*?)</script>', page, re.S)[1])
    assert facts["text"] == TEXT and (facts["layers"], facts["heads"]) == (4, 4)
    assert "<h1>book</h1>" in page and sorted(p.name for p in book.iterdir()) == ["book.txt", "report.html"]


def test_the_title_is_text(book):
    assert run("watch", "book.txt", "-o", "a.html", "--title", "<b>", "--reset", "0").exit_code == 0
    assert "<h1>&lt;b&gt;</h1>" in (book / "a.html").read_text(encoding="utf-8")


def test_what_is_refused(book, monkeypatch):
    (book / "empty.txt").write_bytes(b"")
    (book / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (book / "folder.html").mkdir()
    for arguments, message in [
        ((), "no text: give a TEXT_FILE, or --serve"),
        (("book.txt",), "no --output: name the page"),
        (("missing.txt", "-o", "a.html"), "missing.txt: No such file"),
        (("empty.txt", "-o", "a.html"), "empty.txt: is empty"),
        (("bytes.txt", "-o", "a.html"), "bytes.txt: not UTF-8 text"),
        (("folder.html", "-o", "a.html"), "folder.html: Is a directory"),
        (("book.txt", "-o", "a.txt"), "the name must end in .html"),
        (("book.txt", "-o", "folder.html"), "exists and is not a file"),
        (("book.txt", "-o", "nowhere/a.html"), "there is no such folder"),
        (("book.txt", "-o", "a.html", "--model", "nowhere"), "nowhere: no such model directory"),
        (("--serve", "-o", "a.html"), "leave out --output"),
    ]:
        assert_one_line(run("watch", *arguments), message)
    monkeypatch.setattr(sys.modules["mlx_ttt.cli.watch"], "MOST_BYTES", 100)  # the attribute is the command
    assert_one_line(run("watch", "book.txt", "-o", "a.html"), "book.txt: more than 0 MB: cut the text")
    monkeypatch.undo()
    monkeypatch.chdir(book)
    monkeypatch.setattr("mlx_ttt.watch.reading.MOST_TOKENS", 10)
    assert_one_line(run("watch", "book.txt", "-o", "a.html"), "and a page holds 10: cut the text")
    assert not (book / "a.html").exists()


def test_a_port_in_use():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_line(run("watch", "--serve", "--port", str(port)), f"port {port}: Address already in use")


def test_a_text_that_is_too_long_to_be_shown_live(book, monkeypatch):
    monkeypatch.setattr("mlx_ttt.watch.live.MOST_TOKENS", 10)
    message = r"book.txt: \d+ tokens, and a live page holds 10: cut the text"
    assert_one_line(run("watch", "--serve", "book.txt", "--port", "0"), message)


def test_serve_without_its_packages(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    assert_one_line(run("watch", "--serve"), r"--serve needs uvicorn: pip install 'mlx-ttt\[serve\]'")
