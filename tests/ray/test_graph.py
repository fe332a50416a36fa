"""Deployment clients, errors and the graph, without a cluster."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pytest
import yaml

pytest.importorskip("ray", reason="the ray extra; make ray-check")

from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import ServeDeploySchema

from lvm.errors import (
    Expired,
    ModelFailed,
    Overloaded,
    ServiceError,
    Unavailable,
)
from service.engines.engine import Deployed, EngineInfo
from service.engines.predict import Prediction
from service.engines.remote import EngineSet
from service.ray.deployment_client import DeploymentClient, DeploymentClients
from service.ray.graph import build
from service.settings import Settings
from tests.conftest import ROOT, SHIPPED

pytestmark = pytest.mark.ray
MADE = Prediction(np.ones((1, 8), np.float32), "amn", "1", 0.0, 0.001, 1, "somewhere")
Answer = Callable[[], Coroutine[Any, Any, Any]]


class Response:
    """What a call returns: an awaitable that runs on unless it is cancelled."""

    def __init__(self, end: Coroutine[Any, Any, Any]) -> None:
        self._end, self.is_cancelled = end, False

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._end.__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


class Handle:
    """A deployment handle whose calls have the given results, one after the other."""

    deployment_name = "primary"

    def __init__(self, *ends: Any) -> None:
        self.ask, self._ends, self.asked = self, list(ends), list[Response]()

    def remote(self, item: Any, left_s: float) -> Response:
        self.asked.append(Response(self._end(self._ends.pop(0))))
        return self.asked[-1]

    async def _end(self, end: Any) -> Any:
        if isinstance(end, Exception) and not isinstance(end, ServiceError):
            raise end
        if end is None:
            await asyncio.sleep(60)
        return end


def ask(handle: Handle, seconds: float = 60) -> Prediction:
    async def run() -> Prediction:
        return await DeploymentClient(handle).predict(np.ones((1, 5, 8), np.float32), monotonic() + seconds)

    return asyncio.run(run())


def test_asks_another_replica_once_if_one_is_lost() -> None:
    handle = Handle(ActorDiedError(), MADE)
    assert ask(handle).replica == "somewhere"
    assert [response.is_cancelled for response in handle.asked] == [False, False]


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        ((ActorDiedError(), ActorDiedError()), Unavailable),
        ((BackPressureError(9, 9),), Overloaded),
        ((DeploymentUnavailableError("primary"),), Unavailable),
        ((RayTaskError("ask", "traceback", ValueError("no")),), ModelFailed),
        ((Overloaded("full", retry_after=7),), Overloaded),
    ],
)
def test_turns_errors_of_ray_into_ours_with_retry_after(ends: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(Unavailable) as raised:
        ask(Handle(*ends))
    assert type(raised.value) is error
    assert raised.value.retry_after in (1, 7)


def test_cancels_a_call_at_its_deadline() -> None:
    handle = Handle(None)
    with pytest.raises(Expired):
        ask(handle, seconds=0.01)
    assert [response.is_cancelled for response in handle.asked] == [True]


class Replicas(DeploymentClient):
    """Replicas of one deployment, which answer in turn; the last one answers every later call."""

    def __init__(self, *descriptions: tuple[EngineInfo, Deployed]) -> None:
        self._descriptions, self.polls = descriptions, 0

    async def describe(self) -> tuple[EngineInfo, Deployed]:
        self.polls += 1
        return self._descriptions[min(self.polls, len(self._descriptions)) - 1]


def serving(
    version: str, since: str, warning: str | None = None, refused: str | None = None
) -> tuple[EngineInfo, Deployed]:
    info = EngineInfo("primary", "amn", version, "0" * 64, "fake", (5, 8), "fake", warning)
    return info, Deployed(f"amn/{version}", since, refused)


def engine_sets(*descriptions: tuple[EngineInfo, Deployed]) -> list[EngineSet]:
    """Return the engine sets that are provided while replicas answer with these descriptions, in turn."""

    async def run() -> list[EngineSet]:
        replicas, provided = Replicas(*descriptions), list[EngineSet]()
        provider = DeploymentClients({"primary": replicas}, 0.0)
        await provider.open(provided.append)
        while replicas.polls < len(descriptions) + 2:
            await asyncio.sleep(0)
        await provider.close()
        return provided

    return asyncio.run(run())


def test_start_times_and_figures_of_replicas_are_no_news() -> None:
    (only,) = engine_sets(
        serving("1", "noon", "off: +2.1"), serving("1", "one", "off: +2.2"), serving("1", "noon", "off: +2.3")
    )
    assert only.deployed["primary"].since == "noon"


def test_another_version_a_warning_and_a_refusal_are_news() -> None:
    news = engine_sets(
        serving("1", "noon"), serving("1", "one", "off"), serving("1", "two", "off", "amn/2"), serving("2", "three")
    )
    assert [each.engines["primary"].info.warning for each in news] == [None, "off", "off", None]
    assert [each.deployed["primary"].refused for each in news] == [None, None, "amn/2", None]
    assert [each.deployed["primary"].since for each in news] == ["noon", "noon", "noon", "three"]


def test_pickles_an_error_with_all_its_fields() -> None:
    error = pickle.loads(pickle.dumps(Overloaded("full", pointer="/x", retry_after=7)))
    assert (error.detail, error.pointer, error.retry_after, error.status) == ("full", "/x", 7, 503)


def test_the_config_file_matches_the_schema_and_the_graph() -> None:
    said = yaml.safe_load(Path(ROOT / "docker" / "ray" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(said).applications
    Settings(**application.args)
    graph = build(Settings(registry=SHIPPED))
    names = {part["name"] for part in said["applications"][0]["deployments"]}
    assert names == {graph._bound_deployment.name, *graph._bound_deployment.init_args[1]}
    assert application.import_path == "service.ray.graph:app"
