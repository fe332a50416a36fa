"""Remote engines: nets that run in another process. The seam between who decodes and encodes, and who owns a device.

A router asks a `Remote` as it asks an `Engine`: contexts `(n, T, D)` and a deadline in, a `Prediction` or an error of
`lvm.errors` out. How the question gets there is the lender's: the owner's socket
(`service/processes/device_client.py`), or whatever else answers to a name. Batching, the guard of the inputs,
probation and loading are all done where the net is; breakers and fallbacks here. A lender says who serves each alias,
anew whenever that changes, and says nobody while it is out of reach; the answer's version is then the truth, whatever
was asked.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from models.vectors import Floats
from service.engines.engine import (
    Engine,
    Identity,
    Live,
    Prediction,
)
from service.engines.search import Ask as AskSearch
from service.telemetry.tracing import export_remote_spans

Ask = Callable[[Floats, float], Awaitable[Prediction]]


@dataclass(frozen=True)
class Facts:
    """What an engine says of itself, as plain values that any wire carries; `shape` is (T, D)."""

    alias: str
    name: str
    version: str
    sha256: str
    runtime: str
    shape: tuple[int, int]
    encoder: str
    warning: str | None = None

    @classmethod
    def of(cls, engine: Engine) -> Facts:
        """Return the facts of an engine of this process."""
        warning = engine.guard.warning() if engine.guard else None
        return cls(engine.alias, *engine.identity, engine.shape, engine.encoder, warning)


@dataclass(frozen=True)
class Remote:
    """An engine whose net runs elsewhere: `facts`, and `ask(contexts, deadline)`, which predicts there.

    `ask` answers, or raises `Unavailable` or `Expired`, by its deadline on the monotonic clock, whatever became of the
    other end; a caller who leaves takes his question back with him.
    """

    facts: Facts
    ask: Ask

    @property
    def alias(self) -> str:
        """The alias it serves."""
        return self.facts.alias

    @property
    def shape(self) -> tuple[int, int]:
        """(T, D)."""
        return self.facts.shape

    @property
    def name(self) -> str:
        """The model's name."""
        return self.facts.name

    @property
    def version(self) -> str:
        """The version, without the name."""
        return self.facts.version

    @property
    def encoder(self) -> str:
        """The encoder whose vectors it reads."""
        return self.facts.encoder

    @property
    def runtime(self) -> str:
        """What executes it."""
        return self.facts.runtime

    @property
    def identity(self) -> Identity:
        """The label values of `lvm_model_info` after the alias."""
        return self.name, self.version, self.facts.sha256, self.runtime

    async def predict(self, contexts: Floats, deadline: float) -> Prediction:
        """Return the next vectors of contexts `(n, T, D)`; raises as `ask` does."""
        made = await self.ask(contexts, deadline)
        export_remote_spans(self.alias, made.queue_s, (("infer", made.infer_s),))
        return made


class Loan(NamedTuple):
    """Who serves each alias elsewhere, `candidate` included, and since when; nobody while it is out of reach.

    `search`, where there is one, searches the corpus elsewhere; it is the same in every loan.
    """

    engines: Mapping[str, Remote]
    live: Mapping[str, Live]
    search: AskSearch | None = None


Borrow = Callable[[Loan], None]  # on the event loop, before any answer of an engine that is new in the loan


class Lender(Protocol):
    """Lends engines to a line-up (`create_app(..., lender=)`)."""

    async def open(self, borrow: Borrow) -> None:
        """Call `borrow` now, and again whenever something changes; return after the first time."""
        ...

    async def close(self) -> None:
        """Let go of what is there; everything that was asked is answered."""
        ...
