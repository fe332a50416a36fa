"""The Open Inference Protocol over gRPC: Triton's client gets what HTTP gives, and the same verdicts."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
from tritonclient.grpc import service_pb2 as messages
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from tests.conftest import Running, until
from tests.fakes import D, Gate, T, add_version, contexts, raises

Serve = Callable[..., Running]
INFER = "/inference.GRPCInferenceService/ModelInfer"


def address(server: Running) -> str:
    assert server.app.grpc
    return f"127.0.0.1:{server.app.grpc.port}"


def tensor(batch: Any, kind: Any = triton) -> Any:
    asked = kind.InferInput("context", list(batch.shape), np_to_triton_dtype(batch.dtype))
    asked.set_data_from_numpy(batch)
    return asked


def request(batch: Any, **changes: Any) -> Any:
    """Return a message with numbers, or what `changes` say."""
    given = {"name": "context", "datatype": "FP32", "shape": batch.shape, "contents": {"fp32_contents": batch.ravel()}}
    known = {key: changes.pop(key) for key in list(changes) if key in given}
    return messages.ModelInferRequest(**{"model_name": "amn", "inputs": [given | known], **changes})


def call(server: Running, message: Any, **options: Any) -> Any:
    with grpc.insecure_channel(address(server), [("grpc.max_send_message_length", -1)]) as channel:
        data = message if isinstance(message, bytes) else message.SerializeToString()
        return messages.ModelInferResponse.FromString(channel.unary_unary(INFER)(data, **options))


def rejection(server: Running, message: Any, **options: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as refusal:
        call(server, message, **options)
    return refusal.value.code(), refusal.value.details()


def outcomes(server: Running, route: str = "grpc:infer") -> dict[str, float]:
    """Return the calls of a route by outcome."""
    counted = ("ok", "fallback", "invalid", "malformed", "unknown_model", "expired", "cancelled", "too_large")
    found = {outcome: server.metric("lvm_requests_total", route=route, outcome=outcome) for outcome in counted}
    return {outcome: count for outcome, count in found.items() if count}


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritons_clients_get_the_same_vectors_over_grpc_and_http(serve: Serve, compression: str | None) -> None:
    server, batch = serve(grpc_port=0), contexts(3)
    with (
        triton.InferenceServerClient(address(server)) as client,
        triton_http.InferenceServerClient(server.url.removeprefix("http://")) as other,
    ):
        answer = client.infer(
            "primary",
            [tensor(batch)],
            outputs=[triton.InferRequestedOutput("vector")],
            request_id="7",
            client_timeout=60,
            compression_algorithm=compression,
        )
        expected = other.infer("primary", [tensor(batch, triton_http)]).as_numpy("vector")
    assert answer.as_numpy("vector").tobytes() == expected.tobytes()
    response = answer.get_response()
    assert (response.id, response.model_name, response.parameters["served_by"].string_param) == ("7", "amn", "primary")
    assert outcomes(server) == {"ok": 1}


def test_tritons_other_ways_to_ask_get_them_too(serve: Serve) -> None:
    server, batch = serve(grpc_port=0), contexts(2)
    options = triton.KeepAliveOptions(keepalive_time_ms=10_000, keepalive_permit_without_calls=True)

    async def ask() -> Any:
        async with triton_aio.InferenceServerClient(address(server)) as client:
            assert await client.is_server_live()
            answers = await asyncio.gather(*(client.infer("amn", [tensor(batch)]) for _ in range(20)))
            return [answer.as_numpy("vector").tobytes() for answer in answers]

    with triton.InferenceServerClient(address(server), keepalive_options=options) as client:
        expected = client.infer("amn", [tensor(batch)]).as_numpy("vector").tobytes()
        done: list[Any] = []
        client.async_infer("amn", [tensor(batch)], lambda result, error: done.append(error or result))
        until(lambda: done, "the answer")
    assert asyncio.run(ask()) == [expected] * 20
    assert done[0].as_numpy("vector").tobytes() == expected


def test_numbers_are_answered_by_numbers_unless_the_caller_asks_for_bytes(serve: Serve) -> None:
    server, batch = serve(grpc_port=0), contexts(2)
    numbers = call(server, request(batch))
    output = numbers.outputs[0]
    assert (output.name, output.datatype, list(output.shape)) == ("vector", "FP32", [2, D])
    binary = {"binary_data_output": messages.InferParameter(bool_param=True)}
    raw = call(server, request(batch, parameters=binary)).raw_output_contents[0]
    assert np.array(output.contents.fp32_contents, np.float32).tobytes() == raw


def test_a_long_list_of_numbers_is_what_its_bytes_are(serve: Serve) -> None:
    server, batch = serve(grpc_port=0), contexts(1000)
    by_numbers = call(server, request(batch)).outputs[0].contents.fp32_contents
    by_bytes = call(server, request(batch, contents=None, raw_input_contents=[batch.tobytes()]))
    assert np.array(by_numbers, np.float32).tobytes() == by_bytes.raw_output_contents[0]


def test_the_answer_says_who_made_it(serve: Serve) -> None:
    server = serve(grpc_port=0, amn=raises)
    with grpc.insecure_channel(address(server)) as channel:
        ask = channel.unary_unary(INFER, lambda message: message.SerializeToString())
        metadata = (("x-request-id", "mine"),)
        _, made = ask.with_call(request(contexts(), model_name="primary"), metadata=metadata)
    found = dict(made.trailing_metadata())
    assert found["x-request-id"] == "mine"
    assert (found["x-model"], found["x-served-by"], found["x-fallback-reason"]) == ("gru", "fallback", "model_failed")
    assert {"x-model-version", "server-timing"} <= found.keys()
    assert not {"content-type", "content-length", "x-content-type-options"} & found.keys()
    assert outcomes(server) == {"fallback": 1}


BATCH = contexts()
RAW = {"contents": None, "raw_input_contents": [BATCH.tobytes()]}


def parameter(**value: Any) -> Any:
    return messages.InferParameter(**value)


PLACES: list[tuple[dict[str, Any], str]] = [
    ({"name": "x"}, "/inputs/0/name"),
    ({"datatype": "FP64"}, "/inputs/0/datatype"),
    ({"datatype": ""}, "/inputs/0/datatype"),
    ({"shape": [1, T]}, "/inputs/0/shape"),
    ({"shape": []}, "/inputs/0/shape"),
    ({"shape": [0, T, D]}, "/inputs/0/shape"),
    ({"shape": [-1, T, D]}, "/inputs/0/shape"),
    ({"shape": [2, T, D]}, "/inputs/0/contents/fp32_contents"),
    ({"contents": None}, "/inputs/0/contents"),
    ({"contents": {"fp64_contents": [0.0] * T * D}}, "/inputs/0/contents"),
    ({"contents": {"fp32_contents": [0.0] * T * D, "int_contents": [1]}}, "/inputs/0/contents"),
    ({"contents": {"fp32_contents": [float("nan")] * T * D}}, "/inputs/0/contents/fp32_contents/0"),
    ({"contents": {"fp32_contents": [1e10] * T * D}}, "/inputs/0/contents/fp32_contents/0"),
    ({"raw_input_contents": [BATCH.tobytes()]}, "/inputs/0/contents"),
    ({**RAW, "raw_input_contents": [BATCH.tobytes()] * 2}, "/raw_input_contents"),
    ({"inputs": []}, "/inputs"),
    ({"inputs": [{}, {}]}, "/inputs"),
    ({"outputs": [{"name": "y"}]}, "/outputs/0/name"),
    ({"outputs": [{"name": "vector"}, {"name": "vector"}]}, "/outputs"),
    ({"parameters": {"custom": parameter(int64_param=1)}}, "/parameters/custom"),
    ({"parameters": {"custom": parameter()}}, "/parameters/custom"),
    ({"parameters": {"priority": parameter(uint64_param=1)}}, "/parameters/priority"),
    ({"parameters": {"timeout": parameter(double_param=1.5)}}, "/parameters/timeout"),
    ({"id": "x" * 201}, "/id"),
]


def test_rejects_what_is_no_context_and_says_where(serve: Serve) -> None:
    server = serve(grpc_port=0)
    for changes, pointer in PLACES:
        code, text = rejection(server, request(BATCH, **changes))
        assert (code, text.partition(" (at ")[2]) == (grpc.StatusCode.INVALID_ARGUMENT, f"{pointer})"), changes
    assert outcomes(server) == {"invalid": len(PLACES)}


BYTES: list[tuple[bytes, grpc.StatusCode, str]] = [
    (
        BATCH.tobytes()[:-1],
        grpc.StatusCode.INVALID_ARGUMENT,
        "body is 159 bytes; expected 160",
    ),
    (b"", grpc.StatusCode.INVALID_ARGUMENT, "body is 0 bytes; expected 160"),
    (BATCH.tobytes() * 2, grpc.StatusCode.INVALID_ARGUMENT, "body is 320 bytes; expected 160"),
    (np.full_like(BATCH, np.nan).tobytes(), grpc.StatusCode.INVALID_ARGUMENT, "expected a finite float32"),
]


def test_rejects_bytes_that_are_no_context(serve: Serve) -> None:
    server = serve(grpc_port=0, max_rows=4)
    for raw, status, text in BYTES:
        code, details = rejection(server, request(BATCH, contents=None, raw_input_contents=[raw]))
        assert (code, text in details) == (status, True), details


def test_rows_over_the_limit_or_beside_the_shape_get_one_verdict_as_numbers_and_as_bytes(serve: Serve) -> None:
    server, many = serve(grpc_port=0, max_rows=4), np.repeat(BATCH, 5, axis=0)
    for batch, shape, status, http in (
        (many, many.shape, grpc.StatusCode.RESOURCE_EXHAUSTED, 413),
        (BATCH, (2, T, D), grpc.StatusCode.INVALID_ARGUMENT, 422),
    ):
        raw = {"contents": None, "raw_input_contents": [batch.tobytes()]}
        for form in ({}, raw):
            assert rejection(server, request(batch, shape=shape, **form))[0] is status
        given = {"name": "context", "datatype": "FP32", "shape": shape}
        for more, data in (
            ({"data": batch.ravel().tolist()}, b""),
            ({"parameters": {"binary_data_size": batch.nbytes}}, batch.tobytes()),
        ):
            header = json.dumps({"inputs": [{**given, **more}]}).encode()
            headers = {"inference-header-content-length": str(len(header))}
            answer = server.http.post("/v2/models/amn/infer", content=header + data, headers=headers)
            assert answer.status_code == http, answer.text
    assert outcomes(server) == {"too_large": 2, "invalid": 2}


MESSAGES: list[tuple[bytes, str]] = [
    (b"\xff\xff\xff", "malformed"),
    (b"\x0a\xff", "malformed"),
    (b"{}", "malformed"),
    (b"", "unknown_model"),
    (b"\x0a\x03amn", "invalid"),
    # a hundred thousand empty tensors, parameters and shapes, which take a hundred times as much memory parsed
    (b"\x2a\x00" * 100_000, "invalid"),
    (b"\x3a\x00" * 100_000, "invalid"),
    (b"\x22\x00" * 100_000, "invalid"),
    (b"\x3a\xff\xff\xff\xff\x07" + b"x" * 100_000, "malformed"),
    (b"\x0b" * 100_000, "malformed"),
    (b"\xff" * 100_000, "malformed"),
]


def test_rejects_bytes_that_are_no_message(serve: Serve) -> None:
    server = serve(grpc_port=0)
    counts: Counter[str] = Counter()
    for message, outcome in MESSAGES:
        rejection(server, message)
        counts[outcome] += 1
        assert outcomes(server) == counts, message[:10]


def test_knows_no_model_but_those_that_are_served(serve: Serve) -> None:
    server = serve(grpc_port=0)
    for name, version in (("nothing", ""), ("../x", ""), ("amn", "1"), ("", "")):
        code, _ = rejection(server, request(BATCH, model_name=name, model_version=version))
        assert code is grpc.StatusCode.NOT_FOUND
    assert outcomes(server) == {"unknown_model": 4}


def test_rejects_a_message_over_the_limit_and_goes_on(serve: Serve) -> None:
    server = serve(grpc_port=0, max_body_mb=0.01)
    batch = contexts(100)
    code, text = rejection(server, request(batch, contents=None, raw_input_contents=[batch.tobytes()]))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text
    code, text = rejection(server, bytes(10**8), compression=grpc.Compression.Gzip)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert call(server, request(BATCH)).outputs
    assert sum(outcomes(server).values()) == 3


def test_the_deadline_of_a_call_is_that_of_the_request(serve: Serve) -> None:
    gate = Gate()
    server = serve(grpc_port=0, amn=gate)
    try:
        assert rejection(server, request(BATCH), timeout=0.1)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        by_header = rejection(server, request(BATCH), metadata=(("x-request-timeout-ms", "50"),))
        by_parameter = rejection(server, request(BATCH, parameters={"timeout": parameter(int64_param=50_000)}))
    finally:
        gate.opened.set()
    assert by_header[0] is by_parameter[0] is grpc.StatusCode.DEADLINE_EXCEEDED
    assert outcomes(server) == {"expired": 3}


def test_a_deadline_beyond_the_default_is_kept(serve: Serve) -> None:
    gate = Gate()
    server = serve(grpc_port=0, amn=gate, timeout_ms=50)
    with grpc.insecure_channel(address(server)) as channel:
        asked = channel.unary_unary(INFER).future(request(BATCH).SerializeToString(), timeout=60)
        assert rejection(server, request(BATCH))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        gate.opened.set()
        assert asked.result()


def test_a_call_that_is_cancelled_is_counted_and_holds_nothing(serve: Serve) -> None:
    gate = Gate()
    server = serve(grpc_port=0, amn=gate)
    try:
        with grpc.insecure_channel(address(server)) as channel:
            asked = channel.unary_unary(INFER).future(request(BATCH).SerializeToString())
            gate.entered.wait()
            asked.cancel()
            until(lambda: outcomes(server) == {"cancelled": 1}, "the call to be cancelled")
    finally:
        gate.opened.set()
    assert server.metric("lvm_in_flight_requests", route="grpc:infer") == 0
    server.app.state.update_gauges()
    assert server.metric("lvm_in_flight_rows") == 0
    assert call(server, request(BATCH)).outputs


def test_overload_is_rejected_with_a_time_to_wait(serve: Serve) -> None:
    gate = Gate()
    server = serve(grpc_port=0, amn=gate, concurrency=1)
    try:
        with grpc.insecure_channel(address(server)) as channel:
            ask = channel.unary_unary(INFER)
            first = ask.future(request(BATCH).SerializeToString())
            gate.entered.wait()
            with pytest.raises(grpc.RpcError) as refusal:
                ask(request(BATCH).SerializeToString())
            gate.opened.set()
            assert first.result()
    finally:
        gate.opened.set()
    found = dict(refusal.value.trailing_metadata())
    assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
    assert (found["x-reason"], found["retry-after"], found["grpc-retry-pushback-ms"]) == ("overloaded", "1", "1000")
    assert server.metric("lvm_refusals_total", reason="rows") == 1


def test_a_failing_net_is_unavailable(serve: Serve) -> None:
    server = serve(grpc_port=0, amn=raises)
    assert rejection(server, request(BATCH))[0] is grpc.StatusCode.UNAVAILABLE


def test_the_answers_over_both_wires_are_compared_with_the_candidates(serve: Serve) -> None:
    server = serve(grpc_port=0, shadow_share=1)
    registry = server.app.state.deployments.registry
    registry.point("candidate", add_version(registry, "gru", "second"))
    until(lambda: "candidate" in server.app.state.deployments.slots, "the candidate")
    assert call(server, request(BATCH)).outputs
    until(lambda: server.metric("lvm_shadow_total", outcome="compared") == 1, "a comparison")
    with triton_http.InferenceServerClient(server.url.removeprefix("http://")) as client:
        client.infer("amn", [tensor(BATCH, triton_http)])
    until(lambda: server.metric("lvm_shadow_total", outcome="compared") == 2, "another")


def test_a_call_that_outlasts_the_grace_period_is_told_so(serve: Serve) -> None:
    gate = Gate()
    server = serve(grpc_port=0, amn=gate, grace_s=0.2, timeout_ms=60_000)
    try:
        with grpc.insecure_channel(address(server)) as channel:
            asked = channel.unary_unary(INFER).future(request(BATCH).SerializeToString())
            gate.entered.wait()
            server.server.should_exit = True
            assert asked.code() is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in asked.details()
    finally:
        gate.opened.set()
    assert server.metric("lvm_requests_total", route="grpc:infer", outcome="draining") == 1


def test_tritons_client_is_told_the_name_of_what_is_not_supported(serve: Serve) -> None:
    server = serve(grpc_port=0)
    options: list[tuple[dict[str, Any], str]] = [
        ({"outputs": [triton.InferRequestedOutput("vector", class_count=3)]}, "classification"),
        ({"sequence_id": 3, "sequence_start": True}, "sequence_id"),
        ({"priority": 2}, "priority"),
        ({"parameters": {"custom": 1}}, "custom"),
    ]
    with triton.InferenceServerClient(address(server)) as client:
        for option, named in options:
            with pytest.raises(InferenceServerException, match=named):
                client.infer("amn", [tensor(BATCH)], **option)
        shared = triton.InferInput("context", [1, T, D], "FP32")
        shared.set_shared_memory("region", 4 * T * D)
        with pytest.raises(InferenceServerException, match="shared_memory"):
            client.infer("amn", [shared])
        for datatype in (np.float16, np.float64, np.int32):
            with pytest.raises(InferenceServerException, match="FP32"):
                client.infer("amn", [tensor(BATCH.astype(datatype))])
