"""The locust users send the same requests, without a browser, and fail on a body of the wrong shape."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]
LOCUST = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless"]
KINDS = {
    ("/predict", "application/json"),
    ("/predict", "application/octet-stream"),
    ("/retrieve", "application/json"),
    ("/retrieve?k=10", "application/octet-stream"),
}


def seen(fake: Any) -> set[tuple[str, str]]:
    return {(path, headers["content-type"]) for path, headers, _ in list(fake.requests)}


@pytest.mark.parametrize(("script", "code"), [({}, 0), ({"body": b"{}"}, 1)])
def test_users_of_every_kind_check_the_response(serve: Any, script: dict[str, Any], code: int) -> None:
    fake = serve(lambda n: script)
    # Ten users are 4 + 4 + 1 + 1 by weight. The run ends, not by the clock, when each kind has asked and one
    # user has asked twice, so at least one answer was judged.
    command = [*LOCUST, "--host", fake.url, "-u", "10", "-r", "10", "-t", "30s", "--stop-timeout", "5"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while (seen(fake) != KINDS or len(fake.requests) <= 10) and process.poll() is None:
        time.sleep(0.05)
    process.terminate()
    _, messages = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, seen(fake)) == (code, KINDS), messages
