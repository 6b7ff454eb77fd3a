"""The page in Chromium: what a person sees and does. Without a browser or playwright, these tests are skipped."""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import mlx_ttt
from mlx_ttt.text.tokenizer import encode_long
from mlx_ttt.watch.page import Subject, report
from mlx_ttt.watch.reading import read_text

from .serving import serving

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = next((path for path in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if path), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium"),
]

SCRIPT = "<script>window.ran = 1; alert(1)</script><img src=x onerror='window.ran = 1'>"
TEXT = "".join(
    f"SCENE {i}.\nEnter a KING, and {name}.\n\nKING.\nThe sea is calm to-night, and {name} sleeps. 日本 🎉\n"
    for i, name in enumerate(["MIRANDA", "ARIEL", "LEAR", "HAMLET", "ROMEO"] * 4)
)
TEXT = f"{TEXT}{SCRIPT}\nExeunt.\n"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, as which a container's tests may run.
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@contextmanager
def opened(browser, url: str, **options) -> Iterator:
    """A page, which must run without an error and ask nobody else for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
    page = context.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.on("request", lambda request: None if request.url.startswith(url.split("#")[0]) else wrong.append(request.url))
    page.goto(url)
    page.wait_for_selector("html[data-ready]")
    yield page
    context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def reading():
    model, tokenizer = mlx_ttt.load()
    return read_text(model, tokenizer, encode_long(tokenizer, TEXT))


@pytest.fixture(scope="module")
def file(reading, tmp_path_factory) -> str:
    path: Path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(report(reading, Subject("Scenes", "TTT-Linear", 4, 4, 16)), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def page(browser, file):
    with opened(browser, file) as page:
        yield page


def number(text: str) -> float:
    return float(text.replace("\u202f", "").replace("\u2212", "-"))


def wait(page, expression: str) -> None:
    """Until it is true. Playwright's own waiting would evaluate a string in the page, which our policy forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came true: {expression}")


def shown_figure(page, name: str) -> float:
    return number(page.locator(f"[data-figure={name}] b").inner_text())


def token(page, i: int):
    return page.locator(f'.pane[data-side="A"] [data-i="{i}"]').first


def is_in_sight(page, i: int) -> bool:
    box, pane = token(page, i).bounding_box(), page.locator(".text").first.bounding_box()
    return pane["y"] <= box["y"] and box["y"] + box["height"] <= pane["y"] + pane["height"]


def test_the_head_of_the_page(page, reading):
    assert number(page.locator(".gain").inner_text()) == pytest.approx(reading.gain, rel=0.05)  # two digits
    header, tools = (page.locator(name).bounding_box() for name in ("header", ".tools"))
    assert header["height"] < 100 and tools["x"] > 1000  # in one row


def test_a_page_of_one_token(browser, tmp_path):
    model, tokenizer = mlx_ttt.load()
    one = read_text(model, tokenizer, np.array([tokenizer.bos_token_id], np.int32))
    path = tmp_path / "one.html"
    path.write_text(report(one, Subject("One", "TTT-Linear", 4, 4, 16)), encoding="utf-8")
    with opened(browser, path.as_uri()) as page:
        assert page.locator(".tokens").inner_text() == "1" and page.locator(".gain").inner_text() == "–"  # noqa: RUF001
        ticks = page.locator(".drift .tick, .loss .tick").all()
        below = [tick.text_content() for tick in ticks if float(tick.get_attribute("x")) >= 0]
        assert set(below) == {"0", "1"}  # there is no half of a token


def test_hovering_shows_a_tokens_numbers(page, reading):
    figures = reading.figures
    for i in (3, 17):
        token(page, i).hover()
        assert page.locator(".place").inner_text().startswith(f"token {i} of ")
        assert page.locator(".quoted").inner_text() == reading.texts[i].replace("\n", "↵").strip()
        assert shown_figure(page, "surprisal") == pytest.approx(figures.surprisal[i], rel=0.03)
        assert shown_figure(page, "write") == pytest.approx(figures.write_norm[i], rel=0.03)
        assert shown_figure(page, "loss") == pytest.approx(figures.loss[i], rel=0.03)
        heads = page.locator(".heads li")
        for place, head in enumerate(figures.strongest[i]):
            row = heads.nth(place).inner_text().split("\n")
            assert row[0] == f"layer {head // 4}, head {head % 4}"
            assert number(row[-1]) == pytest.approx(figures.strongest_norm[i, place], rel=0.03)


def shades(page, tokens: range) -> list[int]:
    classes = dict(
        page.evaluate("[...document.querySelectorAll('.rows .t')].map(e => [Number(e.dataset.i), e.className])")
    )
    return [int(re.search(r"\bs(\d)\b", classes[i])[1]) for i in tokens]


def test_the_switch_changes_the_shades(page, reading):
    tokens = range(1, 60)
    for name, values in [
        ("write", reading.figures.write_norm),
        ("loss", reading.figures.loss),
        ("surprisal", reading.figures.surprisal),
    ]:
        page.locator(f"input[value={name}]").locator("xpath=..").click()
        seen = shades(page, tokens)
        order = np.argsort([values[i] for i in tokens])
        assert sorted(seen) == [seen[i] for i in order], "a larger value has no lighter shade"
        assert len(set(seen)) > 2
        colors = set(
            page.evaluate("[...document.querySelectorAll('.rows .t')].map(e => getComputedStyle(e).backgroundColor)")
        )
        assert len(colors) >= len(set(seen))
    page.keyboard.press("2")
    assert page.locator("input[value=write]").is_checked()


def test_strong_shades_have_a_line_too(page):
    """So that the page can be read without colours."""
    lines = page.evaluate(
        """() => [...document.querySelectorAll(".legend .t")].map(e => {
            const shadow = getComputedStyle(e).boxShadow.match(/(-?[0-9.]+)px (-?[0-9.]+)px/);
            return shadow ? -Number(shadow[2]) : 0;
        })"""
    )
    assert len(lines) == 8 and lines == sorted(lines) and lines[0] == 0 and lines[-1] == 4


def test_links_lead_into_the_text(page, reading):
    links = page.locator(".passages a")
    assert links.count() == 10
    ranges = [list(map(int, re.findall(r"\d+", links.nth(i).get_attribute("href")))) for i in range(10)]
    norms = [reading.figures.write_norm[a:b].mean() for a, b in ranges]
    assert all(earlier >= later * 0.98 for earlier, later in itertools.pairwise(norms))
    best = max(reading.figures.write_norm[a : a + 32].mean() for a in range(0, len(reading.texts) - 32, 8))
    assert norms[0] == pytest.approx(best, rel=0.02)
    start, stop = max(ranges)
    links.nth(ranges.index([start, stop])).click()
    wait(page, f"location.hash === '#t{start}-{stop}'")
    assert is_in_sight(page, start) and "passage" in token(page, stop - 1).get_attribute("class")
    assert f"token {start:,} of".replace(",", "\u202f") in page.locator(".place").inner_text()


def test_a_text_is_shown_and_not_run(page, reading):
    page.fill(".find input", "<script>")
    page.press(".find input", "Enter")
    rows = page.locator(".row", has_text="<script>")
    assert "<script>window.ran = 1; alert(1)</script>" in page.locator(".rows").inner_text().replace("\n", "")
    assert rows.count() >= 1 and page.evaluate("window.ran") is None
    assert page.locator(".rows script, .rows img").count() == 0
    shown = re.sub("[↵\n]", "", page.locator(".rows").inner_text())
    assert SCRIPT in shown


def test_all_of_the_text_is_there_line_by_line(page, reading):
    shown = "[...document.querySelectorAll('.rows .t')].map(e => [Number(e.dataset.i), e.textContent])"
    scroll = "(() => { const t = document.querySelector('.text'); t.scrollTop += 600; return t.scrollTop; })()"
    lines: dict[int, str] = {}
    at, before = 0, -1
    while at != before:
        lines |= dict(page.evaluate(shown))
        before, at = at, page.evaluate(scroll)
        page.wait_for_timeout(40)
    assert sorted(lines) == list(range(len(reading.texts)))
    assert "".join(lines[i] for i in sorted(lines)).replace("·", "").replace("↵", "\n") == TEXT


def test_keys(page, reading):
    page.keyboard.press("t")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".place").inner_text().startswith("token 2 of")
    page.keyboard.press("End")
    last = len(reading.texts) - 1
    assert is_in_sight(page, last) and "chosen" in token(page, last).get_attribute("class")
    page.keyboard.press("PageUp")
    page.keyboard.press("n")
    first = page.locator(".passages a").first.get_attribute("href")
    wait(page, f"location.hash === '{first}'")


def test_a_click_on_a_figure_goes_there(page, reading):
    for figure in (".map", ".drift", ".loss"):
        plot = page.locator(f"{figure} .plot")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        plot.hover(position={"x": box["width"] * 0.7, "y": 20})
        assert page.locator(f"{figure} .says").inner_text()
        plot.click(position={"x": box["width"] * 0.7, "y": 20})
        place = number(re.search(r"token ([\d\u202f]+) of", page.locator(".place").inner_text())[1])
        assert place == pytest.approx(0.7 * len(reading.texts), abs=12)


def test_light_and_dark(browser, file):
    colors = {}
    for scheme in ("light", "dark"):
        with opened(browser, file, color_scheme=scheme) as page:
            colors[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
            if scheme == "light":
                page.click(".theme")
                colors["switched"] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colors["light"] != colors["dark"] == colors["switched"]


def test_a_narrow_window(browser, file):
    with opened(browser, file) as page:
        page.set_viewport_size({"width": 360, "height": 700})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        widest = page.evaluate(
            "Math.max(...[...document.querySelectorAll('.row')].map(r => r.scrollWidth - r.clientWidth))"
        )
        assert widest <= 0, "a line is broken where the window ends"


def test_paper_has_the_whole_text(browser, file):
    with opened(browser, file) as page:
        page.emulate_media(media="print")
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert "Exeunt." in page.locator(".rows").inner_text() and "SCENE 0." in page.locator(".rows").inner_text()
        assert page.locator(".row").last.is_visible()
        page.evaluate("dispatchEvent(new Event('afterprint'))")


def test_a_long_text_needs_few_elements(browser, reading, tmp_path):
    import dataclasses

    many = 20
    figures = type(reading.figures)(*(np.concatenate([x] * many) for x in vars(reading.figures).values()))
    long = dataclasses.replace(
        reading, texts=reading.texts * many, figures=figures, columns=np.concatenate([reading.columns] * many), names={}
    )
    file = tmp_path / "long.html"
    file.write_text(report(long, Subject("Long", "TTT-Linear", 4, 4, 16)), encoding="utf-8")
    last = len(long.texts) - 1
    with opened(browser, f"{file.as_uri()}#t{last}") as page:
        assert is_in_sight(page, last)
        assert page.evaluate("document.querySelectorAll('*').length") < 3000


# ---- Live ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("live")
    (folder / "scene.txt").write_text("ROMEO.\nBut soft! <script>window.ran = 1</script>\n", encoding="utf-8")
    with serving(folder / "log", str(folder / "scene.txt")) as server:
        yield server


def text_of(page, side: str) -> str:
    rows = page.locator(f'.pane[data-side="{side}"] .rows').inner_text()
    return re.sub("[·\n]", "", rows).replace("↵", "\n")


def take_turn(page, prompt: str, tokens: int | None = None) -> None:
    page.fill(".prompt textarea", prompt)
    if tokens is None:
        page.click(".prompt .read")
    else:
        page.fill(".max-tokens", str(tokens))
        page.fill(".temperature", "0")
        page.click(".prompt .write")
    wait(page, "document.querySelector('.prompt textarea').value === ''")
    page.wait_for_selector(".prompt:not(.busy)")
    page.wait_for_timeout(400)


def test_live(browser, server):
    with opened(browser, server.url) as page:
        wait(page, "document.querySelector('.rows').textContent.includes('But soft')")
        page.wait_for_selector(".prompt:not(.busy)")
        assert "<script>window.ran = 1</script>" in text_of(page, "A") and page.evaluate("window.ran") is None
        page.click('.pane[data-side="A"] .remember')
        wait(page, "document.querySelector('.back').textContent.includes('state 1')")

        take_turn(page, "\nJULIET.\n", 12)
        once = text_of(page, "A")
        assert "JULIET" in once and page.locator(".row.written").count() >= 1
        token(page, 5).hover()
        assert shown_figure(page, "write") > 0

        # Back, and the same prompt on both sides: the same text, since the states are the same.
        page.select_option('.pane[data-side="A"] .back', "1")
        wait(page, "!document.querySelector('.rows').textContent.includes('JULIET')")
        page.check(".compare input")
        page.select_option('.pane[data-side="B"] .back', "A")
        wait(page, "document.querySelector('.pane[data-side=B] .rows').textContent.includes('But soft')")
        take_turn(page, "\nJULIET.\n", 12)
        assert text_of(page, "A") == text_of(page, "B") == once

        # With the slider at 0, side B learns nothing.
        page.fill('.pane[data-side="B"] .learning input', "0")
        wait(page, "document.querySelector('.pane[data-side=B] .learning output').textContent === 'off'")
        before = page.locator('.pane[data-side="B"] .t').count()
        take_turn(page, "\nNURSE.\nMadam!\n")
        last = page.locator('.pane[data-side="B"] .t').count() - 2
        assert last > before
        page.locator(f'.pane[data-side="B"] [data-i="{last}"]').hover()
        assert shown_figure(page, "write") == 0
        page.locator(f'.pane[data-side="A"] [data-i="{last}"]').hover()
        assert shown_figure(page, "write") > 0


def test_live_errors_and_a_second_page(browser, server):
    with opened(browser, server.url) as page:
        page.wait_for_selector(".prompt:not(.busy)")
        page.select_option('.pane[data-side="A"] .back', "start")
        wait(page, "document.querySelector('.pane[data-side=A] .state-name').textContent === 'start'")
        page.fill(".prompt textarea", "")
        page.click(".prompt .write")
        wait(page, "document.querySelector('.told').textContent.includes('there is no text yet')")
        take_turn(page, "Once more unto the breach", 8)
        text = text_of(page, "A")
        with opened(browser, server.url) as second:
            wait(second, "document.querySelector('.rows').textContent.includes('breach')")
            second.wait_for_selector(".row")
            assert second.locator(".tokens").inner_text() == page.locator(".tokens").inner_text()
        assert text


def test_a_turn_can_be_stopped(browser, server):
    with opened(browser, server.url) as page:
        page.wait_for_selector(".prompt:not(.busy)")
        page.fill(".prompt textarea", "HAMLET.\n")
        page.fill(".max-tokens", "4096")
        page.click(".prompt .write")
        page.wait_for_selector(".prompt.busy")
        page.click(".prompt .stop")
        page.wait_for_selector(".prompt:not(.busy)", timeout=10_000)
