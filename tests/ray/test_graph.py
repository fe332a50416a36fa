"""What Ray says and what we say of it, without a cluster."""

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
    """What a call returns: to be awaited, and it runs on unless it is called off."""

    def __init__(self, end: Coroutine[Any, Any, Any]) -> None:
        self._end, self.is_off = end, False

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._end.__await__()

    def cancel(self) -> None:
        self.is_off = True


class Handle:
    """A deployment handle whose calls end as told, one after the other."""

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


def test_a_lost_replica_is_made_good_for_by_another_once() -> None:
    handle = Handle(ActorDiedError(), MADE)
    assert ask(handle).replica == "somewhere"
    assert [response.is_off for response in handle.asked] == [False, False]


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
def test_what_ray_says_becomes_an_error_of_ours_with_retry_after(ends: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(Unavailable) as raised:
        ask(Handle(*ends))
    assert type(raised.value) is error
    assert raised.value.retry_after in (1, 7)


def test_the_deadline_holds_whatever_a_replica_does_and_calls_it_off() -> None:
    handle = Handle(None)
    with pytest.raises(Expired):
        ask(handle, seconds=0.01)
    assert [response.is_off for response in handle.asked] == [True]


class Replicas(DeploymentClient):
    """Replicas of one deployment, which answer in turn: as told first, then the last ever after."""

    def __init__(self, *told: tuple[EngineInfo, Deployed]) -> None:
        self._told, self.looks = list(told), 0

    async def describe(self) -> tuple[EngineInfo, Deployed]:
        self.looks += 1
        return self._told[min(self.looks, len(self._told)) - 1]


def told(
    version: str, since: str, warning: str | None = None, refused: str | None = None
) -> tuple[EngineInfo, Deployed]:
    info = EngineInfo("primary", "amn", version, "0" * 64, "fake", (5, 8), "fake", warning)
    return info, Deployed(f"amn/{version}", since, refused)


def loans(*each: tuple[EngineInfo, Deployed]) -> list[EngineSet]:
    """Return what is lent while replicas tell that, and are then looked at once more."""

    async def run() -> list[EngineSet]:
        replicas, lent = Replicas(*each), list[EngineSet]()
        lines = DeploymentClients({"primary": replicas}, 0.0)
        await lines.open(lent.append)
        while replicas.looks < len(each) + 2:
            await asyncio.sleep(0)
        await lines.close()
        return lent

    return asyncio.run(run())


def test_replicas_that_came_at_other_times_and_saw_other_inputs_are_no_news() -> None:
    (loan,) = loans(told("1", "noon", "off: +2.1"), told("1", "one", "off: +2.2"), told("1", "noon", "off: +2.3"))
    assert loan.live["primary"].since == "noon"


def test_another_version_a_warning_and_a_refusal_are_news() -> None:
    news = loans(told("1", "noon"), told("1", "one", "off"), told("1", "two", "off", "amn/2"), told("2", "three"))
    assert [loan.engines["primary"].info.warning for loan in news] == [None, "off", "off", None]
    assert [loan.live["primary"].refused for loan in news] == [None, None, "amn/2", None]
    assert [loan.live["primary"].since for loan in news] == ["noon", "noon", "noon", "three"]


def test_an_error_of_ours_crosses_the_wire_whole() -> None:
    error = pickle.loads(pickle.dumps(Overloaded("full", pointer="/x", retry_after=7)))
    assert (error.detail, error.pointer, error.retry_after, error.status) == ("full", "/x", 7, 503)


def test_the_config_file_is_of_serves_schema_and_names_what_the_graph_has() -> None:
    said = yaml.safe_load(Path(ROOT / "docker" / "ray" / "serve.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(said).applications
    Settings(**application.args)
    graph = build(Settings(registry=SHIPPED))
    names = {part["name"] for part in said["applications"][0]["deployments"]}
    assert names == {graph._bound_deployment.name, *graph._bound_deployment.init_args[1]}
    assert application.import_path == "service.ray.graph:app"
