"""Every command and every option with wrong, missing and odd values: one line, exit status 2, never a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import mlx_ttt
from mlx_ttt.cli import main
from mlx_ttt.cli.mlx_lm import MLXLM

ROOT = Path(__file__).parents[2]


def commands(group: click.Group = main, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands, with the words that call them."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


OURS = [(path, command) for path, command in commands() if not isinstance(command, MLXLM)]
MLX_LM = [path for path, command in commands() if isinstance(command, MLXLM)]
NAMES = [" ".join(path) for path, _ in OURS]


def run(*arguments: str):
    return CliRunner(env={"MLX_TTT_API_KEY": None}).invoke(main, list(arguments), input="")


def assert_one_line(result, arguments) -> None:
    """Exit status 2 and one line. A command that could run all the same (a chat without input) is right, too."""
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    assert "Traceback" not in result.output, (arguments, result.output)
    if result.exit_code != 0:
        assert result.exit_code == 2, (arguments, result.output)
        assert re.fullmatch(r"error: [^\n]+\n", result.stderr), (arguments, result.stderr)


def wrong_values(option: click.Parameter) -> list[str]:
    """Values that an option cannot take, by its type."""
    kind = option.type
    if isinstance(kind, click.Choice):
        return ["no-such-choice", ""]
    if isinstance(kind, click.IntRange | click.types.IntParamType):
        ends = [getattr(kind, "min", None), getattr(kind, "max", None)]
        return [
            "x",
            "",
            "1.5",
            "nan",
            *(str(end + step) for end, step in zip(ends, (-1, 1), strict=True) if end is not None),
        ]
    if isinstance(kind, click.FloatRange | click.types.FloatParamType):
        return ["x", "", *([str(kind.min - 1)] if getattr(kind, "min", None) is not None else [])]
    return []


@pytest.mark.parametrize(("path", "command"), OURS, ids=NAMES)
def test_every_option_with_a_value_that_it_cannot_take(path, command):
    for option in command.params:
        if isinstance(option, click.Option) and not option.is_flag:
            assert_one_line(run(*path, option.opts[0]), (path, option.opts[0]))  # without a value
            for value in wrong_values(option):
                arguments = [*path, option.opts[0], value]
                result = run(*arguments)
                assert result.exit_code == 2, (arguments, result.output)
                assert_one_line(result, arguments)


@pytest.mark.parametrize(("path", "command"), OURS, ids=NAMES)
def test_every_command_called_wrongly(path, command):
    count = sum(isinstance(p, click.Argument) for p in command.params)
    for arguments in (["--no-such-option"], ["x"] * (count + 1)):
        result = run(*path, *arguments)
        assert result.exit_code == 2, (path, arguments, result.output)
        assert_one_line(result, (path, arguments))
    if count:
        assert_one_line(run(*path), path)
    assert run(*path, "--help").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("path", "command"), OURS, ids=NAMES)
def test_every_option_with_a_file_that_is_none(path, command, tmp_path, monkeypatch):
    """Names of files and folders: nowhere, empty, a folder, a file of something else, with odd characters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "odd").write_bytes(b"\xff\0{")
    if path == ("serve",):  # or it would start
        return
    count = sum(isinstance(p, click.Argument) for p in command.params)
    for value in ("nowhere", "", "folder", "odd", "no\nline"):
        if count:
            assert_one_line(run(*path, *[value] * count, *_needed(command, value)), (path, value))
        for option in command.params:
            text = isinstance(option.type, click.types.StringParamType | click.Path | click.types.FuncParamType)
            if isinstance(option, click.Option) and not option.is_flag and text:
                arguments = [*path, *["nowhere"] * count, *_needed(command, "nowhere"), option.opts[0], value]
                assert_one_line(run(*arguments), arguments)


def _needed(command: click.Command, value: str) -> list[str]:
    """The options that a command must have."""
    return [word for o in command.params if isinstance(o, click.Option) and o.required for word in (o.opts[0], value)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], None),
        (["no-such-command"], "No such command"),
        (["--no-such-option"], "No such option"),
        (["completion"], "Missing argument"),
        (["completion", "tcsh"], "tcsh"),
        (["serve", "--model", "nowhere", "--port", "0"], "nowhere"),
        (["serve", "--host", "no host", "--port", "0"], "cannot listen on no host"),
        (["serve", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
        (["serve", "--api-key", "", "--port", "0"], "--api-key is empty"),
        (["serve", "--api-key", "a\nb", "--port", "0"], "--api-key"),
        (["serve", "--draft-model", "x"], "No such option"),
        (["serve", "--chat-template", "nowhere", "--port", "0"], "--chat-template nowhere"),
        (["serve", "--states", "README.md", "--port", "0"], "cannot be used for states"),
        (["serve", "--model", "tests", "--model", "tests", "--port", "0"], "tests"),
        (["chat", "-m", "0"], "--max-tokens 0"),
        (["chat", "--system", "a"], "chat template"),
        (["chat", "--load-state", "nowhere"], "nowhere: the state cannot be read: no such file"),
        (["doctor", "-o", "no/such/folder"], "--output no/such/folder"),
    ],
)
def test_mistakes(arguments, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    if message is not None:
        assert_one_line(result, arguments)
        assert message in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lora"], "default model: not on this machine"),
        (["lora", "--no-such-option"], "unrecognized arguments"),
        (["lora", "--iters", "x"], "invalid int value"),
        (["lora", "--model", "nowhere", "--train"], "nowhere"),
        (["lora", "--model", "MODEL", "--train", "--data", "nowhere"], "nowhere"),
        (["lora", "--config", "nowhere"], "nowhere"),
        (["fuse"], "adapters"),
        (["fuse", "--model", "MODEL", "--adapter-path", "nowhere"], "nowhere: there is no adapter_config.json"),
        (["fuse", "x"], "unrecognized arguments"),
        (["perplexity", "--model", "MODEL", "--data-path", "x"], "datasets"),
        (["perplexity", "--model", "nowhere", "--data-path", "x"], ""),
        (["perplexity", "--sequence-length", "x"], ""),
    ],
    ids=str,
)
def test_mistakes_with_the_commands_of_mlx_lm(arguments, message, tmp_path):
    """In a process of their own: mlx-lm prints what it likes to stdout before it finds out."""
    arguments = [str(mlx_ttt.bundled_model()) if a == "MODEL" else a for a in arguments]
    program = "from mlx_ttt.cli import main; main(prog_name='mlx-ttt')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert re.fullmatch(r"error: [^\n]+", result.stderr.splitlines()[-1])
    assert message in result.stderr


def test_the_commands_of_mlx_lm_are_known():
    assert MLX_LM == [("lora",), ("fuse",)]


def test_help_names_every_command():
    text = run("--help").stdout
    for name in main.commands:
        assert re.search(rf"^  {name}  ", text, re.M), name


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    script = run("completion", shell).stdout
    assert "_MLX_TTT_COMPLETE" in script
    word = "ch" if shell == "fish" else "1"  # fish says which word, the others which number it has
    found = CliRunner(env={"_MLX_TTT_COMPLETE": f"{shell}_complete", "COMP_WORDS": "mlx-ttt ch", "COMP_CWORD": word})
    assert "chat" in found.invoke(main, [], prog_name="mlx-ttt", complete_var="_MLX_TTT_COMPLETE").stdout


def test_colours_only_in_a_terminal(monkeypatch):
    from mlx_ttt.cli.command import styled

    class Terminal:
        def isatty(self):
            return True

    class File(Terminal):
        def isatty(self):
            return False

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styled("a", Terminal(), fg="red") != "a" == styled("a", File(), fg="red")
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("a", Terminal(), fg="red") == "a"
