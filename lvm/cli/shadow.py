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
    from lvm.cli.evidence import scrape
    from service.deploy.shadow_report import candidate_of, summarize_shadow

    text = scrape(url, token)
    candidate, found = candidate_of(text), summarize_shadow(text)
    requests = found.pop("requests")
    if candidate is None and not any(requests.values()):
        print_message(f"lvm: {url} has no candidate, so nothing is compared\nnext: {_HOW_TO_START}")
        raise typer.Exit(FAILED)
    rows: dict[str, Any] = {"candidate": candidate, **requests, **found}
    if as_json:
        print_json(rows)
    else:
        rows |= {f"nearer, {level} coherence": each for level, each in rows.pop("differences").items()}
        print_table(("what", "value"), [(name, _shown(rows[name])) for name in rows])
    if candidate is None:
        print_message("there is no candidate now: these are comparisons with an earlier one")
    elif not any(requests.values()):
        print_message("nothing was compared yet: the service compares the share LVM_SHADOW_SHARE of /predict")


_HOW_TO_START = "`lvm models` lists versions; `lvm promote candidate VERSION` sets one in the registry of the service"


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        low, high = value["interval"]
        return f"{value['mean']:+.4f} [{low:+.4f}, {high:+.4f}] on {value['pairs']} contexts"
    return "-" if value is None else value if isinstance(value, str) else f"{value:.6g}"
