"""coreai: exports a model directory as a bundle for Core AI; and how a bundle is verified."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from .command import CONTEXT, Command, Progress, existing, show_table, tokenizer_option


def learning_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options about learning, of both kinds of packages."""
    scale = click.option(
        "--learning",
        is_flag=True,
        help="decode and prefill take the learning scale, [layers, heads], as an input: 0 freezes what was learned.",
    )
    signals = click.option(
        "--signals",
        is_flag=True,
        help="decode and prefill return what each layer and head does with each token: loss, lr, writeNorm.",
    )
    return scale(signals(command))


@click.command(cls=Command, context_settings=CONTEXT)
@click.argument("model")
@click.argument("out", type=Path)
@tokenizer_option
@click.option(
    "--weights",
    type=click.Choice(["float32", "float16", "int8", "int4", "lut4"]),
    default="float16",
    help="How the large matrices are stored; lut4: in tables of 16 numbers. Run `verify` before you ship a small one.",
)
@click.option(
    "--compute",
    type=click.Choice(["float16", "mixed", "float32"]),
    default="float16",
    help="mixed: the inner model learns in float32, for texts that float16 is too coarse for.",
)
@learning_options
@click.option(
    "--kernels",
    is_flag=True,
    help="A second program beside the first, for a GPU: with our Metal kernels. No device has run it yet.",
)
def coreai(model: str, tokenizer: str | None, out: Path, weights: str, kernels: bool, **options: Any) -> None:
    """Export MODEL, a model directory or ORG/NAME, to the folder OUT, a bundle for Core AI (iOS 27, macOS 27).

    Apple's runner for language models takes it as it is. Apple's runtime for Linux proves it: `convert.py verify`.
    """
    from ..export.coreai import require_coreai

    require_coreai()
    from ..export.coreai.bundle import export
    from ..export.functions import Options

    directory = existing(model, tokenizer)
    start = time.perf_counter()
    with Progress("exporting") as progress:
        chosen = Options(**options)
        report = export(directory, out, weights=weights, options=chosen, kernels=kernels, progress=progress)
    click.echo(f"{report.out}")
    click.echo(
        f"{report.nbytes / 1e6:.1f} MB, state {report.state_nbytes / 1e6:.2f} MB; {time.perf_counter() - start:.0f} s"
    )


def is_bundle(path: Path) -> bool:
    """Whether a path that is to be verified is a bundle for Core AI, or was meant to be one."""
    return path.suffix == ".aimodel" or (path / "metadata.json").exists()


def verify_bundle(ctx: click.Context, bundle: Path, model: Path, tokens: int | None) -> None:
    """Compare a bundle with its model, show a table, and end with status 1 if it is beyond a bound."""
    from ..export.coreai import require_coreai

    require_coreai()
    from ..export.coreai.verify import verify

    with Progress("comparing") as progress:
        found = verify(bundle, model, tokens=tokens, progress=progress)
    heads = ["function", "tokens", "logits", "bound", "state", "bound", "bits per token", "the model's", "greedy text"]
    signals = any(row.signals is not None for row in found.rows)
    heads += ["signals"] * signals
    rows = [
        (
            row.what,
            str(row.tokens),
            f"{row.logits:.1e}",
            f"{row.bound.logits:.0e}",
            f"{row.state:.1e}",
            f"{row.bound.state:.0e}",
            f"{row.bits[0]:.4f}",
            f"{row.bits[1]:.4f}",
            "equal" if row.greedy is None else f"parts at {row.greedy}",
            *["" if row.signals is None else f"{row.signals:.1e}"] * signals,
        )
        for row in found.rows
    ]
    show_table([heads, *rows])
    if found.kernels:
        click.echo(f"Not run: the kernels of {found.kernels}, which load only where there is Apple's GPU.")
    click.echo(f"Run by Core AI's runtime. Bounds are for --compute {found.compute}: {found.rows[0].bound.reason}.")
    click.echo(
        f"The model was given the weights as {found.weights} stores them: {found.bits[1]:.4f} bits per token of this"
        f" text; {found.bits[0]:.4f} with its own."
    )
    if not all(row.holds for row in found.rows):
        click.echo("beyond the bound", err=True)
        ctx.exit(1)
