"""A headless Chromium, driven by the DevTools protocol over its pipe: no package and no port is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
TIMEOUT = 60.0


def chromium() -> str | None:
    """The path of the browser; None if there is none."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab; a context manager.

    `complaints` has every console message of level warning or error, uncaught exception, refusal of the page's
    policy, and request to anything but the file itself.
    """

    def __init__(self, profile: Path, width: int = 1200, height: int = 900) -> None:
        binary = chromium()
        assert binary is not None
        self._reads, write = os.pipe()
        read, self._writes = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars"]
        flags += [
            f"--user-data-dir={profile}",
            "--disable-dev-shm-usage",
            "--no-first-run",
            f"--window-size={width},{height}",
        ]
        # The browser reads commands from descriptor 3 and writes to 4; sh knows no descriptors of two digits.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', binary, *flags, "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(read, write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read)
        os.close(write)
        os.set_blocking(self._reads, False)
        self._pending = b""
        self._number = 0
        self._session: str | None = None
        self._loaded = False
        self._file = ""
        self.complaints: list[str] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")
        self.resize(width, height)

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session = None
        try:
            self._call("Browser.close")
            self._process.wait(10)
        except (OSError, RuntimeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._reads)
        os.close(self._writes)

    def open(self, file: Path) -> None:
        """Load a file and wait for it."""
        self._loaded, self._file = False, file.resolve().as_uri()
        self._call("Page.navigate", url=self._file)
        self._until(lambda: self._loaded)

    def resize(self, width: int, height: int) -> None:
        """The size of the window in CSS pixels."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives, as JSON."""
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def point_at(self, selector: str, share: float = 0.5) -> None:
        """Scroll the first such element into view and move the mouse over it, at a share of its width."""
        box = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center'}); const r = e.getClientRects()[0];"
            "return [r.left, r.top, r.width, r.height]; })()"
        )
        time.sleep(0.1)  # the scroll event comes with the next frame
        left, top, width, height = box
        for nudge in (0.0, 0.4):
            x, y = left + width * share + nudge, top + height / 2
            self._call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def screenshot(self, file: Path) -> None:
        """The whole page as PNG."""
        size = self._call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        answer = self._call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(answer["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._writes, json.dumps(message).encode() + b"\0")
        found: list[dict[str, Any]] = []

        def answered() -> bool:
            found.extend(one for one in self._fresh if one.get("id") == number)
            return bool(found)

        self._until(answered)
        if "error" in found[0]:
            raise RuntimeError(f"{method}: {found[0]['error']}")
        return found[0]["result"]

    def _until(self, done: Any) -> None:
        end = time.monotonic() + TIMEOUT
        self._fresh: list[dict[str, Any]] = []
        while not done():
            if time.monotonic() > end:
                raise RuntimeError("Chromium does not answer")
            try:
                self._pending += os.read(self._reads, 2**20)
            except BlockingIOError:
                time.sleep(0.005)
            *whole, self._pending = self._pending.split(b"\0")
            self._fresh = [json.loads(text) for text in whole]
            for message in self._fresh:
                self._heard(message.get("method"), message.get("params", {}))

    def _heard(self, method: str | None, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(f"console: {[one.get('value') for one in params['args']]}")
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(f"exception: {params['exceptionDetails']}")
        elif method == "Log.entryAdded":
            self.complaints.append(f"log: {params['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if self._file and url != self._file and not url.startswith("data:"):
                self.complaints.append(f"request: {url}")
