"""Tracing: the caller's decision, the tree of spans, links to batches, and a collector that cannot delay requests."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from lvm.client import Client
from service.app import create_app
from service.settings import Settings
from service.telemetry.tracing import (
    Span,
    TraceContext,
    Tracer,
    parse,
)
from tests.collector import Collector, attributes, collecting
from tests.conftest import PATIENCE_S, ROOT, Process, Running, running, until
from tests.fakes import FakeLoader, Gate, HashEncoder, bundle, contexts, mean_of, prose, raises, registry_of

Serve = Callable[..., Running]
OCTETS = {"content-type": "application/octet-stream", "accept": "application/octet-stream"}
ONE = contexts()[0].tobytes()
TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = (f"00-{TRACE_ID}-{SPAN_ID}-{flags}" for flags in ("01", "00"))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (SAMPLED, TraceContext(TRACE_ID, SPAN_ID, True)),
        (UNSAMPLED, TraceContext(TRACE_ID, SPAN_ID, False)),
        (f"00-{TRACE_ID}-{SPAN_ID}-ff", TraceContext(TRACE_ID, SPAN_ID, True)),
        (f"00-{TRACE_ID}-{SPAN_ID}-02", TraceContext(TRACE_ID, SPAN_ID, False)),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01", TraceContext(TRACE_ID, SPAN_ID, True)),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01-fields of a later version", TraceContext(TRACE_ID, SPAN_ID, True)),
        (f"cc-{TRACE_ID}-{SPAN_ID}-01.what", None),
        (f"ff-{TRACE_ID}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{SPAN_ID}-01-more", None),
        (f"00-{TRACE_ID}-{SPAN_ID}-01-", None),
        (f"00-{TRACE_ID}-{SPAN_ID}-1", None),
        (f"00-{TRACE_ID}-{SPAN_ID}", None),
        (f"00-{'0' * 32}-{SPAN_ID}-01", None),
        (f"00-{TRACE_ID}-{'0' * 16}-01", None),
        (SAMPLED.upper(), None),
        (SAMPLED.replace("a", "g"), None),
        (f"00-{TRACE_ID[1:]}-{SPAN_ID}-01", None),
        (f" {SAMPLED}", None),
        (f"{SAMPLED}\n", None),
        ("", None),
    ],
)
def test_parses_traceparent_strictly(header: str, expected: TraceContext | None) -> None:
    assert parse(header.encode()) == expected


def test_follows_the_callers_decision_and_else_samples_a_share() -> None:
    spans: list[Span] = []
    draws = iter([0.1, 0.3])
    tracer = Tracer(spans.append, 0.2, lambda: next(draws))
    assert tracer.start(TraceContext(TRACE_ID, SPAN_ID, False)) is None
    assert tracer.start(TraceContext(TRACE_ID, SPAN_ID, True)) is not None
    drawn, left = tracer.start(None), tracer.start(None)
    assert drawn is not None
    assert left is None
    assert drawn.trace.trace_id not in (TRACE_ID, "0" * 32)
    assert spans == []


@contextmanager
def traced(root: Path, collector: str, *, text: Any = None, corpus: Any = None, **settings: Any) -> Iterator[Running]:
    """Serve fakes that send spans. All spans are sent when the server has stopped."""
    nets = {name: settings.pop(name, mean_of) for name in ("amn", "gru")}
    registry = registry_of(root / "registry", primary="amn", fallback="gru", retriever="corpus")
    known = Settings(registry=registry.root, otlp_endpoint=collector, **settings)
    loaders = FakeLoader(corpus or (lambda version: bundle(version)), text, **nets)
    with running(create_app(known, loaders), known) as server:
        yield server


def ask(server: Running, traceparent: str | None = SAMPLED, path: str = "/predict", **more: str) -> Any:
    """Send one request as part of a trace."""
    given = {"traceparent": traceparent} if traceparent else {}
    return server.http.post(path, content=ONE, headers={**OCTETS, **given, **more})


def times_of(span: Any) -> tuple[int, int]:
    return span.start_time_unix_nano, span.end_time_unix_nano


def only(collector: Collector, name: str) -> Any:
    [found] = collector.named(name)
    return found


def test_a_sampled_request_has_a_span_for_each_stage_and_a_link_to_its_batch(tmp_path: Path) -> None:
    with collecting() as collector:
        with traced(tmp_path, collector.url) as server:
            answer = ask(server, tracestate="vendor=1,other=2")
        span, batch = only(collector, "POST /predict"), only(collector, "batch primary")
    assert (span.trace_id.hex(), span.parent_span_id.hex(), span.kind) == (TRACE_ID, SPAN_ID, span.SPAN_KIND_SERVER)
    assert span.trace_state == "vendor=1,other=2"
    known = attributes(span)
    assert known["lvm.request_id"] == answer.headers["x-request-id"]
    assert (known["http.route"], known["http.response.status_code"], known["lvm.rows"]) == ("/predict", 200, 1)
    below = collector.children(span)
    assert {name: len(spans) for name, spans in below.items()} == {"decode": 1, "queue": 1, "infer": 1, "encode": 1}
    stages = [below[name][0] for name in ("decode", "queue", "infer", "encode")]
    assert all(stage.trace_id == span.trace_id for stage in stages)
    times = [time for stage in stages for time in times_of(stage)]
    assert [times_of(span)[0], *times, times_of(span)[1]] == sorted([*times, *times_of(span)])
    assert batch.trace_id != span.trace_id
    assert [(link.trace_id, link.span_id) for link in batch.links] == [(span.trace_id, span.span_id)]
    assert [(link.trace_id, link.span_id) for link in span.links] == [(batch.trace_id, batch.span_id)]
    assert times_of(batch)[0] <= times_of(below["infer"][0])[0] < times_of(batch)[1]
    assert collector.services[0]["service.name"] == "lvm-serve"


def test_requests_in_one_batch_and_the_batch_link_to_each_other(tmp_path: Path) -> None:
    gate = Gate()
    with collecting() as collector:
        with traced(tmp_path, collector.url, amn=gate, timeout_ms=60_000, primary_share=1) as server:
            threads = [threading.Thread(target=ask, args=(server,)) for _ in range(4)]
            threads[0].start()
            until(gate.entered.is_set, "the first to run alone")
            for thread in threads[1:]:
                thread.start()
            batcher = server.app.state.deployments.engines["primary"].batcher
            until(lambda: batcher.pending_rows == 4, "the others to wait")
            gate.opened.set()
            for thread in threads:
                thread.join()
        alone, together = collector.named("batch primary")
        requests = collector.named("POST /predict")
    assert ([attributes(batch)["lvm.rows"] for batch in (alone, together)]) == [1, 3]
    assert {link.span_id for link in together.links} == {span.span_id for span in requests[1:]}
    assert [link.span_id for span in requests for link in span.links] == [alone.span_id] + 3 * [together.span_id]
    assert not together.parent_span_id


def test_unsampled_requests_have_no_span_whatever_the_share(tmp_path: Path) -> None:
    with collecting() as collector:
        with traced(tmp_path, collector.url, trace_share=1) as server:
            assert ask(server, UNSAMPLED).status_code == 200
            assert ask(server, None).status_code == 200
        [span] = collector.named("POST /predict")
    assert not span.parent_span_id
    assert span.trace_id.hex() != TRACE_ID
    with collecting() as collector:
        with traced(tmp_path, collector.url, trace_share=0) as server:
            assert ask(server, None).status_code == ask(server, "00-nonsense").status_code == 200
        assert collector.spans == []


def test_drops_a_malformed_tracestate_without_a_log_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with collecting() as collector:
        with traced(tmp_path, collector.url) as server:
            assert ask(server, tracestate="vendor=1,no pair").status_code == 200
        assert only(collector, "POST /predict").trace_state == ""
    assert [record.message for record in caplog.records if record.name.startswith("opentelemetry")] == []


def test_unauthenticated_callers_have_no_span(tmp_path: Path) -> None:
    token = "a" * 32
    with collecting() as collector:
        with traced(tmp_path, collector.url, tokens=token) as server:
            assert ask(server).status_code == 401
            assert ask(server, authorization=f"Bearer {token}").status_code == 200
        assert attributes(only(collector, "POST /predict"))["http.response.status_code"] == 200


def test_a_trace_shows_the_net_that_failed_and_the_fallback_that_answered(tmp_path: Path) -> None:
    with collecting() as collector:
        with traced(tmp_path, collector.url, amn=raises) as server:
            assert ask(server).headers["x-fallback-reason"] == "model_failed"
        span = only(collector, "POST /predict")
        first, second = sorted(collector.children(span)["infer"], key=times_of)
    failed = first.status.STATUS_CODE_ERROR
    assert (attributes(first)["lvm.engine"], first.status.code, first.status.message) == (
        "primary",
        failed,
        "ModelFailed",
    )
    assert (attributes(second)["lvm.engine"], second.status.code) == ("fallback", 0)
    assert (attributes(span)["lvm.outcome"], span.status.code, len(span.links)) == ("fallback", 0, 2)


def test_a_server_error_fails_the_span_and_a_client_error_does_not(tmp_path: Path) -> None:
    with collecting() as collector:
        with traced(tmp_path, collector.url, amn=raises, gru=raises) as server:
            assert ask(server).status_code == 503
            assert ask(server, path="/v2/models/amn/infer").status_code == 400
        failed, malformed = only(collector, "POST /predict"), only(collector, "POST /v2/models/{model}/infer")
    assert (failed.status.code, failed.status.message) == (failed.status.STATUS_CODE_ERROR, "model_failed")
    assert (malformed.status.code, attributes(malformed)["http.response.status_code"]) == (0, 400)
    assert collector.children(malformed) == {}


def test_a_search_by_text_has_spans_for_encoder_and_reranker(tmp_path: Path) -> None:
    with collecting() as collector:
        with traced(tmp_path, collector.url, text=HashEncoder()) as server:
            body = {"text": prose([60] * 6)}
            assert server.http.post("/retrieve", json=body, headers={"traceparent": SAMPLED}).status_code == 200
        below = collector.children(only(collector, "POST /retrieve"))
        assert set(below) == {"decode", "queue", "embed", "infer", "search", "rerank", "encode"}
        assert [attributes(span)["lvm.engine"] for span in sorted(below["queue"], key=times_of)] == [
            "encoder",
            "retriever",
        ]
        assert times_of(below["rerank"][0])[0] >= times_of(below["search"][0])[1] - 1


@pytest.mark.parametrize("is_silent", [True, False], ids=["never answers", "refuses connections"])
def test_a_collector_that_does_not_answer_affects_no_request(process: Callable[..., Process], is_silent: bool) -> None:
    """In a process of its own: the exporter's threads go on trying, and end with the process."""
    context = (ROOT / "examples" / "context.f32").read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = "http://{}:{}".format(*listener.getsockname())
        if not is_silent:
            listener.close()
        server = process(LVM_OTLP_ENDPOINT=url, LVM_DRAIN_S="0.1")
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
            for _ in range(600):  # more spans than one export takes
                answer = http.post("/predict", content=context, headers={**OCTETS, "traceparent": SAMPLED})
                assert answer.status_code == 200
        assert server.stop() == 0


def test_rejects_a_collector_without_the_extra_and_names_the_command_to_install_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['opentelemetry.sdk'] = None; from lvm.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "--port", "0"]
    env = {"LVM_OTLP_ENDPOINT": "http://127.0.0.1:1", "LVM_REGISTRY": str(tmp_path)}
    ended = subprocess.run(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 78
    assert "pip install 'lvm-serve[otlp]'" in ended.stderr.replace("\n", " ")


def exemplars(server: Running) -> dict[str, set[str]]:
    """Return the trace ids that the histogram of /predict shows, by stage."""
    accept = "application/openmetrics-text; version=1.0.0"
    families = parse_openmetrics(server.http.get("/metrics", headers={"accept": accept}).text)
    found: dict[str, set[str]] = {}
    for sample in (s for family in families if family.name == "lvm_request_seconds" for s in family.samples):
        if sample.exemplar:
            assert sample.exemplar.value <= float(sample.labels["le"])
            found.setdefault(sample.labels["stage"], set()).add(sample.exemplar.labels["trace_id"])
    return found


def test_sampled_requests_are_exemplars_without_a_collector(serve: Serve) -> None:
    server = serve()
    ask(server, UNSAMPLED)
    ask(server, None)
    assert exemplars(server) == {}
    ask(server)
    assert exemplars(server) == {stage: {TRACE_ID} for stage in ("decode", "queue", "infer", "encode", "total")}
    assert TRACE_ID not in server.http.get("/metrics").text


def test_the_client_passes_the_trace_on(serve: Serve) -> None:
    from opentelemetry import trace

    server = serve()
    place = trace.SpanContext(int(TRACE_ID, 16), int(SPAN_ID, 16), is_remote=False, trace_flags=trace.TraceFlags(1))
    with Client(server.url) as client:
        client.predict(contexts())
        assert exemplars(server) == {}
        client.retrieve(contexts()[0, 0], traceparent=SAMPLED)
        with trace.use_span(trace.NonRecordingSpan(place)):
            client.predict(contexts())
    assert exemplars(server)["total"] == {TRACE_ID}
