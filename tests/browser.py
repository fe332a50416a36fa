"""A real browser for tests: Chromium without a window, driven over its DevTools pipe, its complaints kept."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from queue import Queue
from typing import Any

from tests.conftest import PATIENCE_S, until

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = ("--headless=new", "--remote-debugging-pipe", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}


class Browser:
    """One page: `complaints` are what its console says at the level of a warning or above, and exceptions."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = os.fdopen(into, "wb", 0), os.fdopen(out, "rb", 0)
        self._ids, self._answers, self._session = count(1), Queue[dict[str, Any]](), ""
        self.complaints: list[str] = []
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.send("Emulation.setFocusEmulationEnabled", enabled=True)

    def close(self) -> None:
        """Let go of a browser that has ended."""
        self._listener.join()
        self._into.close()
        self._out.close()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Return what the browser answers to one command."""
        known = next(self._ids)
        message = {"id": known, "method": method, "params": parameters}
        self._into.write(json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while (answer := self._answers.get(timeout=PATIENCE_S))["id"] != known:
            pass
        assert "result" in answer, answer
        return answer["result"]  # type: ignore[no-any-return]

    def _listen(self) -> None:
        rest = b""
        while part := self._out.read(1 << 16):
            *whole, rest = (rest + part).split(b"\0")
            for message in map(json.loads, whole):
                self._answers.put(message) if "id" in message else self._hear(message["method"], message["params"])

    def _hear(self, method: str, said: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(said["exceptionDetails"]))
        if method == "Log.entryAdded" and said["entry"]["level"] in ("warning", "error"):
            self.complaints.append(f"{said['entry']['text']} {said['entry'].get('url', '')}")
        if method == "Runtime.consoleAPICalled" and said["type"] in ("warning", "error", "assert"):
            self.complaints.append(json.dumps(said["args"]))

    def open(self, url: str) -> None:
        """Go to `url`, anew also where only the fragment differs."""
        self.send("Page.navigate", url="about:blank")
        self.send("Page.navigate", url=url)
        until(lambda: self.run("document.readyState") == "complete", url)

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page, awaited where it is a promise."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        """Wait until an expression is true, or an element, in the page."""
        try:
            until(lambda: self.run(f"Boolean({script})"), script)
        except AssertionError as error:
            raise AssertionError(f"{error}; the console says {self.complaints}, the page {self.text('body')}") from None

    def text(self, selector: str) -> str:
        """Return the text of the first element that is seen there."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Click an element."""
        self.run(f"document.querySelector({json.dumps(selector)}).click()")

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press and release a key as a person does."""
        known = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": 8 * shift}
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **known, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **known)

    def type(self, words: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=words)

    def size(self, width: int, height: int) -> None:
        """Be a screen of so many pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def colours(self, scheme: str) -> None:
        """Prefer the dark or the light."""
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, file: Path) -> None:
        """Keep what is seen, the whole page long."""
        file.parent.mkdir(parents=True, exist_ok=True)
        shot = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Run a browser whose profile is the directory `profile`."""
    theirs, ours = os.pipe()
    our_end, their_end = os.pipe()
    options = [*OPTIONS, f"--user-data-dir={profile}", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    script = f'exec 98<&{theirs} 99>&{their_end}; exec "$@" 3<&98 4>&99'  # DevTools wants descriptors 3 and 4
    command = ["bash", "-c", script, "bash", str(CHROMIUM), *options]
    popen = subprocess.Popen(command, pass_fds=(theirs, their_end), stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(their_end)
    browser = Browser(ours, our_end)
    try:
        yield browser
    finally:
        popen.kill()
        popen.wait()
        browser.close()
