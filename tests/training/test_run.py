"""A training in its folder: what it leaves there, exact resume after any kill, what goes wrong."""

from __future__ import annotations

import errno
import json
import math
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.errors import CheckpointError, OutputError, TrainingDataError, TrainingError, TTTError
from mlx_ttt.training import checkpoint, run
from mlx_ttt.training.loop import Part, Step
from mlx_ttt.training.run import Evaluation, Training, begin, saved_options

PROCESS = """
import sys
from pathlib import Path
from mlx_ttt.training.run import Training
training = Training(Path(sys.argv[1]))
print("open", flush=True)
for _ in training.run():
    pass
"""


def arrays(out: Path) -> dict[str, bytes]:
    """All arrays of the newest checkpoint of a training, and its models', as bytes."""
    files = sorted(out.rglob("*.safetensors"))
    loaded = {f"{file.relative_to(out)}: {name}": x for file in files for name, x in mx.load(str(file)).items()}
    return {name: np.array(x.reshape(-1).view(mx.uint8)).tobytes() for name, x in loaded.items()}


def assert_same(out: Path, expected: Path) -> None:
    """Bit for bit."""
    found, wanted = arrays(out), arrays(expected)
    assert found.keys() == wanted.keys()
    assert [name for name, x in wanted.items() if found[name] != x] == []


def steps(out: Path) -> list:
    return [event for event in Training(out).run() if isinstance(event, Step)]


@pytest.fixture
def finished(started, tmp_path) -> Path:
    """A training that was never interrupted."""
    out = Path(shutil.copytree(started, tmp_path / "finished"))
    steps(out)
    return out


class TestFolder:
    def test_models_and_log(self, finished, options):
        for folder in (finished, finished / "best"):
            model, tokenizer = mlx_ttt.load(folder)
            assert math.isfinite(model(mx.array([tokenizer.encode("the of and")])).sum().item())
        entries = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
        assert [e["step"] for e in entries if "loss" in e] == list(range(1, 9))
        assert [e["step"] for e in entries if "held_out" in e] == [0, 4, 8]
        assert all(e["bands"][0]["start"] == 0 for e in entries if "held_out" in e)
        assert saved_options(finished) == options

    @pytest.mark.slow
    def test_it_learns(self, tiny, options, tmp_path):
        begin(tmp_path / "out", replace(options, steps=30, carry=False, lr=1e-2))
        losses = [event.loss for event in Training(tmp_path / "out").run() if isinstance(event, Evaluation)]
        assert losses[-1] < losses[0] - 1

    @pytest.mark.slow
    def test_the_same_seed_gives_the_same_weights(self, finished, options, tmp_path):
        begin(tmp_path / "again", options)
        steps(tmp_path / "again")
        assert_same(tmp_path / "again", finished)

    @pytest.mark.slow
    def test_from_a_model(self, finished, options, tmp_path):
        out = tmp_path / "on"
        begin(out, replace(options, source=str(finished), preset=None, layer=None, vocab_size=None, steps=2))
        before, after = (mx.load(str(folder / "model.safetensors")) for folder in (finished, out))
        assert all(mx.array_equal(after[name], w) for name, w in before.items())
        steps(out)
        after = mx.load(str(out / "model.safetensors"))
        assert not any(mx.array_equal(after[name], w) for name, w in before.items())

    def test_half_precision(self, tiny, options, tmp_path):
        out = tmp_path / "out"
        begin(out, replace(options, dtype="bfloat16", steps=2))
        steps(out)
        weights = mx.load(str(out / "model.safetensors"))
        assert weights["model.embed_tokens.weight"].dtype == mx.bfloat16
        assert weights["model.layers.0.seq_modeling_block.W1"].dtype == mx.float32
        state, _ = checkpoint.load(out / "checkpoints")
        assert {x.dtype for x in state.weights.values()} == {mx.float32}
        assert {x.dtype for name, x in state.optimizer.items() if "step" not in name} == {mx.float32}


class TestResume:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("optimizer", "carry"), [("adamw", True), ("adamw", False), ("muon", False), ("adafactor", True)]
    )
    def test_after_any_step(self, tiny, options, tmp_path, optimizer, carry):
        """Opened again after each step, as if every process had died there."""
        expected, out = tmp_path / "expected", tmp_path / "out"
        begin(expected, replace(options, optimizer=optimizer, carry=carry, dtype="bfloat16" if carry else "float32"))
        shutil.copytree(expected, out)
        steps(expected)
        for step in range(1, 9):
            for event in Training(out).run():
                if isinstance(event, Step) and event.step == step + 1:
                    break  # without saving
        assert_same(out, expected)

    @pytest.mark.slow
    def test_stopped_within_a_step(self, started, finished):
        """What Ctrl-C does: the unfinished step is dropped, the state before it saved."""
        training = Training(started)
        for event in training.run():
            if isinstance(event, Part) and event.step == 6:
                break
        training.save()
        assert training.trainer.step == 5
        assert [e["step"] for e in training.log.entries() if "loss" in e] == list(range(1, 6))
        steps(started)
        assert_same(started, finished)

    @pytest.mark.slow
    def test_after_sigkill(self, started, finished, tmp_path, kills=24):
        """Killed at random moments of stepping, evaluating and saving, in real processes."""
        rng, out = random.Random(kills), tmp_path / "killed"
        reached = set()
        while kills:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(started, out)
            complete = False
            while not complete:
                with subprocess.Popen([sys.executable, "-c", PROCESS, out], stdout=subprocess.PIPE) as process:
                    process.stdout.readline()
                    if kills:
                        time.sleep(rng.uniform(0, 0.5))
                        process.kill()
                    status = process.wait()
                kills -= status == -9
                complete = status == 0
                assert status in (0, -9)
                reached.add(checkpoint.load(out / "checkpoints")[0].step)  # never half-written
            assert_same(out, finished)
        assert len(reached) > 1
        logged = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        assert [e["step"] for e in logged if "loss" in e] == list(range(1, 9))

    def test_other_data(self, started, texts, tmp_path, monkeypatch):
        monkeypatch.setattr(run.data.Batches, "fingerprint", "other")
        with pytest.raises(TrainingError, match="data are not those"):
            Training(started)

    def test_no_training(self, tmp_path):
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            Training(tmp_path)

    def test_damaged_checkpoint(self, started):
        file = next((started / "checkpoints").glob("step-*")) / "weights.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
            Training(started)


class TestFailures:
    @pytest.mark.parametrize(
        ("save_every", "message", "kept"),
        [(1, "step 4: after it", 3), pytest.param(6, "step 5: the loss", 0, marks=pytest.mark.slow)],
    )
    def test_nan(self, tiny, options, tmp_path, monkeypatch, save_every, message, kept):
        """The training stops, says the step, and keeps the last good state."""
        begin(tmp_path / "out", replace(options, save_every=save_every, evaluate_every=100))
        training = Training(tmp_path / "out")
        update = training.trainer.optimizer.update

        def spoil(weights, gradients, lr):
            updated = update(weights, gradients, lr)
            if training.trainer.step == 3:  # the fourth step
                updated["model.norm.weight"] = updated["model.norm.weight"] * 1e38
            return updated

        monkeypatch.setattr(training.trainer.optimizer, "update", spoil)
        with pytest.raises(TrainingError, match=rf"^{message}.* nan.*has the weights after step {kept}$"):
            list(training.run())
        assert checkpoint.load(tmp_path / "out" / "checkpoints")[0].step == kept
        assert mx.isfinite(mlx_ttt.load_model(tmp_path / "out")[0](mx.array([[5, 6, 7]]))).all()

    @pytest.mark.slow
    def test_data_that_break_a_good_model(self, started, monkeypatch):
        """The state before the step is good, so it is saved."""
        training = Training(started)
        batch = training.trainer.batches.batch
        monkeypatch.setattr(
            training.trainer.batches,
            "batch",
            lambda step: replace(batch(step), weights=batch(step).weights * (math.inf if step == 4 else 1)),
        )
        with pytest.raises(TrainingError, match=r"^step 5: the loss is nan.*has the weights after step 4$"):
            list(training.run())
        assert checkpoint.load(started / "checkpoints")[0].step == 4

    @pytest.mark.slow
    def test_full_disk(self, started, finished, monkeypatch):
        """One line, and the last checkpoint stays: the training goes on when there is room again."""
        write, room = checkpoint.write_safetensors, [7]

        def full(path, *args):
            room[0] -= 1
            if room[0] < 0:
                path.write_bytes(b"half")
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            write(path, *args)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_safetensors", full)
            with pytest.raises(OutputError, match="the disk is full") as error:
                steps(started)
        assert "\n" not in str(error.value)
        assert not list(started.rglob("*.partial*"))
        assert checkpoint.load(started / "checkpoints")[0].step == 1
        steps(started)
        assert_same(started, finished)

    def test_too_little_room(self, started, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        with pytest.raises(OutputError, match="the disk is full"):
            Training(started).save()
            steps(started)
        assert checkpoint.load(started / "checkpoints")[0].step == 0

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"data": ["/nowhere.txt"]}, "nowhere"),
            ({"source": "/nowhere", "preset": None}, "nowhere"),
            ({"tokenizer": "/nowhere"}, "nowhere"),
            ({"vocab_size": 30_000}, "too little"),
        ],
    )
    def test_bad_options_leave_nothing(self, tiny, options, tmp_path, change, message):
        with pytest.raises(TTTError, match=message):
            begin(tmp_path / "out", replace(options, **change))
        assert not list(tmp_path.iterdir())

    def test_an_existing_folder(self, tiny, options, tmp_path):
        with pytest.raises(OutputError, match="exists already"):
            begin(tmp_path, options)

    def test_empty_data(self, tiny, options, tmp_path):
        (tmp_path / "empty.txt").touch()
        with pytest.raises(TrainingDataError):
            begin(tmp_path / "out", replace(options, data=[str(tmp_path / "empty.txt")]))
        assert not (tmp_path / "out").exists()
