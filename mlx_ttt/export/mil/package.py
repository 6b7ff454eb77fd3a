"""A model directory -> an .mlpackage with the functions `decode` and `prefill`, and a folder of companions."""

from __future__ import annotations

import itertools
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint.folder import complete_folder
from ...errors import CheckpointError, OutputError, TTTError
from ...loading import load_model
from ...network.args import ModelArgs
from ...network.model import Model
from ...text.tokenizer import load_tokenizer
from .. import metadata
from ..companions.folder import special_ids, write_companions
from ..errors import first_line
from ..functions import FUNCTIONS
from ..layout import StateLayout
from .conversion import convert_function, finish, merge
from .program import Options

_BESIDE_WEIGHTS = 64 << 20  # bytes to spare for graphs, constants and companions


@dataclass(frozen=True)
class Report:
    """What `export` wrote.

    Attributes:
        packages: one, or two.
        companions: their folder; None if there are none.
        nbytes: size of the packages.
        layout: of the state.
        peak_memory: of the process so far, in bytes.
    """

    packages: tuple[Path, ...]
    companions: Path | None
    nbytes: int
    layout: StateLayout
    peak_memory: int


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

    The same model, options and versions of this package and coremltools give the same bytes.

    Args:
        model_dir: what `convert.py mlx` writes; quantized weights are widened first.
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
    for path in (*targets, *([beside] if companions else [])):
        if path.exists() or path.is_symlink():
            raise OutputError(f"{path}: exists already; remove it or choose another name")

    model, config = load_model(model_dir)
    _check_options(options, model.args)
    ids = metadata.own_ids(model_dir, config)
    if companions:
        ids = special_ids(load_tokenizer(model_dir, config))
    layout = StateLayout.of(model.args)
    about = _metadata(metadata.model_name(model_dir, config), model, ids, weights, options)
    nbytes = _expected_bytes(model, weights)

    total, count = len(FUNCTIONS) * (len(model.layers) + 1) + 1, itertools.count(1)

    def step() -> None:
        progress(next(count), total)

    with ExitStack() as stack:
        if companions:  # before the conversion, because a tokenizer that cannot be used shows here
            folder = stack.enter_context(complete_folder(beside, 0))
            names, stateful = [target.stem for target in targets], options.state_mode == "state"
            write_companions(folder, model_dir, names, model.args, layout.description(), stateful)
        folders = [stack.enter_context(complete_folder(target, nbytes)) for target in targets]
        workshop = stack.enter_context(_workshop(out, nbytes))
        packages = [workshop / f"{name}.mlpackage" for name in FUNCTIONS]
        try:
            for package in packages:
                convert_function(model, package.stem, weights, options, package, step)
        except CheckpointError as error:
            raise CheckpointError(f"{model_dir}: {error}") from None
        del model
        if not separate:
            merge(packages, workshop / "merged.mlpackage")
            packages = [workshop / "merged.mlpackage"]
        for package, folder in zip(packages, folders, strict=True):
            finish(package, about)
            for entry in package.iterdir():
                shutil.move(entry, folder / entry.name)
        step()
        size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
    return Report(tuple(targets), beside if companions else None, size, layout, peak_memory())


def peak_memory() -> int:
    """The largest memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _metadata(name: str, model: Model, ids: dict[str, Any], weights: str, options: Options) -> dict[str, str]:
    """What the package says of itself, beyond Core ML's own fields."""
    how = {"state_mode": options.state_mode, "weights": weights}
    return {metadata.NAME: name} | metadata.facts(model, options, ids, how)


def _check_options(options: Options, args: ModelArgs) -> None:
    if options.prefill_tokens % args.mini_batch_size:
        raise TTTError(
            f"--prefill-tokens {options.prefill_tokens}: must be a multiple of the mini-batch size,"
            f" {args.mini_batch_size}"
        )
    if options.split_head > args.vocab_size:
        raise TTTError(f"--split-head {options.split_head}: there are only {args.vocab_size} tokens")


def _expected_bytes(model: Model, weights: str) -> int:
    """About what the disk must hold at once: two functions, and the package made of them."""
    C, args = model.args.hidden_size, model.args
    per_block = 5 * C * C + 3 * C * args.intermediate_size
    vocabulary = args.vocab_size * C * (1 if args.tie_word_embeddings else 2)
    factor = {"float16": 2, "int8": 1.1, "int4": 0.6}[weights]
    return int(3 * (per_block * args.num_hidden_layers * factor + vocabulary * 2)) + _BESIDE_WEIGHTS


@contextmanager
def _workshop(out: Path, nbytes: int) -> Iterator[Path]:
    """A temporary folder beside the output, on the same disk. coremltools, too, puts its temporary files there.

    A RuntimeError, which coremltools' writer raises on a full disk, becomes an OutputError if less than nbytes is free.
    """
    usual = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix=".coreml-", dir=out.parent) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        except RuntimeError as error:
            free = shutil.disk_usage(out.parent).free
            if free >= nbytes:
                raise
            raise OutputError(f"{out}: cannot be written, {free / 1e9:.2f} GB are free: {first_line(error)}") from None
        finally:
            tempfile.tempdir = usual
