"""The page that compares two models, used with mouse and keyboard in a real browser."""

from pathlib import Path

import pytest
from support.browser import Browser

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.evaluate.page import compare_page
from jaxsft.evaluate.scoring import GeneratedAnswer, compare_answers

pytestmark = pytest.mark.browser

FORM = AnswerTemplate()
EVIL = "</div></script><script>document.title='evil'</script><img src=http://evil.invalid/a.png>"
GOOD, BAD = FORM.join("So.", "7"), FORM.join("Hm.", "8")
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


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reference = FORM.join("Because.", "7")
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
    table = compare_answers(FORM, *sides)
    html = compare_page(f"Two models {EVIL}", ["base", "tuned"], sides, table, FORM)
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
    browser.check_requests(page, EVIL)


def test_page_without_answers_has_a_table_alone(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(compare_page("Losses", ["base"], [[]], [], FORM), encoding="utf-8")
    browser.show(page)
    assert browser.heard("Runtime.exceptionThrown") == []
    assert browser.evaluate("getComputedStyle(form).display") == "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_fits_and_can_be_read(width: int, scheme: str, browser: Browser, page: Path) -> None:
    parts = [".reasoning", ".answer", ".outside", ".tag.reasoning", ".tag.answer", ".badge.good"]
    parts += [".badge.bad", ".prompt .text", "summary", "td b", "td i", "h3", ".badges small"]
    browser.check_colours(page, width, scheme, [f".sides {part}, {part}" for part in parts])
    left, right = browser.evaluate(
        "[...document.querySelectorAll('#prompt-1 .sides section')].map(s => s.offsetLeft)"
    )
    assert (left == right) is (width == 400)
