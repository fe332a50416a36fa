"""A fake service, and a plan that is run against it."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from loadtest.plan import Plan
from loadtest.report import Summary
from tests.fake_service import FakeService, fake_services


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeService]]:
    """Start fake services."""
    with fake_services() as start:
        yield start


@pytest.fixture
def closed_url() -> str:
    """A URL without a listener."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def drive() -> Callable[..., Summary]:
    """Run a plan against a URL, by default 30 requests in 0.1 s, and return the figures."""
    from loadtest import driver, report

    def run(url: str, **settings: Any) -> Summary:
        plan = Plan(**{"url": url, "rate": 300.0, "seconds": 0.1, "wire": "octet", "min_offered": 0.0, **settings})
        return report.summarise(plan, driver.run(plan))

    return run
