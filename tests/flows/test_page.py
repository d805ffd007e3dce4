"""The page of a sweep in a real browser, and labels that would end its script."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, Request, expect, sync_playwright

from flows.compare import compare
from flows.page import page_of
from flows.servers import free_port
from tests.flows.conftest import Project, wait_for
from tests.flows.test_compare import sweep
from tests.flows.test_servers import started

Exported = tuple[Project, dict[str, Any]]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here; `make browser-test` installs it"
)


@pytest.fixture
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without its sandbox: it refuses to start as root, as containers do.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, path: Path, **options: Any) -> tuple[Page, list[str]]:
    """The page, and what went wrong or was asked of a network."""
    page = browser.new_page(**options)
    wrong: list[str] = []

    def asked(request: Request) -> None:
        if not request.url.startswith("data:"):
            wrong.append(request.url)

    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", asked)
    page.goto(path.as_uri())
    wrong.remove(path.as_uri())
    return page, wrong


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_report_is_accessible_and_needs_no_network(
    exported: Exported, browser: Browser, scheme: str
) -> None:
    path = Path(exported[1]["report"]) / "report.html"
    assert path.stat().st_size < 5e6
    page, wrong = opened(browser, path, color_scheme=scheme)
    assert wrong == []
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.locator("#table tbody tr").count() == len(exported[1]["rows"])
    assert page.locator("#table tr.best").count() == 1, "the champion"


@needs_chromium
def test_the_report_opens_at_once_and_can_be_read_on_a_phone(
    exported: Exported, browser: Browser
) -> None:
    path = Path(exported[1]["report"]) / "report.html"
    begun = time.monotonic()
    page, wrong = opened(browser, path, viewport={"width": 390, "height": 844})
    page.locator("#frontier g.point").last.wait_for()
    assert time.monotonic() - begun < 2
    assert wrong == []
    shown = "s => s.getBoundingClientRect().width / s.viewBox.baseVal.width"
    for chart in page.locator("svg").all():
        assert chart.evaluate(shown) > 0.95, "its text is as large as the page's"
    widths = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1], "nothing but the tables scrolls sideways"


@needs_chromium
def test_the_report_answers(exported: Exported, browser: Browser) -> None:
    page, wrong = opened(browser, Path(exported[1]["report"]) / "report.html")
    marks = page.locator("#frontier g.point")
    assert marks.count() == len(exported[1]["rows"])
    marks.first.focus()
    assert "baseline: 100.0%" in page.locator("#said").inner_text()
    before = page.locator("#frontier").inner_html()
    page.select_option("#cost", "cost/latency_ms")
    assert page.locator("#frontier").inner_html() != before
    assert marks.count() == 3, "torch computes no int8"
    page.select_option("#kept-point", "0.6")
    assert page.locator("#kept rect").count() == 20
    page.locator("#epoch").fill("0")
    assert "sparse (orange), epoch 1" in page.locator("#gammas-said").inner_text()
    page.select_option("#figure", "loss")
    assert page.locator("#curves polyline").count() == 4
    page.select_option("#errors-point", "0.6 int8")
    assert "lines are read wrongly" in page.locator("#errors-said").inner_text()
    page.get_by_text("layers of 0.6").click()
    assert "Conv2d" in page.locator("#details").inner_text()
    page.set_viewport_size({"width": 360, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "it fits a phone"
    assert wrong == []


ROW = {"val/word_accuracy": 0.5, "val/word_accuracy_low": 0.4, "val/word_accuracy_high": 0.6}
HOSTILE = "</script><script>document.title='taken'</script><!--<script>"


@needs_chromium
def test_no_label_leaves_its_place(browser: Browser, tmp_path: Path) -> None:
    error = {"index": 0, "label": HOSTILE, "text": "<b>", "confidence": 0.5, "new": True}
    point = {"point": HOSTILE, "kept": {}, "errors": [error], "wrong": 1, "newly_wrong": 1}
    shown = {
        "title": "safe",
        "subject": HOSTILE,
        "sentences": [HOSTILE],
        "axes": {"cost/bytes": "bytes"},
        "size": "cost/bytes",
        "table": {"header": ["point"], "cells": [[HOSTILE]]},
        "rows": [{**ROW, "point": HOSTILE, "kind": "slimmed", "cost/bytes": 10}],
    }
    details = {"points": [point], "lines": 2, "images": {0: "data:,"}, "details": {"x": HOSTILE}}
    path = tmp_path / "page.html"
    path.write_bytes(page_of(shown, details))
    page, wrong = opened(browser, path)
    assert wrong == []
    assert page.title() == "safe"
    assert page.locator("#errors b").first.inner_text() == HOSTILE


@needs_chromium
def test_frontiers_that_are_compared_have_a_colour_each(browser: Browser) -> None:
    sweep("tiny", "aaaa11", 3.0)
    sweep("other", "bbbb22", 2.0)
    page, wrong = opened(browser, compare(["tiny", "other"])[1] / "report.html")
    marks = page.locator("#frontier .mark").all()
    assert [mark.get_attribute("stroke") for mark in marks] == [
        "var(--blue)",
        "var(--blue)",
        "var(--orange)",
        "var(--orange)",
    ]
    assert "other/bbbb" in page.locator("#key").inner_text()
    names = [text.text_content() for text in page.locator("#frontier g.point text").all()]
    assert names == ["", "0.5", "", "0.5"], "colour and mark say the rest"
    assert Axe().run(page).violations_count == 0
    assert wrong == []


@needs_chromium
def test_mlflow_shows_the_charts_of_an_experiment(
    exported: Exported, browser: Browser, tmp_path: Path
) -> None:
    project, printed = exported
    port = free_port()
    server = started(project, "ui", "--port", str(port), log=tmp_path / "log")
    try:
        wait_for(f"http://127.0.0.1:{port}/health")
        page = browser.new_page(viewport={"width": 1500, "height": 2400})
        address = f"http://127.0.0.1:{port}/#{printed['charts'].split('/#')[1]}"
        page.goto(address)
        chart = page.get_by_role("heading", name="cost/bytes vs. val/word_accuracy", exact=True)
        expect(chart).to_be_visible(timeout=60_000)
        for row in printed["rows"]:
            expect(page.get_by_role("link", name=row["point"], exact=True)).to_be_visible()
        page.goto("about:blank")
        page.goto(address.replace("frontier", "training"))
        for chart in ("gamma/share_zero", "gammas"):
            heading = page.get_by_role("heading", name=chart, exact=True)
            expect(heading).to_be_visible(timeout=60_000)
        expect(page.get_by_role("link", name="sparse", exact=True)).to_be_visible()
        expect(page.locator("img[src*='gammas']").first).to_be_visible(timeout=30_000)
    finally:
        server.terminate()
        server.wait()


def test_the_page_of_bare_rows_holds_their_figures(exported: Exported) -> None:
    content = (Path(exported[1]["report"]) / "report.html").read_text(encoding="utf-8")
    data = content.split('type="application/json">')[1].split("</script>")[0]
    shown = json.loads(data)
    assert [row["point"] for row in shown["rows"]] == [r["point"] for r in exported[1]["rows"]]
    assert shown["champion"] == "0.6 int8"
    assert set(shown["gammas"]) == {"baseline", "sparse"}
    assert "s computed by this run" in shown["details"]["time"]
