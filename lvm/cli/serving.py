"""Commands that serve, and that check a service."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from lvm.cli.arguments import AsJson, Token, Url, registry_to_read
from lvm.cli.exit_codes import FAILED, OK
from lvm.cli.output import print_json, print_message
from models.cores import pool_limits


def _workers(text: str) -> int | str:
    """Read `--workers`."""
    if text != "auto" and not text.isdecimal():
        raise typer.BadParameter(f"expected a number or auto, not {text!r}")
    return text if text == "auto" else int(text)


def serve(
    host: Annotated[str | None, typer.Option(help="Address; default LVM_HOST or 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one; default LVM_PORT or 8000.")] = None,
    registry: Annotated[
        str | None,
        typer.Option(metavar="DIR|URL", help="Versions and aliases; default LVM_REGISTRY or artifacts/lvm."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps; default LVM_DEVICE or auto.")] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Fail at start if no encoder is installed to read text.")
    ] = False,
    workers: Annotated[
        Any,
        typer.Option(
            parser=_workers, metavar="N|auto", help="Serving processes, auto: one per core; default LVM_WORKERS or 1."
        ),
    ] = None,
    grpc_port: Annotated[
        int | None, typer.Option(help="Port for gRPC; 0 picks a free one; default LVM_GRPC_PORT or no gRPC.")
    ] = None,
    tokens_file: Annotated[
        Path | None, typer.Option(help="File of the tokens that callers need; default LVM_TOKENS_FILE.")
    ] = None,
    insecure: Annotated[
        bool | None, typer.Option("--insecure", help="Listen beyond loopback although no LVM_TOKENS are set.")
    ] = None,
    on_ray: Annotated[
        bool,
        typer.Option("--ray", help="Serve on Ray: RAY_ADDRESS, or here; up to WORKERS replicas of each part."),
    ] = False,
) -> None:
    """Serve what the aliases point at, until SIGTERM or Ctrl-C.

    Every setting is an environment variable (docs/settings.md); the options here take precedence. SIGHUP restarts the
    workers one after another, if there are several.
    """
    _handle_early_signals()
    # numpy's matrix products are small here: a second thread would only spin
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    with _collector_paused():
        from service.settings import read_settings

    given: dict[str, object] = {"host": host, "port": port, "registry": registry, "device": device, "workers": workers}
    given |= {"grpc_port": grpc_port, "tokens_file": tokens_file, "insecure": insecure}
    overrides = {name: value for name, value in given.items() if value is not None}
    # workers read them there
    os.environ |= {f"LVM_{name.upper()}": str(value) for name, value in overrides.items()}
    settings = read_settings(**overrides)
    if text:
        from models.text.encoder import require_encoder

        require_encoder(settings.encoder)
    if on_ray:
        # ray reads it when it is imported
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        from service.ray.graph import serve_until_signal as run
    elif settings.workers > 1 or settings.owner == "on":
        # The supervisor is small: it imports nothing of the server.
        from service.processes.supervisor import supervise as run
    else:
        os.environ |= pool_limits(settings.threads)
        with _collector_paused():
            from service.processes.server import serve as run
    _exit(run(settings))


def run_worker(metric_slot: int, listener: int, heartbeat_fd: int, metrics_directory: Path) -> None:
    """Run one of several workers; `serve` starts them."""
    _handle_early_signals()
    with _collector_paused():
        from service.processes.worker import run_worker as run

    _exit(run(metric_slot, listener, heartbeat_fd, metrics_directory))


def run_device_worker(metric_slot: int, listener: int, heartbeat_fd: int, metrics_directory: Path) -> None:
    """Run the device worker, which runs nets for all workers; `serve` starts it."""
    _handle_early_signals()
    with _collector_paused():
        from service.processes.device_worker import run_device_worker as run

    _exit(run(metric_slot, listener, heartbeat_fd, metrics_directory))


def _handle_early_signals() -> None:
    """Until the server has requests to finish, let SIGTERM end the process with 0 and ignore SIGHUP."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(OK))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Pause the garbage collector for imports: they leave no garbage, and it takes a seventh of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _exit(status: int) -> NoReturn:
    """Exit with a status that no late signal changes: all requests are finished."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise typer.Exit(status)


def smoke(
    url: Url = "http://127.0.0.1:8000",
    version: Annotated[
        str | None, typer.Option(help="What `primary` must serve: a model's name, or NAME/VERSION.")
    ] = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Check a running service from outside, in seconds.

    Prints one line for each check; the command fails if a check does.
    """
    import httpx

    from lvm.cli.smoke import Smoke, golden_of
    from lvm.client import auth_headers

    results = []
    with httpx.Client(base_url=url, headers=auth_headers(token), timeout=10) as client:
        for result in Smoke(client, golden_of(registry_to_read()), version).run():
            results.append(result)
            if not as_json:
                typer.echo(f"{result.outcome:<8}{result.check:<24}{result.milliseconds:8.1f} ms  {result.found}")
    is_ok = all(result.outcome != "failed" for result in results)
    if as_json:
        print_json({"url": url, "ok": is_ok, "checks": [result._asdict() for result in results]})
    if not is_ok:
        print_message("next: check the address, --token if required, and the log; `lvm rollback` undoes a promotion")
    raise typer.Exit(OK if is_ok else FAILED)
