"""`mlx-ttt chat`: what is typed and what is written are one text, or one conversation."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from click.testing import CliRunner

import mlx_ttt
from mlx_ttt.cli import main


@pytest.fixture(scope="module")
def loaded():
    return mlx_ttt.load()


def chat(*lines: str, options=()):
    result = CliRunner().invoke(main, ["chat", "-m", "12", *map(str, options)], input="\n".join([*lines, ""]))
    assert result.exit_code == 0, result.output
    assert "Traceback" not in result.output
    return result


def test_a_base_model_continues_the_text(loaded):
    """What it writes is what `generate` writes after all that came before."""
    typed = ["ROMEO:", '"""', "", "JULIET:", 'I am here"""']
    found = chat(*typed).stdout
    state = mlx_ttt.read(*loaded, "ROMEO:\n")
    first = mlx_ttt.generate(*loaded, state=state, max_tokens=12)
    state = mlx_ttt.read(*loaded, "JULIET:\nI am here\n", state)
    assert found == first + "\n" + mlx_ttt.generate(*loaded, state=state, max_tokens=12) + "\n"


@pytest.mark.slow
def test_a_model_with_a_template(loaded, tmp_path):
    model = shutil.copytree(mlx_ttt.bundled_model(), tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}you: "
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    found = chat("Hello", "And?", options=["--model", model, "--system", "Be brief."]).stdout
    ids = loaded[1].encode("<s>system: Be brief.\nuser: Hello\nyou: ", add_special_tokens=False)
    state = mlx_ttt.read(*loaded, ids)
    first = mlx_ttt.generate(*loaded, state=state, max_tokens=12)
    state = mlx_ttt.read(*loaded, "user: And?\nyou: ", state)
    assert found == first + "\n" + mlx_ttt.generate(*loaded, state=state, max_tokens=12) + "\n"


@pytest.mark.slow
def test_save_load_reset(tmp_path):
    file = tmp_path / "a.state"
    found = chat(
        "ROMEO:", f"/save {file}", "I am", "/reset", "/state", f"/load {file}", "I am", "/quit", "never"
    ).stdout
    lines = found.split(f"{file}: ")
    saved, _, after = lines[1].partition("\n")
    again = lines[2].partition("\n")[2]
    assert re.fullmatch(r"\d+ tokens", saved)
    assert after == again + "nothing was read yet\n"
    assert chat("I am", options=["--load-state", file]).stdout.endswith(again)


@pytest.mark.slow
def test_learning_in_words():
    assert chat("/learn off", "/learn on", "/learn 0.5").stdout == "learning 0\nlearning 1\nlearning 0.5\n"


def test_learning(loaded):
    found = chat("/learn 0", "ROMEO:", "/state", "/learn").stdout
    state = mlx_ttt.read(*loaded, "ROMEO:\n", learning=0)
    assert found.startswith("learning 0\n" + mlx_ttt.generate(*loaded, state=state, max_tokens=12, learning=0) + "\n")
    assert "learning 0\nthe weights have moved by 0.0%, 0.0%, 0.0%, 0.0%" in found
    assert found.endswith("learning 0\n")


MISTAKES = {
    "/nothing": "there is no such command",
    "/save": "expected a value",
    "/reset now": "expected nothing",
    "/save 'a": "a quotation mark is missing",
    "/save /no/such/folder/a": "nothing to save",
    "/load nowhere.state": "no such file",
    "/learn much": "expected on, off or a number",
    "/learn nan": "expected on, off or a number",
    "/learn -1": "expected on, off or a number",
    "/learn 1e300": "expected on, off or a number from 0 to 100",
}


def test_a_mistake_ends_nothing():
    result = chat(*MISTAKES, "/learn", "/help")
    errors = result.stderr.splitlines()
    assert len(errors) == len(MISTAKES)
    for error, message in zip(errors, MISTAKES.values(), strict=True):
        assert re.fullmatch(f"error: .*{message}.*", error), error
    assert result.stdout.startswith("learning 1\n")
    commands = {"/save", "/load", "/state", "/learn", "/reset", "/help", "/quit"}
    assert set(re.findall(r"/\w+", result.stdout)) == commands
