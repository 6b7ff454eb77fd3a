"""Models by their name on the Hub: fetched once, converted once, and never half."""

from __future__ import annotations

import concurrent.futures
import errno
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from tokenizers import Tokenizer, models

import mlx_ttt
from mlx_ttt.checkpoint import by_name, convert, hub
from mlx_ttt.checkpoint.converted import Home, cache_root, homes
from mlx_ttt.cli import main
from mlx_ttt.errors import TokenizerError

from .hub_server import Hub

ROOT = Path(__file__).parents[2]
REPO, TOKENIZER = "some-org/ttt-125m", "meta/llama"
LARGE = ("streaming_train_state", "model-00001-of-00003.safetensors", "odd-name.safetensors")
TEXT = "To be, or not to be, that is the question"


def tokenizer_json() -> bytes:
    """A token for each character of ASCII."""
    vocabulary = {"<unk>": 0, **{chr(c): c - 30 for c in range(32, 127)}, "\n": 1}
    return Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>")).to_str().encode()


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture
def layouts(golden_dir) -> dict[str, dict[str, bytes]]:
    """Repositories as they are in the world, small."""
    sharded = golden_dir / "linear-mamba-sharded"
    shards = [file.name for file in sharded.iterdir() if file.name.startswith("model")]
    config = json.loads((sharded / "config.json").read_text()) | {
        "auto_map": {"AutoModelForCausalLM": "modeling_ttt.TTTForCausalLM"}
    }
    lone = golden_dir / "linear-transformer"
    return {
        "train state": {
            **contents(golden_dir / "jax-linear-mamba", "streaming_train_state"),
            **dict.fromkeys(("metadata.pkl", "dataset.pkl", ".gitattributes"), b"not to be read"),
        },
        "code beside shards": {
            **contents(sharded, *shards),
            "config.json": json.dumps(config).encode(),
            "modeling_ttt.py": b"open('code-was-run', 'w')",
            "tokenizer.json": tokenizer_json(),
        },
        "lone file": {
            "config.json": (lone / "config.json").read_bytes(),
            "odd-name.safetensors": (lone / "model.safetensors").read_bytes(),
        },
    }


@pytest.fixture
def train_state(hub, layouts) -> dict[str, bytes]:
    """An official repository, and another one that has the tokenizer."""
    hub.add(TOKENIZER, {"tokenizer.json": tokenizer_json(), "model.safetensors": b"large", "config.json": b"{}"})
    hub.add(REPO, layouts["train state"])
    return layouts["train state"]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def run(*arguments: str | Path, **options):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)


def generate(*arguments: str | Path) -> str:
    result = run("generate", "-p", TEXT, "-m", 6, "--model", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def assert_refused(message: str, *arguments: str | Path) -> None:
    """One line, nothing in the cache of converted models, and no traces of a conversion."""
    result = run("generate", "-p", TEXT, "-m", 6, "--model", *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    *told, last = result.stderr.splitlines()
    assert re.search(message, last) and last.startswith("error: "), result.stderr
    assert not any(line.startswith(("error", "Traceback", " ")) for line in told)
    assert homes() == []
    assert not [file for file in cache_root().rglob("*") if not file.name.endswith(".lock")]


def large(hub) -> set[str]:
    """The weights that were asked for."""
    return {name for name in hub.downloaded() if name in LARGE}


class TestLayouts:
    @pytest.mark.parametrize(
        "layout",
        [
            pytest.param("train state", marks=pytest.mark.slow),
            "code beside shards",
            pytest.param("lone file", marks=pytest.mark.slow),
        ],
    )
    def test_the_same_text_as_from_a_directory_and_no_word_to_the_hub_again(
        self, layout, layouts, hub, tmp_path, monkeypatch
    ):
        monkeypatch.chdir(tmp_path)
        files = layouts[layout]
        hub.add(REPO, files)
        (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
        option = [] if "tokenizer.json" in files else ["--tokenizer", tmp_path / "tokenizer.json"]
        here = tmp_path / "here"
        here.mkdir()
        for name, data in files.items():
            (here / name).write_bytes(data)
        assert run("convert", "mlx", here, tmp_path / "out", *option).exit_code == 0
        expected = generate(tmp_path / "out")

        first = run("generate", "-p", TEXT, "-m", 6, "--model", REPO, *option)
        assert first.stdout == expected
        assert re.search(f"{REPO}: downloading [0-9.]+ MB to {re.escape(str(tmp_path / 'cache'))}", first.stderr)
        assert re.search(f"{REPO}: [0-9.]+ MB in {re.escape(str(cache_root()))}/some-org--ttt-125m/", first.stderr)
        assert not {"modeling_ttt.py", "metadata.pkl", "dataset.pkl"} & hub.downloaded()
        assert not (tmp_path / "code-was-run").exists()

        hub.requests.clear()
        shutil.rmtree(tmp_path / "cache")  # not even the download is needed any more
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        again = run("generate", "-p", TEXT, "-m", 6, "--model", REPO)  # the tokenizer is remembered
        assert (again.stdout, again.stderr) == (expected, "")
        assert hub.requests == []

    def test_a_tokenizer_in_another_repository(self, hub, train_state, tmp_path, monkeypatch):
        text = generate(REPO, "--tokenizer", TOKENIZER)
        assert hub.downloaded() == {"tokenizer.json", "streaming_train_state"}
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert text == generate(REPO, "--tokenizer", TOKENIZER) == generate(REPO)
        (entry,) = Home(REPO).entries()
        assert entry.name.startswith(f"{hub.commit(REPO, 'main')}-")
        card = (entry.path / "README.md").read_text()
        assert f"base_model: {REPO}" in card and f'mlx_ttt.load("{REPO}")' in card

    @pytest.mark.slow
    def test_another_tokenizer_later(self, hub, train_state, tmp_path):
        other = tmp_path / "other.json"
        other.write_bytes(tokenizer_json().replace(b"<unk>", b"<odd>"))
        generate(REPO, "--tokenizer", TOKENIZER)
        generate(REPO, "--tokenizer", other)
        first, second = sorted(Home(REPO).entries(), key=lambda entry: len(entry.revisions))
        assert (first.revisions, second.revisions) == ((), ("main",))
        generate(REPO, "--tokenizer", TOKENIZER)
        assert [entry.revisions for entry in Home(REPO).entries() if entry.name == first.name] == [("main",)]

    @pytest.mark.slow
    def test_a_model_directory_is_used_where_it_is(self, hub, tmp_path):
        bundled = mlx_ttt.bundled_model()
        hub.add(REPO, contents(bundled, *(file.name for file in bundled.iterdir() if file.is_file())))
        first = generate(REPO)
        (entry,) = Home(REPO).entries()
        assert entry.path.is_symlink() and entry.nbytes == 0
        hub.requests.clear()
        assert generate(REPO) == first and hub.requests == []
        shutil.rmtree(tmp_path / "cache")  # what the link leads to
        assert generate(REPO) == first and "model.safetensors" in hub.downloaded()

    @pytest.mark.slow
    def test_without_a_tokenizer_for_what_needs_none(self, hub, train_state):
        mlx_ttt.load_model(REPO)
        with pytest.raises(TokenizerError, match=f"{REPO}: has no tokenizer: add --tokenizer FILE"):
            mlx_ttt.load(REPO)
        model, tokenizer = mlx_ttt.load(REPO, tokenizer=TOKENIZER)
        assert mlx_ttt.generate(model, tokenizer, TEXT, max_tokens=6) + "\n" == generate(REPO)


@pytest.mark.slow
class TestCommands:
    """Every command that takes a model."""

    @pytest.fixture
    def name(self, hub, layouts, tmp_path, monkeypatch) -> str:
        monkeypatch.chdir(tmp_path)
        hub.add(REPO, layouts["code beside shards"])
        (tmp_path / "text.txt").write_text(TEXT * 30)
        return REPO

    @pytest.mark.parametrize(
        "command",
        [
            "generate -p a -m 2 --save-state s.state --model NAME",
            "chat -m 2 --model NAME",
            "perplexity --text text.txt --model NAME",
            "watch text.txt -o page.html --model NAME",
            "train OUT --data text.txt --steps 1 --length 32 --batch-size 1 --from NAME",
            "convert inspect NAME",
            "convert torch NAME OUT",
            "convert mlx NAME OUT",
        ],
    )
    def test_it_takes_a_name(self, command, name, hub):
        result = run(*command.replace("NAME", name).split(), input="hello\n")
        assert result.exit_code == 0, (result.output, result.exception)
        assert large(hub) == {"model-00001-of-00003.safetensors"}

    def test_serve(self, name, hub, monkeypatch):
        from mlx_ttt.serve import server

        served = []

        def instead(app, listener, drain):
            served.extend(app.models)
            app.worker.stop()
            return 0

        monkeypatch.setattr(server, "run", instead)
        result = run("serve", "--port", 0, "--model", name, "--model", f"second={name}")
        assert result.exit_code == 0, (result.output, result.exception)
        assert served == [name, "second"]
        assert [request for request in hub.requests if "00001" in request and "GET" in request] != []

    def test_a_state_of_it(self, name):
        assert run("generate", "-p", "a", "-m", 2, "--save-state", "s.state", "--model", name).exit_code == 0
        assert "tokens" in run("state", "show", "s.state", "--model", name).stdout


class TestRevisions:
    @pytest.mark.slow
    def test_it_stays_at_the_commit_of_the_first_time(self, hub, train_state, tmp_path):
        before = hub.commit(REPO, "main")
        generate(REPO, "--tokenizer", TOKENIZER)
        hub.add(REPO, train_state | {"config.json": b"[]"})
        generate(REPO)
        other = tmp_path / "other.json"
        other.write_bytes(tokenizer_json().replace(b"<unk>", b"<odd>"))
        generate(REPO, "--tokenizer", other)
        assert [entry.commit for entry in Home(REPO).entries()] == [before, before]
        assert run("cache", "remove", REPO).exit_code == 0
        assert run("generate", "-p", TEXT, "--model", REPO, "--tokenizer", TOKENIZER).exit_code == 2  # the new config

    @pytest.mark.slow
    def test_a_revision_in_the_name(self, hub, train_state):
        hub.add(REPO, train_state | {"notes.txt": b""}, revision="refs/pr/1")
        commits = {revision: hub.commit(REPO, revision) for revision in ("main", "refs/pr/1")}
        for name in (REPO, f"{REPO}@refs/pr/1", f"{REPO}@{commits['main']}"):
            generate(name, "--tokenizer", TOKENIZER)
        found = {entry.commit: set(entry.revisions) for entry in Home(REPO).entries()}
        assert found == {commits["main"]: {"main", commits["main"]}, commits["refs/pr/1"]: {"refs/pr/1"}}

    def test_a_revision_that_is_not_there(self, hub, train_state):
        assert_refused(f"{REPO}: the repository has no revision v9", f"{REPO}@v9", "--tokenizer", TOKENIZER)

    def test_what_is_here_comes_first(self, hub, train_state, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        shutil.copytree(mlx_ttt.bundled_model(), REPO)
        generate(REPO)
        assert hub.requests == []


class TestErrors:
    """One line each, and nothing half-written."""

    @pytest.mark.parametrize(
        ("status", "message"),
        [(401, "401: .*log in"), (403, "403"), (404, "404|no such"), (429, "429: .*wait"), (500, "500")],
    )
    def test_statuses(self, status, message, hub, train_state):
        hub.status = status
        assert_refused(f"error: (some-org/ttt-125m|meta/llama): .*({message})", REPO, "--tokenizer", TOKENIZER)

    def test_a_gated_tokenizer(self, hub, train_state):
        hub.gated.add(TOKENIZER)
        assert_refused(f"{TOKENIZER}: gated: ask for access at {hub.url}/{TOKENIZER}", REPO, "--tokenizer", TOKENIZER)
        assert not large(hub)

    def test_no_network(self, hub, train_state, monkeypatch):
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        assert_refused("the Hub cannot be reached .*refused", REPO)

    def test_a_lack_of_a_tokenizer_is_found_before_the_download(self, hub, train_state):
        assert_refused(
            f"{REPO}: has no tokenizer: add --tokenizer FILE, or --tokenizer ORG/NAME; .*https://huggingface.co/meta-",
            REPO,
        )
        assert not large(hub)

    def test_another_kind_of_model_is_found_before_the_download(self, hub, train_state):
        hub.add(REPO, train_state | {"config.json": b'{"model_type": "llama"}', "tokenizer.json": tokenizer_json()})
        assert_refused(f"{REPO}: config.json: describes a model of type llama", REPO)
        assert not large(hub)

    def test_a_repository_without_a_tokenizer_as_tokenizer(self, hub, train_state):
        assert_refused(f"{REPO}: has no tokenizer .tokenizer.json or tokenizer.model", REPO, "--tokenizer", REPO)

    def test_a_tokenizer_for_a_directory(self, hub, tmp_path):
        assert_refused("a tokenizer is given to a repository", tmp_path, "--tokenizer", TOKENIZER)
        result = run("generate", "-p", "a", "--tokenizer", TOKENIZER)
        assert result.exit_code == 2 and "give --model ORG/NAME" in result.stderr

    def test_cuts_in_the_midst(self, hub, train_state, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())
        option = ("--tokenizer", tmp_path / "tokenizer.json")
        hub.cuts = {"streaming_train_state": [0] * 20}
        assert_refused(f"error: {REPO}: ", REPO, *option)
        hub.cuts = {"streaming_train_state": [100_000, 50_000]}  # it goes on where it stopped
        assert generate(REPO, *option)

    def test_a_wrong_hash(self, hub, train_state):
        hub.damaged = {"streaming_train_state"}
        message = f"{REPO}: streaming_train_state was damaged on its way"
        assert_refused(message, REPO, "--tokenizer", TOKENIZER)
        hub.damaged = set()
        assert generate(REPO, "--tokenizer", TOKENIZER)

    def test_no_room_for_the_download(self, hub, train_state, monkeypatch):
        monkeypatch.setattr(hub_module().shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 99))
        assert_refused(f"{REPO}: the disk is full: 0.00 GB are to be downloaded", REPO, "--tokenizer", TOKENIZER)
        assert not large(hub)

    def test_a_disk_that_is_full_in_the_midst_of_the_download(self, hub, train_state, monkeypatch, tmp_path):
        (tmp_path / "tokenizer.json").write_bytes(tokenizer_json())

        def full(*arguments, **options):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
        assert_refused(f"{REPO}: the disk is full: .*make room", REPO, "--tokenizer", tmp_path / "tokenizer.json")

    def test_a_disk_that_is_full_in_the_midst_of_the_conversion(self, hub, train_state, monkeypatch):
        def full(folder, *others):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(convert, "write_weights", full)
        assert_refused("the disk is full", REPO, "--tokenizer", TOKENIZER)

    def test_damaged_weights(self, hub, train_state):
        hub.add(REPO, {"streaming_train_state": train_state["streaming_train_state"][:1000]})
        assert_refused("streaming_train_state: ", REPO, "--tokenizer", TOKENIZER)


def hub_module():
    return hub


class TestManyAtOnce:
    def test_what_a_killed_process_left_is_removed(self, hub, train_state):
        left = Home(REPO).folder / ".0123.partial-abc"
        (left / "new").mkdir(parents=True)
        generate(REPO, "--tokenizer", TOKENIZER)
        assert not left.exists()

    def test_one_waits_for_the_other(self, hub, train_state, monkeypatch):
        started, waiting, conversions = threading.Event(), threading.Event(), []
        real = by_name.convert

        def slowly(*arguments, **options):
            conversions.append(arguments[1])
            started.set()
            assert waiting.wait(20)
            return real(*arguments, **options)

        def tell(line: str) -> None:
            if "another process is at it" in line:
                waiting.set()

        monkeypatch.setattr(by_name, "convert", slowly)
        ask = functools.partial(by_name.model_directory, REPO, tokenizer=TOKENIZER, listener=by_name.Listener(tell))
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            first = threads.submit(ask)
            assert started.wait(20)
            second = threads.submit(ask)
            assert first.result() == second.result() == conversions[0]
        assert len(conversions) == 1

    @pytest.mark.slow
    def test_two_processes_convert_once(self, layouts, tmp_path):
        with Hub() as hub:
            hub.add(REPO, layouts["code beside shards"])
            environment = os.environ | {
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_DISABLE_XET": "1",
                "MLX_TTT_CACHE": str(tmp_path / "converted"),
            }
            command = [sys.executable, ROOT / "generate.py", "--model", REPO, "-p", TEXT, "-m", "6"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            both = [subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes) for _ in range(2)]
            (one, told), (other, told_other) = [process.communicate(timeout=120) for process in both]
        assert [process.returncode for process in both] == [0, 0], told + told_other
        assert one == other and len(one) > 2
        assert (told + told_other).count(": converting\n") == 1
        assert [file.name for file in (tmp_path / "converted" / "models-1" / "some-org--ttt-125m").glob(".*")] == []

    def test_a_removal_while_somebody_reads(self, hub, train_state):
        """Whoever has the model goes on; whoever looks for it does not find half of it."""
        generate(REPO, "--tokenizer", TOKENIZER)
        (entry,) = Home(REPO).entries()
        with (entry.path / "model.safetensors").open("rb") as file:
            Home(REPO).remove()
            assert len(file.read()) > 1000
        assert homes() == [] and [f.name for f in cache_root().iterdir()] == [".some-org--ttt-125m.lock"]


class TestCache:
    def test_list_and_remove(self, hub, train_state, tmp_path):
        assert run("cache", "list").stdout == f"{cache_root()}: holds no models\n"
        generate(REPO, "--tokenizer", TOKENIZER)
        table = run("cache", "list").stdout
        assert re.search(rf"{REPO} +main +{hub.commit(REPO, 'main')[:12]} +0\.[0-9] MB +0\.[0-9] MB", table)
        (fact,) = json.loads(run("cache", "list", "--json").stdout)
        assert fact["name"] == REPO and fact["bytes"] > 1000 < fact["downloaded_bytes"]

        assert f"{REPO}: 0." in run("cache", "remove", "--download", REPO).stdout
        assert not list((tmp_path / "cache").rglob("streaming_train_state"))
        hub.requests.clear()
        generate(REPO)
        assert hub.requests == []
        assert run("cache", "remove", "--all").exit_code == 0
        assert homes() == []

    def test_mistakes(self, hub):
        for arguments, message in (
            ((), "Give names, or --all"),
            (("a/b", "--all"), "Give names, or --all"),
            (("a/b",), "a/b: not in"),
            (("../x", "--download"), "not in"),
        ):
            result = run("cache", "remove", *arguments)
            assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1

    def test_a_cache_that_cannot_be_made(self, hub, train_state, tmp_path, monkeypatch):
        (tmp_path / "file").write_bytes(b"")
        monkeypatch.setenv("MLX_TTT_CACHE", str(tmp_path / "file"))
        result = run("generate", "-p", TEXT, "--model", REPO, "--tokenizer", TOKENIZER)
        assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'file'}")


def test_human():
    assert [by_name.human(n) for n in (1, 442_000_000, 7_850_000_000)] == ["0.0 MB", "442.0 MB", "7.85 GB"]


@pytest.mark.slow
class TestDamage:
    """What is not whole, or means something else, is found out and mended."""

    @pytest.fixture(autouse=True)
    def cached(self, hub, layouts):
        hub.add(REPO, layouts["code beside shards"])
        self.expected = generate(REPO)
        (self.copy,) = (entry.path for entry in homes()[0].entries())

    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
    def test_a_copy_that_lacks_a_file_is_made_again(self, missing):
        (self.copy / missing).unlink()
        assert generate(REPO) == self.expected

    def test_a_file_in_its_place(self):
        shutil.rmtree(self.copy)
        self.copy.write_text("")
        assert generate(REPO) == self.expected

    @pytest.mark.parametrize("name", ["", "main", "../.."])
    def test_a_branch_that_means_nothing(self, name):
        (self.copy.parent / "revisions" / "main").write_text(name)
        assert generate(REPO) == self.expected

    def test_a_small_file_of_the_download(self):
        assert run("cache", "remove", REPO).exit_code == 0
        (blob,) = hub.cache_folder().rglob("snapshots/*/config.json")
        stored = Path(os.path.realpath(blob))
        stored.write_bytes(stored.read_bytes()[:100])
        assert_refused(r"config\.json was damaged on its way or in the cache .*: start again", REPO)
        assert generate(REPO) == self.expected

    @pytest.mark.parametrize("revision", [".main", "..", ".", "a/../main", "a//b"])
    def test_no_revision_is_called_that(self, revision):
        result = run("generate", "-p", TEXT, "--model", f"{REPO}@{revision}")
        assert result.exit_code == 2 and "no branch, tag or commit can be called" in result.stderr

    def test_a_data_set_of_the_same_name_stays(self):
        blob = hub.cache_folder() / f"datasets--{REPO.replace('/', '--')}" / "blobs" / "1"
        snapshot = blob.parents[1] / "snapshots" / ("0" * 40)
        for folder in (blob.parent, snapshot, blob.parents[1] / "refs"):
            folder.mkdir(parents=True)
        blob.write_text("data")
        (snapshot / "data").symlink_to(blob)
        (blob.parents[1] / "refs" / "main").write_text("0" * 40)
        assert run("cache", "remove", "--download", REPO).exit_code == 0
        assert blob.read_text() == "data" and not list(hub.cache_folder().glob("models--some-org*/blobs/*"))

    def test_the_cache_of_the_hub_is_a_file(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
        result = run("cache", "list")
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, result.output

    def test_what_a_killed_removal_left_goes(self):
        grave = cache_root() / ".removed-zz"
        (grave / "folder").mkdir(parents=True)
        assert run("cache", "remove", REPO).exit_code == 0
        assert not grave.exists()
