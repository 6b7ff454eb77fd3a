"""Other people's checkpoints into model directories that `mlx_ttt.load` and mlx-lm read."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from ..errors import CheckpointError, OutputError, TokenizerError
from ..model import ModelArgs
from .config import find_config, read_config, written_config
from .folder import complete_folder
from .parameters import EMBEDDING, HEAD, Parameters
from .safetensors import write_safetensors
from .source import Source, open_source
from .tensor import Tensor, dtype_name
from .untrusted import read_json

if TYPE_CHECKING:
    from .tokenizer import TokenizerReport

LARGEST_SHARD = 5 * 10**9  # bytes
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
_BESIDE_WEIGHTS = 32 << 20  # bytes to spare for tokenizer and config


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is, without reading its values."""

    path: Path
    format: str
    files: tuple[Path, ...]
    tensors: int
    parameters: int
    bytes_by_dtype: dict[str, int]
    args: ModelArgs | None  # None when there is no usable config
    has_head: bool  # whether lm_head.weight is stored; a tied one counts in no figure
    tokenizer_files: tuple[str, ...]
    problems: tuple[str, ...]  # empty when `convert` would accept it, as far as one can tell without its values


@dataclass(frozen=True)
class ConversionReport:
    """What `convert` wrote."""

    out: Path
    files: tuple[str, ...]
    tensors: int
    parameters: int
    bytes_by_dtype: dict[str, int]
    tokenizer: TokenizerReport | None
    warnings: tuple[str, ...]


def inspect(source: Path | str, config: Path | str | None = None) -> Inspection:
    """Describe a checkpoint, and say what keeps it from being converted.

    Raises:
        CheckpointError: there is no checkpoint at `source`, or it is damaged.
    """
    checkpoint = open_source(Path(source))
    args, problems = None, []
    try:
        config_path = find_config(checkpoint.folder, config and Path(config))
        _, args = read_config(config_path)
        problems = Parameters(args).problems(checkpoint.tensors)
    except CheckpointError as error:
        problems = [str(error)]
    own = dict(checkpoint.tensors)
    if args and args.tie_word_embeddings:
        own.pop(HEAD, None)
    return Inspection(
        path=checkpoint.path,
        format=checkpoint.format,
        files=checkpoint.files,
        **_figures(own),
        args=args,
        has_head=HEAD in checkpoint.tensors,
        tokenizer_files=tuple(name for name in TOKENIZER_FILES if (checkpoint.folder / name).is_file()),
        problems=tuple(problems),
    )


def convert(
    source: Path | str,
    out: Path | str,
    *,
    dtype: mx.Dtype | None = None,
    config: Path | str | None = None,
    tokenizer: Path | str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionReport:
    """Write the model directory `out` from the checkpoint `source`; `out` appears only when it is complete.

    One tensor is in memory at a time.

    Args:
        source: a folder with safetensors or PyTorch weights, or a weights file.
        out: the model directory to make.
        dtype: of the parameters, except the inner model's, which stay float32; None keeps what each tensor has.
        config: the config file, if it is not config.json beside the weights.
        tokenizer: tokenizer file or a folder with one, if it is not beside the weights.
        overwrite: replace a model directory at `out`.
        allow_nonfinite: convert weights that are NaN or infinite too, with a warning.
        progress: called with the bytes written so far and in all.

    Raises:
        CheckpointError: the checkpoint is damaged, or is not what its config describes.
        TokenizerError: its tokenizer files are damaged.
        OutputError: `out` exists or cannot be written to.
    """
    checkpoint, out = open_source(Path(source)), Path(os.path.realpath(out))
    _refuse_overlap(checkpoint, out)
    config_path = find_config(checkpoint.folder, config and Path(config))
    given_config, args = read_config(config_path)
    parameters = Parameters(args)
    _raise_first(parameters.problems(checkpoint.tensors), checkpoint, config_path)

    warnings: list[str] = []

    def nonfinite(sentence: str) -> None:
        if not allow_nonfinite:
            raise CheckpointError(f"{checkpoint.path}: {sentence}; --allow-nonfinite converts it all the same")
        warnings.append(sentence)

    tensors = {
        name: parameters.as_parameter(name, checkpoint.tensors[name], dtype, nonfinite) for name in parameters.shapes()
    }
    new_config = written_config(given_config, args, dtype_name(tensors[EMBEDDING].dtype))
    nbytes = sum(tensor.nbytes for tensor in tensors.values()) + _BESIDE_WEIGHTS
    with mx.stream(mx.cpu), complete_folder(out, nbytes, overwrite) as folder:  # only the CPU knows float64
        _check_tied_head(checkpoint, args)
        _write_json(folder / "config.json", new_config)
        _copy_generation_config(checkpoint.folder, folder)
        tokenizer_report = _write_tokenizer(checkpoint.folder, tokenizer and Path(tokenizer), folder, new_config)
        _write_weights(folder, tensors, progress)
        files = tuple(sorted(file.name for file in folder.iterdir()))

    if tokenizer_report:
        warnings += tokenizer_report.warnings
    else:
        warnings.append("no tokenizer files: the model reads and writes token ids only; add one with --tokenizer FILE")
    return ConversionReport(out, files, **_figures(tensors), tokenizer=tokenizer_report, warnings=tuple(warnings))


def _figures(tensors: Mapping[str, Tensor]) -> dict:
    nbytes: Counter[str] = Counter()
    for tensor in tensors.values():
        nbytes[dtype_name(tensor.dtype)] += tensor.nbytes
    parameters = sum(tensor.size for tensor in tensors.values())
    return {"tensors": len(tensors), "parameters": parameters, "bytes_by_dtype": dict(nbytes)}


def _refuse_overlap(checkpoint: Source, out: Path) -> None:
    """Replacing `out` must not delete what is being read."""
    for file in checkpoint.files:
        if out in (file.resolve(), *file.resolve().parents) and out.exists():
            raise OutputError(f"{out}: the checkpoint itself is in there; choose another place")


def _raise_first(problems: list[str], checkpoint: Source, config_path: Path) -> None:
    if problems:
        more = f" (and {len(problems) - 1} more such problems)" if len(problems) > 1 else ""
        raise CheckpointError(f"{checkpoint.path}: does not fit {config_path.name}: {problems[0]}{more}")


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
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard, {"format": "mlx"}, written)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(beside: Path, given: Path | None, folder: Path, config: dict) -> TokenizerReport | None:
    """The tokenizer that the user gave, which must be one, or the one beside the weights, if any."""
    from .tokenizer import write_tokenizer  # imports transformers, which takes seconds

    report = write_tokenizer(given or beside, folder, config)
    if given and report is None:
        raise TokenizerError(f"{given}: holds neither tokenizer.model nor tokenizer.json")
    return report


def _copy_generation_config(source: Path, folder: Path) -> None:
    file = source / "generation_config.json"
    if file.is_file():
        _write_json(folder / file.name, read_json(file))


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
