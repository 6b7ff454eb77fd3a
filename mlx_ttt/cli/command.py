"""What all commands share."""

from __future__ import annotations

import errno
import signal
import sys

import click

from ..errors import TTTError

CONTEXT = {"help_option_names": ["-h", "--help"], "show_default": True}
INTERRUPTED = 130  # what shells report for a program ended by Ctrl-C


class Command(click.Command):
    """Shows what a user can mend as one line on stderr, exit status 2, no traceback."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except TTTError as error:
            message = str(error)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of our output has left
                raise
            message = f"{error.filename or 'output'}: {error.strerror}"
        except KeyboardInterrupt:
            click.echo("interrupted; nothing was saved", err=True)
            ctx.exit(INTERRUPTED)
        click.echo(f"error: {' '.join(message.split())}", err=True)
        ctx.exit(2)


class Interrupt:
    """Here Ctrl-C only sets `received`, so that a loop can end between two tokens; a second one is as usual."""

    def __enter__(self) -> Interrupt:
        self.received = False
        self._before = signal.signal(signal.SIGINT, self._receive)
        return self

    def _receive(self, *_) -> None:
        self.received = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *_) -> None:
        signal.signal(signal.SIGINT, self._before)


class Progress:
    """A progress bar on stderr; silent where stderr is no terminal or there is little to wait for."""

    def __init__(self, label: str, at_least: int = 1):
        self.label, self.at_least, self._bar, self._done = label, at_least, None, 0

    def __call__(self, done: int, total: int) -> None:
        if self._bar is None:
            if total < self.at_least or not sys.stderr.isatty():
                return
            self._bar = click.progressbar(length=total, label=self.label, file=sys.stderr)
            self._bar.__enter__()
        self._bar.update(done - self._done)
        self._done = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()
