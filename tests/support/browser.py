"""A headless Chromium for the tests of the pages."""

import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any


class Browser:
    """One tab of a headless Chromium, driven by its DevTools protocol over a pair of pipes."""

    def __init__(self, profile: Path) -> None:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        options += [f"--user-data-dir={profile}", "--disable-background-networking"]
        options += ["--disable-component-update", "--remote-debugging-pipe", "about:blank"]
        low_to_read, self._to = os.pipe()
        self._from, low_to_write = os.pipe()
        # Chromium reads from 3 and writes to 4; above them the two cannot be in each other's way.
        to_read, to_write = (fcntl.fcntl(x, fcntl.F_DUPFD, 10) for x in (low_to_read, low_to_write))
        script = f'exec chromium "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", *options],
            pass_fds=(to_read, to_write),
            stderr=subprocess.DEVNULL,
        )
        for descriptor in (low_to_read, low_to_write, to_read, to_write):
            os.close(descriptor)
        self._number, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        tabs = self.call("Target.getTargets")["targetInfos"]
        tab = next(each["targetId"] for each in tabs if each["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=tab, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        self.call("Browser.close")
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers; events that come before go to `events`."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (reply := self._read()).get("id") != self._number:
            self.events.append(reply)
        assert "error" not in reply, reply
        return reply["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = os.read(self._from, 1 << 16)
            assert more, "chromium has ended"
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def show(self, page: Path, width: int = 1400, scheme: str = "light") -> None:
        """Opens the page and waits until it is loaded."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not self.heard("Page.loadEventFired"):
            self.events.append(self._read())

    def heard(self, method: str) -> list[dict[str, Any]]:
        """The parameters of the events of one kind since the page was opened."""
        return [event["params"] for event in self.events if event["method"] == method]

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def click(self, selector: str) -> None:
        """Presses the mouse in the middle of an element."""
        where = self.evaluate(
            f"(b => ({{x: b.x + b.width / 2, y: b.y + b.height / 2}}))"
            f"(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def press(self, key: str) -> None:
        """Presses one key; a character is typed where something has the focus."""
        codes = {"Escape": 27, "ArrowRight": 39, "ArrowLeft": 37}
        text = {} if key in codes else {"text": key}
        code = codes.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            parameters = {"key": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **parameters, **text)
            text = {}

    def check_requests(self, page: Path, markup: str) -> None:
        """The page shown asked for nothing and logged nothing; with `markup`, a script and a
        picture, added to it, its policy stops both."""
        urls = [event["request"]["url"] for event in self.heard("Network.requestWillBeSent")]
        assert urls == [page.as_uri()] and self.heard("Log.entryAdded") == []
        title = self.evaluate("document.title")
        careless = page.with_name("careless.html")
        html = page.read_text("utf-8").replace("</main>", f"{markup}</main>")
        careless.write_text(html, encoding="utf-8")
        self.show(careless)
        assert self.evaluate("document.title") == title
        refused = [event["entry"]["text"] for event in self.heard("Log.entryAdded")]
        assert len(refused) == 2 and all("Content Security Policy" in text for text in refused)

    def check_colours(self, page: Path, width: int, scheme: str, parts: list[str]) -> None:
        """The page fits the window, follows the scheme, and its parts can be read."""
        self.show(page, width, scheme)
        root = "document.documentElement"
        assert self.evaluate(f"{root}.scrollWidth === {root}.clientWidth")
        background = luminance(self.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert background > 0.8 if scheme == "light" else background < 0.02
        for part in parts:
            assert self.contrast(part) >= 4.5, part  # WCAG 2.2, 1.4.3

    def contrast(self, selector: str) -> float:
        """Ratio of an element's text and background, 1 to 21, as WCAG 2.2 defines it."""
        colours = self.evaluate(
            "(element => { const ink = getComputedStyle(element).color; let paper;"
            "do { paper = getComputedStyle(element).backgroundColor; "
            "element = element.parentElement; } while (paper === 'rgba(0, 0, 0, 0)');"
            f"return [ink, paper]; }})(document.querySelector({selector!r}))"
        )
        dark, light = sorted(map(luminance, colours))
        return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of rgb(…), 0 to 1, as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
