"""A scrape of metrics that are not behind a server."""

from __future__ import annotations

from service.http.codec import run_to_end
from service.telemetry.metrics import Metrics


def scrape(metrics: Metrics, accept: str = "") -> tuple[bytes, str]:
    """Return the text and its media type."""
    return run_to_end(metrics.scrape(accept))
