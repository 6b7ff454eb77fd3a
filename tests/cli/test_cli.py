"""The command line: its text, its errors in one line, its exit statuses."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import mlx_ttt
from mlx_ttt.cli import main

ROOT = Path(__file__).parents[2]


def run(*args: str | Path, stdin: str | None = None):
    return CliRunner().invoke(main, [str(arg) for arg in args], input=stdin)


def generate(*args: str | Path, **options):
    result = run("generate", *args, **options)
    assert result.exit_code == 0, result.output
    return result


def assert_one_line(result, message: str) -> None:
    """Exit status 2, nothing on stdout, and one line on stderr that says what is wrong."""
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert re.search(message, result.stderr), result.stderr
    assert "Traceback" not in result.output


@pytest.fixture(scope="module")
def text() -> str:
    return mlx_ttt.generate(*mlx_ttt.load(), "ROMEO:\n", max_tokens=60)


@pytest.fixture
def checkpoint(shakespeare_dir, tmp_path) -> Path:
    return Path(shutil.copytree(shakespeare_dir, tmp_path / "checkpoint"))


class TestGenerate:
    def test_prompt(self, text):
        assert generate("--prompt", "ROMEO:\n", "-m", 60).stdout == text + "\n"

    def test_prompt_from_stdin_and_file(self, text, tmp_path):
        (tmp_path / "prompt").write_text("ROMEO:\n")
        assert generate("--prompt", "-", "-m", 60, stdin="ROMEO:\n").stdout == text + "\n"
        assert generate("--prompt-file", tmp_path / "prompt", "-m", 60).stdout == text + "\n"

    def test_stop(self, text):
        assert (
            generate("-p", "ROMEO:\n", "-m", 60, "--stop", text[30:35]).stdout == text[: text.index(text[30:35])] + "\n"
        )

    def test_samples_are_separate_and_repeatable(self):
        arguments = ["-p", "ROMEO:\n", "-m", 20, "--temp", 0.9, "--top-p", 0.9, "--top-k", 50, "--seed", 3, "-n", 3]
        first, second = generate(*arguments).stdout, generate(*arguments).stdout
        samples = re.split(r"^--- \d of 3 ---$", first, flags=re.M)[1:]
        assert first == second
        assert len(set(samples)) == 3

    def test_a_draft_model(self, text):
        drafted = ["-p", "ROMEO:\n", "--draft-model", mlx_ttt.bundled_model()]
        result = generate(*drafted, "-m", 20, "-v")
        assert text.startswith(result.stdout.rstrip("\n"))
        assert re.search(r"proposed by the draft model: 1\d of these tokens", result.stderr)
        assert_one_line(run("generate", *drafted, "--num-draft-tokens", 17), "can take back 16 at most")

    def test_a_draft_model_of_another_vocabulary(self, tmp_path):
        other = shutil.copytree(mlx_ttt.bundled_model(), tmp_path / "other")
        tokenizer = json.loads((other / "tokenizer.json").read_text())
        vocabulary = tokenizer["model"]["vocab"]
        vocabulary["Z"], vocabulary["1"] = vocabulary["1"], vocabulary["Z"]
        (other / "tokenizer.json").write_text(json.dumps(tokenizer))
        assert_one_line(run("generate", "-p", "ROMEO:", "--draft-model", other), "has another vocabulary")

    def test_statistics(self):
        shown = generate("-p", "ROMEO:\n", "-m", 20, "--verbose").stderr
        for figure in (r"prompt: 7 tokens, [\d.]+ tokens/s", r"generation: 20 tokens, [\d.]+ tokens/s"):
            assert re.search(figure, shown)
        assert re.search(r"peak memory: \d+ MB, state: 0\.4\d MB", shown)

    def test_save_and_resume(self, text, tmp_path):
        state = tmp_path / "a.state"
        first = generate("-p", "ROMEO:\n", "-m", 25, "--save-state", state).stdout
        rest = generate("--load-state", state, "-m", 35).stdout
        assert first[:-1] + rest == text + "\n"

    def test_read_only_then_write(self, text, tmp_path):
        state = tmp_path / "a.state"
        assert generate("-p", "ROMEO:\n", "-m", 0, "--save-state", state).stdout == ""
        assert generate("--load-state", state, "-m", 60).stdout == text + "\n"

    def test_a_prompt_after_a_state_is_one_text(self, tmp_path):
        state = tmp_path / "a.state"
        generate("-p", "ROMEO:\n", "-m", 0, "--save-state", state)
        resumed = generate("--load-state", state, "-p", "I am", "-m", 30).stdout
        assert resumed == generate("-p", "ROMEO:\nI am", "-m", 30).stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "no prompt: give --prompt"),
            (["-p", ""], "the prompt is empty"),
            (["-p", "a", "--prompt-file", "b"], "not both"),
            (["--prompt-file", "nowhere.txt"], "nowhere.txt: No such file"),
            (["--prompt-file", sys.executable], "not UTF-8"),
            (["-p", "\udcff"], "--prompt: not UTF-8 text"),
            (["--model", "nowhere", "-p", "a"], "nowhere: no such model directory"),
            (["--model", "tests", "-p", "a"], "tests/config.json: no such file"),
            (["-p", "a", "-m", "0"], "--save-state FILE"),
            (["-p", "a", "-n", "2", "--save-state", "s"], "leave out --num-samples"),
            (["-p", "a", "--save-state", "no/such/folder/s"], "no such folder"),
            (["-p", "a", "--save-state", "tests"], "tests: exists and is not a file"),
            (["-p", "a", "--save-state", ""], "is not a file"),
            (["-p", "a", "--save-state", "/dev/null"], "/dev/null: exists and is not a file"),
            (["--load-state", ""], "cannot be read"),
            (["--load-state", "nowhere.state"], "nowhere.state: the state cannot be read: no such file"),
            (["--load-state", "README.md"], "README.md: the state cannot be read"),
        ],
    )
    def test_bad_input(self, arguments, message, monkeypatch):
        monkeypatch.chdir(ROOT)
        assert_one_line(run("generate", *arguments), message)

    def test_bad_options(self):
        wrong = [("--temp", "-1"), ("--temp", "nan"), ("--temp", "inf"), ("--top-p", "2"), ("--top-p", "0")]
        wrong += [("--seed", str(2**64)), ("--max-tokens", "x"), ("--num-samples", "0")]
        for option, value in wrong:
            result = run("generate", "-p", "a", option, value)
            assert result.exit_code == 2
            assert option in result.stderr

    def test_extreme_sampling(self, text):
        """A temperature near zero is greedy; a top-k above the size of the vocabulary means all tokens."""
        assert generate("-p", "ROMEO:\n", "-m", 60, "--temp", 1e-40).stdout == text + "\n"
        all_tokens, more = (generate("-p", "a", "-m", 9, "--temp", 1, "--seed", 1, "--top-k", k) for k in (0, 2048))
        assert all_tokens.stdout == more.stdout

    def test_a_model_without_a_name_is_not_the_bundled_one(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert_one_line(run("generate", "--model", "", "-p", "a"), "config.json: no such file")

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda d: (d / "config.json").write_text("{"), "config.json: not valid JSON"),
            (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "a model of type llama"),
            (lambda d: (d / "config.json").write_text('{"model_type": "ttt"}'), "lacks vocab_size"),
            (lambda d: _edit_config(d, hidden_size=255), "hidden_size 255"),
            (lambda d: _edit_config(d, mini_batch_size=2 * 10**9), "mini_batch_size is 2000000000"),
            (lambda d: _edit_config(d, num_hidden_layers=5), "num_hidden_layers is 5"),
            (lambda d: _edit_config(d, vocab_size=100), "model.embed_tokens.weight has shape"),
            (lambda d: _edit_config(d, use_gate=False), "g_proj.weight.*not in a model of this config"),
            (lambda d: _edit_config(d, tie_word_embeddings=False), "lm_head.weight.*missing"),
            (lambda d: (d / "model.safetensors").unlink(), "no weights"),
            (lambda d: _truncate(d / "model.safetensors", 0.5), "model.safetensors: truncated or damaged"),
            (lambda d: (d / "tokenizer.json").write_text("{"), "the tokenizer cannot be read"),
            (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer.json"),
        ],
    )
    def test_a_damaged_model_directory(self, damage, message, tmp_path):
        model = Path(shutil.copytree(mlx_ttt.bundled_model(), tmp_path / "directory"))
        damage(model)
        assert_one_line(run("generate", "--model", model, "-p", "a"), message)


def _edit_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _truncate(file: Path, part: float) -> None:
    os.truncate(file, int(file.stat().st_size * part))


class TestConvert:
    def test_a_checkpoint_becomes_a_model(self, checkpoint, tmp_path):
        result = run("convert", "mlx", checkpoint, tmp_path / "out", "--dtype", "float16")
        assert result.exit_code == 0
        assert result.stdout == f"{tmp_path / 'out'}: 3.83 M parameters, 7.8 MB, 16.30 bits per weight\n"
        assert result.stderr == ""
        official = {case["prompt"]: case for case in json.loads((checkpoint / "expected.json").read_text())["greedy"]}
        written = generate("--model", tmp_path / "out", "-p", "ROMEO:\n", "-m", 60).stdout
        assert official["ROMEO:\n"]["text"].startswith(written.removesuffix("\n"))
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_inspect(self, checkpoint):
        result = run("convert", "inspect", checkpoint)
        assert result.exit_code == 0
        for fact in ("PyTorch", "3.83 M", "TTT-Linear", "4 layers", "4 heads", "mini-batch size 16", "tokenizer.model"):
            assert fact in result.stdout, fact

    def test_inspect_a_model_directory(self):
        result = run("convert", "inspect", mlx_ttt.bundled_model())
        assert result.exit_code == 0
        assert "float16" in result.stdout

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda d: shutil.rmtree(d), "no such file or folder"),
            (lambda d: (d / "pytorch_model.bin").unlink(), "no weights"),
            (lambda d: (d / "config.json").unlink(), "--config"),
            (lambda d: (d / "config.json").write_text('{"model_type": "llama"}'), "llama"),
            (lambda d: _edit_config(d, num_hidden_layers=3), "num_hidden_layers is 3"),
            (lambda d: _edit_config(d, intermediate_size=700), "mlp.*has shape"),
            (lambda d: _edit_config(d, use_gate=False), "g_proj.*not in a model of this config"),
            (lambda d: _edit_config(d, share_qk=False), "k_proj.weight.*missing"),
            (lambda d: _truncate(d / "pytorch_model.bin", 0.7), "damaged"),
            (lambda d: (d / "pytorch_model.bin").write_bytes(b"not a checkpoint"), "pytorch_model.bin"),
            (lambda d: (d / "tokenizer.model").write_bytes(b"no"), "tokenizer.model"),
        ],
    )
    def test_bad_input(self, checkpoint, tmp_path, damage, message):
        damage(checkpoint)
        before = sorted(tmp_path.iterdir())
        assert_one_line(run("convert", "mlx", checkpoint, tmp_path / "out"), message)
        assert sorted(tmp_path.iterdir()) == before

    def test_out_that_exists(self, checkpoint, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("")
        assert_one_line(run("convert", "mlx", checkpoint, tmp_path / "out"), "--overwrite")
        assert (tmp_path / "out" / "mine").exists()


class TestConvertFromJAX:
    """A folder as the authors publish it: a stream, pickles beside it, no config."""

    @pytest.fixture
    def stream(self, golden_dir, tmp_path) -> Path:
        (tmp_path / "download").mkdir()
        (tmp_path / "download" / "metadata.pkl").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
        return Path(shutil.copy(golden_dir / "jax-mlp-transformer" / "streaming_params", tmp_path / "download"))

    def test_a_stream_becomes_a_model(self, stream, golden_dir, tmp_path):
        """With the constants it was made with, it becomes the same model as with its config."""
        own, out = tmp_path / "own", tmp_path / "out"
        assert run("convert", "mlx", golden_dir / "jax-mlp-transformer", own).exit_code == 0
        result = run("convert", "mlx", stream.parent, out, "--ttt-base-lr", 1, "--rope-theta", 10000)
        assert result.exit_code == 0
        assert re.match(r"warning: no config: .* rms_norm_eps 1e-06 \(--rms-norm-eps\)\n", result.stderr)
        made, expected = (json.loads((folder / "config.json").read_text()) for folder in (out, own))
        assert made.items() <= expected.items()
        assert (out / "model.safetensors").read_bytes() == (own / "model.safetensors").read_bytes()

    def test_inspect(self, stream):
        result = run("convert", "inspect", stream.parent)
        assert result.exit_code == 0
        facts = ("JAX stream", "TTT-MLP", "2 layers", "1 heads of 64", "vocabulary 160", "ttt_base_lr 0.1", "tied")
        for fact in facts:
            assert fact in result.stdout, fact
        assert "problem" not in result.stdout

    @pytest.mark.parametrize(
        ("damage", "options", "message"),
        [
            (lambda f: _truncate(f, 0.5), (), "streaming_params: truncated or damaged"),
            (lambda f: f.write_bytes(b"\x80\x04N."), (), "streaming_params: named like a JAX stream, but is a pickle"),
            (lambda f: f.rename(f.with_name("weights")), (), "no weights in this folder .*JAX streams"),
            (lambda f: None, ("--ttt-base-lr", 0), "ttt_base_lr is 0.0, expected a positive number"),
            (lambda f: None, ("--config", "nowhere.json"), "nowhere.json: no such file"),
            (lambda f: (f.parent / "config.json").write_text("{}"), (), "config.json: lacks vocab_size"),
        ],
    )
    def test_bad_input(self, stream, tmp_path, damage, options, message):
        damage(stream)
        assert_one_line(run("convert", "mlx", stream.parent, tmp_path / "out", *options), message)
        assert [path.name for path in tmp_path.iterdir()] == ["download"]

    def test_constants_of_a_checkpoint_with_a_config(self, checkpoint, tmp_path):
        result = run("convert", "mlx", checkpoint, tmp_path / "out", "--rope-theta", 500)
        assert_one_line(result, "config.json: set rope_theta in there")


def test_version():
    assert run("--version").stdout == f"mlx-ttt, version {mlx_ttt.__version__}\n"


class TestProcess:
    """What can only be tested in a process of its own."""

    def test_the_scripts(self):
        for script in ("generate.py", "convert.py"):
            result = subprocess.run([sys.executable, ROOT / script, "--help"], capture_output=True, text=True)
            assert result.returncode == 0
            assert f"Usage: {script}" in result.stdout

    @pytest.mark.slow
    def test_text_is_streamed(self):
        """The first words arrive before the last are written."""
        command = [sys.executable, ROOT / "generate.py", "-p", "ROMEO:\n", "-m", "300"]
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0, env=buffered) as process:
            first = process.stdout.read(1 << 20)  # returns as soon as there are any bytes
            rest = process.stdout.read()
        assert process.returncode == 0
        assert 0 < len(first) < len(rest)

    @pytest.mark.slow
    def test_ctrl_c_keeps_what_there_is(self, tmp_path):
        """The text so far is printed and saved, statistics are shown, and there is no traceback."""
        state = tmp_path / "s"
        process = subprocess.Popen(
            [sys.executable, ROOT / "generate.py", "-p", "ROMEO:\n", "-m", "-1", "-v", "--save-state", state],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        first = process.stdout.read(40)
        process.send_signal(signal.SIGINT)
        rest, messages = process.stdout.read(), process.stderr.read()
        assert process.wait(timeout=60) == 130
        assert "Traceback" not in messages
        assert "generation:" in messages
        written = (first + rest)[:-1]
        resumed = generate("--load-state", state, "-m", 20).stdout
        n = len(mlx_ttt.load()[1].encode(written, add_special_tokens=False))
        whole = generate("-p", "ROMEO:\n", "-m", n + 40).stdout
        assert whole.startswith(written + resumed[:-1])

    @pytest.mark.slow
    def test_a_closed_pipe_is_no_error(self):
        program = f"{sys.executable} {ROOT / 'generate.py'} -p ROMEO: -m 100 | head -c 5"
        result = subprocess.run(program, shell=True, capture_output=True, text=True)
        assert len(result.stdout) == 5
        assert result.stderr == ""

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
    def test_a_full_disk_under_the_output(self):
        with open("/dev/full", "w") as full:
            command = [sys.executable, ROOT / "generate.py", "-p", "a", "-m", "5"]
            result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
        assert result.returncode == 2
        assert result.stderr == "error: output: No space left on device\n"

    @pytest.mark.slow
    def test_a_prompt_in_another_locale(self):
        environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        environment["PYTHONIOENCODING"] = "utf-8"
        command = [sys.executable, ROOT / "generate.py", "-p", "é", "-m", "5"]
        result = subprocess.run(command, env=environment, capture_output=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout == generate("-p", "é", "-m", "5").stdout_bytes
