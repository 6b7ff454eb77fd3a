"""What all commands share: one-line errors, Ctrl-C, a progress bar."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO, TypeVar

import click

from ..errors import TTTError

if TYPE_CHECKING:
    import mlx.core as mx

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}
Rows = Iterable[Sequence[str]]
F = TypeVar("F", bound=Callable[..., Any])

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended, as shells report it


def one_line(error: BaseException) -> str:
    """What is wrong, for a user."""
    if isinstance(error, click.UsageError):
        where = f" (`{error.ctx.command_path} --help` shows what there is)" if error.ctx is not None else ""
        return f"{error.format_message().rstrip('.')}{where}"
    if isinstance(error, click.ClickException):
        return error.format_message()
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'output'}: {error.strerror}"
    return str(error) or type(error).__name__


def fail(error: BaseException) -> NoReturn:
    """End with one line on stderr and exit status 2."""
    click.echo(f"error: {' '.join(one_line(error).split())}", err=True)
    raise click.exceptions.Exit(2)


class OneLine(click.Command):
    """A command that ends in one line if it is called wrongly. click's own message has four."""

    def main(self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        if not standalone_mode:
            return super().main(args, *more, standalone_mode=False, **extra)  # type: ignore[call-overload]
        try:
            status = super().main(args, *more, standalone_mode=False, **extra)  # type: ignore[call-overload]
            sys.exit(status or 0)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.format_message(), err=True)
            sys.exit(2)
        except click.ClickException as error:
            click.echo(f"error: {' '.join(one_line(error).split())}", err=True)
            sys.exit(2)
        except click.Abort:
            sys.exit(INTERRUPTED)
        except OSError as error:
            if error.errno != errno.EPIPE:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains when it closes stdout
            sys.exit(1)


class Group(OneLine, click.Group):
    """Commands under one name."""


class Command(OneLine):
    """A command whose errors, if a user can mend them, are one line on stderr and exit status 2: no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TTTError as error:
            fail(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the program that reads our output has ended: main exits in silence
                raise
            fail(error)
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was saved", err=True)
            ctx.exit(INTERRUPTED)


def styled(text: str, stream: TextIO, **style: Any) -> str:
    """Text with a colour or weight, if it goes to a terminal and the user has not set NO_COLOR (no-color.org)."""
    return click.style(text, **style) if stream.isatty() and not os.environ.get("NO_COLOR") else text


@dataclass(frozen=True)
class Named:
    """The model that a user names."""

    name: str | None
    tokenizer: str | None = None

    def directory(self, needs_tokenizer: bool = True) -> Path | None:
        """Its directory; None for the bundled model. A repository is fetched the first time, with a word on stderr.

        Raises:
            TTTError: it cannot be had.
        """
        if self.name is None:
            if self.tokenizer is not None:
                raise TTTError("--tokenizer is for a repository: give --model ORG/NAME, too")
            return None

        from ..checkpoint.by_name import Listener, model_directory

        with Progress("converting") as progress:
            listener = Listener(lambda line: click.echo(line, err=True), progress)
            return model_directory(
                self.name, tokenizer=self.tokenizer, needs_tokenizer=needs_tokenizer, listener=listener
            )


def existing(model: str, tokenizer: str | None = None, needs_tokenizer: bool = True) -> Path:
    """The directory of a model that must be named; see `Named`."""
    directory = Named(model, tokenizer).directory(needs_tokenizer)
    assert directory is not None
    return directory


_MODEL = click.option(
    "--model",
    metavar="DIR",
    help="A model directory, or ORG/NAME on the Hub (`mlx-ttt models` lists some); the bundled model by default.",
)
tokenizer_option = click.option(
    "--tokenizer",
    metavar="FILE",
    help="For a repository without a tokenizer: a file or folder with one, or ORG/NAME. It is remembered.",
)


def model_options(command: F) -> F:
    """--model and --tokenizer, which the command gets together as a `Named`."""

    @_MODEL
    @tokenizer_option
    @functools.wraps(command)
    def with_model(model: str | None, tokenizer: str | None, **others: Any) -> Any:
        return command(model=Named(model, tokenizer), **others)

    return with_model  # type: ignore[return-value]


def text_of(file: str, name: str) -> str:
    """A file's text, unchanged: line ends are part of it. Errors begin with the name.

    Raises:
        TTTError: it cannot be read, is not UTF-8, or is empty.
    """
    try:
        content = Path(file).read_bytes().decode("utf-8")
    except OSError as error:
        raise TTTError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TTTError(f"{name}: not UTF-8 text") from None
    if not content:
        raise TTTError(f"{name}: is empty")
    return content


def show_table(rows: Rows) -> None:
    """Print a table: names on the left, values on the right."""
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for name, *values in table:
        cells = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
        click.echo("  ".join([name.ljust(widths[0]), *cells]).rstrip())


class Interrupt:
    """A context manager in which Ctrl-C only sets `received`, so that a loop can end between two tokens.

    A second Ctrl-C interrupts as usual.
    """

    def __enter__(self) -> Interrupt:
        self.received = False
        self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def _receive(self, *_: object) -> None:
        self.received = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


class Progress(ExitStack):
    """A context manager that gives a progress bar on stderr, to be called with the work done so far and in all.

    It shows nothing if stderr is not a terminal, or if the work in all is less than `at_least`.
    """

    def __init__(self, label: str, at_least: int = 1):
        super().__init__()
        self.label, self.at_least = label, at_least
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if total < self.at_least or not sys.stderr.isatty():
                return
            self._bar = self.enter_context(click.progressbar(length=total, label=self.label, file=sys.stderr))
        self._bar.update(done - self._bar.pos)


@contextlib.contextmanager
def only_the_first_shows(group: mx.distributed.Group | None) -> Iterator[None]:
    """Of several machines, which all write the same, the first one shows it."""
    if group is None or group.rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
