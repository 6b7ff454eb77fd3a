"""generate: continue a text."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .. import _blas
from ..errors import TTTError
from .command import CONTEXT, INTERRUPTED, Command, Interrupt, Progress

if TYPE_CHECKING:
    from ..generation import TextState

LEAST_TEMPERATURE = 1e-5  # below it, logits divided by the temperature overflow; the best token wins anyway


def _finite(ctx, param, value: float) -> float:
    if not math.isfinite(value):
        raise click.BadParameter("must be a number", ctx, param)
    return value


@click.command(cls=Command, context_settings=CONTEXT)
@click.option("--model", metavar="DIR", help="Model directory, or org/name on the Hub; the bundled one by default.")
@click.option("--prompt", "-p", metavar="TEXT", help="The text to continue; - reads it from stdin.")
@click.option("--prompt-file", metavar="FILE", help="A file that holds the text to continue.")
@click.option("--max-tokens", "-m", default=256, type=click.IntRange(-1), help="Stop after N tokens; -1: no limit.")
@click.option(
    "--temp", default=0.0, type=click.FloatRange(0), callback=_finite, help="Sampling temperature; 0: greedy."
)
@click.option(
    "--top-p",
    default=1.0,
    type=click.FloatRange(0, 1, min_open=True),
    callback=_finite,
    help="Sample from the best tokens of this total probability.",
)
@click.option("--top-k", default=0, type=click.IntRange(0), help="Sample from the K best tokens; 0: all.")
@click.option(
    "--min-p",
    default=0.0,
    type=click.FloatRange(0, 1),
    callback=_finite,
    help="Drop tokens less likely than this, relative to the best.",
)
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Makes sampling repeatable.")
@click.option(
    "--stop",
    multiple=True,
    metavar="TEXT",
    help="Stop before this text (a saved state has read it); can be given several times.",
)
@click.option("--num-samples", "-n", default=1, type=click.IntRange(1), help="Continue the text N times.")
@click.option(
    "--draft-model", metavar="DIR", help="A smaller model of the same vocabulary that proposes tokens, for speed."
)
@click.option("--num-draft-tokens", default=3, type=click.IntRange(1), help="Proposals at a time.")
@click.option("--save-state", metavar="FILE", help="Save what was read and written, to go on from it later.")
@click.option("--load-state", metavar="FILE", help="Go on from a saved state; --prompt comes after it, if given.")
@click.option("--verbose", "-v", is_flag=True, help="Show speed, memory and state size on stderr.")
def generate(
    model,
    prompt,
    prompt_file,
    max_tokens,
    num_samples,
    draft_model,
    num_draft_tokens,
    save_state,
    load_state,
    verbose,
    **sampling,
):
    """Continue a text with a TTT language model.

    \b
    generate.py --prompt "ROMEO:" --temp 0.8
    generate.py --prompt-file book.txt --max-tokens 0 --save-state book.state
    generate.py --load-state book.state --prompt "CHAPTER II"
    """
    text = _prompt(prompt, prompt_file, required=load_state is None)
    if save_state is not None and num_samples > 1:
        raise TTTError("--save-state saves one text: leave out --num-samples")
    if max_tokens == 0 and save_state is None:
        raise TTTError("--max-tokens 0 only reads: add --save-state FILE to keep what was read")

    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    import mlx_ttt
    from mlx_ttt.generation import encode, state_file

    if save_state is not None:
        state_file(save_state)  # an hour of reading should not end in an error that could be seen before
    seed, stop = sampling.pop("seed"), sampling.pop("stop")
    if seed is not None:
        mx.random.seed(seed)
    loaded, tokenizer = mlx_ttt.load(model)
    draft = _draft(draft_model, num_draft_tokens, loaded, tokenizer) if draft_model is not None else {}
    sampling["temp"] = sampling["temp"] if sampling["temp"] >= LEAST_TEMPERATURE else 0.0
    sampling["top_k"] = sampling["top_k"] if sampling["top_k"] < loaded.args.vocab_size else 0
    options = {"max_tokens": max_tokens, "sampler": make_sampler(**sampling), "stop": stop}
    state = mlx_ttt.load_state(load_state, loaded, tokenizer) if load_state is not None else None
    before = state.tokens if state is not None else []
    tokens = encode(tokenizer, text, continues=bool(before))
    state = _read(loaded, tokenizer, tokens, state, verbose)
    if draft:
        options |= draft | {"draft_state": mlx_ttt.read(draft["draft_model"], tokenizer, before + tokens)}

    interrupted = False
    for sample in range(1, num_samples + 1 if max_tokens else 1):
        if num_samples > 1:
            click.echo(f"--- {sample} of {num_samples} ---")
        continued = state if save_state is not None else state.copy()
        interrupted = _write(loaded, tokenizer, continued, options, verbose)
        if interrupted:
            break

    if save_state is not None:
        mlx_ttt.save_state(save_state, state, loaded, tokenizer)
    if verbose:
        click.echo(f"peak memory: {mx.get_peak_memory() / 1e6:.0f} MB, state: {state.nbytes / 1e6:.2f} MB", err=True)
        if advice := _blas.advice():
            click.echo(advice, err=True)
    sys.exit(INTERRUPTED if interrupted else 0)


def _read(model, tokenizer, tokens: list[int], state: TextState | None, verbose: bool) -> TextState:
    from ..generation import read

    before, start = len(state) if state else 0, time.perf_counter()
    with Progress("reading", at_least=4096) as progress:
        state = read(model, tokenizer, tokens, state, progress=progress)
    if verbose and len(state) > before:
        _show_speed("prompt", len(state) - before, time.perf_counter() - start)
    return state


def _draft(path: str, num_draft_tokens: int, model, tokenizer) -> dict:
    """The draft model's part of the options, when it fits the model."""
    import mlx_ttt
    from mlx_ttt.generation import most_draft_tokens

    draft_model, draft_tokenizer = mlx_ttt.load(path)
    same_size = draft_model.args.vocab_size == model.args.vocab_size
    if not same_size or draft_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise TTTError(f"--draft-model {path}: has another vocabulary than the model; both must have the same")
    most = most_draft_tokens(model, draft_model)
    if num_draft_tokens > most:
        raise TTTError(f"--num-draft-tokens {num_draft_tokens}: these models can take back {most} at most")
    return {"draft_model": draft_model, "num_draft_tokens": num_draft_tokens}


def _write(model, tokenizer, state: TextState, options: dict, verbose: bool) -> bool:
    """Stream a continuation to stdout; says whether Ctrl-C ended it."""
    from ..generation import stream_generate

    before, start, from_draft = len(state), time.perf_counter(), 0
    responses = stream_generate(model, tokenizer, state=state, **options)
    with Interrupt() as interrupt, contextlib.closing(responses):
        for response in responses:
            click.echo(response.text, nl=False)
            from_draft += response.from_draft
            if interrupt.received:
                break
    click.echo()
    if verbose:
        _show_speed("generation", len(state) - before, time.perf_counter() - start)
        if "draft_model" in options:
            click.echo(f"proposed by the draft model: {from_draft} of these tokens", err=True)
    return interrupt.received


def _show_speed(what: str, tokens: int, seconds: float) -> None:
    click.echo(f"{what}: {tokens} tokens, {tokens / seconds:.1f} tokens/s", err=True)


def _prompt(prompt: str | None, prompt_file: str | None, required: bool) -> str:
    """The prompt as it is, byte for byte."""
    if prompt is not None and prompt_file is not None:
        raise TTTError("give --prompt or --prompt-file, not both")
    if prompt_file is not None:
        text = _decode(_bytes(Path(prompt_file)), f"--prompt-file {prompt_file}")
    elif prompt == "-":
        text = _decode(sys.stdin.buffer.read(), "--prompt -")
    else:
        text = _decode(os.fsencode(prompt or ""), "--prompt")  # as typed, whatever the locale
    if required and not text:
        given = prompt is not None or prompt_file is not None
        raise TTTError("the prompt is empty" if given else "no prompt: give --prompt TEXT, --prompt - or --prompt-file")
    return text


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TTTError(f"--prompt-file {path}: {error.strerror}") from None


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise TTTError(f"{where}: not UTF-8 text") from None
