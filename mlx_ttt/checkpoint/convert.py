"""Other people's checkpoints into model directories that `mlx_ttt.load` and mlx-lm read."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, OutputError, QuantizationError, TokenizerError
from ..model import ModelArgs
from .card import model_card
from .config import config_of, written_config
from .directory import (
    CARD,
    CONFIG,
    GENERATION_CONFIG,
    MODEL_FILE,
    MODEL_FILE_TEXT,
    TOKENIZER_FILES,
    WEIGHTS,
    WEIGHTS_INDEX,
    shard_name,
)
from .folder import check_place, complete_folder
from .hub import locate
from .parameters import EMBEDDING, HEAD, Parameters
from .quantization import Quantization, Scheme
from .safetensors import write_safetensors
from .source import Source, open_source
from .tensor import Tensor, dtype_name
from .untrusted import read_json

LARGEST_SHARD = 5 * 10**9  # bytes
_SMALL_FILES = 1 << 20  # bytes for configs and headers, at most
_TOKENIZER_GROWTH = 8  # a tokenizer.json made of a tokenizer.model has at most so many times its size


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, without reading its values."""

    format: str
    tensors: int  # a tied lm_head counts in no figure
    parameters: int
    bytes_by_dtype: dict[str, int]
    args: ModelArgs | None  # None when there is no usable config
    quantization: Quantization | None
    tokenizer_files: tuple[str, ...]
    warnings: tuple[str, ...]
    problems: tuple[str, ...]  # empty when `convert` would accept it, as far as one can tell without its values


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` wrote."""

    parameters: int
    bytes_by_dtype: dict[str, int]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(self.bytes_by_dtype.values())


def inspect(source: Path | str, config: Path | str | None = None) -> Inspection:
    """Describe a checkpoint, and say what keeps it from being converted.

    Raises:
        CheckpointError: there is no checkpoint at `source`, or it is damaged.
    """
    checkpoint = open_source(Path(source))
    args, quantization, warnings, problems, tensors = None, None, (), [], checkpoint.tensors
    try:
        found = config_of(checkpoint, config and Path(config))
        args, warnings = found.args, found.warnings
        if quantization := Quantization.of_config(found.fields, found.path):
            tensors = quantization.dequantized(tensors, str(checkpoint.path))
        problems = Parameters(args).problems(tensors)
    except CheckpointError as error:
        problems = [str(error)]
    tied = HEAD if args and args.tie_word_embeddings else None
    stored = {name: tensor for name, tensor in checkpoint.tensors.items() if name != tied}
    return Inspection(
        format=checkpoint.format,
        tensors=len(stored),
        parameters=sum(tensor.size for name, tensor in tensors.items() if name != tied),
        bytes_by_dtype=_bytes_by_dtype(stored),
        args=args,
        quantization=quantization,
        tokenizer_files=tuple(name for name in TOKENIZER_FILES if os.path.isfile(checkpoint.folder / name)),
        warnings=warnings,
        problems=tuple(problems),
    )


def convert(
    source: Path | str,
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
    """Write the model directory `out` from the checkpoint `source`; `out` appears only when it is complete.

    One tensor is in memory at a time.

    Args:
        source: a folder with safetensors or PyTorch weights or a JAX stream, a weights file, or a repository on the
            Hugging Face Hub, `org/name`.
        out: the model directory to make.
        revision: branch, tag or commit of the repository.
        name: of the model in its card, by which it will be loaded; None says `out`'s.
        dtype: of the parameters, except the inner model's, which stay float32; None keeps what each tensor has.
        quantize: how to quantize the projections and embeddings; nothing else is quantized.
        recipe: a mixed recipe of mlx-lm, which gives matrices bits of their own; in the groups of `quantize`.
        dequantize: write floating-point weights from a quantized model directory.
        config: the config file, if it is not config.json beside the weights.
        tokenizer: tokenizer file or a folder with one, if it is not beside the weights.
        assumptions: ttt_base_lr, rope_theta or rms_norm_eps, by name, of a JAX stream without a config.
        overwrite: replace a model directory at `out`: a folder with such files alone.
        allow_nonfinite: convert weights that are NaN or infinite too, with a warning.
        progress: called with the bytes written so far and in all.

    Raises:
        CheckpointError: the checkpoint is damaged, or is not what its config describes.
        HubError: the repository cannot be downloaded.
        QuantizationError: no matrix can be quantized like that, or a quantized model needs `quantize` or `dequantize`.
        TokenizerError: its tokenizer files are damaged.
        OutputError: `out` exists or cannot be written to.
    """
    out = _in_real_folder(Path(out))
    if not os.path.lexists(source):
        check_place(out, overwrite)  # a download should not end in an error that could be seen before
    located = locate(source, revision)
    checkpoint = open_source(located.path)
    found = config_of(checkpoint, config and Path(config), assumptions)
    args = found.args
    tokenizer_source = Path(checkpoint.folder if tokenizer is None else tokenizer)
    _refuse_overlap(out, [*checkpoint.files, *filter(None, [found.path]), tokenizer_source])
    before = Quantization.of_config(found.fields, found.path)
    _check_choice(checkpoint.path, before, quantize, dequantize)
    if before:
        checkpoint = replace(checkpoint, tensors=before.dequantized(checkpoint.tensors, str(checkpoint.path)))
    parameters = Parameters(args)
    parameters.check(checkpoint.tensors, f"{checkpoint.path}: does not fit {found.name}")
    if before and dtype is None:
        dtype = checkpoint.tensors["model.norm.weight"].dtype  # what all had before: some modes dequantize to bfloat16

    warnings = list(found.warnings)

    def nonfinite(sentence: str) -> None:
        if not allow_nonfinite:
            raise CheckpointError(f"{checkpoint.path}: {sentence}; --allow-nonfinite converts it all the same")
        warnings.append(sentence)

    tensors = {
        name: parameters.as_parameter(name, checkpoint.tensors[name], dtype, nonfinite) for name in parameters.shapes()
    }
    count = sum(tensor.size for tensor in tensors.values())
    new_config = written_config(found.fields, args, dtype_name(tensors[EMBEDDING].dtype))
    after = None
    if quantize:
        after = Quantization.mixed(recipe, quantize, args) if recipe else Quantization(quantize)
        tensors, unfit = after.quantized(tensors, args)
        new_config |= after.config()
        warnings += unfit
        if before:
            warnings.append(f"the weights were quantized before ({before}): what they lost then stays lost")
    nbytes = sum(tensor.nbytes for tensor in tensors.values()) + _tokenizer_bytes(tokenizer_source) + _SMALL_FILES
    with mx.stream(mx.cpu), complete_folder(out, nbytes, overwrite) as folder:  # only the CPU knows float64
        _check_tied_head(checkpoint, args)
        _write_json(folder / CONFIG, new_config)
        (folder / MODEL_FILE).write_text(MODEL_FILE_TEXT, encoding="utf-8")
        warnings += _copy_generation_config(checkpoint.folder, folder)
        warnings += _write_tokenizer(tokenizer_source, tokenizer is not None, folder, new_config)
        _write_weights(folder, tensors, progress)
        report = ConversionReport(count, _bytes_by_dtype(tensors), tuple(warnings))
        card = model_card(name or out.name, args, located, checkpoint, count, report.bytes_by_dtype, after)
        (folder / CARD).write_text(card, encoding="utf-8")
    return report


def _bytes_by_dtype(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    nbytes: Counter[str] = Counter()
    for tensor in tensors.values():
        nbytes[dtype_name(tensor.dtype)] += tensor.nbytes
    return dict(nbytes)


def _check_choice(path: Path, before: Quantization | None, quantize: Scheme | None, dequantize: bool) -> None:
    """A quantized model is written as what the user says, and nothing is guessed."""
    if quantize and dequantize:
        raise QuantizationError("quantize or dequantize, not both")
    if dequantize and not before:
        raise QuantizationError(f"{path}: its weights are not quantized; leave out --dequantize")
    if before and not (quantize or dequantize):
        raise QuantizationError(f"{path}: its weights are quantized ({before}): say --dequantize, or --bits for others")


def _in_real_folder(path: Path) -> Path:
    """`path` with its folder's links followed, but not its own: a link is not a folder to be replaced."""
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)


def _refuse_overlap(out: Path, inputs: list[Path]) -> None:
    """Replacing `out` must not delete what is being read, nor the links by which it was found."""
    for path in inputs:
        for place in (_in_real_folder(path), Path(os.path.realpath(path))):
            if any(_same(out, folder) for folder in (place, *place.parents)):
                raise OutputError(f"{out}: {path}, which is to be read, lies there; choose another place")


def _same(one: Path, other: Path) -> bool:
    """Whether both are there, and one and the same, whatever their names: some disks ignore the case of letters."""
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _tokenizer_bytes(source: Path) -> int:
    """What the tokenizer's files will need, at most."""
    files = [source / name for name in TOKENIZER_FILES] if os.path.isdir(source) else [source]
    sizes = {file: os.path.getsize(file) for file in files if os.path.isfile(file)}
    return sum(size if file.suffix == ".json" else _TOKENIZER_GROWTH * size for file, size in sizes.items())


def _check_tied_head(checkpoint: Source, args: ModelArgs) -> None:
    """A tied model's lm_head is its embedding, and is not written. If they differ, the config is wrong."""
    head, embedding = checkpoint.tensors.get(HEAD), checkpoint.tensors[EMBEDDING]
    if not args.tie_word_embeddings or head is None:
        return
    same = head.shape == embedding.shape and mx.array_equal(head.read(), embedding.read(), equal_nan=True).item()
    mx.clear_cache()
    if not same:
        raise CheckpointError(
            f"{checkpoint.path}: tie_word_embeddings is true (or not given), but {HEAD} differs from {EMBEDDING};"
            " set it to false in the config"
        )


def _write_weights(folder: Path, tensors: Mapping[str, Tensor], progress: Callable[[int, int], None]) -> None:
    """model.safetensors, or shards of at most LARGEST_SHARD bytes (or one tensor) with an index."""
    shards: list[dict[str, Tensor]] = [{}]
    room = LARGEST_SHARD
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = LARGEST_SHARD
        shards[-1][name] = tensor
        room -= tensor.nbytes

    done, total = 0, sum(tensor.nbytes for tensor in tensors.values())

    def written(name: str, nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else shard_name(number, len(shards))
        write_safetensors(folder / file, shard, {"format": "mlx"}, written)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / WEIGHTS_INDEX, index)


def _write_tokenizer(source: Path, given: bool, folder: Path, config: dict) -> list[str]:
    """The tokenizer that the user gave, which must be one, or the one beside the weights, if any. Gives warnings."""
    from .tokenizer import write_tokenizer  # imports transformers, which takes seconds

    report = write_tokenizer(source, folder, config)
    if report:
        return report.warnings
    if given:
        raise TokenizerError(f"{source}: holds neither tokenizer.model nor tokenizer.json")
    return ["no tokenizer files: the model reads and writes token ids only; add one with --tokenizer FILE"]


def _copy_generation_config(source: Path, folder: Path) -> list[str]:
    """A file that many checkpoints lack, so one that is damaged is left out, with a warning."""
    file = source / GENERATION_CONFIG
    if os.path.lexists(file):
        try:
            _write_json(folder / file.name, read_json(file))
        except CheckpointError as error:
            return [f"{error}; left out"]
    return []


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
