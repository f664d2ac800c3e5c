"""Finds texts that end in a loop, as generations do that were cut off in one.

A loop is one unit, a phrase, sentence, line or paragraph, that is repeated exactly up to the last
character, or a line in which one number grows by the same step each time. Ordinary texts repeat
themselves too, but less often: a table has some tens of equal rows, a song some refrains. And they
stop where a unit does, while nearly every generation that is cut off stops within one. So the least
number of repetitions depends on both:

    unit                                                   stops with a unit   within one
    longer than 200 characters                                             6            4
    of 4 different words or more: a sentence                              12            6
      lines                                                               20            6
      lines with a blank one between them                                 10            6
    of 2 or 3 words: a phrase                                             20            6
      lines                                                              100            6
    of one word                                                          100          100
    without words (rows of numbers or marks), 1,000 characters           100          100
      lines                                                             1000          100
    with a growing number, 2 words or more                               400           20
    with a growing number, one word                                      200          200

and the repetitions have at least 200 characters.

Measured: all 1,200 loops of tests/data/test_loops.py were found (tokens, phrases, sentences, lines,
paragraphs and growing numbers, cut off or not). Of 66,215 ordinary texts none was taken for one:
6,180 generated tables, boards, lists, logs, code, proofs and songs, 39,781 pieces of Python's
standard library and 2,386 of other documents, whole and cut anywhere, and 17,868 texts of GSM8K and
MBPP. Not found: loops that vary, and those with fewer repetitions than above. Taken for a loop all
the same: a sentence that a text does repeat twelve times at its end, as "write it 100 times" asks.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

_MIN_CHARS = 200
_LONG_CHARS = 200  # of a unit; paragraphs are longer
_MIN_MARK_CHARS = 1000  # of repetitions without words
_MAX_COUNTED_CHARS = 40_000  # of the text's end, where growing numbers are looked for
_TAIL_CHARS = 24
_FEWEST, _NEVER = 4, 10**9
_MAX_PERIODS = 8  # places of the tail that are tried
# With two different letters; in scripts without blanks between words every letter.
_WORD = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
    r"|[^\W\d_]*([^\W\d_])(?!\1)[^\W\d_]+"
)
_TOKEN = re.compile(r"\w+")
_MARKS = frozenset(".,:;!?…)]}>\"'`*|\u2019\u201d\u3002\uff01\uff1f\uff0c")  # ends of items
_NUMBER = re.compile(r"[0-9]+")
_ENDS_LINE = re.compile(r"[^\w\n]*\n")


class Loop(NamedTuple):
    """The end of a text: a unit, and how often it stands there."""

    unit: str
    times: int


def find_loop(text: str) -> Loop | None:
    """The loop in which the text ends, if it does. Takes some microseconds for other texts."""
    text = text.strip()
    if len(text) < _MIN_CHARS:
        return None
    for period, num_chars in _periods(text):
        times = _times(num_chars, period)
        is_long = num_chars >= _MIN_CHARS and times >= _FEWEST
        if is_long and times >= _least(text, period, num_chars):
            return Loop(text[-period:], times)
    return _counting_loop(text)


def _periods(text: str) -> Iterator[tuple[int, int]]:
    """(length of a unit, number of characters at the end of the text that repeat it)."""
    tail, end = text[-_TAIL_CHARS:], len(text) - 1
    for _ in range(_MAX_PERIODS):
        found = text.rfind(tail, 0, end)
        if found < 0:
            return
        period = len(text) - _TAIL_CHARS - found
        yield period, period + _num_same(text, period)
        end = found + _TAIL_CHARS - 1


def _num_same(text: str, period: int) -> int:
    """How many characters at the end of the text equal those a period before."""
    later, earlier = text[period:], text[: len(text) - period]
    low, high = 0, 1
    while high < len(later) and later[-high:] == earlier[-high:]:
        low, high = high, 2 * high
    high = min(high, len(later) + 1)
    while low + 1 < high:  # `low` are the same, `high` are not
        middle = (low + high) // 2
        if later[-middle:] == earlier[-middle:]:
            low = middle
        else:
            high = middle
    return low


def _times(num_chars: int, period: int) -> int:
    """Rounded: white space after the last unit is gone."""
    return (num_chars + period // 2) // period


def _least(text: str, period: int, num_chars: int) -> int:
    """The number of repetitions that make the end of the text a loop."""
    unit = text[-period:]
    is_lines, is_long = "\n" in unit, period > _LONG_CHARS
    num_words = _num_words(unit + unit, is_lines)
    if not num_words and num_chars < _MIN_MARK_CHARS:
        return _NEVER
    if num_words < 2:
        return 1000 if is_lines and not num_words and _is_whole(text, period) else 100
    if not _is_whole(text, period):
        return _FEWEST if is_long else 6
    if is_long:
        return 6
    if num_words < 4:
        return 100 if is_lines else 20
    if is_lines:
        return 10 if "\n\n" in unit + unit else 20
    return 12


def _num_words(text: str, is_lines: bool) -> int:
    """Different words; in a sentence that has any, numbers and single letters count as well."""
    words = {found[0] for found in _WORD.finditer(text)}
    return len(words) if is_lines or not words else len(words | {*_TOKEN.findall(text)})


def _is_whole(text: str, period: int) -> bool:
    """Does the text stop where a line, a sentence or an item of its last unit does?"""
    coming = text[len(text) - period :] + "\n"
    if "\n" in text[-period:]:
        return _ENDS_LINE.match(coming) is not None
    return coming[0] in _MARKS or (text[-1] in _MARKS and not coming[0].isalnum())


def _counting_loop(text: str) -> Loop | None:
    """A loop of lines that are equal but for one number, which grows by the same step."""
    text = text[-_MAX_COUNTED_CHARS:]
    longest = max(_NUMBER.split(text[-_MIN_CHARS:]), key=len)
    if len(longest) < 4 or text.count(longest) < 20:
        return None
    numbers = [int(found[-15:]) for found in _NUMBER.findall(text)]
    template = _NUMBER.sub("\0", text)
    for period, num_chars in _periods(template):
        unit = template[-period:]
        num_each = unit.count("\0")
        times = _times(num_chars, period)
        if not num_each or times < _FEWEST:
            continue
        times = min(times, _num_growing(numbers, num_each))
        num_words = len({found[0] for found in _WORD.finditer(unit)})
        least = 200 if num_words < 2 else 400 if _is_whole(template, period) else 20
        if num_words and times * period >= _MIN_CHARS and times >= least:
            return Loop(text[-period:], times)
    return None


def _num_growing(numbers: list[int], num_each: int) -> int:
    """How many units at the end differ from the one before by one and the same step."""
    numbers = numbers[:-1]  # the last may be cut off
    steps = [b - a for a, b in zip(numbers, numbers[num_each:], strict=False)]
    wanted, times = steps[-num_each:], 1
    if len({step for step in wanted if step}) != 1:
        return 0
    for start in range(len(steps) - num_each, -1, -num_each):
        if steps[start : start + num_each] != wanted:
            break
        times += 1
    return times + 1  # with that of the last number
