"""A model directory -> an .mlpackage with the functions `decode` and `prefill`, and a folder of companions."""

from __future__ import annotations

import io
import json
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import coremltools as ct
import coremltools.optimize as cto
import numpy as np
from coremltools.models.utils import MultiFunctionDescriptor, load_spec, save_multifunction

from .. import __version__
from ..checkpoint.folder import complete_folder
from ..errors import CheckpointError, OutputError, TTTError
from ..generation import fingerprint
from ..loading import load_model, load_tokenizer
from ..model import Model, ModelArgs
from .companions import special_ids, write_companions
from .program import Options, build, head_name
from .state import StateLayout

FUNCTIONS = ("decode", "prefill")
PREFIX = "com.mlx-ttt."
FORMAT = "1"
BLOCK = 32  # weights that share a scale
_SPEC = "Data/com.apple.CoreML/model.mlmodel"
_BESIDE_WEIGHTS = 64 << 20  # bytes to spare for graphs, constants and companions

DESCRIPTIONS = {
    "inputIds": "Token ids. decode: the next one. prefill: a block; what stands past `length` does not count.",
    "position": "How many tokens the open mini-batch holds: tokens read so far, modulo the mini-batch size.",
    "length": "How many of the tokens count, from 1. Only the last block of a prompt may be incomplete.",
    "tttState": "Everything the model remembers of the text. Zeros before the first token.",
    "tttStateOut": "The state after this call: tttState of the next.",
    "logits": "Of the token after the last one that counts.",
}


@dataclass(frozen=True)
class Report:
    """What `export` wrote."""

    packages: tuple[Path, ...]
    companions: Path | None
    nbytes: int  # of the packages
    layout: StateLayout
    peak_memory: int  # bytes, of the process so far


def export(
    model_dir: Path | str,
    out: Path | str,
    *,
    weights: str = "float16",
    options: Options | None = None,
    separate: bool = False,
    companions: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Report:
    """Write the Core ML package `out` from a model directory; it appears only when it is complete.

    Args:
        model_dir: what `convert.py mlx` writes; quantized ones are widened.
        out: the package, NAME.mlpackage. Companions go to the folder NAME-companions beside it.
        weights: float16, int8 or int4 for the matrices of the blocks and an untied lm_head; embedding, norms,
            convolutions and the inner model stay float16.
        options: of the programs; all_logits is for verification.
        separate: two packages, NAME-decode.mlpackage and NAME-prefill.mlpackage, instead of one.
        companions: whether to write tokenizer files, configuration and Swift code for an app.
        progress: called with the steps done so far and in all.

    Raises:
        CheckpointError: `model_dir` is no TTT model, or a weight is not finite or does not fit float16.
        TokenizerError: companions are wanted and there is no tokenizer.
        OutputError: one of the outputs exists or cannot be written to.
        TTTError: an option does not fit the model.
    """
    model_dir, out, options = Path(model_dir), Path(out).resolve(), options or Options()
    if out.suffix != ".mlpackage":
        raise OutputError(f"{out}: a Core ML package's name ends in .mlpackage")
    targets = [out.with_name(f"{out.stem}-{name}.mlpackage") for name in FUNCTIONS] if separate else [out]
    beside = out.with_name(f"{out.stem}-companions")
    _refuse_existing([*targets, *([beside] if companions else [])])

    model, config = load_model(model_dir)
    _check_block(options, model.args)
    ids = _own_ids(model_dir, config)
    if companions:
        ids = special_ids(load_tokenizer(model_dir, config))
    layout = StateLayout.of(model.args)
    metadata = _metadata(model_dir, model, config, ids, weights, options, layout)
    nbytes = _expected_bytes(model, weights)

    steps = _Steps(progress, len(FUNCTIONS) * (len(model.layers) + 1) + 1)
    with ExitStack() as stack, _out_of_space(out, nbytes):
        if companions:  # first: a tokenizer that cannot be used shows here
            folder = stack.enter_context(complete_folder(beside, 0))
            names, stateful = [target.stem for target in targets], options.state_mode == "state"
            write_companions(folder, model_dir, names, model.args, layout.description(), stateful)
        folders = [stack.enter_context(complete_folder(target, nbytes)) for target in targets]
        workshop = stack.enter_context(_workshop(out.parent))
        parts = [workshop / f"{name}.mlpackage" for name in FUNCTIONS]
        try:
            for part in parts:
                convert_function(model, part.stem, weights, options, part, steps)
        except CheckpointError as error:
            raise CheckpointError(f"{model_dir}: {error}") from None
        del model
        packages = parts if separate else [_merged(parts, workshop)]
        for package, folder in zip(packages, folders, strict=True):
            _describe(package, metadata)
            for entry in package.iterdir():
                shutil.move(entry, folder / entry.name)
        steps()
        size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return Report(tuple(targets), beside if companions else None, size, layout, peak_memory())


def peak_memory() -> int:
    """Of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def convert_function(
    model: Model, name: str, weights: str, options: Options, package: Path, step: Callable[[], None] = lambda: None
) -> None:
    """Write one function as a package of its own; `step` is called after each block and at the end."""
    with np.errstate(over="raise"):
        try:
            program = build(model, name, options, step)
        except FloatingPointError:
            raise CheckpointError(
                "a weight does not fit float16, which ends at 65504; --compute mixed has the inner model's in float32"
            ) from None
    with redirect_stderr(io.StringIO()):  # its progress bars
        ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,  # every op already has its type
            pass_pipeline=_passes(model.args, weights, options),
            skip_model_load=True,
            package_dir=str(package),
        )
    step()


def _passes(args: ModelArgs, weights: str, options: Options) -> ct.PassPipeline:
    """The program is built as it is meant to be: what remains is to tidy constants and to compress."""
    passes = ["noop_elimination", "const_deduplication", "dead_code_elimination", "dedup_op_and_var_names"]
    pipeline = ct.PassPipeline([f"common::{name}" for name in passes])
    if weights != "float16":
        compress = "compression::linear_quantize_weights"
        pipeline.append_pass(compress)
        pipeline.set_options(compress, {"config": _quantization(args, weights, options)})
    return pipeline


def _quantization(args: ModelArgs, dtype: str, options: Options) -> cto.coreml.OptimizationConfig:
    """Scales per block of inputs where blocks fit, else per output channel; only of matrices in `linear` ops."""
    blocks = args.hidden_size % BLOCK == 0 and args.intermediate_size % BLOCK == 0
    quantizer = cto.coreml.OpLinearQuantizerConfig(
        mode="linear_symmetric",
        dtype=dtype,
        granularity="per_block" if blocks else "per_channel",
        block_size=BLOCK,
        weight_threshold=0,
    )
    config = cto.coreml.OptimizationConfig(op_type_configs={"linear": quantizer})
    if args.tie_word_embeddings:  # the embedding, which stays as it is
        for piece in range(options.split_head):
            config.set_op_name(head_name(piece), None)
    return config


def _merged(parts: list[Path], workshop: Path) -> Path:
    """One package of several functions, which share their weights."""
    descriptor = MultiFunctionDescriptor()
    for part in parts:
        descriptor.add_function(str(part), src_function_name="main", target_function_name=part.stem)
    descriptor.default_function_name = FUNCTIONS[0]
    merged = workshop / "merged.mlpackage"
    with redirect_stderr(io.StringIO()):
        save_multifunction(descriptor, str(merged))
    for part in parts:
        shutil.rmtree(part)
    return merged


def _metadata(
    model_dir: Path, model: Model, config: dict, ids: dict, weights: str, options: Options, layout: StateLayout
) -> dict[str, str]:
    """What the package says of itself, beyond Core ML's own fields."""
    args = model.args
    facts = {
        "format": FORMAT,
        "model": fingerprint(model),
        "mini_batch_size": args.mini_batch_size,
        "prefill_tokens": options.prefill_tokens or args.mini_batch_size,
        "vocab_size": args.vocab_size,
        **ids,
        "state": layout.description(),
        "state_mode": options.state_mode,
        "weights": weights,
        "compute": options.compute,
    }
    text = {name: value if isinstance(value, str) else json.dumps(value) for name, value in facts.items()}
    name = Path(str(config.get("_name_or_path") or "")).name or model_dir.resolve().name  # never where it lies
    return {"co.huggingface.exporters.name": name} | {PREFIX + key: value for key, value in text.items()}


def _own_ids(model_dir: Path, config: dict) -> dict[str, int | list[int] | None]:
    """The ids that begin and end a text, as the configuration has them."""
    eos = config.get("eos_token_id")
    eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(id) is int for id in eos):
        raise CheckpointError(f"{model_dir}: eos_token_id must be a token id or a list of them")
    return {"bos_token_id": config.get("bos_token_id"), "eos_token_id": eos}


def _describe(package: Path, metadata: dict[str, str]) -> None:
    """Write the metadata into a finished package: merging would drop it."""
    spec = load_spec(str(package))
    about = spec.description.metadata
    about.shortDescription = "A Test-Time Training language model: reads tokens, gives the next token's logits."
    about.author = f"mlx-ttt {__version__}"
    about.license = "The weights' own license; see the model they come from."
    about.userDefined.update(metadata)
    for function in spec.description.functions or [spec.description]:
        for feature in (*function.input, *function.output, *function.state):
            feature.shortDescription = DESCRIPTIONS[feature.name]
    (package / _SPEC).write_bytes(spec.SerializeToString())


def _check_block(options: Options, args: ModelArgs) -> None:
    if options.prefill_tokens % args.mini_batch_size:
        raise TTTError(
            f"--prefill-tokens {options.prefill_tokens}: must be a multiple of the mini-batch size,"
            f" {args.mini_batch_size}"
        )
    if options.split_head > args.vocab_size:
        raise TTTError(f"--split-head {options.split_head}: there are only {args.vocab_size} tokens")


def _refuse_existing(paths: list[Path]) -> None:
    for path in paths:
        if path.exists() or path.is_symlink():
            raise OutputError(f"{path}: exists already; remove it or choose another name")


def _expected_bytes(model: Model, weights: str) -> int:
    """About what the disk must hold at once: both functions, and the package made of them."""
    C, args = model.args.hidden_size, model.args
    per_block = 5 * C * C + 3 * C * args.intermediate_size
    vocabulary = args.vocab_size * C * (1 if args.tie_word_embeddings else 2)
    factor = {"float16": 2, "int8": 1.1, "int4": 0.6}[weights]
    return int(3 * (per_block * args.num_hidden_layers * factor + vocabulary * 2)) + _BESIDE_WEIGHTS


class _Steps:
    """Counts steps for a progress bar."""

    def __init__(self, progress: Callable[[int, int], None], total: int):
        self.progress, self.done, self.total = progress, 0, total

    def __call__(self) -> None:
        self.done += 1
        self.progress(self.done, self.total)


@contextmanager
def _workshop(parent: Path) -> Iterator[Path]:
    """A folder for what is made on the way, on the output's disk; coremltools puts its own temporary files there."""
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".coreml-", dir=parent) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = usual


@contextmanager
def _out_of_space(out: Path, nbytes: int) -> Iterator[None]:
    """coremltools' native writer reports a full disk as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        free = shutil.disk_usage(out.parent).free
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if free < nbytes:
            raise OutputError(f"{out}: cannot be written, {free / 1e9:.2f} GB are free: {first_line}") from None
        raise
