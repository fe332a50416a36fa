"""One look at each view of the console in a real browser; `make console-check` tests them in depth."""

from __future__ import annotations

import httpx
import pytest

from tests.browser import CHROMIUM, Browser
from tests.conftest import PATIENCE_S, Process
from tests.e2e.test_console import BODY, DRAWN, SHOTS, load
from tests.e2e.test_console_try import DONE, texts

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="wants Chromium (make console-check)")


def test_the_first_visit_shows_a_prediction_that_came_true(page: Browser) -> None:
    page.until(f"{DONE} && document.querySelectorAll('#found li').length === 20")
    assert texts(page, "#measured .readout .value")[0] in ("1st", "2nd", "3rd")
    assert page.run("document.querySelector('#measured .readout').dataset.state") == "hit"
    assert "R@5 is the share of contexts whose true next passage is among the first five" in page.text("#limits")
    assert page.run("/article=\\d+&at=\\d+/.test(location.hash)")
    assert page.complaints == []


def test_the_live_view_draws_what_load_does(page: Browser, server: Process) -> None:
    with load(server.url):
        page.click("#tab-live")
        page.until(DRAWN)
    titles = page.run("[...document.querySelectorAll('figcaption')].map(one => one.innerText)")
    shown = "Latency of /predict", "Latency of /retrieve", "Time in the model: primary (amn)", "Answered, by route"
    assert set(shown) < set(titles)
    assert not any("Failed" in title or "Overload" in title for title in titles)
    described = page.run("document.querySelector('#latency desc').textContent")
    assert {word.split(":")[0].strip() for word in described.split(";")} == {"p50", "p95", "p99"}
    assert " ms" in page.text("#latency figure .legend").replace("\xa0", " ")
    assert "batches" in page.text("#queue figure:last-child .legend")
    assert page.text("#readouts .value").replace("\xa0", " ").endswith(" /s")
    rows = page.text("#serving tbody")
    assert all(alias in rows for alias in ("primary", "fallback", "candidate", "retriever"))
    page.screenshot(SHOTS / "live.png")
    assert page.complaints == []


def test_the_models_view_shows_versions_cards_shadow_and_ledger(page: Browser, server: Process) -> None:
    for _ in range(5):
        httpx.post(f"{server.url}/predict", json=BODY, timeout=PATIENCE_S).raise_for_status()
    page.click("#tab-models")
    moves, _ = server.registry.read_ledger()
    page.until(f"document.querySelectorAll('#ledger tbody tr').length === {len(moves)}")
    assert "to be looked at" in page.text("#ledger tbody tr")
    known = {version.id for version in server.registry.versions()}
    shown = page.run("[...document.querySelectorAll('.version code')].map(one => one.textContent)")
    assert set(shown) == known
    assert "822,400" in page.text("#nets tbody")
    assert "Passages both find" in page.text("#shadow")
    page.click("#nets tbody a[href*='=amn/']")
    page.until("document.querySelector('#card h4')")
    assert page.run("document.activeElement.id") == "card"
    card = page.text("#card")
    assert all(title in card for title in ("Scores", "Limits", "Origin", "persistence", "lvm train amn"))
    page.screenshot(SHOTS / "models.png")
    assert page.complaints == []
