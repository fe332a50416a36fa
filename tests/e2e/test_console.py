"""The console in a real browser: every view over what ships, without a word in the browser's console."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from service.deploy.shadow_report import summarize_shadow
from tests.browser import CHROMIUM, Browser
from tests.conftest import PATIENCE_S, ROOT, Process, until

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="wants Chromium")]
SHOTS = ROOT / "runs" / "console"
BODY = json.loads((ROOT / "examples" / "context.json").read_text())
VIEWS = ("try", "live", "models")


@contextmanager
def load(url: str) -> Iterator[None]:
    """Ask for vectors and passages, over and over."""
    is_over = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
            while not is_over.wait(0.02):
                client.post("/predict", json=BODY).raise_for_status()
                client.post("/retrieve", json=BODY).raise_for_status()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


DRAWN = """(() => {
    const figures = [...document.querySelectorAll('.plots figure')];
    const isDrawn = (one) => [...one.querySelectorAll('path.line')].some((path) => /L/.test(path.getAttribute('d')));
    return figures.length > 9 && figures.every((one) => one.querySelector('rect') || isDrawn(one));
})()"""


def focused(page: Browser) -> str:
    """Return what has the focus, which must be seen."""
    ringed = "getComputedStyle(document.activeElement).outlineStyle"
    named = "document.activeElement.id || document.activeElement.name || document.activeElement.textContent"
    assert page.run(ringed) != "none", page.run(named)
    return str(page.run(named))


def test_the_keyboard_alone_goes_everywhere(page: Browser) -> None:
    page.until("document.querySelectorAll('#found li').length === 20")
    first = int(page.run("document.querySelector('#at').value"))
    walk = []
    for _ in range(12):
        page.press("Tab")
        walk.append(focused(page))
    assert walk == [
        "drift",
        "API",
        "OpenAPI",
        "Metrics",
        "tab-try",
        "source",
        "another",
        "search",
        "article",
        "back",
        "at",
        "on",
    ]
    page.press("Enter")
    page.until(f"document.querySelector('#place').textContent.startsWith('passages {first + 2} to')")
    page.press("Tab", shift=True)
    page.press("ArrowRight")
    page.until(f"document.querySelector('#context').innerText.startsWith('passage {first + 3}\\n')")
    for _ in range(6):
        page.press("Tab", shift=True)
    for key, tab in (("ArrowRight", "live"), ("ArrowRight", "models"), ("ArrowRight", "try"), ("End", "models")):
        page.press(key)
        assert focused(page) == f"tab-{tab}"
        assert page.run("[...document.querySelectorAll('[role=tabpanel]:not([hidden])')].map(one => one.id)") == [tab]
        assert page.run(f"document.querySelector('#tab-{tab}').ariaSelected") == "true"
    page.until("document.querySelectorAll('#aliases tbody a').length > 3")
    page.press("Tab")
    page.press("Tab")
    assert focused(page).startswith("amn/")
    page.press("Enter")
    page.until("document.activeElement.id === 'card'")
    page.press("Escape")
    page.until("document.activeElement.closest('#aliases')")
    assert page.complaints == []


def test_every_control_has_a_name(page: Browser) -> None:
    nameless = """[...document.querySelectorAll('button, input, select, textarea, [role=tabpanel], [role=group]')]
        .filter(one => !(one.labels?.length || one.ariaLabel || one.hasAttribute('aria-labelledby') || one.textContent))
        .map(one => one.outerHTML)"""
    page.until("document.querySelectorAll('#found li').length === 20")
    assert page.run(nameless) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_every_view_without_scrolling_sideways(page: Browser, server: Process, scheme: str) -> None:
    page.size(320, 700)
    page.colours(scheme)
    ready = {"try": "#found li", "live": ".plots svg, #idle pre", "models": "#ledger tbody tr"}
    for view in VIEWS:
        page.click(f"#tab-{view}")
        page.until(f"document.querySelector({json.dumps(ready[view])})")
        if view == "models":
            page.click("#nets tbody a")
            page.until("document.querySelector('#card h4')")
        assert page.run("document.documentElement.scrollWidth") == 320, view
        page.screenshot(SHOTS / f"{view}-phone-{scheme}.png")
    paper = page.run("getComputedStyle(document.documentElement).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") is (scheme == "light")
    assert page.complaints == []


def in_page(page: Browser, module: str, expression: str) -> Any:
    """Return an expression over `m`, a module of the page."""
    return page.run(f"import('/console/{module}.js').then((m) => {expression})")


def test_each_view_keeps_its_values_in_the_address(page: Browser, server: Process) -> None:
    page.open(f"{server.url}/#/live?window=15")
    assert page.run("document.querySelector('#live').hidden") is False
    assert in_page(page, "address", "m.values().get('window')") == "15"
    page.click("#tab-models")
    in_page(page, "address", "m.set({card: 'a/b c', gone: null})")
    assert page.run("location.hash") == "#/models?card=a/b+c"
    page.click("#tab-live")
    assert page.run("location.hash") == "#/live?window=15"
    page.run("history.back()")
    page.until("location.hash === '#/models?card=a/b+c' && !document.querySelector('#models').hidden")
    page.open(f"{server.url}/#/nothing?x=1")
    page.until("location.hash.startsWith('#/try')")


def test_the_text_of_a_card_is_never_markup(page: Browser) -> None:
    card = "---\na: 1\n---\n\n# <img src=x onerror=alert(1)>\n\n|a|b|\n|---|---|\n|`<b>`|0.5|\n\n- one\n- **two**\n"
    shown = in_page(
        page,
        "markdown",
        f"""{{
            const {{front, body}} = m.render({json.dumps(card)}), box = document.createElement('div');
            box.append(...body);
            const count = (selector) => box.querySelectorAll(selector).length;
            return [front, count('img, b'), count('li'), count('td.number'), box.firstChild.textContent];
        }}""",
    )
    assert shown == ["a: 1", 0, 2, 1, "<img src=x onerror=alert(1)>"]


def test_rows_of_a_card_that_begin_alike_are_a_group(page: Browser) -> None:
    card = "|data|predictor|R@5|\n|---|---|---|\n|wiki|amn|0.3|\n|wiki|mean|-0.4|\n|peps|amn|0.5|"
    lines = f"[...m.render({json.dumps(card)}).body[0].querySelectorAll('tr')]"
    shown = in_page(page, "markdown", f"{lines}.map(({{cells}}) => [...cells].map((one) => one.textContent))")
    rows = ["predictor", "R@5"], ["wiki"], ["amn", "0.3"], ["mean", "\u22120.4"], ["peps"], ["amn", "0.5"]
    assert shown == list(rows)


def test_a_scrape_is_read_as_prometheus_reads_it(page: Browser) -> None:
    scrape = (
        "# TYPE a counter\n"
        'a_total{route="/v2/{m}",said="a \\"b\\" \\\\ c"} 3 # {trace="x"} 1\n'
        'h_bucket{le="0.1"} 2\nh_bucket{le="0.2"} 4\nh_bucket{le="+Inf"} 5\nh_sum 1.5\nh_count 5\nlone 7e-1\n'
    )
    parsed = f"m.parse({json.dumps(scrape)})"
    assert in_page(page, "prometheus", f"[...{parsed}.get('a_total')]") == [
        {"labels": {"route": "/v2/{m}", "said": 'a "b" \\ c'}, "value": 3}
    ]
    assert in_page(page, "prometheus", f"m.total({parsed}, 'lone')") == 0.7
    assert in_page(page, "prometheus", f"m.total({parsed}, 'nothing')") is None
    quantiles = f"[0.2, 0.4, 0.6, 0.99].map((q) => m.quantile(q, m.histogram({parsed}, 'h')))"
    assert in_page(page, "prometheus", quantiles) == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert in_page(page, "prometheus", "m.quantile(0.5, null)") is None


def test_a_restart_of_the_service_is_no_fall(page: Browser) -> None:
    assert in_page(page, "prometheus", "[m.rise(7, 5), m.rise(3, 5), m.rise(2, null), m.rise(null, 1)]") == [
        2,
        3,
        2,
        None,
    ]
    later, earlier = ({"edges": [1, 2], "counts": [n, n + 1], "count": n + 1, "sum": n} for n in (4, 1))
    for pair, counts in (((later, earlier), [3, 3]), ((earlier, later), [1, 2])):
        assert in_page(page, "prometheus", f"m.between(...{json.dumps(pair)}).counts") == counts


def test_ticks_of_an_axis_are_round_and_hold_the_values(page: Browser) -> None:
    assert in_page(page, "plot", "m.ticks(0, 7)") == [0, 2, 4, 6, 8]
    assert in_page(page, "plot", "m.ticks(0, 0.01).length") <= 6
    assert in_page(page, "plot", "[m.ticks(-0.4, 1)[0] <= -0.4, m.ticks(-0.4, 1).at(-1) >= 1]") == [True, True]


CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
OPENED = {"try": "#/try", "live": "#/live", "models": "#/models", "card": "#/models?card={net}"}
READY = {
    "try": "document.querySelector('#map svg')",
    "live": DRAWN,
    "models": "document.querySelector('#ledger tbody tr')",
    "card": "document.querySelector('#card h4')",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_borders_have_contrast_on_every_view(page: Browser, server: Process, scheme: str) -> None:
    page.colours(scheme)
    net = server.registry.aliases()["primary"]
    with load(server.url):
        for view, at in OPENED.items():
            page.open(f"{server.url}/{at.format(net=net)}")
            page.until(READY[view])
            found = page.run(CONTRAST)
            texts, borders = found["counted"]
            print(f"{view}, {scheme}: text {found['text']} of {texts}, borders {found['borders']} of {borders}")
            assert found["text"][0] >= 4.5, found["text"]
            assert found["borders"][0] >= 3, found["borders"]


def test_fingers_find_every_control_of_a_phone(page: Browser, server: Process) -> None:
    page.size(390, 844)
    low = """[...document.querySelectorAll('button, select, textarea, summary, [role=table] a, nav a, .segments span')]
        .filter((one) => one.checkVisibility() && one.getBoundingClientRect().height < 44)
        .map((one) => [one.outerHTML.slice(0, 80), one.getBoundingClientRect().height])"""
    for view, at in OPENED.items():
        page.open(f"{server.url}/{at.format(net=server.registry.aliases()['primary'])}")
        page.until(READY[view] if view != "live" else "document.querySelector('#serving tbody tr')")
        assert page.run(low) == [], view


def test_a_quiet_service_has_one_sentence_and_a_command_that_makes_traffic(page: Browser, server: Process) -> None:
    # another origin: its tab has no history
    page.open(f"{server.url.replace('127.0.0.1', 'localhost')}/#/live")
    page.until("document.querySelector('#idle pre')")
    assert "No request" in page.text("#idle-words")
    assert not page.run("[...document.querySelectorAll('figure, #readouts')].some((one) => one.checkVisibility())")
    command = page.text("#idle pre")
    assert "curl" in command
    subprocess.run(["bash", "-c", command.replace("seq 200", "seq 3")], check=True)
    page.until("document.querySelector('#latency figure')?.checkVisibility()")
    assert page.run("document.querySelector('#idle').checkVisibility()") is False
    assert page.complaints == []


def read(url: str, article: int, **options: str) -> None:
    """Ask what comes next at each place of an article, in order."""
    with httpx.Client(base_url=url, timeout=PATIENCE_S) as client:
        chunks = client.get(f"/articles/{article}").raise_for_status().json()["chunks"]
        vectors = [np.frombuffer(b64decode(chunk["vector"]), "<f4").tolist() for chunk in chunks]
        for start in range(len(vectors) - 4):
            body = {"context": vectors[start : start + 5], **options}
            client.post("/predict", json=body).raise_for_status()


def test_live_scores_stand_beside_the_baselines_and_the_card(page: Browser, server: Process) -> None:
    page.open(f"{server.url}/#/live")
    page.until("document.querySelector('#serving tbody tr')")
    read(server.url, 1583)
    page.until("/\\t55\\t/.test(document.querySelector('#scores tbody tr')?.innerText)")
    (score,) = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json()["live"]["versions"]
    row = page.text("#scores tbody tr").split("\t")
    baselines = [score["baselines"][name] for name in ("persistence", "mean", "weighted_mean")]
    assert row[:3] == ["primary", score["id"], "55"]
    assert [float(figure) for figure in (row[3], *row[5:])] == pytest.approx([score["cosine"], *baselines], abs=1e-4)
    drawn = page.run(
        "[...document.querySelectorAll('#quality figure:first-child .legend li')].map((one) => one.innerText)"
    )
    assert [each.split("\n")[0] for each in drawn] == ["amn", "last vector", "mean", "weighted mean", "card"]
    assert page.complaints == []


def compared(url: str) -> tuple[Any, Any]:
    """Return the live scores of the primary, and of the shadow, once they rise no more: they are counted later."""
    seen: list[tuple[Any, Any]] = []

    def is_quiet() -> bool:
        live = httpx.get(f"{url}/models", timeout=PATIENCE_S).json()["live"]["versions"]
        shadow = summarize_shadow(httpx.get(f"{url}/metrics", timeout=PATIENCE_S).text)["differences"]
        seen.append((live, shadow))
        return bool(live and shadow) and seen[-9:] == [seen[-1]] * 9

    until(is_quiet, "the scores")
    live, shadow = seen[-1]
    return next(each for each in live if each["alias"] == "primary"), shadow["all"]


def test_the_models_view_compares_by_what_came_next(page: Browser, server: Process) -> None:
    read(server.url, 1583)
    score, difference = compared(server.url)
    page.open(f"{server.url}/#/models")
    page.until(READY["models"])
    half = (score["interval"][1] - score["interval"][0]) / 2
    row = page.run("[...document.querySelectorAll('#nets tbody tr')].at(-1).innerText")
    assert f"{score['cosine']:.4f}\n\u00b1{half:.4f} of {score['pairs']}" in row
    low, high = difference["interval"]
    shown = page.text("#shadow tbody tr").replace("\u2212", "-").split("\t")
    assert shown[:2] == ["all", str(difference["pairs"])]
    assert shown[2:4] == [f"{difference['mean']:+.4f}", f"{low:+.4f} to {high:+.4f}"]
    page.open(f"{server.url}/#/models?card={score['id']}")
    page.until(READY["card"])
    assert f"cosine {score['cosine']:.4f}" in page.text("#card")
    assert page.complaints == []


def test_rejected_input_is_apart_from_failures(page: Browser, server: Process) -> None:
    page.open(f"{server.url}/#/live")
    page.until("document.querySelector('#serving tbody tr')")
    for _ in range(3):
        assert httpx.post(f"{server.url}/predict", content=b"{", timeout=PATIENCE_S).status_code == 400
    page.until("document.querySelector('#traffic').innerText.includes('/predict malformed')")
    read = "Object.fromEntries([...document.querySelectorAll('#readouts dl')].map((one) => one.innerText.split('\\n')))"
    tiles = page.run(read)
    assert tiles["Rejected input"] != "0\xa0%"
    assert tiles["Failed"] == "0\xa0%"


def test_window_and_scale_are_chosen_and_stay_in_the_address(page: Browser, server: Process) -> None:
    with load(server.url):
        page.open(f"{server.url}/#/live")
        page.until(DRAWN)
        page.click("#window [value='15']")
        page.click("#log")
        assert page.run("location.hash") == "#/live?window=15&scale=log"
        levels = "[...document.querySelectorAll('#latency svg')][0].querySelectorAll('.level')"
        steps = page.run(f"[...{levels}].map((one) => parseFloat(one.textContent))")
        assert steps[0] > 0
        assert steps == sorted(steps)
        page.open(f"{server.url}/{page.run('location.hash')}")
        assert page.run("document.querySelector('#window :checked').value") == "15"
        assert page.run("document.querySelector('#log').checked")
    page.open(f"{server.url}/#/live?window=7&scale=odd")
    assert page.run("document.querySelector('#window :checked').value") == "5"
    assert page.complaints == []


def test_a_chart_tells_its_values_to_pointer_and_keyboard(page: Browser, server: Process) -> None:
    with load(server.url):
        page.open(f"{server.url}/#/live")
        page.until(DRAWN)
    move = """{
        const canvas = document.querySelector('#latency .canvas'), {right} = canvas.getBoundingClientRect();
        canvas.dispatchEvent(new PointerEvent('pointermove', {clientX: right - 12}));
    }"""
    page.run(move)
    tip = page.text("#latency .tip").replace("\xa0", " ")
    assert all(words in tip for words in ("p50", "p95", "p99", " ms"))
    page.run("document.querySelector('#latency .canvas').dispatchEvent(new PointerEvent('pointerleave'))")
    assert page.run("document.querySelector('#latency .tip').hidden")
    until(lambda: in_page(page, "telemetry", "m.history.scrapes.at(-1).at - m.history.scrapes[0].at") > 3, "scrapes")
    page.run("document.querySelector('#latency .canvas').focus()")
    for _ in range(8):
        page.press("ArrowLeft")
    assert "s ago" in page.text("#latency .tip")
    page.press("Escape")
    assert page.run("document.querySelector('#latency .tip').hidden")


def test_the_history_outlives_a_reload(page: Browser, server: Process) -> None:
    scrapes = "import('/console/telemetry.js').then((m) => m.history.scrapes.map(({at}) => at))"
    page.open(f"{server.url}/#/live")
    page.until("document.querySelector('#serving tbody tr')")
    before = page.run(scrapes)
    page.open(f"{server.url}/#/live")
    after = page.run(scrapes)
    assert len(after) >= len(before) > 0
    assert [round(at, 1) for at in after[: len(before)]] == [round(at, 1) for at in before]


def test_an_hour_of_scrapes_is_thinned_out_and_fits_the_tab(page: Browser) -> None:
    hour = """(() => {
        const history = new m.History();
        for (let at = 0; at < 4000; at += 2) {
            const family = Array.from({length: 900}, (_, one) => ({labels: {engine: `${one}`}, value: at * 997 + one}));
            history.add(at, new Map([['lvm_queue_rows', family], ['python_info', family]]));
        }
        const text = history.toText(), back = m.History.fromText(text);
        const facts = ({scrapes, keys}) => [scrapes.length, keys.length, scrapes.at(-1).values[899]];
        return [text.length, facts(history), facts(back)];
    })()"""
    size, (kept, *rest), (back, *read) = in_page(page, "history", hour)
    assert 300 < kept < 400
    assert 0 < back <= kept
    assert size <= 2e6
    assert rest == read == [900, 3998 * 997 + 899]


def test_a_damaged_history_is_an_empty_one(page: Browser) -> None:
    for text in ("", "null", "{}", '{"keys": 3}', '{"keys": [[1]], "scrapes": [[1, 2]]}', "\0"):
        assert in_page(page, "history", f"m.History.fromText({json.dumps(text)}).scrapes.length") == 0


def test_drift_is_on_every_view_with_its_limit(page: Browser, server: Process) -> None:
    scrape = 'lvm_input_drift{{engine="primary",figure="{figure}"}} {value}\n'
    limits = 'lvm_input_drift_limit{figure="norm"} 2.0\nlvm_input_drift_limit{figure="alignment"} -1.4\n'
    said = {
        ("norm", -1.9): ["drift \u22121.9\xa0\u03c3 of \u00b12.0\xa0\u03c3", "hit"],
        ("norm", -2.1): ["drift \u22122.1\xa0\u03c3 of \u00b12.0\xa0\u03c3", "miss"],
        ("alignment", 9.0): ["drift 9.0\xa0\u03c3 of \u22121.4\xa0\u03c3", "hit"],
        ("alignment", -1.5): ["drift \u22121.5\xa0\u03c3 of \u22121.4\xa0\u03c3", "miss"],
    }
    for (figure, value), told in said.items():
        text = json.dumps(scrape.format(figure=figure, value=value) + limits)
        words = f"import('/console/prometheus.js').then(({{parse}}) => m.drifts(parse({text})))"
        described = f"{words}.then((known) => m.describe(m.worst(known))).then(({{words, state}}) => [words, state])"
        assert in_page(page, "drift", described) == told
    for _ in range(8):
        rows = {"contexts": [BODY["context"]] * 8}
        httpx.post(f"{server.url}/predict", json=rows, timeout=PATIENCE_S).raise_for_status()
    for view in VIEWS:
        page.open(f"{server.url}/#/{view}")
        page.until("/^drift .*of/.test(document.querySelector('#drift').innerText)")
        assert page.run("document.querySelector('#drift').dataset.state") in ("hit", "miss")
    page.click("#drift")
    assert page.run("location.hash") == "#/live"


def test_nets_are_sorted_by_recall_and_a_command_is_copied(page: Browser, server: Process) -> None:
    versions = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json()["versions"]
    nets = [each for each in versions if each["kind"] == "net"]
    page.open(f"{server.url}/#/models")
    page.until(READY["models"])
    for data in ("wiki/val", "ood_peps"):
        page.run(f"{{ scored.value = {json.dumps(data)}; scored.dispatchEvent(new Event('change')) }}")
        expected = sorted(nets, key=lambda each: -each["scores"][data]["R@5"])
        shown = page.run("[...document.querySelectorAll('#nets .version a')].map((one) => one.innerText)")
        assert shown == [each["id"] for each in expected]
        assert "best R@5" in page.text("#nets tbody tr")
        assert f"{expected[0]['scores'][data]['R@5']:.3f}" in page.text("#nets tbody tr")
    assert page.run("location.hash") == "#/models?data=ood_peps"
    assert "6,039" in page.text("#corpora tbody tr")
    page.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.click("#nets tbody .copy")
    page.until("document.querySelector('#nets tbody .copy').innerText === 'Copied'")
    assert page.run("navigator.clipboard.readText()") == f"lvm promote primary {expected[0]['id']}"


def test_a_card_has_an_address(page: Browser, server: Process) -> None:
    net = server.registry.aliases()["primary"]
    page.open(f"{server.url}/#/models?card={net}")
    page.until(READY["card"])
    assert page.run("document.querySelector('#catalogue').hidden")
    card = page.text("#card")
    assert all(words in card for words in ("Scores", "primary", f"lvm promote primary {net}"))
    page.click("#card .where a")
    page.until("document.querySelector('#nets').checkVisibility()")
    page.run("history.back()")
    page.until("document.querySelector('#card').checkVisibility()")
    for unknown in ("nothing/at-all", "../../etc/passwd", "<img src=x>"):
        page.open(f"{server.url}/#/models?card={unknown}")
        page.until("document.querySelector('#card').innerText.includes('There is no version')")


def test_a_refused_version_says_why_and_how_to_go_back(page: Browser, server: Process) -> None:
    registry = server.registry
    lstm = next(version for version in registry.versions() if version.name == "lstm")
    weights = lstm.path / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    registry.point("fallback-2", lstm, why="to be refused")
    page.open(f"{server.url}/#/models")
    page.until(READY["models"])

    def refused() -> str:
        page.click("#tab-models")
        return page.text("#refused")

    until(lambda: "altered" in refused(), "the refusal")
    told = page.text("#refused")
    assert all(words in told for words in ("fallback-2", lstm.id, "lvm unset fallback-2"))
    registry.unset("fallback-2", why="it was refused", force=True)
    until(lambda: not refused(), "the refusal to be forgotten")


class Guarded(BaseHTTPRequestHandler):
    """Forwards to `upstream` what carries the token, and the page and the probes without it."""

    upstream = ""
    prefix = ""
    token = "letmein"
    ready: tuple[int, bytes] | None = None  # what the probe answers instead

    def do_GET(self) -> None:
        self._forward(b"")

    def do_POST(self) -> None:
        self._forward(self.rfile.read(int(self.headers["Content-Length"])))

    def _forward(self, body: bytes) -> None:
        path = self.path.removeprefix(self.prefix)
        if self.ready and path == "/readyz":
            return self._say(*self.ready, "application/problem+json")
        is_open = path in ("/", "/readyz") or path.startswith("/console/")
        if not is_open and self.headers["Authorization"] != f"Bearer {self.token}":
            return self._say(401, b'{"detail": "no token"}', "application/problem+json")
        kind = {
            "content-type": self.headers["Content-Type"] or "",
            "authorization": self.headers["Authorization"] or "",
        }
        answer = httpx.request(self.command, self.upstream + path, content=body, headers=kind, timeout=PATIENCE_S)
        return self._say(answer.status_code, answer.content, answer.headers["content-type"])

    def _say(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def guarded(upstream: str, **changes: Any) -> Iterator[str]:
    """Serve `upstream` to those who have the token, until the block ends."""
    handler = type("Handler", (Guarded,), {"upstream": upstream, **changes})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as door:
        door.daemon_threads = True
        threading.Thread(target=door.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{door.server_port}"
        door.shutdown()


def test_a_token_is_asked_for_kept_for_the_tab_and_sent_and_a_lost_service_is_said(
    page: Browser, server: Process
) -> None:
    with guarded(server.url) as url:
        page.open(f"{url}/")
        for token, said in (("wrong", "kept in this tab"), ("letmein", "refused")):
            page.until("document.querySelector('#token-dialog').open")
            assert said in page.text("#token-reason")
            assert page.run("document.activeElement.id") == "token"
            page.type(token)
            page.press("Enter")
            until(lambda: page.run("sessionStorage.getItem('lvm-token')") == token, "the token to be kept")  # noqa: B023
        page.until("document.querySelectorAll('#found li').length === 20")
        page.click("#tab-live")
        page.until("document.querySelector('#serving tbody tr')")
    page.until("document.querySelector('#live-notice').textContent.startsWith('The service cannot be reached')")
    page.until("document.querySelector('#status').textContent === 'unreachable'")


def test_without_the_token_the_page_says_so_and_asks_no_more(page: Browser, server: Process) -> None:
    with guarded(server.url) as url:
        page.open(f"{url}/")
        page.until("document.querySelector('#token-dialog').open")
        page.click("#token-cancel")
        page.until("document.querySelector('#try-notice').textContent.includes('401')")
        page.click("#tab-models")
        page.until("document.querySelector('#models-notice').textContent.includes('401')")
        assert not page.run("document.querySelector('#token-dialog').open")
        page.click("#token-button")
        assert page.run("document.querySelector('#token-dialog').open")


@pytest.mark.parametrize(
    ("problem", "said", "state"),
    [("draining", "draining", "warn"), ("unavailable", "not ready", "miss"), ("", "not ready", "miss")],
)
def test_the_state_of_the_service_is_on_every_view(
    page: Browser, server: Process, problem: str, said: str, state: str
) -> None:
    body = json.dumps({"type": f"urn:lvm:problem:{problem}"}).encode() if problem else b"no JSON"
    with guarded(server.url, ready=(503, body)) as url:
        page.open(f"{url}/#/models")
        page.until(f"document.querySelector('#status').innerText === {json.dumps(said)}")
        assert page.run("document.querySelector('#status').dataset.state") == state


def test_workers_with_a_token_are_seen_through_a_proxy_with_a_prefix(
    page: Browser, process: Callable[..., Process]
) -> None:
    token = "a-token-of-the-console"
    workers = process(LVM_WORKERS="2", LVM_TOKENS=token)
    with guarded(workers.url, prefix="/lvm", token=token) as url:
        page.open(f"{url}/lvm/#/live")
        page.until("document.querySelector('#token-dialog').open")
        page.run("document.querySelector('#token').focus()")
        page.type(token)
        page.press("Enter")
        page.until("document.querySelector('#idle pre')")
        command = page.text("#idle pre")
        assert f"{url}/lvm/" in command
        assert token not in command
        environment = {**os.environ, "LVM_TOKEN": token}
        subprocess.run(["bash", "-c", command.replace("seq 200", "seq 4")], check=True, env=environment)
        page.until("document.querySelector('#readouts').innerText.includes('Memory')")
        page.click("#serving tbody a")
        page.until(READY["card"])
