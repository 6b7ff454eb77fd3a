"""coreml and verify: a model directory as a Core ML package, and how far that is from the model."""

from __future__ import annotations

import time
from pathlib import Path

import click

from .command import CONTEXT, Command, Progress


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("model", type=Path)
@click.argument("out", type=Path)
@click.option(
    "--weights",
    type=click.Choice(["float16", "int8", "int4"]),
    default="float16",
    help="Of the large matrices. int8: half the size, next to no loss. int4: a quarter, where size is everything; run"
    " `verify` before shipping it.",
)
@click.option(
    "--compute",
    type=click.Choice(["float16", "mixed"]),
    default="float16",
    help="mixed: the inner model learns in float32, for texts where float16 goes astray; keeps off the Neural Engine.",
)
@click.option(
    "--prefill-tokens",
    type=click.IntRange(0),
    default=0,
    show_default="one mini-batch",
    metavar="N",
    help="That prefill reads at once, a multiple of the mini-batch size. More: faster prompts, a larger program.",
)
@click.option(
    "--state-mode",
    type=click.Choice(["state", "io"]),
    default="state",
    help="io: the state as input and output of every call, for systems where Core ML's own states fail.",
)
@click.option(
    "--separate",
    is_flag=True,
    help="A package for each function, NAME-decode and NAME-prefill, where the Neural Engine refuses both in one."
    " Weights are stored twice.",
)
@click.option(
    "--split-head",
    type=click.IntRange(1),
    default=1,
    metavar="N",
    help="Compute the logits in N pieces, for devices that refuse a product as large as the vocabulary. With tied"
    " embeddings they are stored twice.",
)
@click.option("--no-companions", is_flag=True, help="Only the package: no tokenizer, configuration and Swift code.")
def coreml(model, out, weights, compute, prefill_tokens, state_mode, separate, split_head, no_companions):
    """Export MODEL, a model directory, to the Core ML package OUT.mlpackage (iOS 18, macOS 15).

    Beside it appears OUT-companions, a folder with what an app needs: tokenizer, configuration, Swift code.
    """
    from ..coreml import require_coremltools

    require_coremltools()
    from ..coreml.package import export
    from ..coreml.program import Options

    options = Options(compute, state_mode, split_head, prefill_tokens)
    start = time.perf_counter()
    with Progress("exporting") as progress:
        report = export(
            model,
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
@click.option("--against", type=Path, required=True, metavar="MODEL", help="The model directory it was made of.")
@click.option("--tokens", type=click.IntRange(1), default=160, metavar="N", help="Length of the text to compare on.")
def verify(package, against, tokens):
    """Compare the answers of PACKAGE with those of the model it was exported from.

    On macOS it runs in Core ML, on each compute unit in turn, with a count of what Core ML plans to run where.
    Elsewhere an interpreter runs the saved program and rounds as it declares: that checks the graph and the weights.
    Of a pair exported with --separate, PACKAGE is the name without -decode or -prefill.
    """
    from ..coreml import require_coremltools

    require_coremltools()
    from ..coreml.verify import Refusal, verify

    with Progress("comparing") as progress:
        comparisons = verify(package, against, tokens=tokens, progress=progress)
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
        for function, devices in (found.devices or {}).items():
            shares = ", ".join(f"{device} {count}" for device, count in sorted(devices.items()))
            click.echo(f"  {function + ' runs on':19} {shares}")
