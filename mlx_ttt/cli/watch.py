"""watch: a page that shows what a model learns while it reads."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path

import click

from ..errors import OutputError, TTTError
from ..files import output_file, written_whole
from .command import CONTEXT, Command, Named, Progress, model_options, text_of

MOST_BYTES = 64 << 20  # of a text: more tokens than a page can hold


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("text_file", required=False)
@model_options
@click.option("--output", "-o", "out", metavar="FILE", help="Where the page is written: FILE.html.")
@click.option("--title", help="The title of the page; by default the name of the text.")
@click.option(
    "--reset",
    type=click.IntRange(0),
    metavar="N",
    help="Compare with a state that is forgotten every N tokens; 0: do not compare. By default 512, or a quarter of a"
    " short text.",
)
@click.option("--serve", is_flag=True, help="Show the page live, in a browser, with a prompt.")
@click.option(
    "--host", default="127.0.0.1", help="The address to serve at. Others than this machine's can be reached by others."
)
@click.option("--port", default=8030, type=click.IntRange(0, 65535), help="0: any that is free.")
def watch(
    text_file: str | None,
    model: Named,
    out: str | None,
    title: str | None,
    reset: int | None,
    serve: bool,
    host: str,
    port: int,
) -> None:
    """See what a model learns while it reads: one page, as a file or live.

    \b
    mlx-ttt watch book.txt -o report.html
    mlx-ttt watch --serve
    """
    text = None if text_file is None else _content(text_file)
    name = title or (Path(text_file).stem if text_file else "Watch a model learn")
    if serve:
        if out is not None or reset is not None:
            raise TTTError("--serve shows the page live: leave out --output and --reset")
        _serve(text, text_file, (model, name), (host, port))
        return
    if text is None or text_file is None:
        raise TTTError("no text: give a TEXT_FILE, or --serve")
    if out is None:
        raise TTTError("no --output: name the page, as in -o report.html")
    _write(text, text_file, name, (model, reset), _output(out))


# ---- A file ----------------------------------------------------------------------------------------------------------


def _write(text: str, text_file: str, title: str, how: tuple[Named, int | None], out: Path) -> None:
    from ..loading import load
    from ..text.tokenizer import encode_long
    from ..watch.page import Subject, report
    from ..watch.reading import MOST_TOKENS, read_text

    model, reset = how
    network, tokenizer = load(model.directory())
    ids = encode_long(tokenizer, text)
    if len(ids) > MOST_TOKENS:
        raise TTTError(f"{text_file}: {len(ids)} tokens, and a page holds {MOST_TOKENS}: cut the text")
    with Progress("reading", at_least=4096) as progress:
        reading = read_text(network, tokenizer, ids, reset, progress)
    page = report(reading, Subject.of(title, network)).encode()
    _replace(output_file(out), page)
    gain = f", {reading.gain:.3f} nats a token saved by remembering" if reading.reset_every else ""
    click.echo(f"{out}: {len(ids)} tokens{gain}, {len(page) / 1e6:.1f} MB")


def _content(file: str) -> str:
    """The text of a file that a page can hold."""
    try:
        if os.path.getsize(file) > MOST_BYTES:
            raise TTTError(f"{file}: more than {MOST_BYTES >> 20} MB: cut the text")
    except OSError as error:
        raise TTTError(f"{file}: {error.strerror}") from None
    return text_of(file, file)


def _output(out: str) -> Path:
    """Finds out before an hour of reading whether the page can be written."""
    if Path(out).suffix.lower() not in (".html", ".htm"):
        raise OutputError(f"--output {out}: the name must end in .html")
    output_file(out)
    return Path(out)


def _replace(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    try:
        with written_whole(path) as complete:
            complete.write_bytes(content)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error


# ---- Live ------------------------------------------------------------------------------------------------------------


def _serve(text: str | None, text_file: str | None, what: tuple[Named, str], at: tuple[str, int]) -> None:
    """what: the model and the title."""
    if missing := [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]:
        raise TTTError(f"--serve needs {' and '.join(missing)}: pip install 'mlx-ttt[serve]'")

    from ..loading import load
    from ..serve.address import is_loopback, listen
    from ..text.tokenizer import encode_long
    from ..watch.live import MOST_TOKENS, Event, Session
    from ..watch.page import Subject, live_page
    from ..watch.reading import RESET
    from ..watch.server import Watcher, serve

    (model, title), (host, port) = what, at
    with listen(host, port) as listener:  # fails before the model is loaded

        def make_session(publish: Callable[[Event], None]) -> tuple[Session, str]:
            network, tokenizer = load(model.directory())
            if text is not None and (n := len(encode_long(tokenizer, text))) > MOST_TOKENS:  # no page is there to tell
                raise TTTError(f"{text_file}: {n} tokens, and a live page holds {MOST_TOKENS}: cut the text")
            page = live_page(Subject.of(title, network), {"resetEvery": RESET})
            return Session(network, tokenizer, publish), page

        watcher = Watcher(make_session)
        if text is not None:
            watcher.begin(text)
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"http://{shown}:{listener.getsockname()[1]}  (Ctrl-C ends it)")
        if not is_loopback(host):
            click.echo("note: others on the network can read this page and use the model", err=True)
        sys.stdout.flush()
        serve(watcher, listener, host)
