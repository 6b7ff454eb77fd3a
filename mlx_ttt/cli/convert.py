"""convert: checkpoints into model directories; inspect: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import HubError, TTTError
from .command import CONTEXT, Command, Group, Progress
from .coreai import coreai
from .coreml import coreml, verify

if TYPE_CHECKING:
    from ..checkpoint.convert import ConversionReport
    from ..checkpoint.inspection import Inspection


@click.group(cls=Group, context_settings=CONTEXT)
def convert() -> None:
    """Convert checkpoints of TTT language models: to MLX, and from there to Core ML, Core AI or back to PyTorch."""


@convert.command(cls=Command, context_settings=CONTEXT)
@click.argument("source", type=Path)
@click.argument("out", type=Path)
@click.option("--revision", help="Branch, tag or commit of SOURCE, a repository on the Hub.")
@click.option("--upload-repo", metavar="ORG/NAME", help="Upload OUT to the Hub; a new repository is public.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Dtype of the weights; the checkpoint's own by default. The inner model stays float32.",
)
@click.option("--bits", type=int, metavar="N", help="Quantize the projections and embeddings to N bits.")
@click.option("--group-size", type=int, metavar="N", help="Let N quantized weights share a scale.")
@click.option(
    "--mode", type=click.Choice(["affine", "mxfp4", "mxfp8", "nvfp4"]), help="Mode of quantization; affine by default."
)
@click.option(
    "--quant-predicate",
    "recipe",
    type=click.Choice(["mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6"]),
    help="Quantize with more bits where they matter most, by a recipe of mlx-lm.",
)
@click.option("--dequantize", is_flag=True, help="Write a quantized model's weights in floating point.")
@click.option("--config", type=Path, metavar="FILE", help="The model's config.json, if SOURCE has none.")
@click.option("--tokenizer", metavar="FILE", help="tokenizer.model or tokenizer.json, a folder with it, or ORG/NAME.")
@click.option("--ttt-base-lr", type=float, help="For a JAX checkpoint; by default 1.0 for TTT-Linear, 0.1 for TTT-MLP.")
@click.option("--rope-theta", type=float, help="For a JAX checkpoint; 10000 by default.")
@click.option("--rms-norm-eps", type=float, help="For a JAX checkpoint; 1e-6 by default.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model directory.")
@click.option("--allow-nonfinite", is_flag=True, help="Convert weights that are NaN or infinite too.")
def mlx(
    source: Path,
    out: Path,
    dtype: str | None,
    bits: int | None,
    group_size: int | None,
    mode: str | None,
    upload_repo: str | None,
    ttt_base_lr: float | None,
    rope_theta: float | None,
    rms_norm_eps: float | None,
    **options: Any,
) -> None:
    """Convert SOURCE, a PyTorch or JAX checkpoint, to the MLX model directory OUT.

    SOURCE is a folder, a file, or a repository on the Hugging Face Hub: org/name.
    """
    import mlx.core as mx

    from ..checkpoint.convert import convert
    from ..checkpoint.hub import check_upload, upload
    from ..checkpoint.quantization import Scheme

    if upload_repo is not None:
        check_upload(upload_repo)
    if options["recipe"] and bits is not None:
        raise TTTError("--quant-predicate chooses the bits of each matrix: leave out --bits")
    is_quantized = options["recipe"] or (bits, group_size, mode) != (None, None, None)
    assumptions = {"ttt_base_lr": ttt_base_lr, "rope_theta": rope_theta, "rms_norm_eps": rms_norm_eps}
    with Progress("converting") as progress:
        report = convert(
            source,
            out,
            dtype=getattr(mx, dtype) if dtype else None,
            quantize=Scheme(group_size, bits, mode or "affine") if is_quantized else None,
            assumptions={name: value for name, value in assumptions.items() if value is not None},
            name=upload_repo,
            progress=progress,
            **options,
        )
    _show(report, out)
    if upload_repo is not None:
        try:
            click.echo(upload(out, upload_repo))
        except HubError as error:
            raise HubError(f"{error}; {out} is complete: `hf upload {upload_repo} {out}` uploads it") from None


def _show(report: ConversionReport, out: Path) -> None:
    """Say what was written."""
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)
    click.echo(
        f"{out}: {report.parameters / 1e6:.2f} M parameters, {report.nbytes / 1e6:.1f} MB,"
        f" {8 * report.nbytes / report.parameters:.2f} bits per weight"
    )


@convert.command(cls=Command, context_settings=CONTEXT)
@click.argument("model", type=Path)
@click.argument("out", type=Path)
@click.option("--dequantize", is_flag=True, help="Write a quantized model's weights in floating point.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model directory.")
def torch(model: Path, out: Path, dequantize: bool, overwrite: bool) -> None:
    """Convert MODEL, a model directory, back to the layout of the official PyTorch code: OUT.

    Weights are bit for bit those of MODEL, in safetensors; config.json is one that the official code reads.
    """
    from ..checkpoint.official import convert_to_torch

    with Progress("converting") as progress:
        report = convert_to_torch(model, out, dequantize=dequantize, overwrite=overwrite, progress=progress)
    _show(report, out)


@convert.command(cls=Command, context_settings=CONTEXT)
@click.argument("source", type=Path)
@click.option("--config", type=Path, metavar="FILE", help="The model's config.json, if SOURCE has none.")
def inspect(source: Path, config: Path | None) -> None:
    """Show what SOURCE, a checkpoint or model directory, holds."""
    from ..checkpoint.hub import locate
    from ..checkpoint.inspection import inspect

    for name, value in _facts(inspect(locate(source).path, config=config)):
        click.echo(f"{name + ':':12} {value}")


def _facts(found: Inspection) -> Iterator[tuple[str, str]]:
    """The lines to show of a checkpoint: a name and a value each."""
    yield "format", found.format
    sizes = ", ".join(f"{nbytes / 1e6:.1f} MB {dtype}" for dtype, nbytes in found.bytes_by_dtype.items())
    yield "weights", f"{found.parameters / 1e6:.2f} M in {found.tensors} tensors, {sizes}"
    if found.quantization:
        yield "quantized", str(found.quantization)
    if args := found.args:
        yield "model", args.kind
        yield "size", args.sizes
        flags = [name for name in ("pre_conv", "share_qk", "use_gate") if getattr(args, name)]
        yield "backbone", ", ".join(flags) or "no convolutions, separate q and k, no gate"
        yield "lm_head", "tied to the embedding" if args.tie_word_embeddings else "of its own"
    yield "tokenizer", ", ".join(found.tokenizer_files) or "none: add one when converting, with --tokenizer FILE"
    yield from (("warning", warning) for warning in found.warnings)
    yield from (("problem", problem) for problem in found.problems)


convert.add_command(coreai)
convert.add_command(coreml)
convert.add_command(verify)
