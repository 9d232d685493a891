"""A headless Chromium that tests ask by its own protocol over two pipes; no package and no port."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Browser", "chromium"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str | None:
    """The program, where one is installed."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page. What it asks the network for, and what it says on its console, is kept.

    Attributes:
        requests: addresses that the page asked for, the page itself among them.
        said: messages of the console, uncaught errors and refusals of the policy.
    """

    def __init__(self, home: Path) -> None:
        program = chromium()
        assert program is not None
        to_it, self._out = os.pipe()
        self._in, from_it = os.pipe()

        def place() -> None:
            low, high = os.dup(to_it), os.dup(from_it)  # 3 and 4 may be taken by what is to be moved there
            os.dup2(low, 3)
            os.dup2(high, 4)
            os.set_inheritable(3, True)
            os.set_inheritable(4, True)

        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
                 "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars",
                 f"--user-data-dir={home / 'profile'}", "about:blank"]  # fmt: skip
        self._process = subprocess.Popen(
            [program, *flags], preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(home)},
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        self._waiting, self._number = b"", 0
        self.requests: list[str] = []
        self.said: list[str] = []
        self._loaded = False
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.tell(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        os.close(self._out)
        self._process.terminate()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)

    def open(self, page: Path) -> None:
        """Load a file and wait until it is there."""
        self._loaded = False
        self.tell("Page.navigate", url=page.absolute().as_uri())
        end = time.monotonic() + 60
        while not self._loaded and time.monotonic() < end:
            self._read()
        assert self._loaded, "the page did not load"

    def run(self, script: str) -> Any:
        """What an expression of JavaScript gives; the page's policy does not bind the one who debugs it."""
        answer = self.tell("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: str, number: int, text: str = "") -> None:
        """One key, as from a keyboard."""
        told = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self.tell("Input.dispatchKeyEvent", type="keyDown", text=text, **told)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **told)

    def look(self, width: int, *, dark: bool = False, script: bool = True) -> None:
        """A screen so wide, light or dark, with scripts or without (from the next page on)."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[feature])
        self.tell("Emulation.setScriptExecutionDisabled", value=not script)

    def picture(self, path: Path, height: int | None = None, *, quality: int | None = None) -> None:
        """The whole page, or so much of it from above, as a file."""
        size = self.tell("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(height or 1e6, size["height"]), "scale": 1}
        told: dict[str, Any] = {"format": "png"} if quality is None else {"format": "jpeg", "quality": quality}
        made = self.tell("Page.captureScreenshot", clip=clip, captureBeyondViewport=True, **told)
        path.write_bytes(base64.b64decode(made["data"]))

    def tell(self, method: str, **values: Any) -> Any:
        """Ask the page."""
        return self.ask(method, self._session, **values)

    def ask(self, method: str, session: str | None = None, **values: Any) -> Any:
        """Ask the browser, and wait for its answer."""
        self._number += 1
        told: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if session is not None:
            told["sessionId"] = session
        os.write(self._out, json.dumps(told).encode() + b"\0")
        end = time.monotonic() + 60
        while time.monotonic() < end:
            answer = self._read()
            if answer.get("id") == told["id"]:
                assert "error" not in answer, answer
                return answer["result"]
        raise TimeoutError(method)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            ready, _, _ = select.select([self._in], [], [], 60)
            more = os.read(self._in, 1 << 20) if ready else b""
            assert more, "the browser is gone"
            self._waiting += more
        line, _, self._waiting = self._waiting.partition(b"\0")
        event: dict[str, Any] = json.loads(line)
        told, kind = event.get("params", {}), event.get("method", "")
        if kind == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif kind == "Page.loadEventFired":
            self._loaded = True
        elif kind == "Runtime.consoleAPICalled":
            self.said.append(str([arg.get("value") for arg in told["args"]]))
        elif kind == "Runtime.exceptionThrown":
            self.said.append(str(told["exceptionDetails"]))
        elif kind == "Log.entryAdded":
            self.said.append(told["entry"]["text"])
        return event
