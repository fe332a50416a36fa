"""Every knob, with unit, default and reason; read from the environment, prefix LVM_."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models.registry.remote import CACHE

OTHERS = {"LVM_TOKEN", "LVM_URL", "LVM_TEXT", "LVM_RUNTIME"}  # the command line's, the load tests', compose.yaml's
BY_KUBERNETES = re.compile(r"LVM_(SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+)")  # set where a Service is named lvm
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class BadSettings(Exception):
    """An environment variable that does not mean anything; the message names it."""


NormPolicy = Literal["accept", "normalise", "refuse"]


class Settings(BaseSettings):
    """The configuration of one process; frozen once read."""

    model_config = SettingsConfigDict(env_prefix="LVM_", env_ignore_empty=True, frozen=True, extra="ignore")

    registry: Annotated[str, BeforeValidator(str)] = Field(
        "artifacts/lvm", description="Directory of versions and aliases, or the URL of an object store of them."
    )
    cache: Path = Field(CACHE, description="Directory in which a store is mirrored, each in one below it.")
    store_s: Positive = Field(5, description="Seconds between two looks at a store; each asks for four small objects.")
    host: str = Field("127.0.0.1", description="Address to listen on; loopback unless told otherwise.")
    insecure: bool = Field(
        False, description="Listen beyond loopback without a token: anybody who gets there may call."
    )
    tokens: SecretStr = Field(
        SecretStr(""), description="Bearer tokens that callers need, `name:token` or `token` each, commas between."
    )
    tokens_file: Path | None = Field(None, description="File of more such tokens, commas or white space between.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    workers: PositiveInt = Field(1, description="Serving processes behind the port; they share the cores.")
    owner: Literal["auto", "on", "off"] = Field(
        "auto", description="Whether one process runs the nets for all workers; auto does so on an accelerator."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Where nets run; auto takes cuda or mps where torch sees one, else cpu."
    )
    precision: Literal["float32", "bf16", "int8"] = Field(
        "float32", description="Arithmetic of the nets; bf16 and int8 are less exact, and held to the golden vectors."
    )
    threads: PositiveInt = Field(
        default_factory=cores,
        description="Cores one net uses at a time, at most one per 8 rows of a batch; all of them.",
    )
    max_batch: PositiveInt = Field(
        128, description="Rows in one micro-batch at most; fewer where more save no time: all in it wait for all of it."
    )
    max_wait_ms: NonNegative = Field(
        0, description="Milliseconds a batch waits for company; 0 because waiting rows gather by themselves."
    )
    max_queue: PositiveInt = Field(2048, description="Rows waiting per engine; one more is refused with 503.")
    concurrency: Literal["adaptive"] | PositiveInt = Field(
        "adaptive",
        description="Rows in flight, one more is refused; adaptive measures how many, at most 4 batches.",
    )
    max_in_flight_mb: Positive = Field(256, description="Megabytes (10^6 bytes) of request bodies in flight.")
    max_rows: PositiveInt = Field(1024, description="Contexts in one request.")
    max_k: PositiveInt = Field(1000, description="Results of one /retrieve.")
    max_body_mb: Positive = Field(64, description="Megabytes (10^6 bytes) of a request body, as sent and decoded.")
    norm_policy: NormPolicy = Field(
        "accept", description="Vectors that are not of unit length: accept, normalise or refuse (422)."
    )
    encoder: str = Field(
        "auto",
        description="What encodes text: auto (the package of the `text` extra, where that is installed), none, or the "
        "name or directory of a sentence-transformers model on this machine.",
    )
    milvus_uri: str = Field(
        "",
        pattern=r"^$|^(https?|tcp)://",
        description="Milvus where `lvm index push` puts what `retriever` searches; none, it is searched here.",
    )
    milvus_token: SecretStr = Field(SecretStr(""), description="Token, or `user:password`, for that Milvus.")
    milvus_timeout_ms: Positive = Field(
        250, description="Milliseconds a batch waits for that Milvus before it is searched here; at most its share."
    )
    max_text: PositiveInt = Field(
        50_000, description="Characters of text in one request; a longer one would hold up the others' too long."
    )
    timeout_ms: Positive = Field(2000, description="Milliseconds to answer where X-Request-Timeout-Ms says nothing.")
    primary_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the time left that the first engine may use before the next is tried.",
    )
    shadow_share: float = Field(
        0.05, ge=0, le=1, description="Share of /predict requests also put to `candidate`, where that alias is set."
    )
    breaker_failures: PositiveInt = Field(5, description="Failures among the last calls that open the breaker.")
    breaker_window: PositiveInt = Field(20, description="Calls the breaker remembers.")
    breaker_hold_s: Positive = Field(5, description="Seconds between two changes of the breaker.")
    hang_s: Positive = Field(30, description="Seconds after which a running batch makes /livez fail.")
    receive_s: Positive = Field(10, description="Seconds for a request's headers and body to arrive.")
    keep_alive_s: Positive = Field(
        75, description="Seconds an idle connection is kept; more than a load balancer in front keeps its own."
    )
    reload_s: Positive = Field(0.5, description="Seconds between two looks at the aliases.")
    watch_s: NonNegative = Field(
        60, description="Seconds in which a net promoted while serving may be rolled back by itself; 0 for never."
    )
    watch_errors: float = Field(
        0.05, ge=0, le=1, description="Share of its calls that it may fail meanwhile; at least 5 failures tell."
    )
    watch_slower: Positive = Field(
        4, description="Times as long as the old one's, or the least LVM_SLO_MS, that its batches may take (p95)."
    )
    watch_agreement: float = Field(
        0.7, ge=-1, le=1, description="Least mean cosine to the old one's answers; nets that ship: 0.94, on noise 0.73."
    )
    drain_s: NonNegative = Field(
        1, description="Seconds after SIGTERM in which /readyz says 503 and requests are still answered."
    )
    grace_s: Positive = Field(20, description="Seconds after the drain to finish what was accepted.")
    slo_ms: Annotated[tuple[float, ...], NoDecode] = Field(
        (5, 10, 25, 50, 100), description="Latency objectives in milliseconds: exact histogram edges."
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Where spans go, OTLP over HTTP, as http://collector:4318; wants the extra `otlp`.",
    )
    trace_share: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of requests to trace where the caller did not decide; recording takes time.",
    )
    access_log: float = Field(
        0, ge=0, le=1, description="Share of requests with a line in the log; what fails here (5xx) has one anyway."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level logged.")

    @property
    def stop_s(self) -> float:
        """Seconds after which a process that was told to stop hangs: it may wait for requests, then for nets."""
        return self.drain_s + 2 * self.grace_s + 10

    @field_validator("milvus_uri")
    @classmethod
    def _has_client(cls, value: str) -> str:
        if value and find_spec("pymilvus") is None:
            raise ValueError("wants the `milvus` extra: pip install -c constraints.txt -e '.[milvus]'")
        return value

    @field_validator("slo_ms", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value


def unknown_settings(environment: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each variable of `environment` that begins with LVM_ and is no setting, and the setting nearest to it."""
    known = [f"LVM_{name.upper()}" for name in Settings.model_fields]
    for name in sorted(environment):
        is_known = name.upper() in {*known, *OTHERS} or BY_KUBERNETES.fullmatch(name.upper())
        if name.upper().startswith("LVM_") and not is_known:
            yield name, get_close_matches(name.upper(), known, 1, 0)[0]


def read_settings(**overrides: object) -> Settings:
    """Return the settings of the environment, `overrides` on top.

    Raises:
        BadSettings: a value is out of range or of the wrong kind.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        said = "; ".join(f"LVM_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors())
        raise BadSettings(said) from error
