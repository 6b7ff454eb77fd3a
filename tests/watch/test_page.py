"""The page as a file: it holds all it needs, and a text cannot become a part of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from mlx_ttt.watch.codes import decode
from mlx_ttt.watch.page import Subject, live_page, report
from mlx_ttt.watch.reading import Figures, Reading

NASTY = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "{{script}}",
    "&amp;",
    "🎉\u2028",
]


def reading(T: int, layers: int = 2, heads: int = 3, K: int = 16, texts=NASTY) -> Reading:
    rng = np.random.RandomState(0)

    def values(*shape: int) -> np.ndarray:
        return rng.random(shape).astype(np.float32)

    strongest = rng.randint(0, layers * heads, (T, 3)).astype(np.uint16)
    figures = Figures(values(T), values(T), values(T), strongest, values(T, 3))
    columns = values(-(-T // K), layers * heads)
    shown = (list(texts) * T)[:T]
    return Reading(
        shown, {1: "<0x0A>"}, figures, K, columns, np.arange(3), values(3, layers), 512, values(T), 0.1, 0.01
    )


SUBJECT = Subject("A <b>book</b> {{style}}", "TTT-Linear", 2, 3, 16)


@pytest.fixture(scope="module")
def made():
    seen = reading(40)
    return seen, report(seen, SUBJECT)


def block(page: str, name: str) -> bytes:
    return base64.b64decode(re.search(f'data-array="{name}">([^<]*)<', page)[1])


def about(page: str) -> dict:
    return json.loads(re.search('id="about">(.*?)</script>', page, re.S)[1])


def test_all_values_are_in_it(made):
    seen, page = made
    facts = about(page)
    assert facts["text"] == "".join(seen.texts) and facts["names"] == {"1": "<0x0A>"}
    for name, values in {
        "surprisal": seen.figures.surprisal,
        "write": seen.figures.write_norm,
        "loss": seen.figures.loss,
        "strongestNorm": seen.figures.strongest_norm.ravel(),
        "columns": seen.columns.ravel(),
        "reset": seen.reset,
    }.items():
        codes = np.frombuffer(block(page, name), np.uint8)
        np.testing.assert_allclose(decode(codes, facts["highs"][name]), values, rtol=0.015, atol=2e-5)
    np.testing.assert_array_equal(np.frombuffer(block(page, "strongest"), "<u2"), seen.figures.strongest.ravel())
    np.testing.assert_array_equal(np.frombuffer(block(page, "drift"), "<f4"), seen.drift.ravel())
    lengths = np.frombuffer(block(page, "lengths"), "<u2")
    assert lengths.tolist() == [len(text.encode("utf-16-le")) // 2 for text in seen.texts]


def test_what_is_no_number_is_not_in_it():
    """JSON has none, so the page would not open."""
    seen = replace(reading(4), gain=float("nan"), gain_half_width=float("nan"))
    facts = re.search('id="about">(.*?)</script>', report(seen, SUBJECT), re.S)[1]
    assert "NaN" not in facts and json.loads(facts)["gain"] is None


def test_a_text_stays_a_text(made):
    page = made[1]
    scripts = re.findall("<script[^>]*>", page)
    arrays = [s for s in scripts if "data-array" in s]
    assert sorted(set(scripts) - set(arrays)) == [
        '<script type="application/json" id="about">',
        '<script type="module">',
    ]
    assert len(scripts) == len(arrays) + 2 and page.count("</script>") == len(scripts)
    assert "alert(1)</" not in page and "<img" not in page and "<b>book" not in page
    assert "<title>A &lt;b&gt;book&lt;/b&gt; {{style}}: " in page


@pytest.mark.parametrize("live", [False, True])
def test_it_loads_nothing_and_runs_only_its_own_program(made, live):
    page = live_page(SUBJECT, {"resetEvery": 512}) if live else made[1]
    policy = re.search('Content-Security-Policy" content="([^"]*)"', page)[1]
    script = re.search('<script type="module">(.*?)</script>', page, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"script-src 'sha256-{digest}';" in policy
    assert policy.endswith("connect-src 'self'" if live else "connect-src 'none'")
    assert "base-uri 'none'; form-action 'none'; " in policy
    outside = set(re.findall(r"https?://[^\s\"'<]*", page)) - {"http://www.w3.org/2000/svg"}
    assert not outside and not re.search(
        r"""\bsrc=|<link|@import|url\(|innerHTML|insertAdjacentHTML|\beval\b""", script
    )


@pytest.mark.slow
def test_a_book_fits(tmp_path):
    texts = [" word", " another", ",", "\n"]
    page = report(reading(200_000, 24, 32, texts=texts), Subject("A book", "TTT-Linear", 24, 32, 16))
    assert len(page.encode()) < 20e6  # 40 MB are allowed
