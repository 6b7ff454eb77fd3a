"""train: train a new model, or train on from one."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import TTTError
from ..network.inner import INNER_MODELS
from .command import CONTEXT, INTERRUPTED, Command, Interrupt, Named, only_the_first_shows

if TYPE_CHECKING:
    import mlx.core as mx

    from ..training.loop import Part, Step
    from ..training.run import Evaluation, Options, Training

_VOCABULARY = 32_000  # of the paper
_TINY_VOCABULARY = 2_048


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("out", type=Path)
@click.option(
    "--preset", type=click.Choice(["tiny", "125m", "350m", "760m", "1.3b"]), help="Train a new model: its size."
)
@click.option("--layer", type=click.Choice(list(INNER_MODELS)), show_default="linear", help="Its TTT layers.")
@click.option("--from", "source", metavar="MODEL", help="Or train on from a model directory, or ORG/NAME on the Hub.")
@click.option(
    "--tokenizer",
    metavar="FILE",
    help="A new model's tokenizer; by default one is trained on the data, by SentencePiece. Or that of a repository"
    " without one: a file or folder, or ORG/NAME.",
)
@click.option(
    "--vocab-size",
    type=click.IntRange(300, 1 << 20),
    metavar="N",
    show_default="32000, tiny 2048",
    help="The number of its tokens.",
)
@click.option(
    "--data",
    multiple=True,
    metavar="PATH",
    help="A text file, a .jsonl file, a data set on disk, or a folder of them; can be given several times.",
)
@click.option(
    "--held-out",
    multiple=True,
    metavar="PATH",
    show_default="5 % of the data, at most 32768 tokens",
    help="Text to evaluate on.",
)
@click.option("--all-tokens", is_flag=True, help="Learn prompts, too, not only completions.")
@click.option(
    "--length", type=click.IntRange(1), metavar="N", show_default="the preset's", help="Tokens of a sequence."
)
@click.option(
    "--batch-size", type=click.IntRange(1), metavar="N", show_default="the preset's", help="Sequences of a step."
)
@click.option(
    "--micro-batch",
    type=click.IntRange(1),
    metavar="N",
    show_default="as many as a segment holds, at least 1",
    help="Sequences computed at a time: more take more memory, and are faster on a GPU.",
)
@click.option(
    "--segment",
    type=click.IntRange(1),
    default=512,
    metavar="N",
    help="Tokens differentiated at a time: more take more memory. The result does not depend on it.",
)
@click.option("--carry", is_flag=True, help="Go on with the state from one window of a document to the next.")
@click.option("--steps", type=click.IntRange(1), metavar="N", show_default="the preset's", help="Steps of training.")
@click.option(
    "--lr",
    type=click.FloatRange(0, 1e3, min_open=True),
    show_default="the preset's",
    help="Learning rate after the warm-up.",
)
@click.option("--end-lr", type=click.FloatRange(0, 1e3), show_default="the preset's", help="Learning rate at the end.")
@click.option("--warmup", type=click.IntRange(0), metavar="N", show_default="a tenth", help="Steps of the warm-up.")
@click.option("--decay", type=click.Choice(["cosine", "linear"]), default="cosine", help="How the learning rate falls.")
@click.option(
    "--optimizer", type=click.Choice(["adamw", "muon", "adafactor"]), default="adamw", help="MLX's optimizer."
)
@click.option(
    "--weight-decay",
    type=click.FloatRange(0, 1e3),
    show_default="the preset's",
    help="Weight decay; norms and biases have none.",
)
@click.option(
    "--clip", type=click.FloatRange(0, 1e6), default=1.0, help="Scale gradients down to this norm; 0: not at all."
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    help="What the network computes in. The inner learner and the optimizer stay float32.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, help="Of the start weights and the order of data."
)
@click.option("--evaluate-every", type=click.IntRange(1), default=25, metavar="N", help="Steps between evaluations.")
@click.option("--save-every", type=click.IntRange(1), default=25, metavar="N", help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint in OUT, if there is one.")
@click.pass_context
def train(ctx: click.Context, /, out: Path, resume: bool, **given: Any) -> None:
    """Train a TTT language model, and write it to the folder OUT.

    \b
    mlx-ttt train OUT --preset tiny --layer linear --data books/
    mlx-ttt train OUT --from MODEL --data book.txt --length 32768 --steps 200
    mlx-ttt train OUT --resume
    """
    for name in ("data", "held_out"):
        given[name] = [os.path.abspath(path) for path in given[name]]
    explicit = {
        name: value
        for name, value in given.items()
        if ctx.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    from ..distributed.files import copy_of_first
    from ..distributed.group import joined

    with joined() as group, only_the_first_shows(group):
        if group is None or group.rank() == 0:
            _open(out, resume, given, explicit)
        with copy_of_first(out, group) as place:
            status = _run(place, group)
    sys.exit(status)


def _open(out: Path, resume: bool, given: dict[str, Any], explicit: dict[str, Any]) -> None:
    """Make the folder of a new training, or check that the one in OUT goes on with the same options."""
    if resume and os.path.lexists(out):
        from ..training.run import saved_options

        _check_same(out, explicit, saved_options(out))
    else:
        options = _with_defaults(given)
        from ..training.run import begin

        begin(out, options)


def _with_defaults(given: dict[str, Any]) -> Options:
    """The options with those of the preset, or of a model that is trained on, where the user said nothing."""
    source, preset = given["source"], given["preset"]
    if (source is None) == (preset is None):
        raise TTTError(
            "train what? Give --preset for a new model, or --from MODEL to train on" + " (not both)" * bool(preset)
        )
    if not given["data"]:
        raise TTTError("no data: give --data PATH, a text file, a .jsonl file or a folder of them")
    for name in ("layer", "vocab_size"):
        if source is not None and given[name] is not None:
            raise TTTError(f"--{name.replace('_', '-')} is for a new model: a model that is trained on has its own")
    if given["tokenizer"] is not None and given["vocab_size"] is not None:
        raise TTTError("--vocab-size is for a tokenizer that is trained on the data: leave it out")

    from ..training.presets import FROM_MODEL, PRESETS
    from ..training.run import Options

    Named(source, given["tokenizer"] if preset is None else None).directory()  # says how a download goes
    defaults = FROM_MODEL if preset is None else PRESETS[preset].defaults
    chosen = {name: value for name, value in given.items() if value is not None}
    steps = chosen.get("steps", defaults.steps)
    lr = chosen.get("lr", defaults.lr)
    length = chosen.get("length", defaults.length)
    batch_size = chosen.get("batch_size", defaults.batch_size)
    unset: dict[str, Any] = dict.fromkeys(("source", "preset", "layer", "tokenizer", "vocab_size"))
    if preset is not None:
        unset |= {"layer": "linear"}
        if given["tokenizer"] is None:
            unset |= {"vocab_size": _TINY_VOCABULARY if preset == "tiny" else _VOCABULARY}
    derived: dict[str, Any] = {
        "steps": steps,
        "length": length,
        "batch_size": batch_size,
        "micro_batch": min(max(given["segment"] // length, 1), batch_size),
        "lr": lr,
        "end_lr": min(defaults.end_lr, lr),
        "warmup": max(steps // 10, 1),
        "weight_decay": defaults.weight_decay,
    }
    return Options(**(unset | derived | chosen))


def _check_same(out: Path, explicit: dict[str, Any], saved: Options) -> None:
    """A training goes on with the options that it was started with, or it would not be the same."""
    for name, value in explicit.items():
        if value != getattr(saved, name):
            option = "--from" if name == "source" else f"--{name.replace('_', '-')}"
            raise TTTError(
                f"{option} {value}: the training in {out} has {getattr(saved, name)}; leave it out, or start another"
            )


def _run(out: Path, group: mx.distributed.Group | None) -> int:
    """Run the training in OUT to its end, or until Ctrl-C. Returns the exit status."""
    from ..distributed.group import any_of
    from ..training.loop import Step
    from ..training.run import PICTURE, Training

    training = Training(out, group)
    screen, stops = _Screen(training), False
    try:
        with Interrupt() as interrupt:
            for event in training.run():
                screen.show(event)
                if group is None:
                    stops = interrupt.received
                elif isinstance(event, Step):  # machines have as many steps, but not as many parts
                    stops = any_of(interrupt.received, group)
                if stops:
                    break
            if stops:
                training.save()
    except KeyboardInterrupt:  # the second one
        if group is not None:
            raise  # the other machines must know
        click.echo(f"{out}: stopped at once; --resume goes on from step {training.saved}", err=True)
        return INTERRUPTED
    finally:
        screen.clear()
    if group is None or group.rank() == 0:
        _draw(training, out / PICTURE)
    done, steps = training.trainer.step, training.options.steps
    if done < steps:
        click.echo(f"{out}: stopped after step {done} of {steps}; --resume goes on")
        return INTERRUPTED
    click.echo(f"{out}: {steps} steps done; the best model is in {out / 'best'}")
    return 0


def _draw(training: Training, file: Path) -> None:
    """Draw the picture. A training whose picture cannot be drawn is a training all the same."""
    from ..training.report import plot

    try:
        plot(training.log.entries(), file)
    except (TTTError, OSError) as error:
        click.echo(f"warning: {error}", err=True)


class _Screen:
    """What a training shows: a line that moves, if stderr is a terminal, and a line for each evaluation."""

    def __init__(self, training: Training):
        self.training, self.moves = training, sys.stderr.isatty()
        self._told_time = False
        self._loss = float("nan")

    def show(self, event: Part | Step | Evaluation) -> None:
        from ..training.loop import Part
        from ..training.run import Evaluation

        if isinstance(event, Evaluation):
            self._evaluation(event)
        elif isinstance(event, Part):
            self._tell_time(event)
            self._line(event.step - 1, event.sequences, event.loss)
        else:
            self._line(event.step, 0, event.loss)

    def clear(self) -> None:
        if self.moves:
            click.echo("\r\033[K", nl=False, err=True)

    def _evaluation(self, event: Evaluation) -> None:
        self.clear()
        bands = ", ".join(f"{band.start} to {band.stop}: {band.mean:.3f}" for band in event.bands)
        best = ", the best so far" if event.is_best else ""
        click.echo(f"step {event.step}: held out {event.loss:.3f} nats per token{best}; by position {bands}")

    def _tell_time(self, part: Part) -> None:
        """After the first part of the first step, say how long a step will take: it may be hours."""
        if self._told_time:
            return
        from ..training.report import duration

        self._told_time = True
        options = self.training.options
        seconds = self.training.clock.seconds / part.sequences * options.batch_size
        self.clear()
        click.echo(
            f"a step of {options.batch_size} sequences of up to {options.length} tokens takes about"
            f" {duration(seconds)}, all {options.steps} steps {duration(seconds * options.steps)}"
        )

    def _line(self, step: int, sequences: int, loss: float) -> None:
        if not self.moves:
            return
        import mlx.core as mx

        from ..training.report import duration

        training = self.training
        part = f" {sequences}/{training.options.batch_size}" if sequences else ""
        text = (
            f"step {step}/{training.options.steps}{part}  loss {loss:.3f}"
            f"  {training.clock.tokens_per_second:,.0f} tokens/s  {mx.get_peak_memory() / 1e9:.2f} GB"
            f"  {duration(training.seconds_left(step, sequences))} left"
        )
        click.echo(f"\r\033[K{text}", nl=False, err=True)
