"""The page that compares two models, used with mouse and keyboard in a real browser."""

import fcntl
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxsft.data.rows import completion_text
from jaxsft.evaluate.page import compare_page
from jaxsft.evaluate.scoring import GeneratedAnswer, compare_answers

pytestmark = pytest.mark.browser

EVIL = "</div></script><script>document.title='evil'</script><img src=http://evil.invalid/a.png>"
GOOD, BAD = completion_text("So.", "7"), completion_text("Hm.", "8")
# What the two models answered, each to "Question <number>?" with the expected answer 7.
ANSWERS = [
    (GOOD, GOOD),
    (GOOD, BAD),
    ("It is 8.", GOOD),
    ("<reasoning>A zebra.</reasoning>", GOOD),
    (BAD, BAD),
    (EVIL, f"{EVIL}<answer>8</answer>"),
]
ALL = [1, 2, 3, 4, 5, 6]
VISIBLE = "rows.filter(row => !row.hidden).map(row => Number(row.id.slice(7)))"


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


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference = completion_text("Because.", "7")
    sides = [
        [
            GeneratedAnswer(
                f"Question {number}?", reference, texts[side], 9, stopped=True, truncated=False
            )
            for number, texts in enumerate(ANSWERS, 1)
        ]
        for side in (0, 1)
    ]
    page = tmp_path_factory.mktemp("page") / "compare.html"
    html = compare_page(f"Two models {EVIL}", ["base", "tuned"], sides, compare_answers(*sides))
    page.write_text(html, encoding="utf-8")
    return page


def test_filters_show_what_they_say(browser: Browser, page: Path) -> None:
    browser.show(page)
    assert browser.evaluate(VISIBLE) == ALL
    counts = browser.evaluate(
        "Object.fromEntries([...document.querySelectorAll('.filters label')].map("
        "label => [label.querySelector('input').value, label.querySelector('b').textContent]))"
    )
    shown = {
        "all": ALL,
        "only-first-right": [2],
        "only-second-right": [3, 4],
        "both-right": [1],
        "none-right": [5, 6],
        "differ": [2, 3, 4, 6],
        "format-broken": [3, 4, 6],
    }
    assert counts == {kind: str(len(numbers)) for kind, numbers in shown.items()}
    for kind, numbers in reversed(shown.items()):
        browser.click(f'[value="{kind}"]')
        assert browser.evaluate(VISIBLE) == numbers
        assert browser.evaluate(
            "rows.every(row => row.hidden === (row.getClientRects().length === 0))"
        )
        told = browser.evaluate("document.querySelector('output').textContent")
        assert told == f"{len(numbers)} of 6 prompts"


def test_keyboard_is_enough(browser: Browser, page: Path) -> None:
    browser.show(page)
    browser.press("/")
    for letter in "ZEBra":
        browser.press(letter)
    assert browser.evaluate("search.value") == "ZEBra"
    assert browser.evaluate(VISIBLE) == [4]
    browser.press("Escape")
    assert browser.evaluate(VISIBLE) == ALL
    browser.evaluate("form.querySelector('[value=all]').focus()")
    browser.press("ArrowRight")
    assert browser.evaluate(VISIBLE) == [2]
    browser.press("ArrowRight")
    assert browser.evaluate(VISIBLE) == [3, 4]
    focused = []
    for key in "jjjkk":
        browser.press(key)
        focused.append(browser.evaluate("document.activeElement.id"))
    assert focused == [f"prompt-{number}" for number in (3, 4, 4, 3, 3)]


def test_text_of_models_does_nothing(browser: Browser, page: Path) -> None:
    browser.show(page)
    assert browser.evaluate("document.title") == f"Two models {EVIL}"
    assert browser.evaluate("document.querySelectorAll('script').length") == 1
    assert browser.evaluate("document.querySelectorAll('img, link, iframe').length") == 0
    sides = "document.querySelectorAll('#prompt-6 .sides .text')"
    assert browser.evaluate(f"{sides}[0].textContent") == EVIL
    assert browser.evaluate(f"{sides}[1].textContent") == f"{EVIL}<answer>8</answer>"
    urls = [event["request"]["url"] for event in browser.heard("Network.requestWillBeSent")]
    assert urls == [page.as_uri()]
    assert browser.heard("Log.entryAdded") == []

    # The same text unescaped: the policy stops both its script and its picture.
    careless = page.with_name("careless.html")
    html = page.read_text("utf-8")
    careless.write_text(html.replace("</main>", f"{EVIL}</main>"), encoding="utf-8")
    browser.show(careless)
    assert browser.evaluate("document.querySelectorAll('script').length") == 2
    assert browser.evaluate("document.title") == f"Two models {EVIL}"
    refused = [event["entry"]["text"] for event in browser.heard("Log.entryAdded")]
    assert len(refused) == 2 and all("Content Security Policy" in text for text in refused)


def test_page_without_answers_has_a_table_alone(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(compare_page("Losses", ["base"], [[]], []), encoding="utf-8")
    browser.show(page)
    assert browser.heard("Runtime.exceptionThrown") == []
    assert browser.evaluate("getComputedStyle(form).display") == "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_and_can_be_read(width: int, scheme: str, browser: Browser, page: Path) -> None:
    browser.show(page, width, scheme)
    root = "document.documentElement"
    assert browser.evaluate(f"{root}.scrollWidth") == browser.evaluate(f"{root}.clientWidth")
    left, right = browser.evaluate(
        "[...document.querySelectorAll('#prompt-1 .sides section')].map(s => s.offsetLeft)"
    )
    assert (left == right) is (width == 400)
    background = luminance(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert background > 0.8 if scheme == "light" else background < 0.02
    parts = [".reasoning", ".answer", ".outside", ".tag.reasoning", ".tag.answer", ".badge.good"]
    parts += [".badge.bad", ".prompt .text", "summary", "td b", "td i", "h3", ".badges small"]
    for part in parts:
        colours = browser.evaluate(
            f"(element => {{ const ink = getComputedStyle(element).color; let paper;"
            "do { paper = getComputedStyle(element).backgroundColor; "
            "element = element.parentElement; } while (paper === 'rgba(0, 0, 0, 0)');"
            f"return [ink, paper]; }})(document.querySelector('.sides {part}') "
            f"|| document.querySelector('{part}'))"
        )
        dark, light = sorted(map(luminance, colours))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, part  # WCAG 2.2, 1.4.3


def luminance(colour: str) -> float:
    """Relative luminance of rgb(…), 0 to 1, as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").rstrip(")").split(",")]
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
