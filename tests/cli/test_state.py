"""mlx-ttt state: what it shows, what it saves, and what it refuses in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

import mlx_ttt

import mlx.core as mx  # isort: skip

from mlx_ttt.learning import states

from .test_cli import assert_one_line, run


@pytest.fixture(scope="module")
def model():
    return mlx_ttt.load()


@pytest.fixture(scope="module")
def texts(model):
    return [
        mlx_ttt.read(*model, text) for text in ("ROMEO:\nBut soft, what light", "KING LEAR:\nBlow, winds, and crack")
    ]


@pytest.fixture(scope="module")
def saved(model, texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for name, text in zip("ab", texts, strict=True):
        mlx_ttt.save_state(folder / f"{name}.state", text, *model)
    return folder


@pytest.fixture
def folder(saved, tmp_path, monkeypatch) -> Path:
    """The current folder, with a.state and b.state."""
    for file in saved.iterdir():
        shutil.copy(file, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def done(*arguments):
    result = run("state", *arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def table(shown: str) -> list[list[str]]:
    """The rows of the table, cut where there are two spaces or more."""
    return [re.split(r" {2,}", line.strip()) for line in shown.split("\n\n")[1].splitlines()]


def test_show(model, texts, folder):
    shown = done("show", "a.state")
    size = f"{len(texts[0])} tokens, 0.42 MB"
    assert shown.startswith(f"a.state: {size}, for TTT-Linear with 4 layers of 4 heads, fingerprint ")
    assert re.search(r"fingerprint [0-9a-f]{16}\n", shown)
    layers = states.drift(model[0], texts[0]).of_layers()
    header, *rows = table(shown)
    assert header == ["layer", "drift", "relative", "furthest head"]
    largest = layers.relative.max().item()
    for i, row in enumerate(rows):
        relative = layers.relative[i, 0].item()
        assert row[:3] == [f"{i}", f"{layers.frobenius[i, 0].item():#.3g}", f"{100 * relative:.1f} %"]
        assert re.fullmatch(r"[0-3]: [\d.]+ %", row[3])
        assert row[4] == "#" * round(20 * relative / largest)
    assert max(len(row[4]) for row in rows) == 20


def test_show_json(model, texts, folder):
    shown = json.loads(done("show", "a.state", "--json"))
    found = states.drift(model[0], texts[0])
    assert (shown["tokens"], shown["learning"], shown["rewindable"]) == (len(texts[0]), 1, False)
    assert shown["bytes"] == (folder / "a.state").stat().st_size
    assert re.fullmatch("[0-9a-f]{64}", shown["fingerprint"])
    for i, layer in enumerate(shown["layers"]):
        assert layer["layer"] == i
        assert layer["drift_heads"] == found.frobenius[i, 0].tolist()
        assert layer["drift_heads_relative"] == found.relative[i, 0].tolist()
        assert layer["drift"] == found.of_layers().frobenius[i, 0].item()


def test_diff(model, texts, folder):
    found = states.distance(model[0], *texts).of_layers()
    shown = done("diff", "a.state", "b.state")
    header, *rows = table(shown)
    assert header == ["layer", "distance", "relative", "drift of A", "drift of B"]
    assert [row[2] for row in rows] == [f"{100 * x:.1f} %" for x in found.relative[:, 0].tolist()]
    drift_b = states.drift(model[0], texts[1]).of_layers()
    assert [row[4] for row in rows] == [f"{100 * x:.1f} %" for x in drift_b.relative[:, 0].tolist()]
    layers = json.loads(done("diff", "a.state", "b.state", "--json"))["layers"]
    assert [layer["distance"] for layer in layers] == found.frobenius[:, 0].tolist()
    assert [layer["drift_b"] for layer in layers] == drift_b.frobenius[:, 0].tolist()
    same = table(done("diff", "a.state", "a.state"))
    assert [row[1] for row in same[1:]] == ["0.00"] * 4


@pytest.mark.parametrize(
    ("arguments", "operation"),
    [
        (["blend", "a.state", "b.state", "--weight", "0.3"], lambda m, a, b: states.blend(m, a, b, 0.3)),
        (
            ["blend", "a.state", "b.state", "--weight", "-0.5", "--extrapolate"],
            lambda m, a, b: states.blend(m, a, b, -0.5, extrapolate=True),
        ),
        (["swap", "a.state", "b.state", "--layers", "0,2-3"], lambda m, a, b: states.swap(m, a, b, layers=[0, 2, 3])),
        (["reset", "a.state"], lambda m, a, b: states.reset(m, a)),
        (
            ["reset", "a.state", "--layers", "2-3", "--heads", "0,3"],
            lambda m, a, b: states.reset(m, a, layers=[2, 3], heads=[0, 3]),
        ),
        (["scale", "a.state", "--factor", "2"], lambda m, a, b: states.scale(m, a, 2)),
        (["freeze", "a.state"], lambda m, a, b: states.freeze(m, a)),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_new_states(model, texts, folder, arguments, operation):
    expected = operation(model[0], *texts)
    said = done(*arguments, "-o", "new.state")
    frozen = ", frozen" if arguments[0] == "freeze" else ""
    assert said == f"new.state: {len(texts[0])} tokens, 0.42 MB{frozen}\n"
    found = mlx_ttt.load_state("new.state", *model)
    assert (found.tokens, found.learning) == (expected.tokens, expected.learning)
    for x, y in zip(found.cache, expected.cache, strict=True):
        assert x.offset == y.offset
        assert all(mx.allclose(v, w, rtol=1e-6, atol=1e-7) for v, w in zip(x.weights, y.weights, strict=True))
        assert mx.allclose(x.rows, y.rows, rtol=1e-6, atol=1e-7)
    assert sorted(path.name for path in folder.iterdir()) == ["a.state", "b.state", "new.state"]


def test_a_state_may_take_the_place_of_the_old_one(model, folder):
    """As --save-state does it; and a frozen state says that it is."""
    done("freeze", "a.state", "-o", "a.state")
    assert mlx_ttt.load_state("a.state", *model).learning == 0
    assert ", frozen, for TTT-Linear" in done("show", "a.state")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "nowhere.state"], "nowhere.state: the state cannot be read: no such file"),
        (["show", ""], "cannot be read"),
        (["show", "."], "cannot be read"),
        (["show", "text.txt"], "text.txt: the state cannot be read"),
        (["show", "a.state", "--model", "nowhere"], "nowhere: no such model directory"),
        (["diff", "a.state", "nowhere.state"], "nowhere.state: the state cannot be read: no such file"),
        (["blend", "a.state", "b.state", "--weight", "1.5"], "--weight 1.5: expected 0 to 1; --extrapolate allows"),
        (["blend", "a.state", "b.state", "--weight", "-0.1"], "--weight -0.1: expected 0 to 1"),
        (["blend", "a.state", "b.state", "--weight", "nan"], "weight is nan, expected a number"),
        (["blend", "a.state", "b.state", "--weight", "inf", "--extrapolate"], "weight is inf, expected a number"),
        (["blend", "a.state", "b.state", "--weight", "1e300", "--extrapolate"], "not saved, since layer 0"),
        (["scale", "a.state", "--factor", "nan"], "factor is nan, expected a number"),
        (["scale", "a.state", "--factor", "1e39"], "not saved, since layer 0"),
        (["reset", "a.state", "--layers", "2-7"], "there is no layer 4: the model has layers 0 to 3"),
        (["reset", "a.state", "--layers", "0-999999999"], "there is no layer 4"),
        (["reset", "a.state", "--heads", "4"], "there is no head 4: the model has heads 0 to 3"),
        (["reset", "a.state", "--layers", "7-4"], "--layers 7-4: expected numbers such as 0,2 or 4-7"),
        (["reset", "a.state", "--layers", "-1"], "--layers -1: expected numbers"),
        (["reset", "a.state", "--layers", ""], "--layers : expected numbers"),
        (["swap", "a.state", "b.state", "--heads", "1,x"], "--heads 1,x: expected numbers"),
        (["freeze", "nowhere.state"], "nowhere.state: the state cannot be read: no such file"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_input(folder, arguments, message):
    """One line, and nothing is left behind."""
    (folder / "text.txt").write_text("no state")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    out = [] if arguments[0] in ("show", "diff") else ["-o", "new.state"]
    assert_one_line(run("state", *arguments, *out), message)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("out", "message"), [("no/such/c.state", "no such folder"), (".", "exists and is not a file")])
def test_a_place_that_cannot_be_written(folder, out, message):
    """It is found out before the model is loaded."""
    assert_one_line(run("state", "freeze", "a.state", "-o", out, "--model", "nowhere"), message)


def test_a_state_of_another_model(folder, model, texts):
    """It must have been made with the model that is named, by all commands."""
    network, _ = model
    layer = network.layers[0].seq_modeling_block
    original = layer.W1
    try:
        layer.W1 = original * 1.01
        mlx_ttt.save_state("other.state", texts[0], *model)
    finally:
        layer.W1 = original
    message = "other.state: this state was made with another model or tokenizer"
    assert_one_line(run("state", "show", "other.state"), message)
    assert_one_line(run("state", "diff", "a.state", "other.state"), message)
    assert_one_line(run("state", "blend", "a.state", "other.state", "--weight", 0.5, "-o", "c.state"), message)
    assert not (folder / "c.state").exists()


def test_a_state_that_is_not_finite(folder, model, texts):
    """It is shown for what it is, and a new one is made of it only where what is wrong with it is reset."""
    broken = texts[0].copy()
    c = broken.cache[1]
    c.arrays = {**c.arrays, "weights": tuple(w * float("nan") for w in c.weights)}
    mlx_ttt.save_state("broken.state", broken, *model)
    assert "nan %" in done("show", "broken.state")
    layers = json.loads(done("show", "broken.state", "--json"), parse_constant=pytest.fail)["layers"]
    assert [layer["drift"] is None for layer in layers] == [False, True, False, False]
    mixed = run("state", "blend", "a.state", "broken.state", "--weight", 0.5, "-o", "c.state")
    assert_one_line(mixed, "c.state: not saved, since layer 1 would not be finite; `state reset` can make it new")
    done("reset", "broken.state", "--layers", "1", "-o", "c.state")
    assert "nan" not in done("show", "c.state")
