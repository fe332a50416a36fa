"""A process with tracing and an access log: its spans, a line for each request, and no vector or token in them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable

import httpx

from tests.collector import attributes, collecting
from tests.conftest import PATIENCE_S, ROOT, Process

Start = Callable[..., Process]
TOKEN, WRONG = "s3cret-of-the-caller-0001", "wr0ng-and-still-a-secret-0002"
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACED = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
JSON = (ROOT / "examples" / "context.json").read_bytes()
OCTETS = (ROOT / "examples" / "context.f32").read_bytes()
AS_OCTETS = {"content-type": "application/octet-stream"}
AS_JSON = {"content-type": "application/json"}


def test_spans_and_log_lines_of_a_process_hold_no_vector_or_token(process: Start) -> None:
    with collecting() as collector:
        settings = {"LVM_TOKENS": f"mine:{TOKEN}", "LVM_ACCESS_LOG": "1", "LVM_LOG_LEVEL": "debug"}
        server = process(LVM_OTLP_ENDPOINT=collector.url, OTEL_SERVICE_NAME="vectors", LVM_TRACE_SHARE="0", **settings)
        bearer = {"authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=server.url, headers=bearer, timeout=PATIENCE_S) as http:
            answers = [
                http.post("/predict", content=JSON, headers={**AS_JSON, **TRACED}),
                http.post("/predict", content=OCTETS, headers=AS_OCTETS),
                http.post("/retrieve", content=JSON, headers={**AS_JSON, **TRACED}),
                http.post("/predict", content=b"[NaN" + OCTETS, headers={**AS_OCTETS, "x-request-id": "short"}),
                http.post("/predict", content=JSON.replace(b"[[", b"[[1e99,"), headers=AS_JSON),
                http.post("/predict", params={"token": TOKEN}, content=OCTETS, headers=AS_OCTETS),
                http.post("/predict", content=JSON, headers={**AS_JSON, "authorization": f"Bearer {WRONG}"}),
                http.get(f"/models/{TOKEN}/{WRONG}/card"),
                http.get("/models", headers={**TRACED, "authorization": WRONG}),
                http.get("/readyz"),
            ]
        assert server.stop() == 0
    spans = {
        span.name: span for span in collector.spans if not span.parent_span_id or span.kind == span.SPAN_KIND_SERVER
    }
    assert set(spans) == {"POST /predict", "POST /retrieve", "batch primary", "batch retriever"}
    assert {span.trace_id.hex() for name, span in spans.items() if name.startswith("POST")} == {TRACE_ID}
    assert attributes(spans["POST /predict"])["lvm.request_id"] == answers[0].headers["x-request-id"]
    assert collector.services[0]["service.name"] == "vectors"

    lines = [line for line in server.log() if line["event"].startswith("request")]
    assert [(line["request_id"], line["status"]) for line in lines] == [
        (answer.headers["x-request-id"], answer.status_code) for answer in answers[:-1]
    ], "a probe has no line"
    assert [line["status"] for line in lines] == [200, 200, 200, 400, 422, 422, 401, 404, 401]
    assert [line.get("trace_id") for line in lines] == [TRACE_ID, None, TRACE_ID, *[None] * 5, TRACE_ID]
    assert {line["client"] for line in lines} == {"mine", "127.0.0.1"}
    assert (lines[0]["route"], lines[0]["outcome"], lines[0]["served_by"]) == ("/predict", "ok", "primary")

    assert all(json.loads(line) for line in server.text().splitlines())
    written = server.text() + repr([attributes(span) for span in collector.spans])
    vector = answers[0].text.partition('"model"')[0]
    digits = re.findall(rb"\.\d{7}", JSON + vector.encode())  # times have at most six digits
    assert len(digits) > 1000
    for secret in (TOKEN, WRONG, base64.b64encode(OCTETS).decode()[:12], *{each.decode() for each in digits}):
        assert secret not in written
