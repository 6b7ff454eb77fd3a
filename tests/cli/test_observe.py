"""`mlx-ttt generate --observe` and `--learning`."""

from __future__ import annotations

import json

import numpy as np
import pytest

from .test_cli import assert_one_line, generate, run

PROMPT = ("--prompt", "ROMEO:\n")


def test_both_files_hold_what_was_learned_from_each_token(tmp_path):
    results = [generate(*PROMPT, "-m", 9, "--observe", tmp_path / name) for name in ("a.npz", "a.jsonl")]
    assert results[0].stdout == results[1].stdout == generate(*PROMPT, "-m", 9).stdout
    arrays = np.load(tmp_path / "a.npz")
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {name: x.shape for name, x in arrays.items()} == {
        **dict.fromkeys(("token", "surprisal"), (9,)),
        **dict.fromkeys(("loss", "lr", "write_norm"), (4, 4, 9)),
    }
    assert "".join(line["text"] for line in lines) + "\n" == results[1].stdout
    for i, line in enumerate(lines):
        for name, x in arrays.items():
            assert np.allclose(x[..., i], line[name], rtol=1e-5), name
    assert (arrays["loss"] > 0).all() and (arrays["surprisal"] > 0).all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "a.npz"]


def test_learning_rates_are_scaled(tmp_path):
    rates = []
    for scale in (1, 0.5, 0):
        generate(*PROMPT, "-m", 1, "--learning", scale, "--observe", tmp_path / "a.npz")
        rates.append(np.load(tmp_path / "a.npz"))
    assert np.allclose(rates[1]["lr"][0], rates[0]["lr"][0] / 2, rtol=0.2)  # later layers depend on what was learned
    assert not rates[2]["lr"].any() and not rates[2]["write_norm"].any() and rates[2]["loss"].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--observe", "a.txt"], r"--observe a.txt: the name must end in .npz or .jsonl"),
        (["--observe", "nowhere/a.npz"], r"nowhere/a.npz: there is no such folder"),
        (["--observe", "a.npz", "-n", 2], "--observe is for one text"),
        (["--observe", "a.npz", "-m", 0, "--save-state", "s"], "--observe is for one text"),
        (["--observe", "a.npz", "--draft-model", "x"], "do not go together with --draft-model"),
        (["--learning", 0.5, "--draft-model", "x"], "do not go together with --draft-model"),
    ],
)
def test_options_that_do_not_fit(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run("generate", *PROMPT, *options), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("scale", ["-1", "nan", "inf", "fast", "1e300", "101"])
def test_no_learning_scale(scale):
    result = run("generate", *PROMPT, "--learning", scale)
    assert result.exit_code == 2 and "error: Invalid value for '--learning'" in result.stderr
