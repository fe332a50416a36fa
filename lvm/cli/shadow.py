"""`lvm shadow`: compare the candidate with what callers got."""

from __future__ import annotations

from typing import Any

import typer

from lvm.cli.arguments import AsJson, Token, Url
from lvm.cli.exit_codes import FAILED
from lvm.cli.output import print_json, print_message, print_table


def report(url: Url = "http://127.0.0.1:8000", token: Token = None, as_json: AsJson = False) -> None:
    """Report how the candidate's answers differ from those that callers got.

    The command fails if there is no candidate, and none was compared since the service started.
    """
    from service.deploy.shadow import candidate_of, summarize_shadow

    scrape = _scrape(url, token)
    candidate, found = candidate_of(scrape), summarize_shadow(scrape)
    requests = found.pop("requests")
    if candidate is None and not any(requests.values()):
        print_message(f"lvm: {url} has no candidate, so nothing is compared\nnext: {_HOW_TO_START}")
        raise typer.Exit(FAILED)
    rows: dict[str, Any] = {"candidate": candidate, **requests, **found}
    print_json(rows) if as_json else print_table(("what", "value"), [(name, _shown(rows[name])) for name in rows])
    if candidate is None:
        print_message("there is no candidate now: these are comparisons with an earlier one")
    elif not any(requests.values()):
        print_message("nothing was compared yet: the service compares the share LVM_SHADOW_SHARE of /predict")


_HOW_TO_START = "`lvm models` lists versions; `lvm promote candidate VERSION` sets one in the registry of the service"


def _scrape(url: str, token: str | None) -> str:
    """Return the text of /metrics; ends the command if there is none."""
    import httpx

    from lvm.client import auth_headers

    try:
        answer = httpx.get(f"{url.rstrip('/')}/metrics", headers=auth_headers(token), timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print_message(f"lvm: no metrics from {url}: {error}\nnext: check the address, and --token if it requires one")
        raise typer.Exit(FAILED) from error
    return answer.text


def _shown(value: Any) -> str:
    return "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"
