"""A release: what a tag may be called, and what the workflow calls."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mlx_ttt

ROOT = Path(__file__).parents[1]


def check(tag: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, ROOT / ".ci" / "check_tag", tag], capture_output=True, text=True)


def test_the_tag_of_this_version():
    assert check(f"v{mlx_ttt.__version__}").returncode == 0


@pytest.mark.parametrize(
    ("tag", "message"),
    [
        (mlx_ttt.__version__, "not a tag of a release"),
        ("v9.9.9", f"version.py says {re.escape(mlx_ttt.__version__)}"),
        *((tag, "not a tag of a release") for tag in ("v1", "v1.2", "v01.2.3", "v1.2.3-", "v1.2.3-01", "latest", "")),
    ],
)
def test_other_tags(tag, message):
    refused = check(tag)
    assert refused.returncode == 1 and re.fullmatch(f"{re.escape(tag)}: .*{message}.*\n", refused.stderr)


def test_the_workflow():
    """Every tag starts it, and what it calls is there and can be run."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow[True] == {"push": {"tags": ["*"]}}  # YAML reads `on` as true
    matrix = workflow["jobs"]["try"]["strategy"]["matrix"]
    assert matrix["python"] == ["3.10", "3.11", "3.12", "3.13", "3.14"] and len(matrix["os"]) == 2
    for script in re.findall(r"\.ci/\w+", text):
        assert (ROOT / script).stat().st_mode & 0o100
