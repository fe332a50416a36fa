"""What a running service shows of a candidate and the primary by true next vectors, as evidence for `lvm promote`."""

from __future__ import annotations

from typing import Any, NamedTuple

import typer

from lvm.cli.exit_codes import FAILED
from lvm.cli.output import print_message
from models.gate import MAX_SCORE_LOSS, Objection, WorseThanIncumbent


class TooFewPairs(Objection):
    """Too few contexts showed the true next vectors of both versions."""


class Evidence(NamedTuple):
    """Figures for JSON, a sentence for the ledger, and the objections."""

    figures: dict[str, Any]
    sentence: str
    objections: tuple[Objection, ...]


def weigh(scrape: str, version: str, primary: str | None, min_pairs: int) -> Evidence:
    """Return the evidence on a version, by the text of /metrics; `version` and `primary` are ids.

    It objects to fewer than `min_pairs` pairs, and if the version may be worse by more than the gate tolerates: if the
    95 % interval of the difference begins below that.
    """
    from service.deploy.shadow_report import ALL, Difference, differences

    found = differences(scrape, version, primary or "").get(ALL, Difference(0, 0.0, (0.0, 0.0)))
    low, high = found.interval
    sentence = f"live: cosine {found.mean:+.4f} [{low:+.4f}, {high:+.4f}] against {primary} on {found.pairs} contexts"
    objections: list[Objection] = []
    if found.pairs < min_pairs:
        counted = f"{found.pairs} contexts showed the true next vectors of {version} as candidate and of {primary}"
        objections.append(TooFewPairs(f"{counted}; --min-pairs is {min_pairs}"))
    elif low < -MAX_SCORE_LOSS:
        objections.append(WorseThanIncumbent(f"{sentence}; {-MAX_SCORE_LOSS} as the lower end would pass"))
    return Evidence(found._asdict(), sentence, tuple(objections))


def scrape(url: str, token: str | None) -> str:
    """Return the text of /metrics; end the command if the service does not send it."""
    import httpx

    from lvm.client import auth_headers

    try:
        answer = httpx.get(f"{url.rstrip('/')}/metrics", headers=auth_headers(token), timeout=10).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        print_message(f"lvm: no metrics from {url}: {error}\nnext: check the address, and --token if it requires one")
        raise typer.Exit(FAILED) from error
    return answer.text
