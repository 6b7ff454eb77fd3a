"""`mlx-ttt lora`: mlx-lm's fine-tuning with gradients in segments, against mlx-lm's own."""

from __future__ import annotations

import inspect
import json

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm.lora
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.tuner import trainer
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import TrainingArgs
from mlx_lm.tuner.utils import linear_to_lora_layers

from mlx_ttt.backends.cpu.weights import QuantizedLinear
from mlx_ttt.cli import main
from mlx_ttt.errors import OutputError, TrainingError
from mlx_ttt.loading import bundled_model
from mlx_ttt.training import gradients
from mlx_ttt.training import lora as ours

from ..models import VOCABULARY, build

LENGTHS = [30, 27, 31, 12, 25, 44, 20, 20]  # tokens
PROMPTS = [0, 5, 15, 3, 0, 43, 0, 19]


@pytest.fixture
def dataset():
    """Pairs of ids and the length of the prompt, as mlx-lm's data sets make them."""
    rng = np.random.default_rng(0)
    return [(rng.integers(1, VOCABULARY, n).tolist(), prompt) for n, prompt in zip(LENGTHS, PROMPTS, strict=True)]


class Reports(TrainingCallback):
    def __init__(self):
        self.train, self.val = [], []

    def on_train_loss_report(self, train_info):
        self.train.append(train_info)

    def on_val_loss_report(self, val_info):
        self.val.append(val_info)


def tunable(kind="linear", dropout=0.0, how="lora"):
    model = build(kind, "111")
    model.freeze()
    mx.random.seed(1)
    if how == "full":
        model.layers[-1].unfreeze()
    else:
        linear_to_lora_layers(model, 2, {"rank": 3, "dropout": dropout, "scale": 5.0}, use_dora=how == "dora")
    return model


def tune(train, model, dataset, folder, **options):
    """Train with SGD, which does not make small differences large. Returns the reports and the files."""
    folder.mkdir()
    defaults = {"batch_size": 2, "iters": 4, "steps_per_report": 2, "steps_per_eval": 3, "steps_per_save": 3}
    args = TrainingArgs(**(defaults | options), val_batches=2, adapter_file=folder / "adapters.safetensors")
    np.random.seed(3)
    reports = Reports()
    optimizer = optim.SGD(learning_rate=optim.linear_schedule(0.05, 0.01, 4), momentum=0.5)
    train(model, optimizer, dataset, dataset[2:6], args, training_callback=reports)
    return reports, {file.name: mx.load(str(file)) for file in folder.iterdir()}


class TestPlaceInMLXLM:
    """Fails if mlx-lm changes what is replaced."""

    @pytest.mark.parametrize(("name", "module"), [("train", trainer), ("evaluate", trainer)])
    def test_names(self, name, module):
        assert getattr(mlx_lm.lora, name) is getattr(module, name)
        with ours.in_mlx_lm():
            assert getattr(mlx_lm.lora, name) is getattr(ours, name)
        assert getattr(mlx_lm.lora, name) is getattr(module, name)

    def test_signature_of_train(self):
        theirs, own = (inspect.signature(function).parameters for function in (trainer.train, ours.train))
        assert list(own) == list(theirs)
        for name, parameter in theirs.items():
            assert own[name].kind == parameter.kind
            assert own[name].default == parameter.default

    def test_signatures_that_are_called(self):
        evaluate = inspect.signature(trainer.evaluate).parameters
        assert list(evaluate)[:5] == ["model", "dataset", "batch_size", "num_batches", "max_seq_length"]
        assert {"loss", "iterate_batches", "progress_callback"} <= evaluate.keys()
        batches = inspect.signature(trainer.iterate_batches).parameters
        assert {"dataset", "batch_size", "max_seq_length", "loop", "comm_group"} <= batches.keys()
        assert list(inspect.signature(trainer.default_loss).parameters) == ["model", "batch", "lengths"]
        assert list(inspect.signature(mlx_lm.lora.load_dataset).parameters) == ["args", "tokenizer"]

    def test_lora_calls_train_by_these_names(self):
        source = inspect.getsource(mlx_lm.lora)
        assert "\n    train(\n" in source
        assert " evaluate(\n" in source
        assert " load_dataset(args, tokenizer)" in source


class TestAgainstMLXLM:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            *(
                pytest.param(options, marks=pytest.mark.slow)
                for options in (
                    {"how": "dora"},
                    {"how": "full", "kind": "mlp"},
                    {"grad_accumulation_steps": 2},
                    {"max_seq_length": 25, "batch_size": 4},
                )
            ),
        ],
        ids=str,
    )
    def test_same_reports_and_adapters(self, options, dataset, tmp_path, monkeypatch):
        monkeypatch.setattr(ours, "_segment", lambda batch: 20)
        kinds = {name: options.pop(name) for name in ("how", "kind") if name in options}
        if options.get("max_seq_length"):  # mlx-lm's own loss is not a number where a batch has only prompts
            dataset = [(ids, min(prompt, 9)) for ids, prompt in dataset]
        expected, expected_files = tune(trainer.train, tunable(**kinds), dataset, tmp_path / "theirs", **options)
        reports, files = tune(ours.train, tunable(**kinds), dataset, tmp_path / "ours", **options)
        assert files.keys() == expected_files.keys() == {"adapters.safetensors", "0000003_adapters.safetensors"}
        for file, weights in expected_files.items():
            assert files[file].keys() == weights.keys()
            for name, w in weights.items():
                assert files[file][name].dtype == w.dtype
                assert mx.allclose(files[file][name], w, rtol=1e-3, atol=1e-5), name
        for name in ("train", "val"):
            own, theirs = getattr(reports, name), getattr(expected, name)
            assert [report.keys() for report in own] == [report.keys() for report in theirs]
            for key in ("iteration", "train_loss", "val_loss", "learning_rate", "trained_tokens"):
                values = [report.get(key, 0) for report in theirs]
                assert [report.get(key, 0) for report in own] == pytest.approx(values, rel=1e-4)

    @pytest.mark.parametrize("segment", [7, 100])
    def test_loss(self, dataset, segment, monkeypatch):
        monkeypatch.setattr(ours, "_segment", lambda batch: segment)
        model = build("mlp", "110")
        for batch in trainer.iterate_batches(dataset, 2, 40):
            loss, tokens = ours.segmented_loss(model, *batch)
            expected, expected_tokens = trainer.default_loss(model, *batch)
            assert tokens.item() == expected_tokens.item()
            if tokens.item():
                assert loss.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_other_models_and_losses_are_mlx_lms(self, dataset, monkeypatch):
        seen = []
        monkeypatch.setattr(trainer, "train", lambda *args: seen.append(args))
        ours.train("a model", "an optimizer", dataset)
        model = tunable()
        ours.train(model, None, dataset, loss="another")
        assert [call[0] for call in seen] == ["a model", model]
        assert seen[1][5] == "another"


class TestStep:
    def test_only_prompts(self, dataset, tmp_path):
        """A batch without a token to predict changes nothing. Its loss counts as 0."""
        model = tunable()
        before = dict(tree_flatten(model.trainable_parameters()))
        prompts = [(ids, 200) for ids, _ in dataset]
        reports, files = tune(ours.train, model, prompts, tmp_path / "out")
        assert all(mx.array_equal(files["adapters.safetensors"][name], w) for name, w in before.items())
        assert {report["train_loss"] for report in reports.train} == {0}

    def test_not_a_number(self, dataset, tmp_path):
        model = tunable()
        model.layers[0].mlp.up_proj.lora_a = model.layers[0].mlp.up_proj.lora_a * float("nan")
        with pytest.raises(TrainingError, match="the loss of iteration 1 is nan"):
            tune(ours.train, model, dataset, tmp_path / "out")
        assert not any((tmp_path / "out").iterdir())

    def test_full_disk(self, dataset, tmp_path, monkeypatch):
        save = mx.save_safetensors

        def fill(file, weights):
            save(file, weights)
            if "0000002_" in file:
                raise RuntimeError("no space left")

        monkeypatch.setattr(mx, "save_safetensors", fill)
        with pytest.raises(
            OutputError, match=r"0000002_adapters\.safetensors: the adapters cannot be written: no space"
        ):
            tune(ours.train, tunable(), dataset, tmp_path / "out", steps_per_save=1)
        files = {"adapters.safetensors", "0000001_adapters.safetensors"}
        assert {file.name for file in (tmp_path / "out").iterdir()} == files

    def test_vocabulary(self, tmp_path):
        dataset = [([1, 2, VOCABULARY], 0)] * 4
        with pytest.raises(TrainingError, match=f"gives the id {VOCABULARY}, which is outside .* of {VOCABULARY}"):
            tune(ours.train, tunable(), dataset, tmp_path / "out")

    def test_half_precision_stays_in_the_file(self, dataset, tmp_path):
        model = tunable(how="full")
        model.set_dtype(mx.bfloat16, lambda dtype: dtype == mx.float32)
        names = {name for name, w in tree_flatten(model.trainable_parameters()) if w.dtype == mx.bfloat16}
        _, files = tune(ours.train, model, dataset, tmp_path / "out", iters=1)
        assert {name for name, w in files["adapters.safetensors"].items() if w.dtype == mx.bfloat16} == names
        assert names

    @pytest.mark.skipif(mx.default_device() != mx.cpu, reason="MLX's quantized products are slow on a CPU only")
    def test_quantized_weights_on_a_cpu(self, tmp_path):
        """The forms of layers that a CPU runs fast are also taken inside LoRA layers."""
        model, _ = mlx_lm.load(str(bundled_model()))
        nn.quantize(model, 32, 4, class_predicate=model.quant_predicate)
        model.freeze()
        linear_to_lora_layers(model, 1, {"rank": 2, "dropout": 0.0, "scale": 5.0})
        tune(ours.train, model, [(list(range(1, 40)), 0)] * 6, tmp_path / "out", iters=1)
        layers = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear)]
        assert layers and all(type(layer) is QuantizedLinear for layer in layers)

    def test_dropout_drops_the_same_both_times(self):
        """The gradient is that of the loss which the same random numbers give: a segment is computed twice."""
        model, ids = tunable(dropout=0.4), mx.random.randint(0, VOCABULARY, (2, 40))
        model.train()
        for module in model.modules():
            if "lora_b" in module:
                module.lora_b = mx.random.normal(module.lora_b.shape) * 0.2
        parameters: dict = dict(tree_flatten(model.trainable_parameters()))

        def run():
            mx.random.seed(5)
            loss, tree = gradients(model, ids, 12)
            return loss.item(), dict(tree_flatten(tree))

        _, slope = run()
        norm = sum((g**2).sum().item() for g in slope.values()) ** 0.5
        losses = []
        for step in (1e-2, -1e-2):
            model.load_weights([(name, w + step * slope[name] / norm) for name, w in parameters.items()], strict=False)
            losses.append(run()[0])
        assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(norm, rel=0.02)


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path):
        def run(*args):
            command = ["lora", "--train", "--model", str(bundled_model()), "--adapter-path", str(tmp_path / "adapter")]
            return CliRunner().invoke(main, [*command, *map(str, args)])

        return run

    def test_trains(self, run, tmp_path):
        lines = "".join(json.dumps({"text": f"But soft, what light {i}"}) + "\n" for i in range(4))
        for name in ("train", "valid"):
            (tmp_path / f"{name}.jsonl").write_text(lines)
        result = run("--data", tmp_path, "--iters", 2, "--num-layers", 1)
        assert result.exit_code == 0, result.output
        names = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
        assert any(name.endswith("v_proj.lora_a") for name in names)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "a file in it is empty"),
            ('{"text": "a"}\n', "Dataset must have at least batch_size=4 examples but only has 1."),
            ('{"txt": "a"}\n', "Unsupported data format"),
            ('{"text": "a"}\n' + '{"txt": "a"}\n' * 4, "a line of the data has no 'text'"),
            ("{\n", "Expecting property name"),
        ],
    )
    def test_bad_data_is_one_line(self, run, tmp_path, content, message):
        (tmp_path / "train.jsonl").write_text(content)
        result = run("--data", tmp_path, "--num-layers", 1)
        assert result.exit_code == 2
        (line,) = result.stderr.strip().splitlines()[-1:]
        assert line.startswith("error: ") and message in line

    def test_no_data(self, run, tmp_path):
        result = run("--data", tmp_path)
        assert (result.exit_code, "Training set not found" in result.stderr) == (2, True)
