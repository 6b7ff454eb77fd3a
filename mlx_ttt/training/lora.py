"""Fine-tuning as mlx-lm does it, with gradients in segments.

Options, data sets, batches, reports and adapter files are mlx-lm's. Only its training step is not: it differentiates a
whole text at once, compiled, in memory that grows with the text.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map
from mlx_lm import lora
from mlx_lm.cli_ui import TrainUI, rprint
from mlx_lm.tuner import datasets, trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.utils import maybe_set_recommended_wired_limit

from ..checkpoint.untrusted import quoted
from ..errors import OutputError, TrainingDataError, TrainingError
from ..files import written_whole
from ..model import Model
from ..network.model import prepare
from ..network.operations import cross_entropy
from .distributed import nothing, reduce
from .segments import SEGMENT, gradients

_LEAST_SEGMENT = 64  # tokens


class _UpTo(int):
    """How many layers mlx-lm trains if nobody says so: as many, or all of a model that has fewer."""


def check_adapter(path: str) -> None:
    """Check that a folder holds what `lora` writes.

    Raises:
        TrainingError: it does not.
    """
    for name in ("adapter_config.json", "adapters.safetensors"):
        if not (Path(path) / name).is_file():
            raise TrainingError(f"{path}: there is no {name}; `mlx-ttt lora` writes it, --adapter-path says where")


@contextlib.contextmanager
def in_mlx_lm() -> Iterator[None]:
    """Have mlx-lm's `lora` command use the functions below in place of its own."""
    names = ("load_dataset", "train", "evaluate", "train_model", "CONFIG_DEFAULTS")
    own: dict[str, Any] = {name: getattr(lora, name) for name in names}
    lora.load_dataset, lora.train, lora.evaluate = load_dataset, train, evaluate
    lora.CONFIG_DEFAULTS = own["CONFIG_DEFAULTS"] | {"num_layers": _UpTo(own["CONFIG_DEFAULTS"]["num_layers"])}

    def train_model(args: Any, model: nn.Module, *rest: Any) -> None:
        if isinstance(args.num_layers, _UpTo):
            args.num_layers = min(int(args.num_layers), len(model.layers))
        own["train_model"](args, model, *rest)

    lora.train_model = train_model  # type: ignore[assignment]
    try:
        yield
    finally:
        vars(lora).update(own)


def load_dataset(args: Any, tokenizer: Any) -> Any:
    """`mlx_lm.tuner.datasets.load_dataset`, with errors that say what to do.

    Raises:
        TrainingDataError: the data is missing, empty, or not what mlx-lm reads.
    """
    try:
        return datasets.load_dataset(args, tokenizer)
    except IndexError:
        raise TrainingDataError(f"{args.data}: a file in it is empty") from None
    except ImportError as error:
        raise TrainingDataError(
            f"{args.data}: no such folder; for a data set of the Hugging Face Hub, run `pip install {error.name}`"
        ) from None
    except ValueError as error:
        raise TrainingDataError(f"{args.data}: {quoted(error)}") from None


def train(  # mlx-lm's signature
    model: nn.Module,
    optimizer: Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: TrainingArgs = TrainingArgs(),  # noqa: B008
    loss: Callable = trainer.default_loss,
    iterate_batches: Callable = trainer.iterate_batches,
    training_callback: TrainingCallback | None = None,
) -> None:
    """In the place of `mlx_lm.tuner.trainer.train`, which it calls for other models and other losses.

    With several machines, losses and gradients are means over the tokens of all of them.

    Raises:
        TrainingError: a loss is not a number, or a token is outside the vocabulary. What was saved before stays.
        OutputError: the adapters cannot be written.
    """
    callback = training_callback or TrainingCallback()
    if not isinstance(model, Model) or loss is not trainer.default_loss:
        trainer.train(model, optimizer, train_dataset, val_dataset, args, loss, iterate_batches, callback)
        return
    if args.grad_accumulation_steps < 1:
        raise ValueError("grad_accumulation_steps must be at least 1")
    if args.grad_checkpoint:
        rprint("--grad-checkpoint is left out: gradients are taken in segments, which needs even less memory")
    maybe_set_recommended_wired_limit()
    parameters: dict[str, mx.array] = dict(tree_flatten(model.trainable_parameters()))
    dtypes = {name: w.dtype for name, w in parameters.items()}
    prepare(model)  # after LoRA layers have been put around its own
    if mx.default_device() == mx.cpu:  # where half precision would be slow, besides coarse
        model.update(tree_map(lambda w: w.astype(mx.float32), model.trainable_parameters()))
    run = _Run(model, optimizer, args, callback, dtypes)
    run.train(train_dataset, val_dataset, iterate_batches)
    run.save(Path(args.adapter_file))


def evaluate(model: nn.Module, *args: Any, **kwargs: Any) -> float:
    """`mlx_lm.tuner.trainer.evaluate`, for TTT models in segments."""
    if isinstance(model, Model):
        prepare(model)
        kwargs.setdefault("loss", segmented_loss)
    return trainer.evaluate(model, *args, **kwargs)


def segmented_loss(model: Model, batch: mx.array, lengths: mx.array) -> tuple[mx.array, mx.array]:
    """`mlx_lm.tuner.trainer.default_loss`, read in segments: the mean loss and the number of tokens."""
    _check_ids(model, batch)
    weights, total, caches = _weights(batch, lengths), mx.array(0.0), model.make_cache()
    size, T = _segment(batch), weights.shape[1]
    for a in range(0, T, size):
        b = min(a + size, T)
        losses = cross_entropy(model(batch[:, a:b], caches), batch[:, a + 1 : b + 1])
        total = total + (losses * weights[:, a:b]).sum()
        mx.eval(total, [c.arrays for c in caches])
    count = weights.sum()
    return total / mx.maximum(count, 1), count


def _check_ids(model: Model, batch: mx.array) -> None:
    vocabulary = model.args.vocab_size
    if (largest := batch.max().item()) >= vocabulary:  # type: ignore[operator]
        raise TrainingError(
            f"the tokenizer gives the id {largest}, which is outside the model's vocabulary of {vocabulary}; "
            "use the tokenizer that belongs to the model"
        )


def _weights(batch: mx.array, lengths: mx.array) -> mx.array:
    """Which predictions mlx-lm counts, [B, T]: `lengths` [B, 2] says from which to which, the last one included."""
    steps = mx.arange(1, batch.shape[1])
    return mx.logical_and(steps >= lengths[:, :1], steps <= lengths[:, 1:]).astype(mx.float32)


def _segment(batch: mx.array) -> int:
    """Tokens of each sequence in a segment: fewer in larger batches, so that the memory is about the same."""
    return max(_LEAST_SEGMENT, SEGMENT // batch.shape[0])


@dataclass
class _Run:
    """One training.

    Attributes:
        dtypes: of the trainable parameters in the files. On a CPU, half-precision ones are trained in float32.
    """

    model: Model
    optimizer: Optimizer
    args: TrainingArgs
    callback: TrainingCallback
    dtypes: dict[str, mx.Dtype]

    def __post_init__(self) -> None:
        world = mx.distributed.init()
        self.group = world if world.size() > 1 else None
        self.rank = world.rank()
        self._summed: Any = None  # gradients of the steps since the last update

    def train(self, dataset: Any, val_dataset: Any, iterate_batches: Callable) -> None:
        args = self.args
        batches: Iterable = iterate_batches(
            dataset=dataset,
            batch_size=args.batch_size,
            max_seq_length=args.max_seq_length,
            loop=True,
            comm_group=mx.distributed.init(),
        )
        self.model.train()
        report = _Report()
        with TrainUI(args.iters, rank=self.rank) as ui:
            for iteration, batch in zip(range(1, args.iters + 1), batches, strict=False):
                if val_dataset and (iteration in (1, args.iters) or iteration % args.steps_per_eval == 0):
                    self._validate(iteration, val_dataset, iterate_batches, ui)
                started = time.perf_counter()
                loss, tokens = self._step(iteration, *batch)
                report.add(loss, tokens, time.perf_counter() - started)
                ui.advance()
                if iteration % args.steps_per_report == 0 or iteration == args.iters:
                    info = report.finish(iteration, self.optimizer.learning_rate.item())
                    ui.report_train(iteration, info["train_loss"], info["tokens_per_second"], info["trained_tokens"])
                    self.callback.on_train_loss_report(info)
                if iteration % args.steps_per_save == 0:
                    numbered = Path(args.adapter_file).parent / f"{iteration:07d}_adapters.safetensors"
                    self.save(Path(args.adapter_file))
                    self.save(numbered)
                    ui.report_save(numbered)

    def save(self, file: Path) -> None:
        """Write the trainable parameters. Of several machines, the first does.

        Raises:
            OutputError: the file cannot be written. An older one of this name then stays as it was.
        """
        if self.rank != 0:
            return
        weights: dict[str, mx.array] = dict(tree_flatten(self.model.trainable_parameters()))
        try:
            with written_whole(file) as complete:
                mx.save_safetensors(str(complete), {name: w.astype(self.dtypes[name]) for name, w in weights.items()})
        except (OSError, RuntimeError) as error:
            raise OutputError(f"{file}: the adapters cannot be written: {error}") from error

    def _step(self, iteration: int, batch: mx.array, lengths: mx.array) -> tuple[float, int]:
        """One batch: its loss and the number of its tokens. Updates the model where enough steps are summed."""
        _check_ids(self.model, batch)
        weights = _weights(batch, lengths)
        count = float(weights.sum().item())  # type: ignore[arg-type]
        if count:
            loss, tree = gradients(self.model, batch, _segment(batch), weights=weights)
        else:  # all of it prompt, or cut off
            loss, tree, count = nothing(self.model)
        loss, tree, total = reduce(loss, tree, count, self.group)
        count = float(total.item())  # type: ignore[arg-type]
        if not count:
            loss, tree, count = nothing(self.model)
        if not math.isfinite(loss.item()):  # type: ignore[arg-type]
            raise TrainingError(
                f"the loss of iteration {iteration} is {loss.item()}; take a smaller learning rate, or start from "
                "adapters that were saved before (--resume-adapter-file)"
            )
        self._summed = tree if self._summed is None else tree_map(mx.add, self._summed, tree)
        steps = self.args.grad_accumulation_steps
        if iteration % steps == 0:
            self.optimizer.update(self.model, tree_map(lambda g: g / steps, self._summed))
            self._summed = None
        mx.eval(self.model.state, self.optimizer.state, self._summed)
        if mx.get_cache_memory() > self.args.clear_cache_threshold:
            mx.clear_cache()
        return float(loss.item()), int(count)  # type: ignore[arg-type]

    def _validate(self, iteration: int, dataset: Any, iterate_batches: Callable, ui: TrainUI) -> None:
        started = time.perf_counter()
        batches = len(dataset) // self.args.batch_size
        if self.args.val_batches != -1:
            batches = min(batches, self.args.val_batches)
        with ui.val_task(batches) as advance:
            loss = evaluate(
                self.model,
                dataset,
                self.args.batch_size,
                self.args.val_batches,
                self.args.max_seq_length,
                iterate_batches=iterate_batches,
                progress_callback=advance,
            )
        self.model.train()
        seconds = time.perf_counter() - started
        ui.report_val(iteration, loss, seconds)
        self.callback.on_val_loss_report({"iteration": iteration - 1, "val_loss": loss, "val_time": seconds})


class _Report:
    """Sums over the steps since the last report."""

    def __init__(self) -> None:
        self.trained_tokens = 0
        self._clear()

    def _clear(self) -> None:
        self._losses: list[float] = []
        self._tokens, self._seconds = 0, 0.0

    def add(self, loss: float, tokens: int, seconds: float) -> None:
        self._losses.append(loss)
        self._tokens += tokens
        self._seconds += seconds

    def finish(self, iteration: int, learning_rate: float) -> dict[str, Any]:
        """What mlx-lm's callbacks get, and start anew."""
        self.trained_tokens += self._tokens
        info = {
            "iteration": iteration,
            "train_loss": sum(self._losses) / len(self._losses),
            "learning_rate": learning_rate,
            "iterations_per_second": len(self._losses) / self._seconds,
            "tokens_per_second": self._tokens / self._seconds,
            "trained_tokens": self.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        self._clear()
        return info
