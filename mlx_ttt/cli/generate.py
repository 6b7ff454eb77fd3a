"""generate: continue a text."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..backends.cpu import library
from ..errors import TTTError
from ..files import output_file
from .command import CONTEXT, INTERRUPTED, Command, Interrupt, Named, Progress, model_options, only_the_first_shows
from .notes import Notes
from .sampling import learning_option, make_sampler, sampling_options

if TYPE_CHECKING:
    from ..network.model import Model
    from ..text.state import TextState


@click.command(cls=Command, context_settings=CONTEXT)
@model_options
@click.option("--prompt", "-p", metavar="TEXT", help="The text to continue; - reads it from stdin.")
@click.option("--prompt-file", metavar="FILE", help="A file that holds the text to continue.")
@click.option("--max-tokens", "-m", default=256, type=click.IntRange(-1), help="Stop after N tokens; -1: no limit.")
@sampling_options
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="Stop before this text; can be given several times. A saved state has read the text.",
)
@click.option("--num-samples", "-n", default=1, type=click.IntRange(1), help="Continue the text N times.")
@click.option(
    "--draft-model", metavar="DIR", help="A smaller model with the same vocabulary, which proposes tokens, for speed."
)
@click.option("--num-draft-tokens", default=3, type=click.IntRange(1), help="How many tokens it proposes at a time.")
@click.option("--save-state", metavar="FILE", help="Save the state after the text, to continue it later.")
@click.option("--load-state", metavar="FILE", help="Continue a saved state, after adding --prompt, if given.")
@learning_option
@click.option(
    "--observe", metavar="FILE", help="Write what it learned from each token it wrote: FILE.npz or FILE.jsonl."
)
@click.option("--verbose", "-v", is_flag=True, help="Show speed, memory and size of the state on stderr.")
def generate(
    model: Named,
    prompt: str | None,
    prompt_file: str | None,
    max_tokens: int,
    seed: int | None,
    stop: tuple[str, ...],
    num_samples: int,
    draft_model: str | None,
    num_draft_tokens: int,
    save_state: str | None,
    load_state: str | None,
    learning: float | None,
    observe: str | None,
    verbose: bool,
    **sampling: Any,
) -> None:
    """Continue a text with a TTT language model.

    \b
    generate.py --prompt "ROMEO:" --temp 0.8
    generate.py --prompt-file book.txt --max-tokens 0 --save-state book.state
    generate.py --load-state book.state --prompt "CHAPTER II"

    Started with mlx.launch, the model is split over the machines (docs/distributed.md).
    """
    text = _prompt(prompt, prompt_file, required=load_state is None)
    if save_state is not None and num_samples > 1:
        raise TTTError("--save-state saves one text: leave out --num-samples")
    if max_tokens == 0 and save_state is None:
        raise TTTError("--max-tokens 0 only reads: add --save-state FILE to keep what was read")
    if draft_model is not None and (observe is not None or learning is not None):
        raise TTTError("--observe and --learning do not go together with --draft-model: leave one out")
    if observe is not None and (num_samples > 1 or max_tokens == 0):
        raise TTTError("--observe is for one text that is written: leave out --num-samples, and --max-tokens 0")

    import mlx.core as mx

    from ..distributed.group import as_first, joined
    from ..loading import load
    from ..text import state as states
    from ..text.tokenizer import encode

    with joined() as group, only_the_first_shows(group):
        if group is not None and (save_state is not None or load_state is not None):
            raise TTTError("a state is split over the machines: no --save-state or --load-state on several")
        if group is not None and observe is not None:
            raise TTTError("the heads are split over the machines: no --observe on several")
        verbose = verbose and (group is None or group.rank() == 0)
        notes = None if observe is None else Notes(observe)
        if save_state is not None:
            output_file(save_state)  # fails now rather than after an hour of reading
        if seed is not None:
            mx.random.seed(seed)
        network, tokenizer = load(model.directory(), group=group)
        writer = _Writer(network, tokenizer, verbose, learning, notes)
        draft = None if draft_model is None else _draft_model(draft_model, num_draft_tokens, writer)
        before = None if load_state is None else states.load_state(load_state, network, tokenizer)
        context = before.tokens if before is not None else []
        tokens = encode(tokenizer, text, continues=bool(context))
        state = writer.prefill(tokens, before)
        sampler = as_first(make_sampler(network.args.vocab_size, **sampling), group)
        options: dict[str, Any] = {"max_tokens": max_tokens, "sampler": sampler, "stop": stop}
        if draft is not None:
            draft_state = states.read(draft, tokenizer, context + tokens)
            options |= {"draft_model": draft, "draft_state": draft_state, "num_draft_tokens": num_draft_tokens}

        if save_state is None:
            interrupted = writer.write_samples(state, num_samples, options)
        else:
            interrupted = max_tokens != 0 and writer.write(state, options)
            states.save_state(save_state, state, network, tokenizer)
        if notes is not None:
            notes.save()
        if verbose:
            memory = mx.get_peak_memory() / 1e6
            click.echo(f"peak memory: {memory:.0f} MB, state: {state.nbytes / 1e6:.2f} MB", err=True)
            if advice := library.advice():
                click.echo(advice, err=True)
        if interrupted:
            sys.exit(INTERRUPTED)


@dataclass(frozen=True)
class _Writer:
    """A model with its tokenizer, which reads a text and writes its continuation."""

    model: Model
    tokenizer: Any
    verbose: bool
    learning: float | None
    notes: Notes | None

    def prefill(self, tokens: list[int], state: TextState | None) -> TextState:
        """Read the prompt after `state`, if any."""
        from ..text.state import read

        before, start = len(state) if state else 0, time.perf_counter()
        with Progress("reading", at_least=4096) as progress:
            state = read(self.model, self.tokenizer, tokens, state, progress=progress, learning=self.learning)
        if len(state) > before:
            self._show_speed("prompt", len(state) - before, start)
        return state

    def write(self, state: TextState, options: dict[str, Any]) -> bool:
        """Stream a continuation of `state` to stdout, and update it; says whether Ctrl-C ended it."""
        from ..text.generation import stream_generate

        before, start, from_draft = len(state), time.perf_counter(), 0
        options = options | {"observe": self.notes is not None, "learning": self.learning}
        responses: Any = stream_generate(self.model, self.tokenizer, state=state, **options)
        with Interrupt() as interrupt, contextlib.closing(responses):
            for response in responses:
                click.echo(response.text, nl=False)
                from_draft += response.from_draft
                if self.notes is not None:
                    self.notes.add(response)
                if interrupt.received:
                    break
        click.echo()
        self._show_speed("generation", len(state) - before, start)
        if self.verbose and "draft_model" in options:
            click.echo(f"proposed by the draft model: {from_draft} of these tokens", err=True)
        return interrupt.received

    def write_samples(self, state: TextState, count: int, options: dict[str, Any]) -> bool:
        """Stream several continuations of `state`, which stays as it is; says whether Ctrl-C ended one."""
        for sample in range(1, count + 1):
            if count > 1:
                click.echo(f"--- {sample} of {count} ---")
            if self.write(state.copy(), options):
                return True
        return False

    def _show_speed(self, what: str, tokens: int, start: float) -> None:
        """Show how fast so many tokens were, since the time `start` in seconds."""
        if self.verbose:
            speed = tokens / (time.perf_counter() - start)
            click.echo(f"{what}: {tokens} tokens, {speed:.1f} tokens/s", err=True)


def _draft_model(path: str, num_draft_tokens: int, writer: _Writer) -> Model:
    """Load the draft model, and check that it fits the model."""
    from ..loading import load
    from ..text.decoding import most_draft_tokens

    draft, tokenizer = load(Named(path).directory())
    same_size = draft.args.vocab_size == writer.model.args.vocab_size
    if not same_size or tokenizer.get_vocab() != writer.tokenizer.get_vocab():
        raise TTTError(f"--draft-model {path}: has another vocabulary than the model; both must have the same")
    most = most_draft_tokens(writer.model, draft)
    if num_draft_tokens > most:
        raise TTTError(f"--num-draft-tokens {num_draft_tokens}: these models can take back {most} at most")
    return draft


def _prompt(prompt: str | None, prompt_file: str | None, required: bool) -> str:
    """The text to continue, unchanged: line ends and spaces are part of it."""
    if prompt is not None and prompt_file is not None:
        raise TTTError("give --prompt or --prompt-file, not both")
    where = "--prompt"
    try:
        if prompt_file is not None:
            where = f"--prompt-file {prompt_file}"
            data = Path(prompt_file).read_bytes()
        elif prompt == "-":
            where = "--prompt -"
            data = sys.stdin.buffer.read()
        else:
            data = os.fsencode(prompt or "")  # the bytes as typed, in any locale
        text = data.decode("utf-8")
    except OSError as error:
        raise TTTError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise TTTError(f"{where}: not UTF-8 text") from None
    if required and not text:
        given = prompt is not None or prompt_file is not None
        raise TTTError("the prompt is empty" if given else "no prompt: give --prompt TEXT, --prompt - or --prompt-file")
    return text
