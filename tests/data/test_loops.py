"""Loops are found, whatever is repeated; ordinary texts that repeat themselves are not."""

import random
import re
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from support.ordinary_texts import ordinary_texts

from jaxsft.data.loops import find_loop

SENTENCES = """
The train leaves at nine and needs three hours. So each of the 4 boxes holds 12 pens.
Let me check that again from the start. Then 3 x 5 = 15, which is what we wanted.
She gives half of them to her brother, who is 11 years old. But wait, is this really right?
Now the sum is even, and the claim follows by induction. I should also look at the other case.
""".replace("\n", " ")
SENTENCE_LIST = re.findall(r"\S[^.?]*[.?]", SENTENCES)


def sentences(words: random.Random, num: int, between: str = " ") -> str:
    return "".join(words.choice(SENTENCE_LIST) + between for _ in range(num))


def phrase(words: random.Random) -> str:
    start = words.choice(SENTENCE_LIST).split()[: words.randint(2, 5)]
    return " ".join(start) + words.choice([" ", ", ", ". "])


# The unit, and the fewest times that it is repeated: whole, and cut off within a unit.
UNITS: dict[str, tuple[Callable[[random.Random], str], int, int]] = {
    "token": (lambda words: words.choice(["the ", "wait ", "Hmm, ", "of ", "是"]), 200, 200),
    "phrase": (phrase, 50, 50),
    "sentence": (lambda words: sentences(words, 1), 20, 8),
    "line": (lambda words: sentences(words, 1, "\n"), 50, 8),
    "paragraph": (lambda words: sentences(words, words.randint(4, 7)) + "\n\n", 10, 7),
    "counter": (lambda words: f"Step {{}}: {re.sub('[0-9]', 'n', sentences(words, 1))}\n", 400, 30),
}


@pytest.mark.parametrize("is_cut", [False, True], ids=["whole", "cut off"])
@pytest.mark.parametrize("kind", UNITS)
def test_loops_to_the_end_are_found(kind: str, is_cut: bool) -> None:
    make, whole, cut = UNITS[kind]
    words, missed = random.Random(0), []
    for _ in range(100):
        unit, times = make(words), words.randint(1, 3) * (cut if is_cut else whole)
        body = "".join(unit.format(i) for i in range(7, 7 + times))
        text = sentences(words, words.randint(0, 8)) + body
        if is_cut:
            text = text[: -words.randint(len(unit) // 3, len(unit) // 2) or None]
        missed += [] if find_loop(text) else [text[-200:]]
    # A cut may fall on the end of a sentence, which looks like a text that ends there.
    assert len(missed) <= 3 * is_cut, missed


def test_ordinary_texts_are_no_loops() -> None:
    texts = list(ordinary_texts())
    assert len(texts) == 4720
    assert [(text[-80:], loop) for text in texts if (loop := find_loop(text))] == []


def test_the_standard_library_is_no_loop_wherever_it_is_cut() -> None:
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        texts += [text[start : start + 1700] for start in range(0, len(text), 1700)]
    assert len(texts) > 2000
    assert [(text[-80:], loop) for text in texts if (loop := find_loop(text))] == []


def test_the_numbers_of_the_table() -> None:
    """The fewest repetitions that are a loop, and one fewer, which are none."""
    sentence = "We look at this again and again. "
    paragraph = sentences(random.Random(1), 6) + "\n\n"
    for unit, num_more, fewest in [
        (paragraph, 0, 6),
        (paragraph, 5, 4),
        (sentence, 0, 12),
        (sentence, 5, 6),
        (f"{sentence}\n", 0, 20),
        (f"{sentence}\n", 5, 6),
        (f"{sentence}\n\n", 0, 10),
        ("Wait, not this one: ", 0, 12),
        ("Wait, no more? ", 0, 20),
        ("Wait, no more\n", 0, 100),
        ("Wait, no more\n", 7, 14),  # 200 characters
        ("alright ", 0, 100),
        ("0 0 0 0 0 0\n", 0, 1000),
    ]:
        for times in (fewest, fewest - 1):
            text = "So it is done;\n\n" + unit * times + unit[:num_more]
            assert (find_loop(text) is not None) == (times == fewest), (unit, num_more, times)
