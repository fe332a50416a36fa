"""Every setting with its unit, default and reason, read from environment variables with the prefix LVM_."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PositiveInt, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from models.cores import cores
from models.registry.remote import CACHE_DIRECTORY

# Variables of the command line, the load tests and compose.yaml.
OTHERS = {"LVM_TOKEN", "LVM_URL", "LVM_TEXT", "LVM_GRPC", "LVM_RUNTIME"}
# Kubernetes sets these if a Service is named lvm.
BY_KUBERNETES = re.compile(r"LVM_(SERVICE_(HOST|PORT)\w*|PORT_\d+_\w+)")
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
CoreCount = Annotated[PositiveInt, BeforeValidator(lambda value: cores() if value == "auto" else value)]


class BadSettings(Exception):
    """An environment variable has an invalid value; the message names the variable."""


NormPolicy = Literal["accept", "normalise", "refuse"]


class Settings(BaseSettings):
    """The configuration of one process; immutable."""

    model_config = SettingsConfigDict(env_prefix="LVM_", env_ignore_empty=True, frozen=True, extra="ignore")

    registry: Annotated[str, BeforeValidator(str)] = Field(
        "artifacts/lvm", description="Registry of versions and aliases: a directory, or the URL of an object store."
    )
    cache: Path = Field(
        CACHE_DIRECTORY,
        description="Directory for local copies of object stores, one subdirectory per store, "
        "and for the choices of `LVM_PRECISION=auto`.",
    )
    store_s: Positive = Field(
        5, description="Seconds between two polls of an object store; a poll requests one small object per alias."
    )
    host: str = Field(
        "127.0.0.1", description="Address to listen on. The default can be reached from this machine only."
    )
    insecure: bool = Field(
        False, description="Allow an address that other machines reach although no token is set: anyone may then call."
    )
    tokens: SecretStr = Field(
        SecretStr(""), description="Bearer tokens that callers need: `name:token` or `token`, separated by commas."
    )
    tokens_file: Path | None = Field(
        None, description="File with more such tokens, separated by commas or white space."
    )
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="Port for gRPC, 0 takes a free one; none: no gRPC. Requires the `grpc` extra."
    )
    compat: Literal["", "lnsp"] = Field(
        "", description="Interface of another server to answer too: lnsp (/infer, /infer/batch, /health, /info)."
    )
    workers: CoreCount = Field(
        1, description="Number of serving processes on the port; they share the cores. auto: one per core."
    )
    owner: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether one process, the device worker, runs the nets for all; auto: on an accelerator only.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        "auto", description="Device that runs the nets; auto: cuda or mps if torch finds one, else cpu."
    )
    precision: Literal["auto", "float32", "bf16", "int8"] = Field(
        "float32",
        description="Number format of the nets; bf16 and int8 are less exact, and checked by the golden vectors. "
        "auto: on a CPU the fastest of these, tried once for a version and kept in LVM_CACHE; else float32.",
    )
    threads: PositiveInt = Field(
        default_factory=cores,
        description="Cores that one net may use, at most one per 8 rows of a batch. "
        "The default is a worker's share of the cores of this process or of its container's CPU quota.",
    )
    max_batch: PositiveInt = Field(
        128, description="Most rows in a micro-batch; smaller batches are used if larger ones save no time per row."
    )
    max_wait_ms: NonNegative = Field(
        0, description="Longest wait for a fuller batch, ms. 0: rows that arrive while the net runs form the next."
    )
    max_queue: PositiveInt = Field(2048, description="Most rows that wait for one engine; further requests get 503.")
    concurrency: Literal["adaptive"] | PositiveInt = Field(
        "adaptive", description="Most rows in flight; further requests get 503. adaptive: measured, at most 4 batches."
    )
    max_in_flight_mb: Positive = Field(
        256, description="Most megabytes (10^6 bytes) of request bodies in flight, which bounds memory; then 503."
    )
    max_rows: PositiveInt = Field(1024, description="Most contexts in a request.")
    max_k: PositiveInt = Field(1000, description="Most results of a /retrieve request.")
    max_body_mb: Positive = Field(
        64, description="Most megabytes (10^6 bytes) in a request body, before and after decompression."
    )
    norm_policy: NormPolicy = Field(
        "accept", description="What to do with vectors that are not of unit length: accept, normalise or refuse (422)."
    )
    encoder: str = Field(
        "auto",
        description="Encoder of text: auto (the package of the `text` extra if it is installed), none, "
        "or the name or directory of a sentence-transformers model on this machine.",
    )
    milvus_uri: str = Field(
        "",
        pattern=r"^$|^(https?|tcp)://",
        description="Milvus that `lvm index push` fills and `retriever` searches; empty: search in this process.",
    )
    milvus_token: SecretStr = Field(SecretStr(""), description="Token, or `user:password`, for Milvus.")
    milvus_timeout_ms: Positive = Field(
        250,
        description="Longest wait for Milvus before a batch is searched here, ms, and never more than "
        "LVM_PRIMARY_SHARE of the time left.",
    )
    max_text: PositiveInt = Field(
        50_000, description="Most characters of text in a request; longer texts would delay other requests too much."
    )
    timeout_ms: Positive = Field(
        2000, description="Time limit for an answer, ms, if the request has no X-Request-Timeout-Ms header."
    )
    primary_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of the remaining time that an engine may use before the next one, the first or a further "
        "fallback, is tried.",
    )
    shadow_share: Share = Field(
        0.05,
        description="Share of /predict requests that are also sent to `candidate`, if that alias is set.",
    )
    truth_share: Share = Field(
        0.1,
        description="Share of predictions that are kept until a later context shows the true next vector, "
        "and are then scored; 0: none.",
    )
    truth_mb: float = Field(
        16,
        ge=1,
        le=10_000,
        description="Megabytes (10^6 bytes) that these predictions may use, in all workers together.",
    )
    truth_s: Positive = Field(3600, description="Longest time that such a prediction is kept, s.")
    breaker_failures: PositiveInt = Field(
        5, description="Number of failed calls in the window that opens the circuit breaker."
    )
    breaker_window: PositiveInt = Field(20, description="Number of last calls that the circuit breaker counts.")
    breaker_hold_s: Positive = Field(
        5, description="Least seconds between opening and closing the circuit breaker, so that it does not flap."
    )
    hang_s: Positive = Field(
        30, description="Seconds until a batch counts as hung: /livez fails, a supervisor replaces the worker."
    )
    receive_s: Positive = Field(
        10, description="Seconds in which a request's headers and body must arrive; slower connections are closed."
    )
    keep_alive_s: Positive = Field(
        75, description="Seconds until an idle connection is closed; set it above your load balancer's idle timeout."
    )
    reload_s: Positive = Field(0.5, description="Seconds between two reads of the aliases.")
    watch_s: NonNegative = Field(
        60, description="Seconds in which a newly promoted net may be rolled back automatically; 0: never."
    )
    watch_errors: Share = Field(0.05, description="Share of failed calls that is too much, from 5 failures on.")
    watch_slower: Positive = Field(
        4,
        description="Roll back if batches take this many times as long (p95) as the old net's, or as the "
        "smallest LVM_SLO_MS if that is longer.",
    )
    watch_agreement: float = Field(
        0.7,
        ge=-1,
        le=1,
        description="Least mean cosine to the old net's answers; "
        "shipped nets agree at 0.94 on real contexts, at 0.73 on random ones.",
    )
    watch_worse: NonNegative = Field(
        0.005,
        description="Roll back if the mean cosine to the true next vectors, which later contexts show, is lower "
        "than the old net's by more than this.",
    )
    drain_s: NonNegative = Field(
        1, description="Seconds after SIGTERM in which requests are answered and /readyz is 503, for balancers."
    )
    grace_s: Positive = Field(20, description="Seconds after LVM_DRAIN_S to finish the requests in flight.")
    slo_ms: Annotated[tuple[float, ...], NoDecode] = Field(
        (5, 10, 25, 50, 100),
        description="Latency objectives, ms, separated by commas; each becomes an edge of the histogram.",
    )
    otlp_endpoint: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="Collector of traces, OTLP over HTTP, as http://collector:4318; requires the `otlp` extra.",
    )
    trace_share: Share = Field(
        0.01, description="Share of requests to trace if the caller did not decide; each trace costs time."
    )
    access_log: Share = Field(
        0,
        description="Share of requests that get a log line; those that fail in the service (5xx) always do.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least level of log lines.")

    @property
    def stop_s(self) -> float:
        """Seconds after which a process that is stopping counts as hung. It may wait for requests, then for nets."""
        return self.drain_s + 2 * self.grace_s + 10

    @field_validator("milvus_uri")
    @classmethod
    def _has_client(cls, value: str) -> str:
        if value and find_spec("pymilvus") is None:
            raise ValueError("requires pymilvus: pip install 'lvm-serve[milvus]'")
        return value

    @field_validator("grpc_port")
    @classmethod
    def _has_grpc(cls, value: int | None) -> int | None:
        if value is not None and not all(map(find_spec, ("grpc", "grpc_health", "grpc_reflection"))):
            raise ValueError("requires grpcio: pip install 'lvm-serve[grpc]'")
        return value

    @field_validator("slo_ms", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return value.split(",") if isinstance(value, str) else value


def unknown_settings(environment: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each variable in `environment` that begins with LVM_ and is not a setting, with the closest setting."""
    known = [f"LVM_{name.upper()}" for name in Settings.model_fields]
    for name in sorted(environment):
        is_known = name.upper() in {*known, *OTHERS} or BY_KUBERNETES.fullmatch(name.upper())
        if name.upper().startswith("LVM_") and not is_known:
            yield name, get_close_matches(name.upper(), known, 1, 0)[0]


def read_settings(**overrides: object) -> Settings:
    """Return the settings of the environment. `overrides` take precedence.

    Raises:
        BadSettings: A value has the wrong type or is out of range.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks them
    except ValidationError as error:
        problems = [f"LVM_{'_'.join(map(str, e['loc'])).upper()}: {e['msg']}" for e in error.errors()]
        raise BadSettings("; ".join(problems)) from error
