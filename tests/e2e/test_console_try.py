"""The Try view in a real browser: what two models expect of an article or a text, on a map, and as code that runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import numpy as np
import pytest

from models.vectors import Floats, normalise
from tests.browser import CHROMIUM, Browser
from tests.conftest import PATIENCE_S, ROOT, Process, Running

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="wants Chromium")]
SHOTS = ROOT / "runs" / "console"
Serve = Callable[..., Running]
RABBIT = 1583
TOKEN = "let-me-in-please-0123"
DONE = "document.querySelector('#try-results')?.ariaBusy === 'false' && document.querySelector('#map svg')"


def show(page: Browser, url: str, **state: object) -> None:
    """Open the Try view with what the address says, and wait until it is there."""
    page.open(f"{url}/#/try?{httpx.QueryParams({name: str(value) for name, value in state.items()})}")
    page.until(f"{DONE} && document.querySelectorAll('#found li').length")


def choose(page: Browser, selector: str, value: str) -> None:
    """Choose an option as a person does."""
    page.run(
        f"(() => {{ const one = document.querySelector({json.dumps(selector)}); one.value = {json.dumps(value)};"
        "one.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def texts(page: Browser, selector: str) -> list[str]:
    """Return the text of every element there."""
    found: list[str] = page.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((one) => one.innerText)")
    return found


def post(server: Process, path: str, **body: object) -> Any:
    """Return the service's answer to a request."""
    return httpx.post(f"{server.url}/{path}", json=body, timeout=PATIENCE_S).raise_for_status().json()


def vectors_of(server: Process, article: int) -> Floats:
    """Return the vectors of an article's passages."""
    chunks = httpx.get(f"{server.url}/articles/{article}", timeout=PATIENCE_S).json()["chunks"]
    return np.array([np.frombuffer(b64decode(chunk["vector"]), "<f4") for chunk in chunks])


def test_two_models_stand_side_by_side(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0, a="primary", b="fallback")
    vectors = vectors_of(server, RABBIT)
    answers = [post(server, "retrieve", context=vectors[:5].tolist(), model=model) for model in ("primary", "fallback")]
    found = [[hit["id"] for hit in answer["results"]] for answer in answers]
    true = next(hit["id"] for hit in answers[0]["results"] if hit["position"] == 5)
    ordinals = {1: "1st", 2: "2nd", 3: "3rd"}
    ranks = [ordinals.get(ids.index(true) + 1, f"{ids.index(true) + 1}th") for ids in found]
    assert texts(page, "#measured .readout .value") == ranks
    assert texts(page, "#found .true .rank") == [rank[:-2] for rank in ranks]
    assert page.text("#found .true p:last-child") in page.text("#context .truth p:last-child")
    predicted = [post(server, "predict", context=vectors[:5].tolist(), model=answer["model"]) for answer in answers]
    one, other = (np.array(answer["vector"]) for answer in predicted)
    mean = normalise(vectors[:5].mean(axis=0))
    shown = [float(figure) for figure in texts(page, ".bars dd")]
    np.testing.assert_allclose(shown, [each @ vectors[5] for each in (one, other, vectors[4], mean)], atol=1e-4)
    facts = dict(fact.split("\n") for fact in texts(page, ".facts div"))
    assert facts["found by both"] == f"{len({*found[0]} & {*found[1]})} of 10"
    assert float(facts["cosine between the predictions"]) == pytest.approx(one @ other, abs=1e-4)
    assert page.complaints == []


def test_the_towers_of_the_corpus_are_beside_its_primary_by_default(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0)
    names = [name.replace("\n", "") for name in texts(page, "#found h3")]
    assert names == ["ATowers and reranker", "Bamn"]
    results = post(server, "retrieve", context=vectors_of(server, RABBIT)[:5].tolist())["results"]
    assert [int(rank) for rank in texts(page, "#found section:first-child .rank")] == list(range(1, 11))
    assert page.text("#found .passages p:last-child").startswith(results[0]["text"][:40])
    page.run("document.querySelector('.timed').open = true")
    assert {"rerank", "infer", "search"} <= set(texts(page, "#times dt.key"))
    page.screenshot(SHOTS / "try.png")
    page.colours("dark")
    page.screenshot(SHOTS / "try-dark.png")
    assert page.complaints == []


def test_what_was_read_stays_open_beside_what_was_found(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0)
    page.click("#read summary")
    assert page.run("document.querySelector('#read').open")
    page.size(390, 844)
    page.until("!document.querySelector('#read').open")
    page.size(1280, 900)
    page.until("document.querySelector('#read').open")


def test_one_model_alone_has_no_column_beside_it(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0, a="gru", b="none")
    assert len(texts(page, "#found h3")) == 1
    assert "gru" in page.text("#measured")
    assert "Do they agree?" not in page.text("#measured")


def test_the_end_of_an_article_is_said(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=55)
    assert "The article ends here" in page.text("#measured")
    assert page.run("document.querySelector('#found .true')") is None


def test_a_rank_is_judged_in_words_and_colour(page: Browser) -> None:
    panel = (
        "import('/console/answers.js').then((m) => [1, 5, 6, 0].map((rank) => {"
        "const found = {model: 'amn', served_by: 'primary', results: []};"
        "const node = m.rankPanel({key: 'a', rank, found}, {}, 100, '600 passages');"
        "return [node.querySelector('.readout').dataset.state, node.querySelector('.value').textContent]; }))"
    )
    assert page.run(panel) == [["hit", "1st"], ["hit", "5th"], ["warn", "6th"], ["miss", "not in the first 100"]]


def test_a_search_without_hits_keeps_the_article_and_says_so(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0)
    before = page.text("#found")
    page.run("document.querySelector('#search').focus()")
    page.type("zzzz")
    page.until("!document.querySelector('#search-note').hidden")
    assert page.text("#search-note") == "No title contains \u201czzzz\u201d; Rabbit is still shown."
    assert page.text("#found") == before
    assert "Rabbit" in page.run("document.querySelector('#article').selectedOptions[0].text")
    page.run("document.querySelector('#search').value = ''")
    page.type("masuria")
    page.until(f"location.hash.includes('article=1473') && {DONE}")
    assert page.run("document.querySelector('#search-note').hidden")
    assert page.complaints == []


def test_the_address_holds_the_state_and_back_forward_and_reload_restore_it(page: Browser, server: Process) -> None:
    state = {"article": RABBIT, "at": 3, "a": "primary", "b": "fallback", "mmr": 0.7, "in": "article"}
    show(page, server.url, **state)
    shown = page.text("#found")
    assert page.text("#place").startswith("passages 4 to 8")
    assert page.run("[...'ab'].map((name) => document.querySelector(`#${name}`).value)") == ["primary", "fallback"]
    page.click("#on")
    page.until("document.querySelector('#context').innerText.startsWith('passage 5\\n')")
    choose(page, "#b", "none")
    page.until(f"{DONE} && document.querySelectorAll('#found section').length === 1")
    page.run("history.back()")
    page.until(f"{DONE} && document.querySelectorAll('#found section').length === 2")
    page.run("history.back()")
    page.until(f"{DONE} && document.querySelector('#context')?.innerText.startsWith('passage 4\\n')")
    assert page.text("#found") == shown
    page.run("history.forward()")
    page.until(f"{DONE} && document.querySelector('#context')?.innerText.startsWith('passage 5\\n')")
    page.run("history.back()")
    page.until(f"{DONE} && document.querySelector('#context')?.innerText.startsWith('passage 4\\n')")
    page.send("Page.reload")
    page.until(f"{DONE} && document.querySelectorAll('#found li').length === 20")
    assert page.text("#found") == shown
    assert page.run("document.querySelector('[name=mmr]').value") == "0.7"
    page.click("#tab-live")
    page.click("#tab-try")
    page.until("location.hash.includes('mmr=0.7')")
    assert page.complaints == []


def test_the_options_change_what_is_found(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0, b="none")
    by_score = page.text("#found")
    choose(page, "[name=mmr]", "0.5")
    page.until(f"{DONE} && document.querySelector('#found').innerText.includes('varied')")
    assert page.text("#found .passages") not in by_score
    choose(page, "[name=mmr]", "")
    choose(page, "[name=in]", "article")
    page.until(f"{DONE} && location.hash.includes('in=article')")
    assert all("Rabbit" in hit for hit in texts(page, "#found .where"))
    page.click("[name=rerank]")
    page.until(f"{DONE} && document.querySelector('#found h3').innerText.endsWith('Towers')")
    assert page.complaints == []


def test_every_click_has_a_visible_reaction(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0)
    page.run(
        "(() => { globalThis.seen = []; const box = document.querySelector('#try-results');"
        "new MutationObserver(() => seen.push(box.ariaBusy + document.querySelector('#try-status').innerText))"
        ".observe(box, {attributes: true}); })()"
    )
    for click in ("#on", "#back", "#another"):
        page.run("globalThis.seen.length = 0")
        page.click(click)
        page.until("seen.some((one) => one.startsWith('true')) && seen.at(-1).startsWith('falseBoth models answered')")


def test_the_map_shows_what_was_read_predicted_and_found(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0)
    numbers = page.run("[...document.querySelectorAll('#map .mark-read text')].map((one) => one.textContent)")
    assert numbers == ["1", "2", "3", "4", "5"]
    count = "document.querySelectorAll('#map .mark-{}').length"
    assert [page.run(count.format(kind)) for kind in ("next", "predicted-b", "predicted-a")] == [1, 1, 0]
    both = page.run(count.format("found-both"))
    assert f"{both + 1} of 10" in page.text(".facts")
    drawn = httpx.get(f"{server.url}/articles/map", timeout=PATIENCE_S).json()
    assert page.run("document.querySelector('#map .cloud').getAttribute('d').split('M').length - 1") == len(
        drawn["passages"]
    )
    assert page.complaints == []


def test_a_point_of_the_map_shows_its_title_and_text_and_opens_it(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=0)
    page.run(
        "(() => { const box = document.querySelector('#map .mark-next circle').getBoundingClientRect();"
        "const at = {clientX: box.x + box.width / 2, clientY: box.y + box.height / 2, bubbles: true};"
        "document.querySelector('#map').dispatchEvent(new PointerEvent('pointermove', at)); })()"
    )
    assert "Comes next" in page.text(".map-tip")
    assert "Rabbit, passage 6" in page.text(".map-tip")
    assert page.text("#context .truth p:last-child")[:60] in page.text(".map-tip")
    page.screenshot(SHOTS / "try-map.png")
    page.run("document.querySelector('#map').focus()")
    page.press("Escape")
    for place in (1, 2):
        page.press("ArrowRight")
        assert page.text(".map-tip").startswith(f"Read, {place} of 5")
    page.press("Escape")
    assert page.run("document.querySelector('.map-tip').hidden")
    page.click("[name=near][value=all]")
    page.press("ArrowRight")
    page.press("Enter")
    page.until(f"location.hash.includes('article={RABBIT}&at=0') && {DONE}")
    assert page.complaints == []


def test_the_page_places_a_vector_where_the_service_places_its_passage(page: Browser) -> None:
    distances = page.run(
        "Promise.all(['map', 'vectors'].map((name) => import(`/console/${name}.js`))).then(async ([m, v]) => {"
        "const plane = await m.Plane.load();"
        f"const {{chunks}} = await (await fetch('articles/{RABBIT}')).json();"
        "const known = await plane.places(chunks.map(({id}) => id));"
        "const far = (one, other) => Math.hypot(one.x - other.x, one.y - other.y);"
        "return chunks.map(({id, vector}) => far(known.get(id), plane.place(v.floats(vector)))); })"
    )
    assert len(distances) == 60
    assert max(distances) < 1e-3


def test_the_map_places_vectors_of_any_dimension(page: Browser) -> None:
    vectors = np.random.default_rng(5).standard_normal((3, 768)).astype("<f4")
    mean, axes, vector = (f"Float32Array.of({','.join(map(str, one.tolist()))})" for one in vectors)
    shown = page.run(
        f"import('/console/vectors.js').then((m) => m.project({vector}, {{mean: {mean}, axes: [{axes}, {axes}]}}))"
    )
    np.testing.assert_allclose(shown, [(vectors[2] - vectors[0]) @ vectors[1]] * 2, rtol=1e-3)


def run_copied(page: Browser, name: str, token: str = "") -> str:
    """Copy what is on the screen as `name`, run it, and return what it prints."""
    page.click(f"#copies button:nth-child({['curl', 'Python'].index(name) + 1})")
    page.until("[...document.querySelectorAll('#copies button')].some((one) => /Copied|by hand/.test(one.innerText))")
    command = ["sh", "-c"] if name == "curl" else [sys.executable, "-W", "error", "-c"]
    code = page.run("document.querySelector('#code').textContent")
    assert TOKEN not in code
    environment = {**os.environ, "LVM_TOKEN": token}
    ran = subprocess.run([*command, code], capture_output=True, text=True, check=True, env=environment)
    assert ran.stderr == ""
    return ran.stdout


def test_what_is_copied_runs_and_prints_what_is_on_the_screen(page: Browser, server: Process) -> None:
    show(page, server.url, article=RABBIT, at=2, a="primary", b="fallback", mmr=0.9, **{"in": "article"})
    places = [hit.split("score")[0].split(",")[1].strip() for hit in texts(page, "#found .where")]
    printed = run_copied(page, "Python").splitlines()
    assert [line.split(", ")[1] for line in printed if "Rabbit" in line] == [place.split("\n")[0] for place in places]
    answers = [json.loads(line) for line in run_copied(page, "curl").splitlines()]
    hits = [hit for answer in answers for hit in answer.get("results", [])]
    assert [f"passage {hit['position'] + 1}" for hit in hits] == [place.split("\n")[0] for place in places]
    assert [answer["model"] for answer in answers] == ["amn", "amn", "gru", "gru"]


def has_encoder(server: Process) -> bool:
    """Return whether the service reads text."""
    encoder = httpx.get(f"{server.url}/models", timeout=PATIENCE_S).json().get("encoder") or {}
    return bool(encoder.get("name") and not encoder.get("missing"))


def test_an_example_text_is_read_and_an_example_question_answered(page: Browser, server: Process) -> None:
    if not has_encoder(server):
        pytest.skip("wants the encoder (make text)")
    page.click("[name=source][value=text]")
    page.click("#example-text")
    page.until(f"{DONE} && document.querySelectorAll('#found section').length === 2")
    assert len(texts(page, "#context li")) >= 5
    assert page.run("document.querySelectorAll('#map .mark-read').length") == len(texts(page, "#context li"))
    assert '"results"' in run_copied(page, "curl")
    assert "passage" in run_copied(page, "Python")
    page.screenshot(SHOTS / "try-text.png")
    page.click("#example-question")
    page.until(f"{DONE} && document.querySelectorAll('#found section').length === 1")
    assert "Rabbit" in page.text("#found .where")
    assert "it is a question" in page.text("#read-as")
    assert "passage" in run_copied(page, "Python")
    page.send("Page.reload")
    page.until(f"{DONE} && document.querySelectorAll('#found section').length === 1")
    assert page.run("document.querySelector('#text').value") == "Why do rabbits dig burrows?"
    page.click("[name=source][value=article]")
    page.until(f"{DONE} && document.querySelectorAll('#found section').length === 2")
    assert page.complaints == []


@pytest.mark.parametrize(
    ("state", "control", "words"),
    [
        ({"a": "nothing"}, "models", 'unknown model "nothing"'),
        ({"article": 999999}, "article", "no such article"),
        ({"mmr": 7}, "options", "mmr"),
        ({"in": '["colour", "red"]'}, "options", "colour"),
    ],
)
def test_what_the_service_rejects_is_said_beside_the_control(
    page: Browser, server: Process, state: dict[str, object], control: str, words: str
) -> None:
    wanted = {"article": RABBIT, "at": 0} | state
    page.open(f"{server.url}/#/try?{httpx.QueryParams({name: str(value) for name, value in wanted.items()})}")
    page.until(f"!document.querySelector('#{control}-note').hidden")
    assert words in page.text(f"#{control}-note")
    assert page.run("document.querySelector('#try-notice').hidden")


def enter(page: Browser, url: str) -> None:
    """Open the page, and enter the token."""
    page.open(f"{url}/")
    page.run("sessionStorage.clear()")
    page.open(f"{url}/")
    page.until("document.querySelector('#token-dialog').open")
    page.type(TOKEN)
    page.press("Enter")
    page.until(f"{DONE} && document.querySelectorAll('#found li').length === 20")


def test_what_is_copied_reads_the_token_from_the_environment(page: Browser, serve: Serve) -> None:
    enter(page, serve(tokens=TOKEN).url)
    assert "Article" in run_copied(page, "Python", TOKEN)
    assert '"results"' in run_copied(page, "curl", TOKEN)


def test_a_small_corpus_without_towers_compares_primary_and_fallback(page: Browser, serve: Serve) -> None:
    show(page, serve().url)
    assert [name.replace("\n", "") for name in texts(page, "#found h3")] == ["Aamn", "Bgru"]
    assert page.text("#map-caption").startswith("All 20 passages, seen along the two directions, of 8,")
    assert page.run("document.querySelectorAll('#map .mark-predicted-a, #map .mark-predicted-b').length") == 2


def test_without_an_encoder_the_page_says_what_reading_text_takes(page: Browser, serve: Serve) -> None:
    show(page, serve(encoder="none").url)
    page.click("[name=source][value=text]")
    page.until("!document.querySelector('#text-note').hidden")
    assert "reads vectors, not text" in page.text("#text-note")
    assert page.run("['#text', '#predict', '#example-text'].every((one) => document.querySelector(one).disabled)")
    page.screenshot(SHOTS / "try-no-encoder.png")
    page.click("[name=source][value=article]")
    page.until(f"{DONE} && document.querySelectorAll('#found li').length === 20")
    assert page.run("document.querySelector('#text-note').hidden")


def test_without_a_corpus_one_sentence_says_how_to_get_one(page: Browser, serve: Serve) -> None:
    page.open(f"{serve(retriever=False).url}/")
    page.until("!document.querySelector('#try-notice').hidden")
    assert page.text("#try-notice").startswith("This service has no corpus to search")
    assert page.run("document.querySelector('#try-controls').hidden")
    page.screenshot(SHOTS / "try-no-corpus.png")


class Prefixed(BaseHTTPRequestHandler):
    """A proxy that serves `upstream` below /lvm."""

    upstream = ""

    def do_GET(self) -> None:
        self._forward(b"")

    def do_POST(self) -> None:
        self._forward(self.rfile.read(int(self.headers["Content-Length"])))

    def _forward(self, body: bytes) -> None:
        assert self.path.startswith("/lvm/"), self.path
        sent = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection")}
        url = self.upstream + self.path.removeprefix("/lvm")
        answer = httpx.request(self.command, url, content=body, headers=sent, timeout=PATIENCE_S)
        self.send_response(answer.status_code)
        for name, value in answer.headers.items():
            if name not in ("connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def behind_prefix(upstream: str) -> Iterator[str]:
    """Serve `upstream` below a path, until the block ends."""
    handler = type("Handler", (Prefixed,), {"upstream": upstream})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as proxy:
        proxy.daemon_threads = True
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}/lvm"
        proxy.shutdown()


def test_everything_works_below_a_path_of_a_proxy(page: Browser, server: Process) -> None:
    with behind_prefix(server.url) as url:
        show(page, url, article=RABBIT, at=0)
        assert "passage" in run_copied(page, "Python")
        assert '"results"' in run_copied(page, "curl")
    assert page.complaints == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_folds_what_was_read_and_scrolls_in_one_direction_only(
    page: Browser, server: Process, scheme: str
) -> None:
    page.size(390, 844)
    page.colours(scheme)
    show(page, server.url, article=RABBIT, at=0)
    page.run("for (const one of document.querySelectorAll('#options, .timed')) one.open = true")
    assert page.run("document.documentElement.scrollWidth") == 390
    page.run("for (const one of document.querySelectorAll('#options, .timed')) one.open = false")
    assert not page.run("document.querySelector('#read').open")
    page.click("#read summary")
    assert page.run("document.querySelector('#read').open")
    page.click("#read summary")
    rank, map_ = page.run("['#measured', '#map'].map((one) => document.querySelector(one).getBoundingClientRect().top)")
    assert rank < map_
    page.screenshot(SHOTS / f"try-phone-{scheme}.png")
    assert page.complaints == []
