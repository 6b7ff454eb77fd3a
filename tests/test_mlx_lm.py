"""mlx-lm's own commands and functions on a model directory, against what this package says itself."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.convert
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm import cache_prompt, fuse, lora, perplexity
from mlx_lm.generate import BatchGenerator, batch_generate, speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint

import mlx_ttt
from mlx_ttt import cli
from mlx_ttt.checkpoint.convert import convert
from mlx_ttt.network.model import Block

from .models import build, shared

# The 32 greedy tokens after these meet no near tie: the best two logits are 0.02 apart or more.
PROMPTS = [
    "ROMEO:\n",
    "To be, or not to be, that is the question:\n",
    "First Witch.\n",
    "HAMLET.\nWords, words",
]


@pytest.fixture(scope="module")
def model_and_tokenizer(directory):
    return mlx_ttt.load(directory)


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command of mlx-lm's in this process, and returns what it prints."""

    def run(module: ModuleType, *args) -> str:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, args)])
        module.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    "order",
    ["mlx_ttt, mlx_lm.models.cache", pytest.param("mlx_lm.models.cache, mlx_ttt", marks=pytest.mark.slow)],
)
def test_mlx_lm_knows_the_architecture_and_the_cache(order):
    program = f"""
import importlib
import {order}
assert mlx_lm.models.cache.TTTCache.__module__ == "mlx_ttt.network.cache"
assert importlib.import_module("mlx_lm.models.ttt").Model is importlib.import_module("mlx_ttt.model").Model
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_importing_the_package_imports_neither_mlx_nor_mlx_lm():
    program = """
import sys, mlx_ttt.cli
assert not {"mlx.core", "mlx_lm", "transformers", "numpy"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


class TestDirectory:
    @pytest.mark.slow
    def test_plain_mlx_lm_runs_it_when_told_to_trust_its_code(self, directory, model_and_tokenizer, tmp_path):
        """In a process that has not imported this package; afterwards its prompt caches can be loaded too."""
        saved = tmp_path / "cache.safetensors"
        save_prompt_cache(str(saved), model_and_tokenizer[0].make_cache())
        program = f"""
import sys
import mlx_lm
from mlx_lm.models.cache import load_prompt_cache
try:
    mlx_lm.load({str(directory)!r})
except ValueError as error:
    assert "trust_remote_code" in str(error)
else:
    sys.exit("ran a directory's code unasked")
assert "mlx_ttt" not in sys.modules
model, tokenizer = mlx_lm.load({str(directory)!r}, trust_remote_code=True)
cache = load_prompt_cache({str(saved)!r})
print(mlx_lm.generate(model, tokenizer, "ROMEO:\\n", max_tokens=12, prompt_cache=cache))
"""
        result = subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.PIPE, text=True)
        assert result.stdout == mlx_ttt.generate(*model_and_tokenizer, "ROMEO:\n", max_tokens=12) + "\n"

    @pytest.mark.parametrize("trust", [False, True])
    def test_its_code_is_not_run_where_this_package_is_imported(self, directory, tmp_path, trust):
        for file in directory.iterdir():
            (tmp_path / file.name).symlink_to(file)
        (tmp_path / "ttt.py").unlink()
        (tmp_path / "ttt.py").write_text("raise SystemExit('this code was run')")
        mlx_lm.load(str(tmp_path), trust_remote_code=trust)
        mlx_ttt.load(tmp_path)

    def test_other_architectures_still_need_trust(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "other", "model_file": "other.py"}')
        (tmp_path / "model.safetensors").symlink_to(mlx_ttt.bundled_model() / "model.safetensors")
        with pytest.raises(ValueError, match="trust_remote_code"):
            mlx_lm.load(str(tmp_path))

    def test_converting_neither_copies_nor_names_the_code_of_its_source(self, directory, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        for file in directory.iterdir():
            (source / file.name).symlink_to(file)
        (source / "config.json").unlink()
        config = json.loads((directory / "config.json").read_text())
        (source / "config.json").write_text(json.dumps({**config, "model_file": "theirs.py"}))
        (source / "theirs.py").write_text("raise SystemExit")
        convert(source, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["model_file"] == "ttt.py"
        assert [file.name for file in (tmp_path / "out").glob("*.py")] == ["ttt.py"]
        assert (tmp_path / "out" / "ttt.py").read_text() == (directory / "ttt.py").read_text()

    def test_it_can_be_replaced(self, directory, tmp_path):
        convert(directory, shutil.copytree(directory, tmp_path / "out"), overwrite=True)


class TestCommands:
    @pytest.mark.parametrize("name", ["lora", "fuse", "perplexity"])
    def test_arguments_reach_mlx_lm_as_they_are(self, name, monkeypatch):
        seen = []
        monkeypatch.setattr(f"mlx_lm.{name}.main", lambda: seen.append(list(sys.argv)))
        monkeypatch.setattr(sys, "argv", ["mlx-ttt"])
        arguments = ["--model", "x", "-c5", "--port=1", "--", "--help", "a b", "-"]
        result = CliRunner().invoke(cli.main, [name, *arguments], prog_name="mlx-ttt")
        assert (result.exit_code, result.output) == (0, "")
        assert seen == [[f"mlx-ttt {name}", *arguments]]

    def test_help_is_mlx_lms(self):
        help = CliRunner().invoke(cli.main, ["lora", "--help"], prog_name="mlx-ttt").output
        assert help.startswith("usage: mlx-ttt lora")
        assert "--num-layers" in help


@pytest.fixture
def quantized(directory, run, tmp_path) -> Path:
    """What mlx-lm's own convert makes of the directory, in 8 bits."""
    paths = ["--hf-path", directory, "--mlx-path", tmp_path / "quantized"]
    run(sys.modules["mlx_lm.convert"], *paths, "--quantize", "--q-bits", 8, "--q-group-size", 32)
    return tmp_path / "quantized"


def test_mlx_lm_quantizes_all_but_the_inner_model(quantized, directory, model_and_tokenizer):
    model, tokenizer = mlx_ttt.load(quantized)
    layer, full = model.layers[1], model_and_tokenizer[0].layers[1]
    assert all(isinstance(m, nn.QuantizedLinear) for m in (layer.mlp.up_proj, layer.seq_modeling_block.v_proj))
    for name, w in full.seq_modeling_block.parameters().items():
        if isinstance(w, mx.array):
            assert mx.array_equal(layer.seq_modeling_block[name], w), name
    expected = mlx_ttt.generate(*model_and_tokenizer, PROMPTS[0], max_tokens=12)
    assert mlx_ttt.generate(model, tokenizer, PROMPTS[0], max_tokens=12) == expected
    assert mlx_lm.generate(*mlx_lm.load(str(quantized)), PROMPTS[0], max_tokens=12) == expected


class TestGenerate:
    def test_command(self, directory, model_and_tokenizer, run):
        out = run(sys.modules["mlx_lm.generate"], "--model", directory, "--prompt", PROMPTS[0], "-m", 20)
        assert mlx_ttt.generate(*model_and_tokenizer, PROMPTS[0], max_tokens=20) in out

    def test_command_on_a_saved_prompt(self, directory, model_and_tokenizer, run, tmp_path):
        model, tokenizer = model_and_tokenizer
        saved = ["--prompt-cache-file", tmp_path / "prompt.safetensors"]
        run(cache_prompt, "--model", directory, "--prompt", PROMPTS[1], *saved)
        out = run(sys.modules["mlx_lm.generate"], *saved, "--prompt", PROMPTS[3], "-m", 20)
        both = tokenizer.encode(PROMPTS[1]) + tokenizer.encode(PROMPTS[3])  # mlx-lm puts a BOS in front of each
        assert mlx_ttt.generate(model, tokenizer, both, max_tokens=20) in out

    def test_a_rewindable_cache_is_saved_and_loaded(self, tmp_path):
        model = shared("mlp", "111")
        ids = mx.arange(25)[None]
        cache = model.make_cache(rewind=True)
        model(ids[:, :20], cache=cache)
        save_prompt_cache(str(tmp_path / "cache.safetensors"), cache)
        loaded = load_prompt_cache(str(tmp_path / "cache.safetensors"))
        assert [c.trim(5) for c in loaded] == [5, 5]
        [c.trim(5) for c in cache]
        assert mx.array_equal(model(ids[:, 15:], cache=loaded), model(ids[:, 15:], cache=cache))

    def test_speculation_with_a_plain_cache_is_refused(self):
        """mlx-lm would go on after a trim that did nothing."""
        model = shared("linear", "000")
        with pytest.raises(ValueError, match=r"requires a trimmable prompt cache .*TTTCache"):
            next(speculative_generate_step(mx.array([1, 2, 3]), model, model))


@pytest.fixture(scope="module")
def prompts(model_and_tokenizer) -> list[list[int]]:
    return [model_and_tokenizer[1].encode(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def alone(model_and_tokenizer, prompts) -> list[list[int]]:
    """32 greedy tokens after each prompt, each read alone, by nothing but the model."""
    model, texts = model_and_tokenizer[0], []
    for ids in prompts:
        cache, text = model.make_cache(), []
        logits = model(mx.array([ids]), cache=cache)
        for _ in range(32):
            text.append(mx.argmax(logits[0, -1]).item())
            logits = model(mx.array([text[-1:]]), cache=cache)
        texts.append(text)
    return texts


class TestBatches:
    @pytest.mark.parametrize(
        "options", [{}, {"prefill_batch_size": 2, "completion_batch_size": 3, "prefill_step_size": 5}]
    )
    def test_prompts_of_different_lengths(self, model_and_tokenizer, prompts, alone, options):
        assert len({len(ids) for ids in prompts}) == len(prompts)
        max_tokens = [32, 7, 17, 16]
        result = batch_generate(*model_and_tokenizer, prompts, max_tokens=max_tokens, return_token_ids=True, **options)
        assert result.token_ids == [text[:n] for text, n in zip(alone, max_tokens, strict=True)]

    def test_texts_go_on_from_returned_caches(self, model_and_tokenizer, prompts, alone):
        options = {"return_prompt_caches": True, "return_token_ids": True}
        first = batch_generate(*model_and_tokenizer, prompts, max_tokens=[3, 11, 9, 16], **options)
        read = [len(ids) for ids in first.token_ids]
        assert [cache[0].offset for cache in first.caches] == [
            [len(ids) + n] for ids, n in zip(prompts, read, strict=True)
        ]
        following = [[text[n]] for text, n in zip(alone, read, strict=True)]
        again = batch_generate(
            *model_and_tokenizer, following, prompt_caches=first.caches, max_tokens=12, return_token_ids=True
        )
        assert again.token_ids == [text[n + 1 : n + 13] for text, n in zip(alone, read, strict=True)]

    def test_joining_and_leaving_on_the_way(self, model_and_tokenizer, prompts, alone):
        generator = BatchGenerator(model_and_tokenizer[0], max_tokens=32, prefill_step_size=4)
        uids, texts = generator.insert(prompts[:2]), {}
        for step in range(60):
            if step in (4, 19):
                uids += generator.insert([prompts[len(uids)]])
            if step == 15:
                generator.remove([uids[0]])
            for response in generator.next()[1]:
                texts.setdefault(response.uid, []).append(response.token)
        generator.close()
        assert 0 < len(texts[uids[0]]) < 32
        assert texts[uids[0]] == alone[0][: len(texts[uids[0]])]
        assert [texts[uid] for uid in uids[1:]] == alone[1:]


@pytest.fixture
def interpreted():
    """Without mx.compile, which on Linux calls a C++ compiler for most of a minute."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture(scope="module")
def verses(tmp_path_factory, shakespeare_dir) -> Path:
    """A data set of two texts, so that every batch of two is the same."""
    folder = tmp_path_factory.mktemp("verses")
    texts = (shakespeare_dir.parent / "tempest.txt").read_text(encoding="utf-8")[5000:].split("\n\n")[:2]
    lines = "".join(json.dumps({"text": text[:150]}) + "\n" for text in texts)
    for name in ("train", "valid"):
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


@pytest.mark.usefixtures("interpreted")
class TestLora:
    def loss(self, model, tokenizer, verses: Path) -> float:
        """Mean negative log-likelihood of the data set's tokens, one text at a time."""
        total = count = 0
        for line in (verses / "train.jsonl").read_text().splitlines():
            ids = mx.array([[*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id]])
            losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
            total, count = total + losses.sum().item(), count + losses.size
        return total / count

    def train(self, run, directory, verses, adapter, *options) -> None:
        data = ["--model", directory, "--data", verses, "--adapter-path", adapter]
        run(lora, "--train", *data, "--iters", 5, "--batch-size", 2, "--learning-rate", 1e-3, *options)

    @pytest.mark.parametrize(
        "kind", ["lora", *(pytest.param(x, marks=pytest.mark.slow) for x in ("dora", "dropout", "full"))]
    )
    def test_it_learns_through_the_update_rule(self, kind, directory, model_and_tokenizer, verses, run, tmp_path):
        options = ["--num-layers", 2]
        if kind == "dropout":
            (tmp_path / "config.yaml").write_text("lora_parameters: {rank: 8, dropout: 0.1, scale: 20.0}")
            options += ["-c", tmp_path / "config.yaml"]
        else:
            options += ["--fine-tune-type", kind]
        self.train(run, directory, verses, tmp_path / "adapter", *options)
        tuned, tokenizer = mlx_lm.load(str(directory), adapter_path=str(tmp_path / "adapter"))
        assert self.loss(tuned, tokenizer, verses) < 0.9 * self.loss(*model_and_tokenizer, verses)
        learned = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
        changed = {name for name, w in learned.items() if "lora_a" not in name and mx.any(w != 0)}
        place = ".seq_modeling_block." + ("W1" if kind == "full" else "v_proj.lora_b")
        assert {f"model.layers.{i}{place}" for i in (2, 3)} <= changed

    @pytest.mark.slow
    def test_it_learns_on_quantized_weights(self, quantized, verses, run, tmp_path):
        self.train(run, quantized, verses, tmp_path / "adapter", "--num-layers", 2)
        tuned = mlx_lm.load(str(quantized), adapter_path=str(tmp_path / "adapter"))
        assert self.loss(*tuned, verses) < 0.9 * self.loss(*mlx_lm.load(str(quantized)), verses)

    def test_adapter_in_generate_and_fused(self, directory, model_and_tokenizer, verses, run, tmp_path):
        self.train(run, directory, verses, tmp_path / "adapter", "--num-layers", 2)
        adapter = ["--model", directory, "--adapter-path", tmp_path / "adapter"]
        out = run(sys.modules["mlx_lm.generate"], *adapter, "--prompt", PROMPTS[0], "-m", 20)
        run(fuse, *adapter, "--save-path", tmp_path / "fused")
        assert (
            json.loads((tmp_path / "fused" / "config.json").read_text())["model_file"] == "ttt.py"
        )  # for stock mlx-lm
        fused = mlx_ttt.generate(*mlx_ttt.load(tmp_path / "fused"), PROMPTS[0], max_tokens=20)
        assert fused in out
        assert fused != mlx_ttt.generate(*model_and_tokenizer, PROMPTS[0], max_tokens=20)

    @pytest.mark.parametrize("flags", ["000", "111"])
    def test_gradient_checkpointing_changes_no_gradient(self, flags, monkeypatch):
        model = build("mlp", flags)
        batch, lengths = mx.random.randint(0, 61, (2, 21)), mx.array([[0, 21], [0, 15]])
        monkeypatch.setattr(Block, "__call__", Block.__call__)  # which grad_checkpoint replaces
        expected = nn.value_and_grad(model, default_loss)(model, batch, lengths)[1]
        grad_checkpoint(model.layers[0])
        checkpointed = nn.value_and_grad(model, default_loss)(model, batch, lengths)[1]
        for (name, a), (_, b) in zip(tree_flatten(expected), tree_flatten(checkpointed), strict=True):
            assert mx.allclose(a, b, rtol=1e-3, atol=1e-6), name


class TestPerplexity:
    def test_command(self, directory, model_and_tokenizer, run, monkeypatch):
        """`datasets`, which would download, is replaced by a module with one text."""
        text = "".join(PROMPTS) * 8
        datasets = ModuleType("datasets")
        datasets.load_dataset = lambda path, split: [{"text": text}]
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        options = ["--data-path", "local", "--sequence-length", 50, "--num-samples", 4, "--batch-size", 3]
        out = run(perplexity, "--model", directory, *options)

        model, tokenizer = model_and_tokenizer
        ids = mx.array([*tokenizer.encode(text), tokenizer.eos_token_id][:200]).reshape(4, 50)
        losses = [nn.losses.cross_entropy(model(row[None, :-1]), row[None, 1:], reduction="none") for row in ids]
        found = float(re.search(r"Perplexity: ([\d.]+)", out)[1])
        assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
