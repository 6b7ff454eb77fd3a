"""The list of public checkpoints: the same in the documentation, the command and the code."""

from __future__ import annotations

import json
import math
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_ttt.checkpoint.hub import named
from mlx_ttt.checkpoint.parameters import Parameters
from mlx_ttt.checkpoint.public import CHECKPOINTS, LLAMA_2, markdown
from mlx_ttt.cli import main
from mlx_ttt.training.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


def test_the_page_has_this_table():
    assert markdown() in PAGE.read_text(encoding="utf-8")


def test_the_command_shows_them_all():
    shown = CliRunner().invoke(main, ["models"]).stdout
    for checkpoint in CHECKPOINTS:
        assert re.search(rf"^{checkpoint.name}  .*{checkpoint.size}", shown, re.M)
        assert f"\n{checkpoint.command}\n" in shown
    facts = json.loads(CliRunner().invoke(main, ["models", "--json"]).stdout)
    assert [fact["name"] for fact in facts] == [checkpoint.name for checkpoint in CHECKPOINTS]
    assert all(fact.keys() >= {"parameters", "context", "tokenizer", "licence", "command", "needs"} for fact in facts)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda c: c.name)
def test_what_follows_from_what(checkpoint):
    """Names are names, the line is one that the command takes, and parameters are those of the paper's sizes."""
    assert named(checkpoint.name).name == checkpoint.name
    program, *arguments = shlex.split(checkpoint.command)
    assert program == "mlx-ttt"
    command = main
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments.pop(0)]
    parsed = command.make_context("mlx", arguments, resilient_parsing=True).params
    assert str(parsed["source"]) == checkpoint.name
    assert parsed["tokenizer"] == (LLAMA_2 if checkpoint.tokenizer == "Llama-2" else None)
    if checkpoint.parameters is not None:
        args = PRESETS[checkpoint.size.lower()].args(checkpoint.inner_model.removeprefix("TTT-").lower(), 32_000)
        assert checkpoint.parameters == sum(math.prod(shape) for shape in Parameters(args).shapes().values())
