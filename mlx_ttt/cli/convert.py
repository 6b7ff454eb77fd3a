"""convert: a checkpoint to a model directory, or a look at one."""

from __future__ import annotations

from pathlib import Path

import click

from .command import CONTEXT, Command, Progress


@click.group(context_settings=CONTEXT)
def convert() -> None:
    """Convert checkpoints of TTT language models."""


@convert.command(cls=Command, context_settings=CONTEXT)
@click.argument("source", type=Path)
@click.argument("out", type=Path)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of the weights; the checkpoint's own by default. The inner model stays float32.",
)
@click.option("--config", type=Path, metavar="FILE", help="The model's config.json, where SOURCE has none.")
@click.option("--tokenizer", type=Path, metavar="FILE", help="tokenizer.model or tokenizer.json, or a folder with it.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that are NaN or infinite too.")
def mlx(source, out, dtype, config, tokenizer, overwrite, allow_nonfinite):
    """Convert SOURCE, a PyTorch checkpoint (folder or file), to the MLX model directory OUT."""
    import mlx.core as mx

    from ..checkpoint.convert import convert

    with Progress("converting") as progress:
        report = convert(
            source,
            out,
            dtype=dtype and getattr(mx, dtype),
            config=config,
            tokenizer=tokenizer,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    size = sum(report.bytes_by_dtype.values())
    click.echo(f"{out}: {report.parameters / 1e6:.2f} M parameters, {size / 1e6:.1f} MB")


@convert.command(cls=Command, context_settings=CONTEXT)
@click.argument("source", type=Path)
@click.option("--config", type=Path, metavar="FILE", help="The model's config.json, where SOURCE has none.")
def inspect(source, config):
    """Show what SOURCE, a checkpoint or model directory, holds."""
    from ..checkpoint.convert import inspect

    for line in inspect(source, config=config).lines():
        click.echo(line)
