"""Downloads and uploads, over real connections to a server with the Hub's protocol."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

import mlx_ttt
from mlx_ttt.checkpoint.hub import Located, locate
from mlx_ttt.checkpoint.source import open_source
from mlx_ttt.cli import main
from mlx_ttt.errors import CheckpointError, HubError

from .hub_server import READER, WRITER, Hub

ROOT = Path(__file__).parents[2]
REPO = "some-org/ttt-125m.v2"
OPTIONS = ("--bits", "8", "--group-size", "32")
CONVERTED = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture
def small(golden_dir) -> Path:
    return golden_dir / "linear-mamba"


@pytest.fixture
def files(small) -> dict[str, bytes]:
    """A small checkpoint."""
    return contents(small)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def run(*args: str | Path):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def convert(*args: str | Path) -> str:
    result = run("convert", "mlx", *args)
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_one_line(result, message: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert re.search(message, result.stderr), result.stderr


@pytest.mark.slow
def test_from_one_repository_to_another(files, tmp_path):
    """In processes of their own, with the Hub named by the environment."""
    with Hub() as hub:
        commit = hub.add(REPO, files)
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": WRITER,
            "HF_HUB_DISABLE_XET": "1",
        }
        out = tmp_path / "out"
        result = subprocess.run(
            [sys.executable, ROOT / "convert.py", "mlx", REPO, out, *OPTIONS, "--upload-repo", "me/ttt-8bit"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr.startswith("warning: no tokenizer") and result.stderr.count("\n") == 1  # no progress bars
        assert result.stdout.splitlines()[-1] == f"{hub.url}/me/ttt-8bit"
        uploaded = hub.repos["me/ttt-8bit"]["main"]
    assert uploaded.keys() > CONVERTED
    assert {name: data for name, data in uploaded.items() if name != ".gitattributes"} == contents(out)
    card = uploaded["README.md"].decode()
    assert f"base_model: {REPO}\n" in card and f"[{REPO}]({hub.url}/{REPO}/tree/{commit})" in card
    assert 'mlx_ttt.load("me/ttt-8bit")' in card
    assert f"| `pytorch_model.bin` | `{hashlib.sha256(files['pytorch_model.bin']).hexdigest()}` |" in card


class TestDownload:
    def test_nothing_when_there_is_no_place_for_the_model(self, hub, files, tmp_path):
        hub.add(REPO, files)
        (tmp_path / "out").mkdir()
        assert_one_line(run("convert", "mlx", REPO, tmp_path / "out"), "out: exists already")
        assert not hub.requests

    def test_only_what_is_needed(self, hub):
        """Only the preferred format of the weights is downloaded, and nothing that may contain code."""
        wanted = {"config.json", "tokenizer.model", "generation_config.json", "chat_template.jinja"}
        unwanted = {"README.md", "modeling_ttt.py", "metadata.pkl", "dataset.pkl", "optimizer.bin", "logs/config.json"}
        weights = {
            **{"model.safetensors": {"model.safetensors"}, "pytorch_model.bin": {"pytorch_model.bin"}},
            "streaming_train_state": {"streaming_train_state"},
            "ttt.pt": {"ttt.pt"},
        }
        while weights:
            repo = f"org/{len(weights)}"
            hub.add(repo, dict.fromkeys(wanted | unwanted | weights.keys(), b"{}"))
            hub.requests.clear()
            located = locate(repo)
            assert hub.downloaded() == wanted | weights.pop(next(iter(weights)))
            assert {path.name for path in located.path.iterdir()} == hub.downloaded()

    def test_shards(self, hub):
        """Only the shards that the index names are downloaded."""
        index = b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'
        names = ("model-1.safetensors", "model-2.safetensors", "model-3.safetensors", "pytorch_model.bin", "x.bin")
        hub.add(REPO, dict.fromkeys(names, b"") | {"model.safetensors.index.json": index})
        locate(REPO)
        assert hub.downloaded() == {"model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"}

    def test_an_index_that_names_anything_else(self, hub):
        for name in ("../config.json", "*", ""):
            index = b'{"weight_map": {"a": "%s"}}' % name.encode()
            hub.add(REPO, {"model.safetensors.index.json": index, "metadata.pkl": b"", "pytorch_model.bin": b""})
            with pytest.raises((CheckpointError, HubError)):
                open_source(locate(REPO).path)
            assert hub.downloaded() == {"model.safetensors.index.json"}

    def test_revision(self, hub, files):
        first = hub.add(REPO, files)
        hub.add(REPO, files | {"config.json": b"{}"})
        hub.add(REPO, files | {"config.json": b"[]"}, revision="v2")
        for revision, config in ((None, b"{}"), ("main", b"{}"), ("v2", b"[]"), (first, files["config.json"])):
            located = locate(REPO, revision)
            assert (located.path / "config.json").read_bytes() == config
            assert located == Located(located.path, REPO, hub.commit(REPO, revision or "main"))

    def test_what_is_here_comes_first(self, hub, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path(REPO).mkdir(parents=True)
        assert locate(REPO) == Located(Path(REPO))
        assert locate("nothing/like/it") == Located(Path("nothing/like/it"))
        assert hub.requests == []

    def test_again_and_offline(self, hub, monkeypatch):
        hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"weights"})
        once = locate(REPO)
        hub.requests.clear()
        assert locate(REPO) == once and hub.downloaded() == set()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.requests.clear()
        assert locate(REPO) == once and hub.requests == []
        (once.path / "model.safetensors").unlink()
        with pytest.raises(HubError, match=f"{REPO}: .* not in the Hub's cache, and HF_HUB_OFFLINE is set"):
            locate(REPO)


class TestUse:
    def test_load(self, hub):
        """A model directory on the Hub is loaded by its name."""
        hub.add(REPO, contents(mlx_ttt.bundled_model()))
        written = run("generate", "--model", REPO, "-p", "ROMEO:", "-m", 8).stdout
        assert written == mlx_ttt.generate(*mlx_ttt.load(REPO, "main"), "ROMEO:", max_tokens=8) + "\n"
        beside = {file.name for file in mlx_ttt.bundled_model().iterdir() if file.is_file()}
        assert hub.downloaded() == beside - {"README.md", "ttt.py"}

    def test_official_stream(self, hub, golden_dir, tmp_path):
        """The authors' repositories have no config and no tokenizer; their pickles are not downloaded."""
        stream = (golden_dir / "jax-linear-mamba" / "streaming_train_state").read_bytes()
        hub.add(REPO, {"streaming_train_state": stream, "metadata.pkl": b"", "dataset.pkl": b"", ".gitattributes": b""})
        convert(REPO, tmp_path / "out")
        assert hub.downloaded() == {"streaming_train_state"}
        mlx_ttt.load_model(tmp_path / "out")

    def test_upload_into_a_repository_that_is_there(self, hub, small, tmp_path, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", WRITER)
        hub.add(REPO, {"notes.txt": b"mine"})
        convert(small, tmp_path / "out", "--upload-repo", REPO)
        assert hub.repos[REPO]["main"].keys() > CONVERTED
        assert hub.repos[REPO]["main"]["notes.txt"] == b"mine"


class TestErrors:
    """Every error is one line, and nothing appears at OUT."""

    @pytest.fixture
    def refused(self, tmp_path):
        def refused(message: str, *args: str | Path) -> None:
            args = args or (REPO,)
            assert_one_line(run("convert", "mlx", args[0], tmp_path / "out", *args[1:]), message)
            assert not (tmp_path / "out").exists()

        return refused

    def test_no_such_repository(self, hub, refused):
        refused(f"{REPO}: no such file or folder here, and no such repository on the Hub; a private one needs a login")

    def test_no_such_revision(self, hub, files, refused):
        hub.add(REPO, files)
        refused(f"{REPO}: the repository has no revision v9", REPO, "--revision", "v9")

    def test_revision_of_a_folder(self, refused, small):
        refused("only a repository on the Hub has revisions", small, "--revision", "main")

    def test_gated(self, hub, files, refused):
        hub.add(REPO, files)
        hub.gated.add(REPO)
        refused(f"{REPO}: gated: ask for access at {hub.url}/{REPO}, then log in")

    def test_no_network(self, hub, refused, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
        refused(f"{REPO}: no such file .* not in the Hub's cache, and the Hub cannot be reached .*refused")

    def test_offline(self, hub, files, refused, monkeypatch):
        hub.add(REPO, files)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        refused("not in the Hub's cache, and HF_HUB_OFFLINE is set")
        assert hub.requests == []

    def test_not_a_name(self, hub, refused):
        refused(r"org/a\.\.b: .*repo.id", "org/a..b")
        assert hub.requests == []

    def test_not_one_model(self, hub, refused):
        hub.add(REPO, {"config.json": b"{}"})
        refused(f"{REPO}: has 0 weights files in its top folder")
        hub.add(REPO, {"a.bin": b"", "b.bin": b""})
        refused(rf"{REPO}: has 2 weights files \(a.bin, b.bin\) in its top folder")

    def test_not_a_model(self, hub, refused):
        hub.add(REPO, {"config.json": b"{}", "model.safetensors": b"x"})
        refused("model.safetensors: truncated or damaged")

    def test_nobody_is_logged_in(self, hub, refused, small):
        refused("me/model: to upload there, log in with", small, "--upload-repo", "me/model")
        refused("not the name of a repository", small, "--upload-repo", "https://hub/me/model")
        for name in ("me/a..b", "me/" + "a" * 120):
            refused(f"{name}: ", small, "--upload-repo", name)

    def test_upload_refused(self, hub, small, tmp_path, monkeypatch):
        """The converted model is kept."""
        monkeypatch.setenv("HF_TOKEN", READER)
        result = run("convert", "mlx", small, tmp_path / "out", "--upload-repo", "me/model")
        assert result.exit_code == 2
        *_, last = result.stderr.splitlines()
        assert re.fullmatch("error: me/model: the Hub answers 403: You don't have the rights .+ is complete: .+", last)
        assert {file.name for file in (tmp_path / "out").iterdir()} > CONVERTED

    def test_hub_in_trouble(self, hub, files, refused):
        hub.add(REPO, files)
        hub.status = 500
        refused(f"{REPO}: the Hub answers 500: the Hub has a bad day")
