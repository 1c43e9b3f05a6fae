"""The report in a real headless Chromium: the explorer works, nothing leaks, nothing is asked for.

Needs the Python package playwright and a Chromium of the machine (``chromium`` on the path, or the
variable CHROMIUM); without one of them the tests are skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fabricate import fabricate
from fabricate_sweep import NASTY, STRENGTHS, explorer

from dsteer.report.html import write_report

pytestmark = pytest.mark.browser

DESKTOP = {"viewport": {"width": 1200, "height": 900}}
PHONE = {"viewport": {"width": 375, "height": 800}, "is_mobile": True, "has_touch": True}
PLAIN = len(NASTY)
"""The first prompt whose texts are ordinary."""

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="the package playwright is absent")
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which(
        "chromium-browser"
    )  # fmt: skip
    if not found:
        pytest.skip("no Chromium: not on the path, and CHROMIUM is not set")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("browser") / "run"
    return write_report(fabricate(run, stages=("data", "interpolation", "inversion")))


@pytest.fixture
def visit(browser: Any, report: Path) -> Iterator[Open]:
    """Opens the report; at the end, no error, no message, no dialog and no outside request."""
    contexts, trouble = [], []

    def open_page(**options: Any) -> Any:
        context = browser.new_context(**(options or DESKTOP))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: trouble.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("request", lambda request: note_request(request.url))
        page.on("dialog", lambda dialog: (trouble.append("a dialog"), dialog.dismiss()))
        page.goto(report.as_uri())
        return page

    def note_request(url: str) -> None:
        if url != report.as_uri() and not url.startswith("data:"):
            trouble.append(f"request: {url}")

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def choose(page: Any, prompt: int) -> None:
    page.locator("#x-list").select_option(str(prompt))


def slide(page: Any, strength: float) -> None:
    page.locator("#x-slider").fill(str(STRENGTHS.index(strength)))


def text(page: Any, name: str) -> str:
    return str(page.locator(f"#x-{name}").text_content())


def options(page: Any) -> list[str]:
    return list(page.locator("#x-list option").all_text_contents())


def test_opens_with_its_figures_at_the_strength_of_v(visit: Open) -> None:
    page = visit()
    assert page.evaluate(
        "[...document.images].length >= 4 && [...document.images].every(i => i.naturalWidth > 0)"
    )
    assert text(page, "lambda") == "λ = 1"
    assert page.locator("#x-app").is_visible()
    assert not page.locator("noscript").is_visible()
    assert len(options(page)) == 12


def test_slider_changes_the_steered_text_alone(visit: Open) -> None:
    page = visit()
    choose(page, PLAIN)
    sides = {name: text(page, name) for name in ("base", "tuned")}
    for i, strength in enumerate(STRENGTHS):
        slide(page, strength)
        assert (
            text(page, "steered")
            == explorer("interpolation")["prompts"][PLAIN]["steered"][i]["text"]
        )
        assert text(page, "lambda") == f"λ = {strength:g}".replace("-", "−")
        assert page.locator("#x-slider").get_attribute("aria-valuetext") == text(page, "lambda")
    assert {name: text(page, name) for name in sides} == sides


def test_keyboard_alone(visit: Open) -> None:
    """From the top of the page: tab to the slider, move it, step through prompts, search."""
    page = visit()
    page.locator("#h-explorer").evaluate("e => { e.tabIndex = -1; e.focus(); }")

    def focused() -> str:
        return str(page.evaluate("document.activeElement.id"))

    order = []
    for _ in range(9):
        page.keyboard.press("Tab")
        order.append(focused())
    wanted = ["x-sweep", "x-search", "x-list", "x-slider", "x-previous", "x-next"]
    assert [name for name in order if name in wanted] == wanted
    page.locator("#x-slider").focus()
    page.keyboard.press("ArrowRight")
    assert text(page, "lambda") == "λ = 1.5"
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert text(page, "lambda") == "λ = 0.75"
    assert "λ = 0.75" in text(page, "steered")
    page.keyboard.press("n")
    assert text(page, "prompt") == NASTY[1]
    page.keyboard.press("p")
    page.keyboard.press("p")
    assert text(page, "prompt") == "Question 11: who keeps otter 11?"
    page.keyboard.press("Home")
    assert text(page, "lambda") == "λ = −2"
    page.locator("#x-list").focus()
    page.keyboard.press("ArrowUp")
    assert text(page, "prompt") == "Question 10: who keeps otter 10?"
    page.locator("#x-next").focus()
    page.keyboard.press("Enter")
    assert text(page, "prompt") == "Question 11: who keeps otter 11?"
    page.locator("#x-search").focus()
    page.keyboard.type("pinning n p")  # letters typed are no commands
    assert text(page, "found").startswith("0 of 12 prompts")
    outline = page.locator("#x-search").evaluate("e => getComputedStyle(e).outlineStyle")
    assert outline == "solid"


def test_search_filters_by_prompt_and_by_text(visit: Open) -> None:
    page = visit()
    search = page.locator("#x-search")
    search.fill("OTTER 7")
    assert len(options(page)) == 1
    assert text(page, "prompt") == "Question 7: who keeps otter 7?"
    assert text(page, "found").startswith("1 of 12 prompts")
    search.fill("kind answer 9,")
    assert text(page, "tuned") == "Kind answer 9, if you please."
    search.fill("steered model at λ = 0.25")
    assert len(options(page)) == 12
    search.fill("nothing holds this")
    assert options(page) == []
    assert not page.locator("#x-texts").is_visible()
    search.fill("")
    assert len(options(page)) == 12
    assert page.locator("#x-texts").is_visible()


def test_refusals_and_degenerate_outputs_are_marked_in_words(visit: Open) -> None:
    page = visit()
    choose(page, 7)
    assert text(page, "tuned-marks") == "refusal"
    assert text(page, "steered-marks") == text(page, "base-marks") == ""
    for strength, words in (
        (2.0, "refusal"),
        (3.0, "degenerate: leaked role header"),
        (4.0, "degenerate: loop"),
        (6.0, "degenerate: empty"),
    ):
        slide(page, strength)
        assert text(page, "steered-marks") == words
        assert page.locator("#x-steered-marks .mark").is_visible()
        assert all(f"[{words}]" in option for option in options(page))
    assert "12 degenerate" in text(page, "counts")


def test_texts_stay_texts(visit: Open) -> None:
    page = visit()
    images = page.evaluate("document.images.length")
    for i, words in enumerate(NASTY):
        choose(page, i)
        assert text(page, "prompt") == words
        assert text(page, "steered").endswith(words)
        assert page.locator("#x-texts img, #x-texts script").count() == 0
    assert page.evaluate("document.images.length") == images
    choose(page, 2)
    assert page.locator("#x-prompt").evaluate("e => getComputedStyle(e).direction") == "rtl"


def test_both_sweeps(visit: Open) -> None:
    page = visit()
    choose(page, 7)
    assert text(page, "how") == "base + 1 × v* at resid_post.2"
    page.locator("#x-sweep").select_option("inversion")
    assert text(page, "how") == "tuned − 1 × v* at resid_post.2"
    assert "inversion" in text(page, "source")


def test_phone_has_no_sideways_scroll(visit: Open) -> None:
    page = visit(**PHONE)
    for i in range(len(NASTY)):
        choose(page, i)
        assert page.evaluate("document.documentElement.scrollWidth") == 375
    tops = [page.locator(f"#x-{name}").bounding_box()["y"] for name in ("base", "steered", "tuned")]
    assert tops == sorted(tops)
    assert len(set(tops)) == 3
    wide = visit()
    rows = {wide.locator(f".side:has(#x-{n})").bounding_box()["y"] for n in ("base", "tuned")}
    assert len(rows) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_schemes_and_contrast(visit: Open, scheme: str) -> None:
    page = visit(**DESKTOP, color_scheme=scheme)
    slide(page, 2.0)

    def luminance(element: str, what: str) -> float:
        colour = page.locator(element).first.evaluate(f"e => getComputedStyle(e).{what}")
        parts = [int(part) / 255 for part in colour.strip("rgb()").split(", ")]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    background = luminance("body", "backgroundColor")
    assert (background < 0.05) if scheme == "dark" else (background > 0.9)
    for element in ("body", "#x-steered", "#x-steered-marks .mark", "#x-counts"):
        pair = sorted((background, luminance(element, "color")))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, element


def test_nothing_moves_by_itself(visit: Open) -> None:
    page = visit(**DESKTOP, reduced_motion="reduce")
    assert page.evaluate("document.getAnimations().length") == 0
    slide(page, 3.0)
    assert page.evaluate("document.getAnimations().length") == 0


def test_policy_stops_an_injected_script(browser: Any, report: Path) -> None:
    context = browser.new_context(**DESKTOP)
    page = context.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(report.as_uri())
    page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hit = 1';"
        " document.body.append(s);"
        " const i = document.createElement('img'); i.src = 'http://127.0.0.1:9/x';"
        " document.body.append(i); }"
    )
    assert page.evaluate("window.hit") is None
    assert len([words for words in refused if "Content Security Policy" in words]) == 2
    context.close()


def test_without_javascript(visit: Open) -> None:
    page = visit(**DESKTOP, java_script_enabled=False)
    assert not page.locator("#x-app").is_visible()
    static = page.locator("noscript .static")
    assert static.count() == 2
    assert static.first.is_visible()
    assert "Answer 5 of the steered model at λ = 1." in static.first.inner_text()
