"""The gRPC server beside HTTP: what it knows of its models, probes, reflection, tokens, and how it stops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from tritonclient.utils import InferenceServerException

from lvm import errors
from service.grpc.call import client_of
from service.grpc.status import CODES
from tests.conftest import Running, until
from tests.fakes import D, T

Serve = Callable[..., Running]
TOKEN = "a-token-that-is-long-enough"
SERVICE = "inference.GRPCInferenceService"
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def address(server: Running) -> str:
    assert server.app.grpc
    return f"127.0.0.1:{server.app.grpc.port}"


def test_tritons_client_finds_the_server_and_its_models(serve: Serve) -> None:
    server = serve(grpc_port=0, max_rows=7)
    with triton.InferenceServerClient(address(server)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        (version,) = client.get_model_metadata("amn").versions
        assert client.is_model_ready("primary")
        assert client.is_model_ready("amn", version)
        assert not client.is_model_ready("amn", "1")
        assert not client.is_model_ready("nothing")
        assert "model_configuration" in client.get_server_metadata().extensions
        metadata = client.get_model_metadata("gru", as_json=True)
        config = client.get_model_config("amn", as_json=True)["config"]
        index = client.get_model_repository_index().models
        with pytest.raises(InferenceServerException, match='unknown model "nothing"') as refusal:
            client.get_model_metadata("nothing")
    assert refusal.value.status() == "StatusCode.NOT_FOUND"
    assert metadata["inputs"] == [{"name": "context", "datatype": "FP32", "shape": ["-1", str(T), str(D)]}]
    assert metadata["outputs"] == [{"name": "vector", "datatype": "FP32", "shape": ["-1", str(D)]}]
    assert (config["name"], config["max_batch_size"]) == ("amn", 7)
    assert config["input"] == [{"name": "context", "data_type": "TYPE_FP32", "dims": [str(T), str(D)]}]
    assert {entry.name for entry in index} == {"primary", "fallback", "amn", "gru"}


MISSING: list[tuple[Callable[[Any], Any], str]] = [
    (lambda client: client.get_inference_statistics("amn"), "/metrics"),
    (lambda client: client.load_model("amn"), "lvm promote"),
    (lambda client: client.unload_model("amn"), "lvm promote"),
    (lambda client: client.get_trace_settings(), "LVM_TRACE_SHARE"),
    (lambda client: client.get_log_settings(), "LVM_LOG_LEVEL"),
    (lambda client: client.get_system_shared_memory_status(), "shared memory"),
    (lambda client: client.unregister_cuda_shared_memory(), "shared memory"),
]


def test_tritons_client_is_told_what_stands_in_for_what_is_missing(serve: Serve) -> None:
    server = serve(grpc_port=0)
    with triton.InferenceServerClient(address(server)) as client:
        for ask, said in MISSING:
            with pytest.raises(InferenceServerException, match=said) as refusal:
                ask(client)
            assert refusal.value.status() == "StatusCode.UNIMPLEMENTED"
    assert server.metric("lvm_requests_total", route="other", outcome="unknown_route") == len(MISSING)


def test_reflection_shows_the_services_and_their_messages(serve: Serve) -> None:
    server = serve(grpc_port=0)
    with grpc.insecure_channel(address(server)) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        services = database.get_services()
        pool = DescriptorPool(database)
        methods = set(pool.FindServiceByName(SERVICE).methods_by_name)
        fields = pool.FindMessageTypeByName("inference.ModelInferRequest").fields_by_name
        assert pool.FindServiceByName("grpc.health.v1.Health").methods_by_name
    assert set(services) == {SERVICE, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert {"ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata", "ModelInfer"} <= methods
    assert "raw_input_contents" in fields


def test_health_is_shown_and_watched_until_the_server_drains(serve: Serve) -> None:
    server = serve(grpc_port=0)
    with grpc.insecure_channel(address(server)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            assert health.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING
        with pytest.raises(grpc.RpcError) as refusal:
            health.Check(health_pb2.HealthCheckRequest(service="nothing"))
        assert refusal.value.code() is grpc.StatusCode.NOT_FOUND
        watched = health.Watch(health_pb2.HealthCheckRequest())
        assert next(watched).status == SERVING
        server.app.state.process.is_draining = True
        assert next(watched).status == NOT_SERVING
        assert not triton.InferenceServerClient(address(server)).is_server_ready()
        server.server.should_exit = True
        with pytest.raises(grpc.RpcError) as end:
            next(watched)
    assert end.value.code() is grpc.StatusCode.UNAVAILABLE
    assert server.metric("lvm_requests_total", route="grpc:health", outcome="ok") == 2
    assert server.metric("lvm_requests_total", route="grpc:health", outcome="unknown_service") == 1
    assert server.metric("lvm_requests_total", route="grpc:health", outcome="draining") == 1


def test_all_but_probes_need_the_token(serve: Serve) -> None:
    server = serve(grpc_port=0, tokens=f"amy:{TOKEN}")
    with triton.InferenceServerClient(address(server)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        asked: list[Callable[[dict[str, str] | None], Any]] = [
            lambda headers: client.is_model_ready("amn", headers=headers),
            lambda headers: client.get_server_metadata(headers=headers),
            lambda headers: client.get_model_config("amn", headers=headers),
        ]
        for ask in asked:
            for headers in (None, {"authorization": "Bearer wrong-token-of-some-length"}, {"authorization": TOKEN}):
                with pytest.raises(InferenceServerException, match="Authorization") as refusal:
                    ask(headers)
                assert refusal.value.status() == "StatusCode.UNAUTHENTICATED"
            assert ask({"authorization": f"Bearer {TOKEN}"})
    with grpc.insecure_channel(address(server)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest()).status == SERVING
        with pytest.raises(grpc.RpcError) as closed:
            ProtoReflectionDescriptorDatabase(channel).get_services()
    assert closed.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_a_call_without_a_message_is_malformed(serve: Serve) -> None:
    server = serve(grpc_port=0)
    with grpc.insecure_channel(address(server)) as channel:
        for method in ("ModelInfer", "ServerLive"):
            with pytest.raises(grpc.RpcError, match="no message") as refusal:
                channel.stream_unary(f"/{SERVICE}/{method}")(iter(()))
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_that_does_not_arrive_is_waited_for_in_vain(serve: Serve) -> None:
    server = serve(grpc_port=0, receive_s=0.1)

    def never() -> Any:
        until(lambda: server.metric("lvm_requests_total", route="grpc:infer", outcome="too_slow"), "the call to end")
        yield b""

    with grpc.insecure_channel(address(server)) as channel, pytest.raises(grpc.RpcError) as refusal:
        channel.stream_unary(f"/{SERVICE}/ModelInfer")(never())
    assert refusal.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("peer", "client"),
    [("ipv4:127.0.0.1:50", "127.0.0.1"), ("ipv6:%5B::1%5D:50", "::1"), ("unix:", ""), ("", "")],
)
def test_a_client_is_its_address_as_over_http(peer: str, client: str) -> None:
    assert client_of(peer) == client


def test_every_error_that_a_call_can_meet_has_a_status() -> None:
    only_over_http = {415, 417, 431, 505}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ServiceError)]
    statuses = {kind.status for kind in kinds}
    assert (statuses - only_over_http) | {200, 500} == CODES.keys()
