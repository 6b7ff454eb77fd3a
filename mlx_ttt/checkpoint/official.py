"""The way back: a model directory as a checkpoint of the official PyTorch implementation, for everybody else.

The names are the same. What differs is the layout of the convolutions, the config and what lies beside the weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import mlx.core as mx

from ..errors import CheckpointError, QuantizationError
from .config import Config, config_of
from .convert import (
    SMALL_FILES,
    ConversionReport,
    check_tied_head,
    in_real_folder,
    refuse_overlap,
    write_weights,
)
from .directory import (
    CONFIG,
    GENERATION_CONFIG,
    TOKENIZER_COMPANIONS,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    write_config,
)
from .folder import check_place, complete_folder
from .hub import locate
from .parameters import EMBEDDING, Parameters
from .quantization import in_floating_point
from .sentencepiece_model import LARGEST_FILE
from .source import open_source
from .tensor import Tensor, bytes_by_dtype, dtype_name
from .untrusted import read_bytes

_COPIED = (GENERATION_CONFIG, *TOKENIZER_FILES, TOKENIZER_CONFIG, *TOKENIZER_COMPANIONS)
# Fields of the official TTTConfig that the network does not depend on, with its defaults.
_OFFICIAL = {
    "architectures": ["TTTForCausalLM"],
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "pretraining_tp": 1,
    "use_cache": False,
    "scan_checkpoint_group_size": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def convert_to_torch(
    source: Path | str,
    out: Path | str,
    *,
    dequantize: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ConversionReport:
    """Write the model directory `source` in the official PyTorch layout to `out`, which appears only when complete.

    One tensor is in memory at a time. All values stay as they are, also those of the inner model, which are float32
    whatever the model's dtype. Converting `out` again gives the same weights, bit for bit.

    Args:
        source: a model directory here or on the Hugging Face Hub, or any checkpoint that `convert` reads.
        out: the folder to make.
        dequantize: write floating-point weights from a quantized model directory.
        overwrite: replace a model directory at `out`. A folder with other files is never replaced.
        progress: called with the bytes written so far and in all.

    Raises:
        CheckpointError: the model is damaged, does not match its config, or has values that are NaN or infinite.
        HubError: the repository cannot be downloaded.
        QuantizationError: the weights are quantized, and `dequantize` is not given; or the other way round.
        OutputError: `out` exists or cannot be written to.
    """
    out = in_real_folder(Path(out))
    if not os.path.lexists(source):
        check_place(out, overwrite)  # before the download, not after it
    checkpoint = open_source(locate(source, None).path)
    found = config_of(checkpoint)
    beside = [file for name in _COPIED if os.path.lexists(file := checkpoint.folder / name)]
    refuse_overlap(out, [*checkpoint.files, *filter(None, [found.path]), *beside])
    before = found.quantization()
    if before and not dequantize:
        raise QuantizationError(f"{checkpoint.path}: its weights are quantized ({before}): say --dequantize")
    if dequantize and not before:
        raise QuantizationError(f"{checkpoint.path}: its weights are not quantized; leave out --dequantize")
    checkpoint = in_floating_point(checkpoint, before)
    parameters = Parameters(found.args)
    parameters.check(checkpoint.tensors, f"{checkpoint.path}: does not fit {found.name}")
    dtype = checkpoint.tensors["model.norm.weight"].dtype if before else None  # some modes dequantize to bfloat16

    def nonfinite(sentence: str) -> None:
        raise CheckpointError(f"{checkpoint.path}: {sentence}")

    tensors = {
        name: _official_layout(name, parameters.as_parameter(name, checkpoint.tensors[name], dtype, nonfinite))
        for name in parameters.shapes()
    }
    nbytes = sum(tensor.nbytes for tensor in tensors.values()) + sum(map(os.path.getsize, beside)) + SMALL_FILES
    with mx.stream(mx.cpu), complete_folder(out, nbytes, overwrite) as folder:
        check_tied_head(checkpoint, found.args)
        write_config(folder / CONFIG, official_config(found, dtype_name(tensors[EMBEDDING].dtype)))
        for file in beside:
            (folder / file.name).write_bytes(read_bytes(file, LARGEST_FILE, CheckpointError))
        write_weights(folder, tensors, "pt", progress)
    has_tokenizer = any(file.name in TOKENIZER_FILES for file in beside)
    warnings = () if has_tokenizer else ("no tokenizer files: add the tokenizer that the model was trained with",)
    return ConversionReport(sum(tensor.size for tensor in tensors.values()), bytes_by_dtype(tensors), warnings)


def official_config(config: Config, dtype: str) -> dict:
    """The config.json that the official TTTConfig reads: all its own fields, and the weights' dtype."""
    network = {field.name: getattr(config.args, field.name) for field in fields(config.args)}
    others = {name: config.fields.get(name, default) for name, default in _OFFICIAL.items()}
    return network | others | {"model_type": "ttt", "torch_dtype": dtype}


def _official_layout(name: str, tensor: Tensor) -> Tensor:
    """A parameter in PyTorch's layout: convolutions are [C, 1, kernel], and here [C, kernel, 1]."""
    is_convolution = ".conv" in name and name.endswith(".weight") and len(tensor.shape) == 3
    return tensor.transposed((0, 2, 1)) if is_convolution else tensor
