"""`mlx-ttt doctor`: what it says of this machine, and that its checks find what is wrong."""

from __future__ import annotations

import importlib.metadata
import json

import mlx.core as mx
import pytest
from click.testing import CliRunner

from mlx_ttt.cli import main
from mlx_ttt.network import dual
from mlx_ttt.proof import checks
from mlx_ttt.proof.facts import facts


def test_facts():
    found = {fact.name: fact for fact in facts()}
    assert found["mlx"].found == mx.__version__
    assert all(fact.found or fact.brings for fact in found.values())
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0
    assert all(name in shown.stdout for name in found)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("1.0.0b3", "coreai-core  1.0.0b3, the version wanted"),
        ("1.0.0b4", "coreai-core  missing: 1.0.0b4 is here, 1.0.0b3 is wanted, for bundles for Core AI"),
        (None, "coreai-core  missing: nothing is here, 1.0.0b3 is wanted, for bundles for Core AI"),
    ],
)
def test_core_ai(monkeypatch, version, said):
    """The version here, the one wanted, and what it would bring."""

    def of(package, version_of=importlib.metadata.version):
        if package != "coreai-core":
            return version_of(package)
        if version is None:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", of)
    shown = CliRunner().invoke(main, ["doctor"])
    assert shown.exit_code == 0, shown.output
    assert said in shown.stdout


@pytest.mark.slow
def test_the_update_rule_as_it_runs_here():
    found = list(checks.rule_checks())
    assert len(found) == 2 * 5 * 5
    assert [check for check in found if not check.holds] == []


@pytest.mark.slow
def test_a_wrong_update_rule_is_found(monkeypatch, tmp_path):
    """And doctor's exit status says so, and the report is written all the same."""
    right = dual.update

    def wrong(*call):
        y, state = right(*call)
        return y * 1.001, state

    monkeypatch.setattr(dual, "update", wrong)
    monkeypatch.setattr(checks, "core_ml_checks", lambda: iter([checks.Check("Core ML", None, 1.0, "not here")]))
    monkeypatch.setattr(checks, "_HEAD_DIMENSIONS", (16,))
    result = CliRunner().invoke(main, ["doctor", "--prove", "-o", str(tmp_path / "report.json")])
    assert result.exit_code == 1
    assert "WRONG" in result.stdout
    assert "not done  Core ML: not here" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert {check["holds"] for check in report["checks"]} == {True, False, None}
    assert [speed["name"] for speed in report["speeds"]] == ["prefill, 1024 tokens", "decode, 64 tokens"]
