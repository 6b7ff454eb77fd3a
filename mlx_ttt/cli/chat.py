"""chat: talk with a model in the terminal, or continue a text with it."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import TTTError
from .command import CONTEXT, INTERRUPTED, Command, Interrupt, Named, Progress, model_options, one_line, styled
from .sampling import MOST_LEARNING, learning_option, make_sampler, sampling_options

if TYPE_CHECKING:
    from ..network.model import Model
    from ..text.state import TextState

_BLOCK = '"""'
_HISTORY = 1000  # lines
_HELP = f"""/save FILE     save what was read and written, to continue it later
/load FILE     go on from a saved state
/state         what the model has read, and how much it has learned from it
/learn [N]     how much it learns from now on: 0 or off nothing, 1 or on as it is; without N, show it
/reset         forget everything
/help, /quit
{_BLOCK}            begins a text of several lines, and ends it"""


@click.command(cls=Command, context_settings=CONTEXT)
@model_options
@click.option("--system", metavar="TEXT", help="What the model is told first. Needs a chat template.")
@click.option("--max-tokens", "-m", default=256, type=click.IntRange(-1), help="Stop after N tokens; -1: no limit.")
@sampling_options
@click.option("--load-state", metavar="FILE", help="Go on from a saved state.")
@learning_option
def chat(
    model: Named,
    system: str | None,
    max_tokens: int,
    seed: int | None,
    load_state: str | None,
    learning: float | None,
    **sampling: Any,
) -> None:
    """Chat with a model in the terminal.

    A model without a chat template continues the text: what you type and what it writes are one text.
    Ctrl-C ends an answer, Ctrl-D the chat. /help shows what else there is.
    """
    if max_tokens == 0:
        raise TTTError("--max-tokens 0 would write nothing: give another number")

    import mlx.core as mx

    from ..loading import load
    from ..text.vocabulary import Vocabulary

    if seed is not None:
        mx.random.seed(seed)
    network, tokenizer = load(model.directory())
    vocabulary = Vocabulary(tokenizer)
    if system is not None and not vocabulary.has_chat_template:
        raise TTTError("--system needs a model with a chat template; this one continues texts")
    options = {"max_tokens": max_tokens, "sampler": make_sampler(network.args.vocab_size, **sampling)}
    talk = _Chat(network, tokenizer, vocabulary, system, learning, options)
    if load_state is not None:
        talk.load(load_state)
    kind = "chat" if vocabulary.has_chat_template else "the model continues your text"
    if sys.stdin.isatty():
        click.echo(styled(f"{kind}; /help shows the commands, Ctrl-D ends", sys.stdout, dim=True))
    with _lines() as ask:
        _loop(talk, ask)


def _loop(talk: _Chat, ask: Callable[[], str | None]) -> None:
    """Read and answer until there is nothing more to read."""
    while (line := ask()) is not None:
        try:
            if line.startswith("/") and not line.startswith("//"):
                if talk.command(line):
                    return
            elif line.strip():
                talk.answer(line.removeprefix("/") if line.startswith("//") else line)
        except (TTTError, OSError) as error:
            click.echo(styled(f"error: {' '.join(one_line(error).split())}", sys.stderr, fg="red"), err=True)


@dataclass
class _Chat:
    """A conversation, or a text that both sides write.

    Attributes:
        state: what was read and written; None at the beginning.
    """

    model: Model
    tokenizer: Any
    vocabulary: Any
    system: str | None
    learning: float | None
    options: dict[str, Any]
    state: TextState | None = None

    def answer(self, line: str) -> None:
        """Read what was typed, and write what follows."""
        from ..text.generation import stream_generate
        from ..text.state import read

        with Progress("reading", at_least=4096) as progress:
            tokens = self._tokens(line)
            self.state = read(self.model, self.tokenizer, tokens, self.state, progress=progress, learning=self.learning)
        options = {**self.options, "learning": self.learning}
        responses: Any = stream_generate(self.model, self.tokenizer, state=self.state, **options)
        with Interrupt() as interrupt, contextlib.closing(responses):
            for response in responses:
                click.echo(response.text, nl=False)
                if interrupt.received:
                    break
        click.echo()

    def _tokens(self, line: str) -> list[int]:
        """What was typed, as the model is to read it."""
        started = self.state is not None
        if not self.vocabulary.has_chat_template:
            return self.vocabulary.encode(f"{line}\n", continues=started)
        messages = [{"role": "user", "content": line}]
        if self.system is not None and not started:
            messages.insert(0, {"role": "system", "content": self.system})
        try:
            return self.vocabulary.chat(messages, continues=started)
        except ValueError as error:
            raise TTTError(str(error)) from error

    def command(self, line: str) -> bool:
        """Do what a line that begins with a slash says; whether the chat ends with it.

        Raises:
            TTTError: there is no such command, or it cannot be done.
        """
        try:
            name, *values = shlex.split(line)
        except ValueError:
            raise TTTError("a quotation mark is missing") from None
        commands: dict[str, tuple[Callable[..., Any], int, int]] = {
            "/help": (lambda: click.echo(_HELP), 0, 0),
            "/save": (self.save, 1, 1),
            "/load": (self.load, 1, 1),
            "/state": (self.show, 0, 0),
            "/learn": (self.learn, 0, 1),
            "/reset": (self.reset, 0, 0),
            "/quit": (lambda: True, 0, 0),
        }
        if name not in commands:
            raise TTTError(f"{name}: there is no such command; /help shows them, and // begins a text with a slash")
        call, least, most = commands[name]
        if not least <= len(values) <= most:
            raise TTTError(f"{name}: expected {'a value' if most else 'nothing'} after it; /help shows how")
        return bool(call(*values))

    def save(self, file: str) -> None:
        from ..text.state import save_state

        if self.state is None:
            raise TTTError("there is nothing to save yet")
        save_state(file, self.state, self.model, self.tokenizer)
        click.echo(f"{file}: {len(self.state)} tokens")

    def load(self, file: str) -> None:
        from ..text.state import load_state

        self.state = load_state(file, self.model, self.tokenizer)
        click.echo(f"{file}: {len(self.state)} tokens")

    def show(self) -> None:
        from ..learning.states import drift

        if self.state is None:
            click.echo("nothing was read yet")
            return
        relative = drift(self.model, self.state).of_layers().relative[:, 0].tolist()
        size = f"{self.state.nbytes / 1e6:.2f} MB"
        click.echo(f"{len(self.state)} tokens, {size}, learning {self._learning:g}")
        layers: Any = relative
        click.echo(f"the weights have moved by {', '.join(f'{x:.1%}' for x in layers)} (layer by layer)")

    def learn(self, value: str | None = None) -> None:
        if value is not None:
            try:
                number = float({"on": "1", "off": "0"}.get(value, value))
            except ValueError:
                number = -1
            if not 0 <= number <= MOST_LEARNING:  # which NaN is not, either
                raise TTTError(f"/learn {value}: expected on, off or a number from 0 to {MOST_LEARNING}")
            self.learning = number
        click.echo(f"learning {self._learning:g}")

    def reset(self) -> None:
        self.state = None

    @property
    def _learning(self) -> float:
        if self.learning is not None:
            return self.learning
        return 1.0 if self.state is None else self.state.learning


@dataclass
class _Reader:
    """Asks for lines. A text of several lines stands between two block marks."""

    prompt: str
    more: str = field(default="")

    def __call__(self) -> str | None:
        """What was typed; None at its end."""
        try:
            line = input(self.prompt)
            if not line.startswith(_BLOCK):
                return line
            lines = [line.removeprefix(_BLOCK)]
            while _BLOCK not in lines[-1]:
                lines.append(input(self.more))
            lines[-1] = lines[-1].partition(_BLOCK)[0]
            return "\n".join(lines).strip("\n")
        except EOFError:
            if sys.stdin.isatty():
                click.echo()
            return None
        except UnicodeDecodeError:
            raise TTTError("the input is not UTF-8 text") from None
        except KeyboardInterrupt:
            click.echo()
            sys.exit(INTERRUPTED)


@contextlib.contextmanager
def _lines() -> Iterator[Callable[[], str | None]]:
    """Something that asks for lines; in a terminal with editing, and the lines of earlier chats."""
    if not sys.stdin.isatty():
        yield _Reader("")
        return
    file = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state", "mlx_ttt", "chat_history")
    try:
        import readline
    except ImportError:  # a Python without it; lines can be typed all the same
        yield _Reader("> ", ". ")
        return
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(_HISTORY)
    try:
        yield _Reader("> ", ". ")
    finally:
        with contextlib.suppress(OSError):  # a chat without a place for its history is a chat all the same
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)
            file.chmod(0o600)
