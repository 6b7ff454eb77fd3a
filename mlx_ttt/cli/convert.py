"""convert: a checkpoint to a model directory, or a look at one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .command import CONTEXT, Command, Progress
from .coreml import coreml, verify

if TYPE_CHECKING:
    from ..checkpoint.convert import Inspection


@click.group(context_settings=CONTEXT)
def convert() -> None:
    """Convert checkpoints of TTT language models: to MLX, and from there to Core ML."""


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
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model directory.")
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

    found = inspect(source, config=config)
    for name, value in _facts(found):
        click.echo(f"{name + ':':12} {value}")
    for problem in found.problems:
        click.echo(f"{'problem:':12} {problem}")


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    """What there is to say of a checkpoint, line by line."""
    yield "format", found.format
    sizes = ", ".join(f"{nbytes / 1e6:.1f} MB {dtype}" for dtype, nbytes in found.bytes_by_dtype.items())
    yield "weights", f"{found.parameters / 1e6:.2f} M in {found.tensors} tensors, {sizes}"
    if args := found.args:
        yield "model", {"linear": "TTT-Linear", "mlp": "TTT-MLP"}[args.ttt_layer_type]
        yield (
            "size",
            f"{args.num_hidden_layers} layers, hidden size {args.hidden_size}, {args.num_attention_heads} heads of"
            f" {args.head_dim}, mini-batch size {args.mini_batch_size}, vocabulary {args.vocab_size}",
        )
        flags = [name for name in ("pre_conv", "share_qk", "use_gate") if getattr(args, name)]
        yield "backbone", ", ".join(flags) or "no convolutions, separate q and k, no gate"
        yield "lm_head", "tied to the embedding" if args.tie_word_embeddings else "of its own"
    yield "tokenizer", ", ".join(found.tokenizer_files) or "none: add one when converting, with --tokenizer FILE"


convert.add_command(coreml)
convert.add_command(verify)
