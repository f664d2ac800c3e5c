"""The page of rollouts, used with mouse and keyboard in a real browser."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.browser import Browser

from jaxsft.grpo.page import write_page

pytestmark = pytest.mark.browser

EVIL = "</div></script><script>document.title='evil'</script><img src=http://evil.invalid/a.png>"
TEXT = "<reasoning>So.</reasoning>\n<answer>7</answer>"
CARDS = (
    "[...document.querySelectorAll('article')].map(card => [card.querySelector('h2').textContent, "
    "[...card.querySelectorAll('h3')].map(h => h.textContent.split(',')[0]).join(' ')])"
)


def row(step: int, prompt: int, member: int, answer: float, **other: Any) -> dict[str, Any]:
    rewards = {"format": {"value": 1, "reason": "ok"}, "answer": {"value": answer, "reason": EVIL}}
    return {
        **{"step": step, "prompt": prompt, "member": member, "source": "a.jsonl:row 1"},
        **{"kind": "number", "question": f"Question {prompt}?", "text": TEXT, "num_tokens": 5},
        **{"ended": "stop", "log_prob": -1.5, "reward": 0.2 + answer, "advantage": 0.5},
        **{"counted": True, "rewards": rewards},
        **other,
    }


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three steps: groups 0 (live), 1 (dead, code) and, in step 5, 2 with a zebra cut off."""
    run_dir = tmp_path_factory.mktemp("run")
    rows = [row(step, 0, member, member) for step in (1, 3, 5) for member in (0, 1)]
    rows += [row(step, 1, member, 0, kind="code") for step in (1, 3, 5) for member in (0, 1)]
    rows += [
        row(5, 2, 0, 0, question=EVIL, text=f"A zebra.\u202e{EVIL}", ended="limit", counted=False)
    ]
    rows.sort(key=lambda each: each["step"])
    (run_dir / "rollouts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    metrics = [{"step": step, "train/reward": step, "train/kl": 0.6} for step in range(1, 7)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in metrics))
    return write_page(run_dir)


def show(browser: Browser, page: Path) -> None:
    browser.show(page)
    wait(browser, "1")


def wait(browser: Browser, step: str) -> None:
    """Until the page has opened the step."""
    while browser.evaluate("groups.length ? $('now').textContent : ''") != step:
        pass


def told(browser: Browser) -> str:
    return browser.evaluate("document.querySelector('output').textContent")


def choose(browser: Browser, name: str, value: str) -> None:
    browser.evaluate(f"form.elements[{name!r}].value = {value!r}; draw()")


def test_any_step_can_be_shown_and_filtered(browser: Browser, page: Path) -> None:
    show(browser, page)
    assert browser.evaluate(CARDS) == [
        ["0", "reward 0.2 reward 1.2"],
        ["1", "reward 0.2 reward 0.2"],
    ]
    assert browser.evaluate("$('facts').textContent") == "reward 1 · kl 0.6"
    assert "KL to the start is 0.6 nats" in browser.evaluate("document.body.textContent")
    browser.press("ArrowRight")
    wait(browser, "3")
    browser.press("ArrowRight")
    wait(browser, "5")
    browser.press("ArrowRight")  # the last one
    assert told(browser) == "5 of 5 completions in 3 of 3 groups"
    for name, value, cards in [
        ("kind", "code", ["1"]),
        ("live", "live", ["0"]),
        ("live", "dead", ["1", "2"]),
        ("ended", "limit", ["2"]),
        ("reward", "+answer", ["0"]),
        ("reward", "0answer", ["0", "1", "2"]),
        ("reward", "0format", []),
    ]:
        choose(browser, name, value)
        assert [number for number, _ in browser.evaluate(CARDS)] == cards
        browser.press("Escape")
    choose(browser, "reward", "+answer")
    assert told(browser) == "1 of 5 completions in 1 of 3 groups"
    browser.press("Escape")
    assert told(browser) == "5 of 5 completions in 3 of 3 groups"
    browser.press("ArrowLeft")
    wait(browser, "3")


def test_a_search_goes_to_the_next_step_with_a_match(browser: Browser, page: Path) -> None:
    show(browser, page)
    browser.press("/")
    for letter in "ZEBra":
        browser.press(letter)
    assert told(browser) == "0 of 4 completions in 0 of 2 groups"
    browser.click("button")
    wait(browser, "5")
    assert [number for number, _ in browser.evaluate(CARDS)] == ["2"]


def test_text_of_models_does_nothing(browser: Browser, page: Path) -> None:
    show(browser, page)
    browser.evaluate("void go(2)")
    wait(browser, "5")
    texts = "[...document.querySelectorAll('article:last-child .text')].map(x => x.textContent)"
    assert browser.evaluate(texts) == [EVIL, f"A zebra.\\u{{202e}}{EVIL}"]
    assert browser.evaluate("document.querySelectorAll('img, link, iframe').length") == 0
    assert browser.heard("Runtime.exceptionThrown") == []
    browser.check_requests(page, EVIL)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_and_can_be_read(width: int, scheme: str, browser: Browser, page: Path) -> None:
    browser.show(page, width, scheme)
    wait(browser, "1")
    parts = ["#facts", "output", "select", "button", "h3"]
    parts += [".badge.good", ".badge.bad", ".tag", ".prompt small", ".sides .text", "li"]
    browser.check_colours(page, width, scheme, parts)
