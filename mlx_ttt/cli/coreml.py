"""coreml: exports a model directory as a Core ML package; verify: compares the package with the model."""

from __future__ import annotations

import time
from pathlib import Path

import click

from .command import CONTEXT, Command, Progress, existing, tokenizer_option
from .coreai import is_bundle, learning_options, verify_bundle


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.argument("out", type=Path)
@tokenizer_option
@click.option(
    "--weights",
    type=click.Choice(["float16", "int8", "int4"]),
    default="float16",
    help="How the large matrices are stored. int8: half the size, hardly any loss. int4: a quarter of the size; run"
    " `verify` before you ship it.",
)
@click.option(
    "--compute",
    type=click.Choice(["float16", "mixed"]),
    default="float16",
    help="mixed: the inner model learns in float32, for texts that float16 is too coarse for; no Neural Engine.",
)
@click.option(
    "--prefill-tokens",
    type=click.IntRange(0),
    default=0,
    show_default="one mini-batch",
    metavar="N",
    help="Tokens per call of prefill, a multiple of the mini-batch size. More: faster prompts, a larger program.",
)
@click.option(
    "--state-mode",
    type=click.Choice(["state", "io"]),
    default="state",
    help="io: the state is an input and output of every call, for systems where Core ML's own states fail.",
)
@click.option(
    "--separate",
    is_flag=True,
    help="Make a package for each function, NAME-decode and NAME-prefill, if the Neural Engine refuses both in one."
    " The weights are stored twice.",
)
@click.option(
    "--split-head",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Compute the logits in N pieces, for devices that refuse a product as large as the vocabulary. Tied"
    " embeddings are then stored twice.",
)
@learning_options
@click.option("--no-companions", is_flag=True, help="Write only the package: no tokenizer, no configuration, no Swift.")
def coreml(
    model: str,
    tokenizer: str | None,
    out: Path,
    weights: str,
    compute: str,
    prefill_tokens: int,
    state_mode: str,
    separate: bool,
    split_head: int,
    no_companions: bool,
    learning: bool,
    signals: bool,
) -> None:
    """Export MODEL, a model directory or ORG/NAME, to the Core ML package OUT.mlpackage (iOS 18, macOS 15).

    Beside it a folder OUT-companions is made, with what an app needs: tokenizer, configuration, Swift code.
    """
    from ..export.mil import require_coremltools

    require_coremltools()
    from ..export.mil.package import export
    from ..export.mil.program import Options

    directory = existing(model, tokenizer, needs_tokenizer=not no_companions)
    options = Options(compute, split_head, prefill_tokens, learning=learning, signals=signals, state_mode=state_mode)
    start = time.perf_counter()
    with Progress("exporting") as progress:
        report = export(
            directory,
            out,
            weights=weights,
            options=options,
            separate=separate,
            companions=not no_companions,
            progress=progress,
        )
    for package in report.packages:
        click.echo(f"{package}")
    if report.companions:
        click.echo(f"{report.companions}")
    click.echo(
        f"{report.nbytes / 1e6:.1f} MB, state {report.layout.nbytes / 1e6:.2f} MB read and written by each call;"
        f" {time.perf_counter() - start:.0f} s, peak memory {report.peak_memory / 1e9:.2f} GB"
    )


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("package", type=Path)
@click.option("--against", required=True, metavar="MODEL", help="The model that it was exported from.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    show_default="160; of a Core AI bundle 4096, in half precision 192",
    metavar="N",
    help="Length of the text to compare on.",
)
@click.pass_context
def verify(ctx: click.Context, package: Path, against: str, tokens: int | None) -> None:
    """Compare PACKAGE, a Core ML package or a bundle for Core AI, with the model it was exported from.

    A bundle runs in Core AI's own runtime, on Linux too; the exit status is 1 if it is beyond a bound.

    A package runs on macOS in Core ML, on each compute unit in turn; also shown is how many operations Core ML plans
    to run on which unit. Elsewhere an interpreter runs the saved program, with the roundings that it declares: this
    checks the graph and the weights. Core AI's runtime gives a second opinion, where it is installed. For a pair
    exported with --separate, PACKAGE is the name without -decode or -prefill.
    """
    if is_bundle(package):
        verify_bundle(ctx, package, existing(against, needs_tokenizer=False), tokens)
        return
    from ..export.mil import require_coremltools

    require_coremltools()
    from ..export.verify import Refusal, verify

    with Progress("comparing") as progress:
        comparisons = verify(package, existing(against, needs_tokenizer=False), tokens=tokens or 160, progress=progress)
    for found in comparisons:
        if isinstance(found, Refusal):
            click.echo(f"{found.where}: refused: {found.reason}")
            continue
        click.echo(f"{found.where}, {found.positions} positions:")
        click.echo(f"  largest difference  {found.largest_difference:.2e} of the largest logit")
        click.echo(f"  same best token     {found.top1:.1%}")
        click.echo(f"  same five best      {found.top5:.1%}")
        click.echo(f"  KL divergence       {found.divergence:.2e} nats")
        click.echo(f"  state drift         {found.state_error:.2e} of what it has learned")
        if found.signals is not None:
            click.echo(f"  signals             {found.signals:.2e} of the largest")
        for function, devices in found.devices.items():
            shares = ", ".join(f"{device} {count}" for device, count in sorted(devices.items()))
            click.echo(f"  {function + ' runs on':19} {shares}")
