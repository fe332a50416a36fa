"""The OpenAPI document: what it allows is what is taken, and a generator can make a client of all of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import numpy as np
import pytest

from models.registry.registry import ACTIONS
from service.app import create_app
from service.http.routes import oip
from service.http.routes.predict import OPTIONS
from service.settings import Settings
from tests.conftest import Running
from tests.fakes import D, T, contexts, corpus

Serve = Callable[..., Running]
DOCUMENT = create_app(Settings()).openapi()
OPERATIONS = {(path, method): said for path, item in DOCUMENT["paths"].items() for method, said in item.items()}
HOT = ["/predict", "/retrieve", "/v2/models/{model}/infer"]
CONTEXT = contexts()[0].tolist()
QUERY = corpus().vectors[3].tolist()
TENSOR = {"name": "context", "datatype": "FP32", "shape": [1, T, D], "data": [CONTEXT]}
INFER: dict[str, Any] = {"inputs": [TENSOR]}


def schema_of(path: str) -> dict[str, Any]:
    body = DOCUMENT["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return {**body, "components": DOCUMENT["components"]}


def is_allowed(path: str, body: Any) -> bool:
    schema = json.loads(json.dumps(schema_of(path)))
    return bool(jsonschema.Draft202012Validator(schema).is_valid(body))


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from nodes(child)


# ---- what it allows is what is taken


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *(("/predict", {"context": CONTEXT, name: None}) for name in (*OPTIONS, "contexts", "text", "texts")),
        ("/predict", {"context": CONTEXT, "model": "gru", "encoding": "base64"}),
        ("/predict", {"contexts": [CONTEXT], "profile": "batch"}),
        ("/retrieve", {"query": QUERY, "k": 3.0, "exclude": [1, 2.0], "rerank": False}),
        ("/retrieve", {"query": QUERY, "k": None, "exclude": None, "exclude_context": None, "rerank": None}),
        ("/retrieve", {"query": None, "context": CONTEXT, "exclude_context": False, "model": "gru"}),
        (HOT[2], {**INFER, "id": "7", "parameters": None, "outputs": None, "model_name": "amn"}),
        (HOT[2], {**INFER, "id": "", "parameters": {"timeout": 60_000_000, "priority": 0, "sequence_id": ""}}),
        (HOT[2], {**INFER, "outputs": [{"name": "vector", "parameters": {"binary_data": False}}]}),
        (
            HOT[2],
            {"inputs": [{**TENSOR, "data": np.ravel(CONTEXT).tolist(), "parameters": {"binary_data_size": None}}]},
        ),
        ("/v2/repository/index", {"ready": True}),
        ("/v2/repository/index", {"ready": None}),
    ],
)
def test_takes_what_the_document_allows(serve: Serve, path: str, body: dict[str, Any]) -> None:
    assert is_allowed(path, body)
    answer = serve().http.post(path.replace("{model}", "amn"), json=body)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", {"context": CONTEXT, "nonsense": 1}),
        ("/predict", {"context": CONTEXT, "profile": "fast"}),
        ("/predict", {"context": CONTEXT, "model": ""}),
        ("/predict", {"context": CONTEXT, "model": 3}),
        ("/predict", {"contexts": []}),
        ("/predict", {"context": [[1e10] * D] * T}),
        ("/retrieve", {"query": QUERY, "k": 0}),
        ("/retrieve", {"query": QUERY, "k": 2.5}),
        ("/retrieve", {"query": QUERY, "k": True}),
        ("/retrieve", {"query": QUERY, "exclude": [-1]}),
        ("/retrieve", {"query": QUERY, "exclude": [0] * 10_001}),
        ("/retrieve", {"query": QUERY, "profile": "batch"}),
        (HOT[2], {}),
        (HOT[2], {"inputs": []}),
        (HOT[2], {"inputs": [TENSOR, TENSOR]}),
        (HOT[2], {"inputs": [{**TENSOR, "datatype": "FP16"}]}),
        (HOT[2], {"inputs": [{**TENSOR, "data": "AAAA"}]}),
        (HOT[2], {"inputs": [{**TENSOR, "parameters": {"shared_memory_region": "x"}}]}),
        (HOT[2], {**INFER, "id": 7}),
        (HOT[2], {**INFER, "id": False}),
        (HOT[2], {**INFER, "nonsense": 1}),
        (HOT[2], {**INFER, "parameters": {"sequence_id": 3}}),
        (HOT[2], {**INFER, "parameters": {"priority": 1}}),
        (HOT[2], {**INFER, "parameters": {"binary_data_output": "true"}}),
        (HOT[2], {**INFER, "outputs": [{"name": "vector", "parameters": {"classification": 3}}]}),
        (HOT[2], {**INFER, "outputs": [{"name": "y"}]}),
        (HOT[2], {**INFER, "outputs": [{"name": "vector"}] * 2}),
        ("/v2/repository/index", {"nonsense": True}),
        ("/v2/repository/index", {"ready": "yes"}),
    ],
)
def test_rejects_what_the_document_does_not_allow(serve: Serve, path: str, body: dict[str, Any]) -> None:
    assert not is_allowed(path, body)
    answer = serve().http.post(path.replace("{model}", "amn"), json=body)
    assert answer.status_code == 422, answer.text


def test_answers_are_as_the_document_says(serve: Serve) -> None:
    server = serve()
    asked = [("/predict", {"context": CONTEXT}), ("/retrieve", {"context": CONTEXT}), (HOT[2], INFER)]
    for path, body in asked:
        for sent, status in ((body, "200"), ({"nonsense": 1}, "422")):
            answer = server.http.post(path.replace("{model}", "amn"), json=sent)
            said = DOCUMENT["paths"][path]["post"]["responses"][status]
            schema = said["content"][answer.headers["content-type"]]["schema"]
            jsonschema.validate(answer.json(), {**schema, "components": DOCUMENT["components"]})
            told = {name.lower() for name in said["headers"]} - {"x-fallback-reason"}
            assert {name for name in told if name.startswith("x-m")} <= set(answer.headers), path


def test_every_option_of_the_code_is_in_the_document() -> None:
    assert set(OPTIONS) < set(schema_of("/predict")["properties"])
    schemas = DOCUMENT["components"]["schemas"]
    for name, checks in (
        ("InferParameters", oip.PARAMETERS),
        ("InputParameters", oip.INPUT_PARAMETERS),
        ("OutputParameters", oip.OUTPUT_PARAMETERS),
    ):
        assert schemas[name]["properties"].keys() == checks.keys()
    assert schema_of(HOT[2])["properties"].keys() == set(oip.MEMBERS)


def test_every_option_of_a_body_may_stand_in_the_query_string() -> None:
    for path in HOT[:2]:
        operation = DOCUMENT["paths"][path]["post"]
        named = {parameter["name"] for parameter in operation["parameters"] if parameter["in"] == "query"}
        assert named == schema_of(path)["properties"].keys() - {
            "context",
            "contexts",
            "query",
            "queries",
            "text",
            "texts",
        }


# ---- a generator can make a client of it


def test_every_reference_resolves() -> None:
    known = {f"#/components/schemas/{name}" for name in DOCUMENT["components"]["schemas"]}
    assert {node["$ref"] for node in nodes(DOCUMENT) if isinstance(node.get("$ref"), str)} <= known


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [said["operationId"] for said in OPERATIONS.values()]
    assert len(set(names)) == len(names)


def test_parameters_are_of_one_kind_and_never_null() -> None:
    for said in OPERATIONS.values():
        for parameter in said.get("parameters", []):
            assert isinstance(parameter["schema"].get("type"), str), parameter


def test_every_parameter_of_a_path_is_declared() -> None:
    for (path, _), said in OPERATIONS.items():
        declared = {parameter["name"] for parameter in said.get("parameters", []) if parameter["in"] == "path"}
        assert declared == {part.strip("{}") for part in path.split("/") if part.startswith("{")}, path


def test_names_the_actions_of_the_ledger() -> None:
    move = DOCUMENT["components"]["schemas"]["Move"]
    assert move["properties"]["action"]["enum"] == list(ACTIONS)


def test_choices_are_of_one_kind() -> None:
    for node in nodes(DOCUMENT):
        if isinstance(node.get("enum"), list):
            assert len({type(choice) for choice in node["enum"]}) == 1, node


def test_every_error_is_a_problem() -> None:
    for said in OPERATIONS.values():
        for status, response in said["responses"].items():
            assert status == "200" or set(response["content"]) == {"application/problem+json"}
