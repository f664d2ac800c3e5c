r"""The numbers in a text that a model or a data set wrote, as exact fractions.

    72   -3   −3   +4   1,234.50   1\,234   .5   5.       as they stand
    1'234   1_234   1 234 with a space that does not break; in an answer with any space
    $18   -$5   $-5   25%   72km   3 apples              the number; its unit is ignored
    3/4   3 / 4   1 1/2   1½   \frac{3}{4}   \frac34     fractions and mixed numbers
    2.5e3   1.5×10^6   1.5 \times 10^{6}   10**6   10⁶   powers of ten, up to two digits
    3-4   10 - 3   x-5   (2)-1                           a range or a subtraction: no signs here
    2024-05-01   12/25/2024                              a date: no number
    m2   H2O   v1.2.3 from its second point on           part of a name: no number

A comma groups thousands or separates numbers; a point begins decimals. A percent sign and "million"
are units: the one doesn't divide by 100, the other doesn't multiply.
"""

import re
import unicodedata
from fractions import Fraction

_MAX_DIGITS = 100  # a longer one is of a model that repeats itself; int() refuses over 4,300
_MAX_GROUPS = 40  # of three digits; without a limit 1,111,…,11 takes quadratic time

_MINUS = r"\-\u2212\u2013"  # hyphen, minus sign, en dash
_MONEY = "[$€£¥₹]"
_TEN_TO = r"10\s?(?:\^|\*\*)\s?(?P<{0}>[{{(])?(?P<ten_{0}>[-+]?\d{{1,2}})(?({0})[}})])(?!\d)"
_NUMBER = re.compile(
    rf"""
    (?<!\d)\d{{4}}-\d\d-\d\d(?!\d) | (?<![\d/])\d{{1,2}}/\d{{1,2}}/\d{{4}}(?!\d)  # dates
    | (?P<sign> (?<![A-Za-z0-9)\]}}%°{_MINUS}])
        (?: [{_MINUS}](?:{_MONEY}[ ]?)? | {_MONEY}[{_MINUS}] ) )?
      (?<![A-Za-z0-9]) (?<!\d\.)
      (?:
        (?<!/)(?<!/[ ]) (?:(?P<whole>\d{{1,3}})[ ])?
        (?P<over>\d+) (?P<gap>[ ]?)/(?P=gap) (?P<under>0*[1-9]\d*) (?!\d|[ ]?/|\.\d)
        | {_TEN_TO.format("a")}
        | (?P<decimal>
            (?: \d{{1,3}}(?:,\d{{3}}){{1,{_MAX_GROUPS}}}(?!,?\d) | \d+ ) (?:\.\d*)?
            | (?<!\.)\.\d+
          )
          (?: [eE](?P<e>[+-]?\d{{1,2}})(?![A-Za-z0-9])
            | \s?(?:×|x|\*|·|\\times|\\cdot)\s?{_TEN_TO.format("b")}
          )?
      )
    """,
    re.VERBOSE | re.ASCII,
)
_VULGAR = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # ½ and its like
_FRAC = re.compile(
    r"(?:(\d)\s*)?\\[cdt]?frac\s*(?:\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)(\d))", re.ASCII
)
_THIN_SPACE = re.compile(r"(?<=\d)\\,(?=\d{3})", re.ASCII)
_GROUPS = (  # of thousands
    rf"(?<![\d.,])(?<!\d[{{0}}])\d{{{{1,3}}}}(?P<mark>[{{0}}])\d{{{{3}}}}"
    rf"(?:(?P=mark)\d{{{{3}}}}){{{{0,{_MAX_GROUPS - 1}}}}}(?!(?P=mark)?\d|[ ]?/)"
)
_MARKS = "\u00a0\u2007\u2009\u202f'\u2019_"
_GROUPED = re.compile(_GROUPS.format(_MARKS), re.ASCII)
_SPACED = re.compile(_GROUPS.format(" "), re.ASCII)
_SUPERSCRIPTS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
_SUPERSCRIPT = re.compile("(?<![0-9])10([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,2})")
_HYPHENS = str.maketrans("\u2010\u2011\ufe63\uff0d", "----")


def find_numbers(text: str) -> list[Fraction]:
    """The numbers in the text, in order; the module's docstring says what counts as one."""
    return [number for match in _NUMBER.finditer(_plain(text)) for number in _values(match)]


def numbers_and_rest(text: str) -> tuple[list[Fraction], str]:
    """(the numbers in the text, the text with NUL in the place of each number and each date)."""
    text = _ungrouped(_SPACED, _plain(text.replace("\0", " ")))
    numbers = [number for match in _NUMBER.finditer(text) for number in _values(match)]
    return numbers, _NUMBER.sub("\0", text)


def parse_number(text: str) -> Fraction | None:
    """The number, if the text is one number and at most marks around it; otherwise None."""
    text = _ungrouped(_SPACED, _plain(text)).replace("\\boxed", "")
    numbers = find_numbers(text)
    is_bare = len(numbers) == 1 and not any(c.isalnum() for c in _NUMBER.sub("", text))
    return numbers[0] if is_bare else None


def _values(match: re.Match[str]) -> list[Fraction]:
    """The numbers of a match of _NUMBER: none for a date, two for "2 5/2"."""
    sign = -1 if match["sign"] else 1
    if len(match[0]) > _MAX_DIGITS:
        return []
    if match["over"]:
        fraction = Fraction(int(match["over"]), int(match["under"]))
        if match["whole"] is None:
            return [sign * fraction]
        whole = int(match["whole"])
        return [sign * (whole + fraction)] if fraction < 1 else [Fraction(sign * whole), fraction]
    if match["decimal"] or match["ten_a"]:
        number = Fraction(re.sub(r"[^\d.]", "", match["decimal"] or "1"))
        if exponent := match["e"] or match["ten_a"] or match["ten_b"]:
            number *= Fraction(10) ** int(exponent)
        return [sign * number]
    return []


def _plain(text: str) -> str:
    """The text with the notations of LaTeX and Unicode for numbers in plain characters."""
    text = _VULGAR.sub(_latex_fraction, text.translate(_HYPHENS))
    text = _SUPERSCRIPT.sub(lambda power: f"10^{power[1].translate(_SUPERSCRIPTS)}", text)
    text = _ungrouped(_GROUPED, text)
    text = text.replace("\u2044", "/").replace("\u00a0", " ").replace("{,}", ",")
    text = text.replace("\\!", "").replace("\\$", "$").replace("\\%", "%")
    return _FRAC.sub(_slashed, _THIN_SPACE.sub("", text))


def _ungrouped(groups: re.Pattern[str], text: str) -> str:
    """The text without the marks between groups of thousands."""
    return groups.sub(lambda number: number[0].replace(number["mark"], ""), text)


def _slashed(match: re.Match[str]) -> str:
    whole = f"{match[1]} " if match[1] else ""
    return f"{whole}{match[2] or match[4]}/{match[3] or match[5]}"


def _latex_fraction(vulgar: re.Match[str]) -> str:
    over, under = unicodedata.normalize("NFKC", vulgar[0]).split("\u2044")
    return f"\\frac{{{over}}}{{{under}}}"
