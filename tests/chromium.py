"""Headless Chromium, driven by chromedriver's own protocol (WebDriver), so that no library is needed."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

NEEDED = pytest.mark.skipif(
    not (shutil.which("chromedriver") and shutil.which("chromium")), reason="needs chromium and chromium-driver"
)
_FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
]  # fmt: skip


class Browser:
    """One window. What a script returns comes back as Python values."""

    def __init__(self, port: int, session: str):
        self._port, self._session = port, session

    def open(self, url: str) -> None:
        self._call("/url", {"url": url})

    def run(self, script: str, *args):
        return self._call("/execute/sync", {"script": script, "args": args})

    def until(self, condition: str, seconds: float = 60) -> None:
        """Waits for a script's expression to be true."""
        end = time.monotonic() + seconds
        while not self.run(f"return {condition}"):
            assert time.monotonic() < end, f"{condition} did not come true; the page says {self.errors()}"
            time.sleep(0.05)

    def press(self, *keys: str) -> None:
        """Types texts and named keys, e.g. "Enter"."""
        typed = [_KEYS[key]] if (key := keys[0]) in _KEYS else list(key)
        actions = [{"type": kind, "value": value} for value in typed for kind in ("keyDown", "keyUp")]
        self._call("/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})
        if keys[1:]:
            self.press(*keys[1:])

    def emulate_phone(self, width: int, height: int) -> None:
        """A screen of this many CSS pixels, narrower than a desktop's window can be."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self._call("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": metrics})

    def show_on_a_desk(self) -> None:
        self._call("/goog/cdp/execute", {"cmd": "Emulation.clearDeviceMetricsOverride", "params": {}})
        self._call("/window/rect", {"width": 1300, "height": 900})

    def errors(self) -> list[str]:
        """What the console said since it was last asked: errors of scripts, refused files."""
        return [line["message"] for line in self._call("/se/log", {"type": "browser"}) if line["level"] == "SEVERE"]

    def _call(self, path: str, body: dict):
        return _send(self._port, self._session + path, body)


_KEYS = {
    "Tab": "\ue004", "Enter": "\ue007", "End": "\ue010", "Home": "\ue011", "Left": "\ue012", "Up": "\ue013",
    "Right": "\ue014", "Down": "\ue015",
}  # fmt: skip


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A window of a browser of its own, with its profile in an empty folder."""
    with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        session = None
        try:
            line = next(line for line in driver.stdout if "started successfully on port" in line)
            port = int(line.rstrip(".\n").rsplit(" ", 1)[1])
            options = {"binary": shutil.which("chromium"), "args": [*_FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            opened = _send(port, "/session", {"capabilities": {"alwaysMatch": wanted}})
            session = f"/session/{opened['sessionId']}"
            yield Browser(port, session)
        finally:
            if session:
                _send(port, session, {}, "DELETE")  # ends the browser, which outlives its driver otherwise
            driver.terminate()


def _send(port: int, path: str, body: dict, method: str = "POST"):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), method=method)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.loads(response.read())["value"]
