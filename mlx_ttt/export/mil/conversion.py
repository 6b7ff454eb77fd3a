"""From a program to an .mlpackage on the disk: compression, merging of functions, and bytes that do not vary."""

from __future__ import annotations

import hashlib
import io
import json
import uuid
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from pathlib import Path

import coremltools as ct
import coremltools.optimize as cto
from coremltools.models.utils import MultiFunctionDescriptor, load_spec, save_multifunction

from ...network.args import ModelArgs
from ...network.model import Model
from ...version import __version__
from ..functions import FUNCTIONS, HEAD, IDS, LEARNING, LOGITS, STATE
from .program import Options, build

BLOCK = 32  # weights that share a scale
_SPEC = "Data/com.apple.CoreML/model.mlmodel"

DESCRIPTIONS = {
    IDS: "Token ids. decode: the next one. prefill: a block; what stands past `length` does not count.",
    "position": "How many tokens the open mini-batch holds: tokens read so far, modulo the mini-batch size.",
    "length": "How many of the tokens count, from 1. Only the last block of a prompt may be incomplete.",
    STATE: "Everything the model remembers of the text. Zeros before the first token.",
    f"{STATE}Out": f"The state after this call: {STATE} of the next.",
    LOGITS: "Of the token after the last one that counts.",
    LEARNING: "What the learning rates of each layer and head are multiplied by. Left out: 1.",
    "loss": "How wrong the inner model of each layer and head was on each token. Zero for tokens that do not count.",
    "lr": "The learning rate of each token. Zero for tokens that do not count.",
    "writeNorm": "The norm of what each token adds to the inner model. Zero for tokens that do not count.",
}


def convert_function(
    model: Model, name: str, weights: str, options: Options, package: Path, step: Callable[[], None] = lambda: None
) -> None:
    """Write one function as a package of its own.

    Args:
        model: the model.
        name: "decode" or "prefill".
        weights: float16, int8 or int4.
        options: of the program.
        package: what to write; its name ends in .mlpackage.
        step: called after each block and at the end.

    Raises:
        CheckpointError: a weight is not finite or does not fit float16.
    """
    program = build(model, name, options, step)
    with redirect_stderr(io.StringIO()):  # its progress bars
        ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,  # every operation already has its type
            pass_pipeline=_passes(model.args, weights, options),
            skip_model_load=True,
            package_dir=str(package),
        )
    step()


def _passes(args: ModelArgs, weights: str, options: Options) -> ct.PassPipeline:
    """Only tidy constants and compress weights: the operations are already those that are meant."""
    passes = ["noop_elimination", "const_deduplication", "dead_code_elimination", "dedup_op_and_var_names"]
    pipeline = ct.PassPipeline([f"common::{name}" for name in passes])
    if weights != "float16":
        compress = "compression::linear_quantize_weights"
        pipeline.append_pass(compress)
        pipeline.set_options(compress, {"config": _quantization(args, weights, options)})
    return pipeline


def _quantization(args: ModelArgs, dtype: str, options: Options) -> cto.coreml.OptimizationConfig:
    """Only matrices of `linear` operations: a scale per block of inputs where blocks fit, else per output."""
    blocks = args.hidden_size % BLOCK == 0 and args.intermediate_size % BLOCK == 0
    quantizer = cto.coreml.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype=dtype,
        granularity="per_block" if blocks else "per_channel",
        block_size=BLOCK,
        weight_threshold=0,
    )
    config = cto.coreml.OptimizationConfig(op_type_configs={"linear": quantizer})
    if args.tie_word_embeddings:  # then the head is the embedding, which stays as it is
        for piece in range(options.split_head):
            config.set_op_name(HEAD.format(piece), None)
    return config


def merge(parts: list[Path], merged: Path) -> None:
    """Make one package of several functions, which then share their weights.

    Args:
        parts: a package for each function, named after it.
        merged: what to write.
    """
    descriptor = MultiFunctionDescriptor()
    for part in parts:
        descriptor.add_function(str(part), src_function_name="main", target_function_name=part.stem)
    descriptor.default_function_name = FUNCTIONS[0]
    with redirect_stderr(io.StringIO()):
        save_multifunction(descriptor, str(merged))


def finish(package: Path, metadata: Mapping[str, str]) -> None:
    """Describe a package, and write its files so that the same model gives the same bytes.

    This comes last, because merging drops metadata. By itself coremltools writes maps in an order that depends on the
    process, and a manifest with random identifiers.
    """
    spec = load_spec(str(package))
    about = spec.description.metadata
    about.shortDescription = "A Test-Time Training language model: reads tokens, gives the next token's logits."
    about.author = f"mlx-ttt {__version__}"
    about.license = "The weights' own license; see the model they come from."
    about.userDefined.update(metadata)
    for function in spec.description.functions or [spec.description]:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = DESCRIPTIONS[feature.name]
            if feature.name == LEARNING:
                feature.type.isOptional = True
                feature.type.multiArrayType.floatDefaultValue = 1
    (package / _SPEC).write_bytes(spec.SerializeToString(deterministic=True))
    _name_by_content(package)


def _name_by_content(package: Path) -> None:
    """Replace the manifest's identifiers by ones that follow from what they name."""
    file = package / "Manifest.json"
    manifest = json.loads(file.read_text(encoding="utf-8"))
    names = {id: _identifier(package / "Data", item["path"]) for id, item in manifest["itemInfoEntries"].items()}
    items = {names[id]: item for id, item in manifest["itemInfoEntries"].items()}
    manifest |= {"itemInfoEntries": items, "rootModelIdentifier": names[manifest["rootModelIdentifier"]]}
    file.write_text(json.dumps(manifest, indent=4, sort_keys=True) + "\n", encoding="utf-8")


def _identifier(data: Path, path: str) -> str:
    """A UUID for a file or folder of a package, from its path and bytes."""
    digest = hashlib.sha256()
    for file in sorted(file for file in (data / path, *(data / path).rglob("*")) if file.is_file()):
        digest.update(f"{file.relative_to(data).as_posix()}\n{file.stat().st_size}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return str(uuid.uuid5(uuid.NAMESPACE_OID, digest.hexdigest()))
