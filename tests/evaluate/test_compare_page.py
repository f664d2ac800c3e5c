"""The page of answers as HTML: well formed, self-contained, every foreign text inert."""

import base64
import hashlib
import re
from html.parser import HTMLParser

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.evaluate.page import compare_page
from jaxsft.evaluate.scoring import GeneratedAnswer, compare_answers

FORM = AnswerTemplate()
EVIL = "</title></script><script>alert(1)</script><img src=x onerror=alert(1)>\" onclick='x' &amp;"
SYSTEM = "Think.\n\nThen answer.\n\n"
VOID = {"meta", "input"}


class Tree(HTMLParser):
    """Elements as (tag, attributes, text of all that is inside)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, list[str]]] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        text: list[str] = []
        self.elements.append((tag, dict(attrs), text))
        if tag not in VOID:
            self._open.append((tag, text))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, text in self._open:
            text.append(data)

    def texts(self, tag: str, **wanted: str) -> list[str]:
        """The texts of the elements with these attributes, `class_` for class."""
        wanted = {name.rstrip("_"): value for name, value in wanted.items()}
        return [
            "".join(text)
            for each, attributes, text in self.elements
            if each == tag and wanted.items() <= attributes.items()
        ]


def answers(*texts: str, reference: str = FORM.join("So.", "7")) -> list[GeneratedAnswer]:
    return [
        GeneratedAnswer(
            f"{SYSTEM}Question {number}?", reference, text, 5, bool(text), text == "cut"
        )
        for number, text in enumerate(texts, 1)
    ]


GOOD, BAD = FORM.join("So.", "7"), FORM.join("Hm.", "7.5")
LEFT = answers("The last is 7", GOOD, EVIL, "a\rb\x1b[31m\u202e\x00c")
RIGHT = answers(GOOD, BAD, "cut", "")


def page(*sides: list[GeneratedAnswer]) -> str:
    names = ["base", "tuned"][: len(sides)]
    return compare_page("Title", names, sides, compare_answers(FORM, *sides), FORM, about="greedy")


def test_each_prompt_has_a_row_with_both_answers() -> None:
    tree = Tree(page(LEFT, RIGHT))
    rows = [attributes for tag, attributes, _ in tree.elements if tag == "article"]
    assert [row["id"] for row in rows] == ["prompt-1", "prompt-2", "prompt-3", "prompt-4"]
    assert [(row["data-kinds"] or "").split() for row in rows] == [
        ["differ", "format-broken", "only-second-right"],
        ["differ", "only-first-right"],
        ["cut-off", "format-broken", "none-right"],
        ["format-broken", "none-right"],
    ]
    assert tree.texts("h3") == ["base", "tuned"] * 4
    badges = [re.sub(r"\s+", " ", text) for text in tree.texts("p", class_="badges")]
    assert badges[:4] == [
        "✗ no numberlast number is right✗ format: no tags5 tokens",
        "✓ 7✓ format5 tokens",
        "✓ 7✓ format5 tokens",
        "✗ 7.5within 10%✓ format5 tokens",
    ]
    assert badges[5] == "✗ no number✗ format: no tags✂ cut off5 tokens"
    assert badges[7] == "✗ no number✗ format: no tags5 tokens"  # neither stopped nor cut off


def test_what_all_prompts_begin_with_is_there_once() -> None:
    tree = Tree(page(LEFT, RIGHT))
    texts = tree.texts("div", class_="text")
    assert texts[0] == SYSTEM
    assert [text for text in texts if text.startswith("Question")] == [
        f"Question {number}?" for number in (1, 2, 3, 4)
    ]
    alone = Tree(page(LEFT[:1], RIGHT[:1]))
    assert alone.texts("div", class_="text")[0] == f"{SYSTEM}Question 1?"
    same = [LEFT[0], LEFT[0]]
    assert Tree(page(same)).texts("div", class_="text")[:2] == [SYSTEM, "Question 1?"]


def test_tags_are_marked_and_parts_too() -> None:
    tree = Tree(page(answers(f"Sure! {GOOD}"), answers("<reasoning>no end")))
    sides = "".join(tree.texts("div", class_="sides"))
    assert f"Sure! {GOOD}" in sides and "<reasoning>no end" in sides
    assert tree.texts("span", class_="outside") == ["\n", "Sure! ", "\n"]
    assert tree.texts("span", class_="reasoning") == ["So.", "So.", "no end"]
    assert tree.texts("span", class_="answer") == ["7", "7"]
    assert set(tree.texts("span", class_="tag answer")) == {"<answer>", "</answer>"}


def test_a_template_without_a_closing_tag_is_coloured_too() -> None:
    form = AnswerTemplate("<think>{reasoning}</think>{answer}")
    side = answers("<think>So.</think>\n\n7", GOOD, reference=form.join("So.", "7"))
    html = compare_page("Title", ["tuned"], [side], compare_answers(form, side), form)
    tree = Tree(html)
    assert tree.texts("span", class_="answer") == ["7", "\n\n7", "7"]
    assert tree.texts("span", class_="reasoning") == ["So.", "So.", "So."]
    assert tree.texts("span", class_="untagged") == [GOOD]
    badges = tree.texts("p", class_="badges")
    assert badges[0] == "✓ 7✓ format5 tokens" and "format: no tags" in badges[1]


def test_foreign_text_is_inert() -> None:
    evil = [GeneratedAnswer(EVIL, EVIL, EVIL, 5, stopped=True, truncated=False)]
    table = compare_answers(FORM, evil, evil)
    html = compare_page(EVIL, [EVIL, EVIL], [evil, evil], table, FORM, about=EVIL)
    tree = Tree(html)
    plain = Tree(page(answers("7"), answers("7")))
    assert {tag for tag, _, _ in tree.elements} == {tag for tag, _, _ in plain.elements}
    names = {name for _, attributes, _ in tree.elements for name in attributes}
    assert names == {name for _, attributes, _ in plain.elements for name in attributes}
    assert tree.texts("title") == tree.texts("h1") == [EVIL]
    assert tree.texts("div", class_="text").count(EVIL) == 4  # prompt, reference, two answers
    assert [a["data-name"] for _, a, _ in tree.elements if "data-name" in a][:2] == [EVIL, EVIL]


def test_what_has_no_shape_is_visible() -> None:
    texts = Tree(page(LEFT, RIGHT)).texts("div", class_="text")
    assert "a\\u{d}b\\u{1b}[31m\\u{202e}\\u{0}c" in texts
    table = compare_answers(FORM, LEFT)
    named = compare_page("a\u202eb", ["\ud800"], [LEFT], table, FORM, about="\u2028")
    assert named.encode() and "\u202e" not in named and "\u2028" not in named
    html = page(answers("one\ntwo\tthree"))
    assert "one\ntwo⇥\tthree" in Tree(html).texts("div", class_="text")


def test_page_asks_for_nothing_and_runs_its_own_script_alone() -> None:
    tree = Tree(page(LEFT, RIGHT))
    (script,) = tree.texts("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policies = [a["content"] for tag, a, _ in tree.elements if "http-equiv" in a]
    assert policies == [
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    ]
    names = {name for _, attributes, _ in tree.elements for name in attributes}
    assert not names & {"src", "href", "srcset", "action"}
    assert not [name for name in names if name.startswith("on")]
    (style,) = tree.texts("style")
    assert "url(" not in style and "@import" not in style


def test_table_has_a_line_for_each_metric() -> None:
    table = compare_answers(FORM, LEFT, RIGHT)
    tree = Tree(page(LEFT, RIGHT))
    assert tree.texts("th", scope="col") == ["base", "tuned", "difference", "p"]
    assert tree.texts("th", scope="row") == [line.metric.label for line in table]
    exact = [" ".join(text.split()) for text in tree.texts("td")[:4]]
    # 1 and 2 of 4: Wilson's intervals; of the gains 1, 0, 0, 0 a p value of 1.
    assert exact[:2] == ["25.0% [4.6, 69.9]", "50.0% [15.0, 85.0]"]
    assert exact[2].startswith("+25.0 points [+0.0, +") and exact[3] == "1.000"


def test_a_difference_is_judged_only_where_it_is_sure() -> None:
    for right, is_better, p_value in ((GOOD, True, "0.008"), ("It is 7.", False, "1.000")):
        tree = Tree(page(answers(*["It is 7."] * 8), answers(*[right] * 8)))
        assert ("better" in tree.texts("td", **{"data-name": "difference"})[0]) is is_better
        assert tree.texts("td", **{"data-name": "p"})[0] == p_value  # 2 / 2^8


def test_one_model_alone() -> None:
    tree = Tree(page(LEFT))
    assert tree.texts("th", scope="col") == ["base"]
    assert tree.texts("h3") == ["base"] * 4
    shown = [a["value"] for tag, a, _ in tree.elements if a.get("type") == "radio"]
    assert shown == ["all", "right", "wrong", "format-broken"]
    assert "McNemar" not in "".join(tree.texts("p"))


def test_answers_without_a_number_are_not_judged() -> None:
    left = answers(GOOD, BAD, reference="A story.")
    tree = Tree(page(left, left))
    badges = "".join(tree.texts("p", class_="badges"))
    assert "✗" not in badges and "✓ 7" not in badges
    kinds = [a["data-kinds"] for _, a, _ in tree.elements if "data-kinds" in a]
    assert kinds == ["", ""]
