"""A training in its folder: made from the user's options, opened again, run to its end.

    OUT/            the model directory with the last weights; best/ is one with the best
    OUT/checkpoints what `--resume` goes on from
    OUT/log.jsonl, OUT/training.png

A new training writes its start as the checkpoint of step 0. From then on every run is the same: open the folder, go on
from the newest checkpoint.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoint.by_name import model_directory
from ..checkpoint.config import Config, read_config, written_config
from ..checkpoint.directory import CONFIG, MODEL_FILE, MODEL_FILE_TEXT, WEIGHTS, write_config
from ..checkpoint.folder import check_place, complete_folder
from ..checkpoint.tokenizer import write_tokenizer
from ..errors import OutputError, TokenizerError, TrainingError
from ..loading import load_model
from ..model import Model
from ..text.tokenizer import load_tokenizer
from . import checkpoint, data, evaluate, presets
from .distributed import reduce, rows
from .loop import Part, Recipe, Step, Trainer, computed
from .optimizer import Arrays, Schedule
from .report import Clock, Log
from .tokenizer import train_tokenizer

CHECKPOINTS, BEST, LOG, PICTURE = "checkpoints", "best", "log.jsonl", "training.png"
_PROBE = 64  # tokens on which it is checked that a model still computes numbers
_HELD_OUT, _MOST_HELD_OUT = 0.05, 32_768  # of the data, if no other text is given: the fraction, and tokens at most


@dataclass(frozen=True)
class Options:
    """What a training is determined by, with all defaults filled in. Checkpoints hold it."""

    source: str | None  # the model that it starts from
    preset: str | None  # or the size of a new one
    layer: str | None
    tokenizer: str | None  # of a new model; None: trained on the data; or of a repository that has none
    vocab_size: int | None
    data: list[str]
    held_out: list[str]  # none: the end of the data
    all_tokens: bool
    length: int
    batch_size: int
    micro_batch: int
    segment: int
    carry: bool
    steps: int
    lr: float
    end_lr: float
    warmup: int
    decay: str
    optimizer: str
    weight_decay: float
    clip: float
    dtype: str
    seed: int
    evaluate_every: int
    save_every: int

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            Schedule(self.lr, self.end_lr, self.warmup, self.steps, self.decay),
            micro_batch=self.micro_batch,
            segment=self.segment,
            carry=self.carry,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            clip=self.clip,
            dtype=self.dtype,
            inner_lr_start=None if self.layer is None else presets.INNER_LR_START.get(self.layer),
        )


class Evaluation(NamedTuple):
    """What the held-out text costs after a step, in nats a token: in all, and by bands of position."""

    step: int
    loss: float
    bands: list[evaluate.Band]
    is_best: bool


# ---------------------------------------------------------------------------------------------- a new training


def begin(out: Path, options: Options) -> None:
    """Make the folder of a new training. It appears when it is complete.

    Raises:
        TTTError: `out` exists or cannot be written to, the data, the tokenizer or the model cannot be read, or they do
            not fit together.
    """
    if os.path.lexists(out):
        raise OutputError(f"{out}: exists already; --resume goes on with a training there, or choose another place")
    check_place(out, overwrite=False)
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder)
        model = _new_model(options, stage) if options.source is None else _given_model(options, stage)
        batches, _ = _read_data(options, stage)  # it may be bad: then nothing is made
        weights = {name: w.astype(mx.float32) for name, w in dict(tree_flatten(model.parameters())).items()}
        mx.random.seed(options.seed)
        start = checkpoint.State(0, weights, {}, {}, checkpoint.random_seed())
        nbytes = 3 * sum(w.nbytes for w in weights.values())  # the model, the best one, the checkpoint
        with complete_folder(out, nbytes) as new:
            shutil.copytree(stage, new, dirs_exist_ok=True)
            config = read_config(new / CONFIG)
            write_config(new / CONFIG, written_config(config, options.dtype))
            (new / MODEL_FILE).write_text(MODEL_FILE_TEXT, encoding="utf-8")
            checkpoint.write_arrays(new / WEIGHTS, computed(model, weights, options.dtype))
            (new / CHECKPOINTS).mkdir()
            checkpoint.save(new / CHECKPOINTS, start, _about(options, batches.fingerprint, evaluated=-1, best=None))


def _given_model(options: Options, stage: Path) -> Model:
    """Load the model to train on from, and write its config and tokenizer."""
    source = options.source
    assert source is not None
    path = model_directory(source, tokenizer=options.tokenizer)
    config = read_config(path / CONFIG)
    if config.quantization():
        raise TrainingError(f"{source}: its weights are quantized; first run `convert.py mlx --dequantize`")
    model, _ = load_model(path)
    write_config(stage / CONFIG, config.fields)
    if write_tokenizer(path, stage, config.fields) is None:
        raise TokenizerError(f"{source}: has no tokenizer; convert it again with --tokenizer FILE")
    return model


def _new_model(options: Options, stage: Path) -> Model:
    """Make the model of a preset, and write its config and tokenizer."""
    if options.tokenizer is None:
        assert options.vocab_size is not None
        train_tokenizer(options.data, stage, options.vocab_size)
    elif write_tokenizer(Path(options.tokenizer), stage, {}) is None:
        raise TokenizerError(f"{options.tokenizer}: holds neither tokenizer.model nor tokenizer.json")
    tokenizer = load_tokenizer(stage, {})
    vocab_size = 1 + max(tokenizer.get_vocab().values())
    assert options.preset is not None and options.layer is not None
    args = presets.PRESETS[options.preset].args(options.layer, vocab_size)
    fields = {
        "architectures": ["TTTForCausalLM"],
        "max_position_embeddings": options.length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }
    write_config(stage / CONFIG, written_config(Config(fields, args, None), options.dtype))
    model = Model(args)
    presets.initialize(model, options.seed)
    return model


def _read_data(options: Options, folder: Path) -> tuple[data.Batches, list[data.Document]]:
    """What is trained on and what is held out. `folder` has the config and the tokenizer."""
    config = read_config(folder / CONFIG)
    tokenizer = load_tokenizer(folder, config.fields)

    def documents_of(paths: list[str]) -> list[data.Document]:
        return data.read_documents(paths, tokenizer, options.all_tokens, config.args.vocab_size)

    documents = documents_of(options.data)
    if options.held_out:
        held_out = documents_of(options.held_out)
    else:
        total = sum(len(document.ids) for document in documents)
        documents, held_out = data.hold_out(documents, min(_HELD_OUT, _MOST_HELD_OUT / total), options.seed)
    held_out = [document for document in held_out if len(document.ids) > 1 and document.predicted.any()]
    return data.Batches(documents, options.length, options.batch_size, options.seed, options.carry), held_out


def _about(options: Options, fingerprint: str, evaluated: int, best: float | None) -> dict[str, Any]:
    """What a checkpoint says besides the trainer's state: also the last step evaluated, and the best held-out loss."""
    return {"options": asdict(options), "data": fingerprint, "evaluated": evaluated, "best": best}


# ---------------------------------------------------------------------------------------------- an open training


class Training:
    """A training in its folder, at its newest checkpoint.

    Attributes:
        options: that it was started with.
        clock: how fast it is.
        saved: the step of the newest checkpoint.

    Args:
        group: machines that train together. Each reads a part of every batch, and the first one writes. They start from
            the same folder, or copies of it.

    Raises:
        TTTError: the folder holds no training, or its data have changed since it began.
    """

    def __init__(self, out: Path, group: mx.distributed.Group | None = None):
        self.out, self.options = out, saved_options(out)
        state, about = checkpoint.load(out / CHECKPOINTS)
        batches, self._held_out = _read_data(self.options, out)
        self._fingerprint = batches.fingerprint
        if about["data"] != self._fingerprint:
            raise TrainingError(f"{out}: the data are not those that this training began with, so it cannot go on")
        model = Model(read_config(out / CONFIG).args)
        if group is not None and self.options.carry:
            raise TrainingError("--carry is for one machine: the states of the texts are not shared")
        own = rows(self.options.batch_size, group)
        self.trainer = Trainer(model, self.options.recipe, batches, state, own, partial(reduce, group=group))
        self._writes = group is None or group.rank() == 0
        self._first = self.saved = state.step
        self._evaluated, self._best = about["evaluated"], about["best"]
        self.log = Log(out / LOG)
        self.log.go_back(state.step, self._evaluated)
        self.clock = Clock()

    def run(self) -> Iterator[Part | Step | Evaluation]:
        """Train to the end, evaluate and save whenever it is due. Whoever stops in between has to `save`.

        Raises:
            TrainingError: a loss is no number. The folder has the last state that was good.
            OutputError: no space, or another reason why nothing can be written. The last checkpoint is kept.
        """
        try:
            yield from self._evaluate()
            self.clock.start()
            for event in self.trainer.run():
                self.clock.count(event.tokens)
                if isinstance(event, Step):
                    self._log_step(event)
                yield event
                if isinstance(event, Step):
                    yield from self._evaluate()
                    if event.step % self.options.save_every == 0:
                        self.save()
                self.clock.start()
            self.save()
        except TrainingError as error:
            if self._is_good():
                self.save()
            raise TrainingError(f"{error}; {self.out} has the weights after step {self.saved}") from None

    def save(self) -> None:
        """Write a checkpoint, and the model.

        Raises:
            TrainingError: the model does not compute numbers any more. The checkpoint before stays.
            OutputError: it cannot be written. The checkpoint before stays.
        """
        step = self.trainer.step
        if not self._is_good():
            raise TrainingError(f"step {step}: after it, the loss is nan; try a lower --lr or a longer --warmup")
        if self._writes:
            about = _about(self.options, self._fingerprint, self._evaluated, self._best)
            checkpoint.save(self.out / CHECKPOINTS, self.trainer.state, about)
            self._write_model(self.out)
        self.saved = step

    def _is_good(self) -> bool:
        """Whether the model still computes numbers: weights can be finite and too large all the same."""
        nats = evaluate.losses(self.trainer.model, self._held_out[0].ids[: _PROBE + 1])
        return bool(np.isfinite(nats).all())

    def seconds_left(self, step: int, sequences: int = 0) -> float:
        """How long the rest takes, less evaluation, after so many steps and so many sequences of the next."""
        done = (step - self._first) + sequences / self.options.batch_size
        left = self.options.steps - self._first - done
        return self.clock.seconds / done * left

    def _log_step(self, step: Step) -> None:
        self.log.append(
            {
                "step": step.step,
                "loss": step.loss if math.isfinite(step.loss) else None,
                "lr": step.lr,
                "norm": step.norm,
                "tokens_per_second": round(self.clock.tokens_per_second, 1),
                "peak_memory": mx.get_peak_memory(),
            }
        )

    def _evaluate(self) -> Iterator[Evaluation]:
        """Evaluate if it is due after the last step, and keep the model if it is the best so far."""
        step, every, steps = self.trainer.step, self.options.evaluate_every, self.options.steps
        if step == self._evaluated or (step % every and step != steps):
            return
        loss, bands = held_out_loss(self.trainer.model, self._held_out, self.options.segment)
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: after it, the held-out loss is {loss:g}; try a lower --lr")
        is_best = self._best is None or loss < self._best
        if is_best:
            self._best = loss
            if self._writes:
                self._write_best()
        self._evaluated = step
        entry = [asdict(band) | {"half_width": _number(band.half_width)} for band in bands]
        self.log.append({"step": step, "held_out": loss, "bands": entry})
        yield Evaluation(step, loss, bands, is_best)

    def _write_best(self) -> None:
        best = self.out / BEST
        if best.exists():
            return self._write_model(best)
        weights = self._model_weights()
        with checkpoint.written_whole(best, _nbytes(weights)) as folder:
            folder.mkdir()
            for file in self.out.iterdir():
                if file.is_file() and not file.name.startswith(".") and file.name not in (WEIGHTS, LOG, PICTURE):
                    shutil.copyfile(file, folder / file.name)
            checkpoint.write_arrays(folder / WEIGHTS, weights)
        return None

    def _write_model(self, folder: Path) -> None:
        weights = self._model_weights()
        with checkpoint.written_whole(folder / WEIGHTS, _nbytes(weights)) as file:
            checkpoint.write_arrays(file, weights)

    def _model_weights(self) -> Arrays:
        return computed(self.trainer.model, self.trainer.weights, self.options.dtype)


def saved_options(out: Path) -> Options:
    """The options that a training was started with.

    Raises:
        CheckpointError: `out` holds no training.
    """
    return Options(**checkpoint.read_about(out / CHECKPOINTS)["options"])


def held_out_loss(model: Model, documents: list[data.Document], segment: int) -> tuple[float, list[evaluate.Band]]:
    """What texts cost, each read from its beginning: the mean over all tokens that count, and by bands of position."""
    nats = [evaluate.losses(model, document.ids, segment=segment) for document in documents]
    longest = max(len(n) for n in nats)
    bands = []
    for start, stop in evaluate.BANDS:
        parts = [n[start:stop][d.predicted[start:stop]] for n, d in zip(nats, documents, strict=True)]
        if (within := np.concatenate(parts)).size:
            band = evaluate.by_position(within, ((0, None),))[0]
            bands.append(evaluate.Band(start, min(stop or longest, longest), band.mean, band.half_width))
    counting = np.concatenate([n[d.predicted] for n, d in zip(nats, documents, strict=True)])
    return float(counting.mean(dtype=np.float64)), bands


def _nbytes(weights: Arrays) -> int:
    return sum(w.nbytes for w in weights.values())


def _number(x: float) -> float | None:
    """JSON has no NaN."""
    return x if math.isfinite(x) else None
