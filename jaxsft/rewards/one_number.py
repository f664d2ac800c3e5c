r"""The one number that an answer gives, or why it gives none: what a reward may pay for.

What may stand around the number is a positive list. Directly behind it a unit of one or two
words, a plural ("72 hair clips"). Elsewhere the words of plain statements (PLAIN_WORDS: "The answer
is 72.", "She has 72 left in May.") and those of the question ("Natalia sold 72 clips"); in front of
it a letter ("x = 72"). Currencies, brackets, LaTeX's and Markdown's marks. So no answer in
words that nobody foresaw pays: "any number but 72", "72 is false", "72 nicht". Of what these lists
let through there is none with

    two numbers, in any notation: "72 or 73", "6 × 12 = 72", "72 (seventy-two)", "72 and a half"
    a hedge: "about 72", "at least 72", "not 72", "72+", "~72", "72?", "72 plus a dozen"
    a digit that is not ASCII (full-width, Arabic-Indic, Chinese …): nobody is paid for a number
        that only some readers see; ½ and its like, and m², are read
    a character that is not seen, a digit struck through, a tag, or more than MAX_WORDS words

"72 thousand" and "$72k" are 72,000 and "2 dozen" is 24, unless the question is how many dozen or
thousand. Otherwise units, percent too, do not change the number. "- 5" is −5.
"""

import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from jaxsft.rewards.number_text import numbers_and_rest

MAX_WORDS = 20

_NUMBER_WORDS = re.compile(
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|"
    "fifteen|sixteen|seventeen|eighteen|nineteen|twenty|thirty|forty|fourty|fifty|sixty|seventy|"
    "eighty|ninety|hundred|hundreds|thousand|thousands|million|millions|billion|billions|"
    "trillion|trillions|lakh|crore|half|halves|fourths|fifths|sixths|sevenths|eighths|"
    "ninths|tenths|hundredths|twice|thrice|minus|negative|squared|cubed|root|sqrt|log|plus|dozens?|"
    "factorial|modulo|mod|doubled|tripled|quadrupled|halved|thirds?|itself|pi|\u03c0|inverse|reciprocal"
)
_HEDGES = re.compile(
    "or|nor|either|neither|maybe|perhaps|possibly|probably|presumably|approximately|approx|"
    "roughly|nearly|almost|circa|between|not|never|cannot|unknown|unsure|uncertain|unclear|guess|"
    "guessing|might|estimate|estimated|alternatively|depends|depending|versus|vs|wrong|incorrect|"
    "except|ish|but|if|unless|though|although|however|whereas|otherwise|no|none|nothing|nobody|any|"
    "anything|everything|anyone|without|besides|excluding|excluded|false|untrue|mistaken|"
    "mistake|what|whatever|something|somewhere|xor|oder|ou|"
    "opposite|doubt|doubtful|else|different|another|instead|suppose|assuming|assume|likely|"
    "unlikely|ignore|joke|joking|kidding|random|lie|lies|fake|near|yet|barely|hardly"
)
_SCALES = {
    "k": 10**3, "K": 10**3, "thousand": 10**3, "M": 10**6, "mn": 10**6, "mln": 10**6,
    "million": 10**6, "B": 10**9, "bn": 10**9, "billion": 10**9, "T": 10**12, "trillion": 10**12,
    "hundred": 100, "dozen": 12, "dozens": 12,
}  # fmt: skip
_SCALED = re.compile(
    r"\0(?:\s?(hundred|thousand|million|billion|trillion|dozens?)|(k|K|M|mn|mln|B|bn|T))\b(?!/)",
    re.ASCII,
)
_DETACHED_MINUS = re.compile(r"(^|[=:({\[]|\*\*|\bis)(\s*)[-\u2212]\s+([$€£¥₹]?)\s?\0")
_BOUND = re.compile(  # words in front of a number that make it another one, and behind it
    r"\b(?:about|around|over|under|above|below|beyond|some|(?<!adds\ )(?<!add\ )up\ to|at\ least"
    r"|at\ most|as\ (?:many|much|few|little)\ as|than|double|triple|after|before|from|past|off|out"
    r"|(?:close|closer|next|opposite|prior|due)\ to|out\ of|between)\ \W*\0"
    r"|\b(?!(?:total|sum|amount|cost|price|average|mean|profit|rate|speed|age|value|score|length"
    r"|distance|loss|change|answer|result|salary|income|area|perimeter|volume|weight|mass|height"
    r"|width|depth|size|discount|savings|bill|fee|fine|tax|tip|temperature|number|count|balance)\ )"
    r"\w+\ of\ \W*\0"
    r"|n['\u2019]t\b|\b(?:could|may|should|can)\ be\b|\0\W*times\ (?:the|that|this|it)\b"
    r"|^\W*(?:is|are|can|does|do|did|will|would|should|could)\b|\bis\ (?:\w+\ )?off\b"
    r"|\0.*\b(?:and|also)\ (?:\w+\ )?(?:more|up|over|others?|so|counting)\b",
    re.IGNORECASE | re.VERBOSE,
)
# A sign or an operator beside the number or between words, marks of doubt, dots for more.
_MARK = re.compile(
    r"\s[-+\u2010-\u2015\u2212/×÷*^&]+\s|[-\u2010-\u2015\u2212/÷^]\W{0,6}\0|\0\s*[+^]"
    r"|~(?![A-Za-z\\])|\.\.|(?<![\\A-Za-z])[A-Za-z]+[(\[]\W*\0|[A-Za-z]_\W?\0"
)
# Else only letters may stand beside the number.
_PUNCTUATION = frozenset(
    " \0.,:;!'\"\u2019\u2018\u201c\u201d()[]{}*_`$€£¥₹¢%‰°=\\#/-+~\uff0c\u3002\uff1a\u3001&"
)
_UNIT_POWER = re.compile(
    r"(?<![A-Za-z])((?:mm|cm|dm|km|m|ft|in|yd|mi|inch(?:es)?|feet|foot|yards?|miles?|units?|s|sec"
    r"|(?:centi|kilo|milli)?met(?:er|re)s?)\}?)\s?(?:\^\{?[23]\}?|[\u00b2\u00b3])"
)
# Of statements; of answers; of word problems; units, currencies and times.
_PLAIN = """
a an the this that these those there here it its he his him she her hers they their them we our us
i my me you your who which each every all both in on at to of for by with per during after before
over out up off down and so thus then hence therefore finally now when as more less fewer only
just also still is are was were be been being has have had having do does did will would can needs
need needed must gets get got makes make made takes take took taken goes go went comes come came
gives give given gave left
answer answers option choice solution result results final total totals overall altogether
together combined sum number amount value count correct right equal equals is means shows yes
exactly
spends spend spent sells sell sold buys buy bought pays pay paid costs cost price earns earned
saves saved eats eat ate eaten drives drove runs ran walked reads read writes wrote keeps kept
brings brought grows grew wins won loses lost sees saw receives received remains remain remaining
remained collected uses used adds add added leaves old older younger taller longer years year
months month weeks week days day hours hour minutes minute seconds second times time morning
afternoon evening night today tomorrow yesterday end first last average mean profit loss change
income bill money weight height length width area perimeter volume speed age distance people
children friends everyone person way ways things whole entire including
adding find away extra new numbers higher
percent dollars dollar cents cent usd euros euro eur pounds pound gbp rupees rupee rs inr yen
miles mile kilometers kilometres km meters metres meter m cm mm feet foot ft inches inch yards
acres square cubic grams g kg kilograms mg lb lbs ounces oz liters litres l ml gallons mph kmh
degrees celsius units unit pieces items apples january february march april may june july august
september october november december monday tuesday wednesday thursday friday saturday sunday 是
答案是 答案 共 一共 个
"""
# Plurals that are no units, unless the question has them.
_OTHER = """
tens gross scores pairs couples lakhs crores mils plusminus upwards downwards onwards thereabouts
others perhaps bogus minus always sometimes regardless
"""
PLAIN_WORDS = frozenset(_PLAIN.split())
_NO_UNITS = frozenset(_OTHER.split())
_GLUE = re.compile(r"[\s{}\\*_`~%°$€£¥₹/'\u2019-]*")  # between a number and its unit
_ENDINGS = re.compile("(?:e?s|e?d|ing|er|e)$")
_WORD = re.compile(r"(?<!\\)\b[^\W\d_]+|(?<=[_\0\d])[^\W\d_]+")
_COMMAND = re.compile(r"\\([A-Za-z]+)")
_COMMANDS = re.compile(
    "boxed|text|textbf|textit|textrm|mathrm|mathbf|mbox|fbox|emph|left|right|displaystyle|quad|circ"
    "|degree"
)
_UNSEEN = ("Cc", "Cf", "Cn", "Co", "Cs")  # Unicode categories
FILLERS = frozenset("\u115f\u1160\u3164\uffa0")  # letters that are not seen


class ReadNumber(NamedTuple):
    """The number of an answer; or None, and why in a few words."""

    number: Fraction | None
    fault: str = ""


def read_one_number(text: str, question: str = "") -> ReadNumber:
    """The number that the text gives; the module's docstring says what gives none.

    Args:
      text: an answer.
      question: what was asked, whose words may stand around the number.
    """
    seen = set(text)
    if seen & FILLERS or any(
        unicodedata.category(c) in _UNSEEN and c not in "\t\n\r" for c in seen
    ):
        return ReadNumber(None, "has characters that are not seen")
    text = unicodedata.normalize("NFC", text)
    numbers, rest = numbers_and_rest(_UNIT_POWER.sub(r"\1", text))
    if len(numbers) > 1:
        return ReadNumber(None, f"has {len(numbers)} numbers")
    if not numbers or rest.count("\0") != 1:
        return ReadNumber(None, "has no number" if "\0" not in rest else "is no plain number")
    number = numbers[0]
    if number >= 0 and _DETACHED_MINUS.search(rest):
        number, rest = -number, _DETACHED_MINUS.sub("\\1\\2\\3\0", rest)
    if scaled := _SCALED.search(rest):
        asked = scaled[1] and re.search(rf"\bhow many {scaled[1].rstrip('s')}s?\b", question, re.I)
        number *= 1 if asked else _SCALES[scaled[1] or scaled[2]]
        rest = f"{rest[: scaled.start()]}\0{rest[scaled.end() :]}"
    fault = _fault(" ".join(rest.split()), question)
    return ReadNumber(None, fault) if fault else ReadNumber(number)


def _fault(rest: str, question: str) -> str:
    """What is wrong with the text around the number, whose place is NUL; "" for nothing."""
    if any(c.isdigit() or unicodedata.numeric(c, None) is not None for c in set(rest)):
        return "has other digits beside the number"
    if any(not _COMMANDS.fullmatch(name) for name in _COMMAND.findall(rest)):
        return "is a formula, not a number"
    for before, char in zip(f" {rest}", rest, strict=False):
        is_accent = unicodedata.category(char).startswith("M") and not before.isascii()
        if not (char.isalpha() or char in _PUNCTUATION or is_accent):
            return f"has {char!a} beside the number"
    words = [(found[0].casefold(), found.start()) for found in _WORD.finditer(rest)]
    if len(words) > MAX_WORDS:
        return f"has {len(words)} words around the number"
    for word, _ in words:
        if _NUMBER_WORDS.fullmatch(word):
            return f'has the word "{word}" beside the number'
        if _HEDGES.fullmatch(word):
            return f'hedges with "{word}"'
    if _BOUND.search(rest):
        return "hedges"
    if mark := _MARK.search(rest):
        return f"has {mark[0].replace(chr(0), '').strip()[:10]} beside the number"
    if odd := _odd_word(rest, words, question):
        return f'has the word "{odd[:40]}" around the number, which is not of the question'
    return ""


def _odd_word(rest: str, words: Sequence[tuple[str, int]], question: str) -> str:
    """The first word that may not stand where it does; "" without one."""
    asked = {_stem(word) for word in _WORD.findall(question.casefold())} if words else set()
    place = rest.index("\0")
    unit = place + 1  # where the number and its unit end
    num_units, before = 0, ""
    following = [word for word, _ in words[1:]] + [""]
    for (word, at), after in zip(words, following, strict=False):
        is_unit = at > place and num_units < 2 and bool(_GLUE.fullmatch(rest, unit, at))
        if is_unit:
            unit, num_units = at + len(word), num_units + 1
        is_letter = len(word) == 1 and word.isascii()
        if is_letter and at > place and word in "xyzneipqru":  # 5x, 5i
            return word
        is_per = at > place and before in ("per", "each", "every")
        # Hardly any negation or doubt is a plural: "72 nicht", "72 roundish".
        is_plural = word.endswith("s") or (after.endswith("s") and len(after) > 3)
        before = word
        is_known = is_letter or word in PLAIN_WORDS or _stem(word) in asked
        if is_known or (((is_unit and is_plural) or is_per) and _may_be_unit(word, question)):
            continue
        return word
    return ""


def _may_be_unit(word: str, question: str) -> bool:
    """Whether an unknown word may be one: no letter, no amount, in no other script."""
    is_plain = unicodedata.normalize("NFKC", word) == word and word not in _NO_UNITS
    scripts = {_script(char) for char in word}
    known = {"LATIN", *map(_script, set(question))}
    return is_plain and len(scripts) == 1 and scripts <= known and len(word) + (word > "z") > 1


def _script(char: str) -> str:
    return unicodedata.name(char, "").partition(" ")[0]


def _stem(word: str) -> str:
    stem = _ENDINGS.sub("", word)
    return stem if len(stem) > 2 else word
