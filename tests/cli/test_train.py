"""train: options, what is shown, resume, Ctrl-C, bad input."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import mlx_ttt
from mlx_ttt.training import presets
from mlx_ttt.training.run import saved_options

from .test_cli import assert_one_line, run

WORDS = "I have of late, but wherefore I know not, lost all my mirth, forgone all custom of exercises. " * 60
SMALL = ["--length", 16, "--batch-size", 2, "--micro-batch", 1, "--vocab-size", 300, "--evaluate-every", 2]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Makes the smallest preset a very small one."""
    small = presets.Preset(1, 16, 2, 24, replace(presets.PRESETS["tiny"].defaults, steps=3))
    monkeypatch.setitem(presets.PRESETS, "tiny", small)


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "book.txt").write_text(WORDS)
    return tmp_path / "book.txt"


@pytest.fixture
def started(text, tmp_path) -> Path:
    """A training that has not taken a step."""
    from mlx_ttt.cli.train import _with_defaults, train
    from mlx_ttt.training.run import begin

    arguments = [str(x) for x in ("out", "--preset", "tiny", "--data", text, *SMALL, "--steps", 2000)]
    given = train.make_context("train", arguments).params
    options = _with_defaults({k: v for k, v in given.items() if k not in ("out", "resume")})
    begin(tmp_path / "started", replace(options, data=[str(text)], held_out=[], save_every=1000, evaluate_every=1000))
    return tmp_path / "started"


def train(*args):
    result = run("train", *args)
    assert result.exit_code == 0, (result.output, result.exception)
    return result


class TestTraining:
    def test_a_new_model(self, text, tmp_path):
        result = train(tmp_path / "out", "--preset", "tiny", "--layer", "mlp", "--data", text, *SMALL)
        assert re.search(
            r"^a step of 2 sequences of up to 16 tokens takes about \d+ s, all 3 steps \d+ s$", result.stdout, re.M
        )
        held_out = re.findall(
            r"^step (\d+): held out [\d.]+ nats per token.*; by position 0 to \d+: [\d.]+", result.stdout, re.M
        )
        assert held_out == ["0", "2", "3"]
        assert "3 steps done" in result.stdout
        assert result.stderr == ""  # no moving line: this is no terminal
        assert (tmp_path / "out" / "training.png").read_bytes().startswith(b"\x89PNG")
        model, _ = mlx_ttt.load(tmp_path / "out")
        assert model.args.ttt_layer_type == "mlp" and model.args.vocab_size == 300
        assert run("generate", "--model", tmp_path / "out", "-p", "mirth", "-m", 3).exit_code == 0

    @pytest.mark.slow
    def test_from_a_model(self, text, tmp_path):
        train(tmp_path / "first", "--preset", "tiny", "--data", text, *SMALL)
        result = train(tmp_path / "out", "--from", tmp_path / "first", "--data", text, "--steps", 1, "--length", 8)
        assert "1 steps done" in result.stdout
        options = saved_options(tmp_path / "out")
        assert (options.lr, options.batch_size, options.preset) == (3e-4, 4, None)

    def test_defaults(self, text):
        from mlx_ttt.cli.train import _with_defaults, train

        given = train.make_context("train", ["out", "--preset", "125m", "--data", str(text)]).params
        options = _with_defaults({k: v for k, v in given.items() if k not in ("out", "resume")})
        assert (options.steps, options.lr, options.end_lr, options.warmup) == (4800, 3e-3, 1e-5, 480)
        assert (options.length, options.batch_size, options.micro_batch) == (2048, 256, 1)
        assert (options.layer, options.vocab_size, options.weight_decay, options.clip) == ("linear", 32_000, 0.1, 1)

    @pytest.mark.slow
    def test_resume(self, text, tmp_path):
        arguments = ["--preset", "tiny", "--data", text, *SMALL]
        train(tmp_path / "out", *arguments, "--resume")  # nothing is there: it begins
        before = (tmp_path / "out" / "model.safetensors").read_bytes()
        for again in ([], arguments):
            assert "3 steps done" in train(tmp_path / "out", "--resume", *again).stdout
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
        assert_one_line(
            run("train", tmp_path / "out", "--resume", "--lr", 1e-2), r"--lr 0.01: the training .* has 0.003"
        )


class TestProcess:
    """In a process of its own."""

    COMMAND = (sys.executable, "-c", "from mlx_ttt.cli import main; main()", "train", "--resume")

    @pytest.mark.slow
    def test_ctrl_c_saves(self, started):
        with subprocess.Popen(
            [*self.COMMAND, started], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            for _ in range(2):  # evaluated, first part done
                process.stdout.readline()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate()
        step = int(re.search(r"stopped after step (\d+) of 2000; --resume goes on", out)[1])
        assert process.returncode == 130
        assert err == ""
        assert [p.name for p in (started / "checkpoints").iterdir()] == [f"step-{step:08}"]
        logged = [json.loads(line) for line in (started / "log.jsonl").read_text().splitlines()]
        assert len([e for e in logged if "loss" in e]) == step

    @pytest.mark.slow
    def test_a_second_ctrl_c_stops_at_once(self, started):
        """Here while the first one is being followed: what was not saved is lost, and nothing else."""
        slow = "Training.save = lambda self: print('saving', flush=True) or signal.pause()"
        # Where tests run in the background, Ctrl-C is ignored from the start.
        usual = "signal.signal(signal.SIGINT, signal.default_int_handler)"
        imports = "import signal; from mlx_ttt.cli import main; from mlx_ttt.training.run import Training"
        code = f"{imports}; {usual}; {slow}; main()"
        command = (sys.executable, "-c", code, "train", "--resume", started)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            while process.stdout.readline() != "saving\n":
                pass
            process.send_signal(signal.SIGINT)
            _, err = process.communicate()
        assert process.returncode == 130
        assert err == f"{started}: stopped at once; --resume goes on from step 0\n"

    @pytest.mark.slow
    def test_the_line_moves_on_a_terminal(self, started):
        terminal, theirs = pty.openpty()
        with subprocess.Popen([*self.COMMAND, started], stdout=subprocess.PIPE, stderr=theirs) as process:
            os.close(theirs)
            shown = b""
            while shown.count(b"\r") < 5:
                shown += os.read(terminal, 1000)
            process.send_signal(signal.SIGINT)
            process.communicate()
        os.close(terminal)
        line = r"step \d+/2000( 1/2)?  loss \d\.\d+  [\d,]+ tokens/s  \d\.\d\d GB  [\w ]+ left"
        assert re.search(line, shown.decode())


class TestBadInput:
    """One line, exit status 2, and nothing half-written."""

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "Give --preset for a new model, or --from MODEL"),
            (["--preset", "tiny", "--from", "x", "--data", "x"], "not both"),
            (["--preset", "tiny"], "no data"),
            (["--preset", "tiny", "--data", "/nowhere"], "/nowhere"),
            (["--from", "/nowhere", "--data", "x"], "/nowhere"),
            (["--from", "x", "--data", "x", "--layer", "mlp"], "--layer is for a new model"),
            (["--from", "x", "--data", "x", "--vocab-size", "500"], "--vocab-size is for a new model"),
            (["--preset", "tiny", "--data", "x", "--tokenizer", "t", "--vocab-size", "500"], "leave it out"),
            (["--preset", "tiny", "--data", "x", "--tokenizer", "/nowhere"], "/nowhere"),
        ],
    )
    def test_options(self, arguments, message, tmp_path):
        assert_one_line(run("train", tmp_path / "out", *arguments), message)
        assert not list(tmp_path.iterdir())

    def test_out_exists(self, text, tmp_path):
        arguments = ["--preset", "tiny", "--data", text]
        assert_one_line(run("train", tmp_path, *arguments), "exists already; --resume")
        assert_one_line(run("train", tmp_path, "--resume"), "holds no checkpoint of a training")

    def test_a_folder_that_does_not_exist(self, text, tmp_path):
        assert_one_line(run("train", tmp_path / "a" / "b", "--preset", "tiny", "--data", text), "create it first")

    @pytest.mark.parametrize(("content", "message"), [(b"", "no text|empty"), (b"hi", "."), (b"\xff\xfe\xfd", "UTF-8")])
    def test_data(self, content, message, tmp_path):
        (tmp_path / "bad.txt").write_bytes(content)
        assert_one_line(run("train", tmp_path / "out", "--preset", "tiny", "--data", tmp_path / "bad.txt"), message)
        assert not (tmp_path / "out").exists()

    def test_a_line_of_jsonl(self, tmp_path):
        (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"txet": "two"}\n')
        result = run("train", tmp_path / "out", "--from", mlx_ttt.bundled_model(), "--data", tmp_path / "bad.jsonl")
        assert_one_line(result, r"bad\.jsonl, line 2")

    def test_a_quantized_model(self, directory, text, tmp_path):
        run("convert", "mlx", directory, tmp_path / "quantized", "--bits", 4)
        result = run("train", tmp_path / "out", "--from", tmp_path / "quantized", "--data", text)
        assert_one_line(result, "quantized; first run `convert.py mlx --dequantize`")

    def test_a_loss_that_is_no_number(self, text, tmp_path):
        arguments = ["--preset", "tiny", "--data", text, *SMALL, "--lr", 1000, "--steps", 200]
        result = run("train", tmp_path / "out", *arguments)
        assert result.exit_code == 2
        assert re.search(r"^error: step \d+: .*loss is nan.* has the weights after step \d+\n$", result.stderr)
        mlx_ttt.load(tmp_path / "out")
