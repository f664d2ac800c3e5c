r"""The one number that an answer gives, or why it gives none: what a reward may pay for.

Beside the number there may be a unit, a currency, and the words of one short sentence ("$1,080",
"72 clips", "3/4 of a mile", "25%", "x = \boxed{72}", "She has 5 apples left over."). An answer
gives no number if it has

    two of them, in any notation: "72 or 73", "6 × 12 = 72", "72 (seventy-two)", "72 and a half"
    a hedge: "about 72", "at least 72", "not 72", "72+", "~72", "72?"
    a digit that is not ASCII (full-width, Arabic-Indic, Chinese …): nobody is paid for a number
        that only some readers see; ½ and its like, and m², are read
    a character that is not seen, or a tag, or more than MAX_WORDS words

"72 thousand" and "$72k" are 72,000. Otherwise units, percent too, do not change the number.
"""

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from jaxsft.rewards.number_text import numbers_and_rest

MAX_WORDS = 20

_NUMBER_WORDS = re.compile(
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    "fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fourty|fifty|sixty|seventy|"
    "eighty|ninety|hundred|hundreds|thousand|thousands|million|millions|billion|billions|"
    "trillion|trillions|lakh|crore|half|halves|thirds|fourths|fifths|sixths|sevenths|eighths|"
    "ninths|tenths|hundredths|twice|thrice|minus|negative|squared|cubed|root|sqrt|log"
)
_HEDGES = re.compile(
    "or|nor|either|neither|maybe|perhaps|possibly|probably|presumably|approximately|approx|"
    "roughly|nearly|almost|circa|between|not|never|cannot|unknown|unsure|uncertain|unclear|guess|"
    "guessing|might|estimate|estimated|alternatively|depends|depending|versus|vs|wrong|incorrect|"
    "except|ish"
)
_SCALES = {
    "k": 3, "K": 3, "thousand": 3, "M": 6, "mn": 6, "mln": 6, "million": 6,
    "B": 9, "bn": 9, "billion": 9, "T": 12, "trillion": 12, "hundred": 2,
}  # fmt: skip
_SCALED = re.compile(
    r"\0(?:\s?(hundred|thousand|million|billion|trillion)|(k|K|M|mn|mln|B|bn|T))\b(?!/)", re.ASCII
)
_BOUND = re.compile(  # words in front of a number that make it another one
    r"\b(?:about|around|over|under|above|below|beyond|some|up\ to|at\ least|at\ most"
    r"|as\ (?:many|much|few|little)\ as|(?:more|less|fewer|greater|larger|smaller|higher|lower"
    r"|other|rather)\ than|double|triple)\ \W*\0"
    r"|n['\u2019]t\b|\b(?:could|may|should)\ be\b",
    re.IGNORECASE | re.VERBOSE,
)
# A sign or an operator beside the number, marks of doubt, of a comparison or a tag, dots for more.
_MARK = re.compile(
    "[-+\u2010-\u2015\u2212/×÷*^]\\s+[$€£¥₹]?\\s?\0|[-\u2010-\u2015\u2212/÷^]\\W{0,6}\0|\0\\s*[+^]"
    "|~(?![A-Za-z\\\\])|[<>?\u2248\u2243\u2245\u2260\u2264\u2265\u00b1\u221a\u221e\u2026\u00bf\uff1f]|\\.\\."
)
_UNIT_POWER = re.compile(
    r"(?<![A-Za-z])((?:mm|cm|dm|km|m|ft|in|yd|mi|inch(?:es)?|feet|foot|yards?|miles?|units?|s|sec"
    r"|(?:centi|kilo|milli)?met(?:er|re)s?)\}?)\s?(?:\^\{?[23]\}?|[\u00b2\u00b3])"
)
_WORD = re.compile(r"[^\W\d_]+")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_COMMANDS = re.compile(
    "boxed|text|textbf|textrm|mathrm|mathbf|fbox|left|right|displaystyle|quad|circ|degree"
)
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs")  # Unicode categories


class ReadNumber(NamedTuple):
    """The number of an answer; or None, and why in a few words."""

    number: Fraction | None
    fault: str = ""


def read_one_number(text: str) -> ReadNumber:
    """The number that the text gives; the module's docstring says what gives none."""
    if any(unicodedata.category(c) in _UNSEEN and c not in "\t\n\r" for c in set(text)):
        return ReadNumber(None, "has characters that are not seen")
    numbers, rest = numbers_and_rest(_UNIT_POWER.sub(r"\1", text))
    if len(numbers) > 1:
        return ReadNumber(None, f"has {len(numbers)} numbers")
    if not numbers or rest.count("\0") != 1:
        return ReadNumber(None, "has no number" if "\0" not in rest else "is no plain number")
    number = numbers[0]
    if scaled := _SCALED.search(rest):
        number *= 10 ** _SCALES[scaled[1] or scaled[2]]
        rest = f"{rest[: scaled.start()]}\0{rest[scaled.end() :]}"
    fault = _fault(rest)
    return ReadNumber(None, fault) if fault else ReadNumber(number)


def _fault(rest: str) -> str:
    """What is wrong with the text around the number, whose place is NUL; "" for nothing."""
    if any(c.isdigit() or unicodedata.numeric(c, None) is not None for c in set(rest)):
        return "has other digits beside the number"
    if any(not _COMMANDS.fullmatch(name) for name in _COMMAND.findall(rest)):
        return "is a formula, not a number"
    words = [word.casefold() for word in _WORD.findall(rest)]
    if len(words) > MAX_WORDS:
        return f"has {len(words)} words around the number"
    if found := next((word for word in words if _NUMBER_WORDS.fullmatch(word)), None):
        return f'has the word "{found}" beside the number'
    if found := next((word for word in words if _HEDGES.fullmatch(word)), None):
        return f'hedges with "{found}"'
    plain = " ".join(rest.split())
    if _BOUND.search(plain):
        return "hedges"
    if mark := _MARK.search(plain):
        return f"has {mark[0].replace(chr(0), '').strip()[:10]} beside the number"
    return ""
