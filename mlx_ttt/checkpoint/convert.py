"""Converts checkpoints into model directories, which `mlx_ttt.load` and mlx-lm can load."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import CheckpointError, OutputError, QuantizationError, TokenizerError
from ..network.args import ModelArgs
from .card import model_card
from .config import config_of, written_config
from .directory import (
    CARD,
    CONFIG,
    GENERATION_CONFIG,
    MODEL_FILE,
    MODEL_FILE_TEXT,
    TOKENIZER_FILES,
    WEIGHTS_INDEX,
    WEIGHTS_PATTERN,
    write_config,
)
from .folder import check_place, complete_folder
from .hub import Located, locate, tokenizer_files
from .parameters import EMBEDDING, HEAD, Parameters
from .quantization import Quantization, Scheme, in_floating_point
from .safetensors import write_safetensors
from .source import Source, open_source
from .tensor import Tensor, bytes_by_dtype, dtype_name
from .untrusted import read_json

LARGEST_SHARD = 5 * 10**9  # bytes
SMALL_FILES = 1 << 20  # bytes: an upper bound for configs and headers together
_TOKENIZER_GROWTH = 8  # a tokenizer.json has at most this many times the size of its tokenizer.model


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` wrote."""

    parameters: int
    bytes_by_dtype: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.bytes_by_dtype.values())


def convert(
    source: Path | str | Located,
    out: Path | str,
    *,
    revision: str | None = None,
    name: str | None = None,
    dtype: mx.Dtype | None = None,
    quantize: Scheme | None = None,
    recipe: str | None = None,
    dequantize: bool = False,
    config: Path | str | None = None,
    tokenizer: Path | str | None = None,
    assumptions: Mapping[str, float] | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionReport:
    """Convert the checkpoint `source` into the model directory `out`, which appears only when it is complete.

    One tensor is in memory at a time.

    Args:
        source: a folder with safetensors or PyTorch weights or a JAX stream, a weights file, or a repository on the
            Hugging Face Hub, `org/name`; or where `locate` has found one.
        out: the model directory to make.
        revision: branch, tag or commit of the repository.
        name: what the model card calls the model and loads it by; the name of `out` by default.
        dtype: of the parameters, except the inner model's, which stay float32; by default each keeps its own.
        quantize: how to quantize the projections and embeddings; nothing else is quantized.
        recipe: a recipe of mlx-lm that gives some matrices more bits; the group size is that of `quantize`.
        dequantize: write floating-point weights from a quantized model directory.
        config: the config file, if it is not config.json beside the weights.
        tokenizer: a tokenizer file, a folder with one or a repository that has one, if it is not beside the weights.
        assumptions: ttt_base_lr, rope_theta or rms_norm_eps, by name, for a JAX stream without a config.
        overwrite: replace a model directory at `out`. A folder with other files is never replaced.
        allow_nonfinite: convert weights that are NaN or infinite too, with a warning.
        progress: called with the bytes written so far and in all.

    Raises:
        CheckpointError: the checkpoint is damaged, or does not match its config.
        HubError: the repository cannot be downloaded.
        QuantizationError: no matrix can be quantized like that, or a quantized model needs `quantize` or `dequantize`.
        TokenizerError: the tokenizer files are damaged.
        OutputError: `out` exists or cannot be written to.
    """
    out = in_real_folder(Path(out))
    if isinstance(source, Located):
        located = source
    else:
        if not os.path.lexists(source):
            check_place(out, overwrite)  # before the download, not after it
        located = locate(source, revision)
    checkpoint = open_source(located.path)
    found = config_of(checkpoint, Path(config) if config else None, assumptions)
    tokenizer_source = checkpoint.folder if tokenizer is None else tokenizer_files(tokenizer)
    refuse_overlap(out, [*checkpoint.files, *filter(None, [found.path]), tokenizer_source])
    before = found.quantization()
    _check_choice(checkpoint.path, before, quantize, dequantize)
    checkpoint = in_floating_point(checkpoint, before)
    parameters = Parameters(found.args)
    parameters.check(checkpoint.tensors, f"{checkpoint.path}: does not fit {found.name}")
    if before and dtype is None:  # some modes dequantize to bfloat16: the norm still has the dtype from before
        dtype = checkpoint.tensors["model.norm.weight"].dtype

    warnings = list(found.warnings)

    def nonfinite(sentence: str) -> None:
        if not allow_nonfinite:
            raise CheckpointError(f"{checkpoint.path}: {sentence}; --allow-nonfinite converts it all the same")
        warnings.append(sentence)

    tensors = {
        name: parameters.as_parameter(name, checkpoint.tensors[name], dtype, nonfinite) for name in parameters.shapes()
    }
    count = sum(tensor.size for tensor in tensors.values())
    new_config = written_config(found, dtype_name(tensors[EMBEDDING].dtype))
    after = None
    if quantize:
        after = Quantization.mixed(recipe, quantize, found.args) if recipe else Quantization(quantize)
        tensors, unfit = after.quantized(tensors, found.args)
        new_config |= after.config()
        warnings += unfit
        if before:
            warnings.append(f"the weights were quantized before ({before}): what they lost then stays lost")
    nbytes = sum(tensor.nbytes for tensor in tensors.values()) + _tokenizer_bytes(tokenizer_source) + SMALL_FILES
    with mx.stream(mx.cpu), complete_folder(out, nbytes, overwrite) as folder:  # only the CPU has float64
        check_tied_head(checkpoint, found.args)
        write_config(folder / CONFIG, new_config)
        (folder / MODEL_FILE).write_text(MODEL_FILE_TEXT, encoding="utf-8")
        warnings += _copy_generation_config(checkpoint.folder, folder)
        warnings += _write_tokenizer(tokenizer_source, tokenizer is not None, folder, new_config)
        write_weights(folder, tensors, "mlx", progress)
        report = ConversionReport(count, bytes_by_dtype(tensors), tuple(warnings))
        card = model_card(name or out.name, found.args, located, checkpoint, count, report.bytes_by_dtype, after)
        (folder / CARD).write_text(card, encoding="utf-8")
    return report


def _check_choice(path: Path, before: Quantization | None, quantize: Scheme | None, dequantize: bool) -> None:
    """The user must say what becomes of a quantized model: quantized again, or floating point."""
    if quantize and dequantize:
        raise QuantizationError("quantize or dequantize, not both")
    if dequantize and not before:
        raise QuantizationError(f"{path}: its weights are not quantized; leave out --dequantize")
    if before and not (quantize or dequantize):
        raise QuantizationError(f"{path}: its weights are quantized ({before}): say --dequantize, or --bits for others")


def in_real_folder(path: Path) -> Path:
    """`path` with the links in its parent followed, but not itself: --overwrite must see that it is a link."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def refuse_overlap(out: Path, inputs: list[Path]) -> None:
    """Raise OutputError if replacing `out` would delete an input, or a link that leads to one."""
    for path in inputs:
        for place in (in_real_folder(path), Path(os.path.realpath(path))):
            if any(_same(out, folder) for folder in (place, *place.parents)):
                raise OutputError(f"{out}: {path}, which is to be read, lies there; choose another place")


def _same(one: Path, other: Path) -> bool:
    """Whether both exist and are one place. Names do not tell: some disks ignore upper and lower case."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _tokenizer_bytes(source: Path) -> int:
    """An upper bound for the size of the tokenizer's files in the model directory."""
    files = [source / name for name in TOKENIZER_FILES] if os.path.isdir(source) else [source]
    sizes = {file: os.path.getsize(file) for file in files if os.path.isfile(file)}
    return sum(size if file.suffix == ".json" else _TOKENIZER_GROWTH * size for file, size in sizes.items())


def check_tied_head(checkpoint: Source, args: ModelArgs) -> None:
    """A tied model's lm_head is its embedding and is not written. If the two differ, the config is wrong."""
    head, embedding = checkpoint.tensors.get(HEAD), checkpoint.tensors[EMBEDDING]
    if not args.tie_word_embeddings or head is None:
        return
    same = head.shape == embedding.shape and mx.array_equal(head.load(), embedding.load(), equal_nan=True).item()
    mx.clear_cache()
    if not same:
        raise CheckpointError(
            f"{checkpoint.path}: tie_word_embeddings is true (or not given), but {HEAD} differs from {EMBEDDING};"
            " set it to false in the config"
        )


def write_weights(
    folder: Path, tensors: Mapping[str, Tensor], layout: str, progress: Callable[[int, int], None]
) -> None:
    """Write model.safetensors, or shards with an index. A shard has at most LARGEST_SHARD bytes, or one tensor.

    Args:
        layout: whose layout the tensors have, "mlx" or "pt"; transformers and mlx-lm ask for it.
    """
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern=WEIGHTS_PATTERN,
        max_shard_size=LARGEST_SHARD,
    )
    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def written(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    for file, names in plan.filename_to_tensors.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names}, {"format": layout}, written)
    if plan.is_sharded:
        weight_map = dict(sorted(plan.tensor_to_filename.items()))
        write_config(folder / WEIGHTS_INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_tokenizer(source: Path, given: bool, folder: Path, config: dict) -> list[str]:
    """Write the tokenizer, if there is one; returns warnings. One that the user gave must be a tokenizer."""
    from .tokenizer import write_tokenizer  # imports transformers, which takes seconds

    report = write_tokenizer(source, folder, config)
    if report:
        return report.warnings
    if given:
        raise TokenizerError(f"{source}: holds neither tokenizer.model nor tokenizer.json")
    return ["no tokenizer files: the model reads and writes token ids only; add one with --tokenizer FILE"]


def _copy_generation_config(source: Path, folder: Path) -> list[str]:
    """Copy generation_config.json, if there is one. It is not needed: a damaged one is left out, with a warning."""
    file = source / GENERATION_CONFIG
    if os.path.lexists(file):
        try:
            write_config(folder / file.name, read_json(file))
        except CheckpointError as error:
            return [f"{error}; left out"]
    return []
