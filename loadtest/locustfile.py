"""Locust users for the web page: `locust -f loadtest/locustfile.py --host URL` from the repository root.

Locust is a closed loop: a user waits for its answer, so a slow service slows the load and flatters the
percentiles. For figures use the open loop, `python -m loadtest`.
"""

import functools

from locust import FastHttpUser, constant_throughput, task

from loadtest import contexts
from loadtest.payloads import Exchange
from loadtest.plan import Route, Wire

CONTEXTS = contexts.load()


@functools.cache
def bodies(exchange: Exchange) -> list[bytes]:
    """Build the request bodies of one kind once, for all its users."""
    return exchange.bodies(CONTEXTS)


class LvmUser(FastHttpUser):
    """A user that sends one kind of request, up to ten a second, and checks every body."""

    abstract = True
    wait_time = constant_throughput(10)
    wire: Wire = "json"
    route: Route = "predict"

    def on_start(self) -> None:
        """Build the bodies of this kind of request, once for all its users."""
        self.exchange = Exchange(self.route, self.wire, 1, CONTEXTS.shape[-1])
        self.bodies = bodies(self.exchange)
        self.turn = 0

    @task
    def ask(self) -> None:
        """Send the next context; a 200 with a body of the wrong shape is a failure."""
        self.turn = (self.turn + 1) % len(self.bodies)
        exchange = self.exchange
        body = self.bodies[self.turn]
        name = f"/{self.route} {self.wire}"
        with self.client.post(
            exchange.path,
            data=body,  # type: ignore[arg-type]  # locust accepts bytes, its annotation does not
            headers=exchange.headers,
            name=name,
            catch_response=True,
        ) as answer:
            if answer.status_code == 200 and not exchange.is_whole(answer.content or b""):
                answer.failure("the body is not the expected shape, or not finite")


class PredictJson(LvmUser):
    """Predicts over JSON."""

    weight = 4
    wire = "json"


class PredictOctet(LvmUser):
    """Predicts over raw float32."""

    weight = 4
    wire = "octet"


class RetrieveJson(LvmUser):
    """Retrieves over JSON."""

    weight = 1
    wire = "json"
    route = "retrieve"


class RetrieveOctet(LvmUser):
    """Retrieves with a raw float32 context."""

    weight = 1
    wire = "octet"
    route = "retrieve"
