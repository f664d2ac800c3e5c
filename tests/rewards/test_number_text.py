"""The numbers in texts, read off by hand."""

from fractions import Fraction

import pytest

from jaxsft.rewards.number_text import find_numbers, parse_number


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("72, -3, \u22123, \u20133 and +4", [72, -3, -3, -3, 4]),
        (".5 5. 0.50 007", ["1/2", 5, "1/2", 7]),
        ("1,234.50 1,080 10\u202f000 1{,}000 10,\\!000", ["1234.5", 1080, 10000, 1000, 10000]),
        ("1,2,3 and 1,234,5 and 1,2345", [1, 2, 3, 1, 234, 5, 1, 2345]),
        ("$18 -$5 $-5 \\$7 £1,000 US$4 25% 25\\%", [18, -5, -5, 7, 1000, 4, 25, 25]),
        ("3/4 -3/4 1 1/2 -1 1/2", ["3/4", "-3/4", "3/2", "-3/2"]),
        ("\u00bd 1\u00bd \u2153 1\u20442", ["1/2", "3/2", "1/3", "1/2"]),
        (r"\frac{3}{4} -\dfrac{3}{4} 1\frac{1}{2} \frac34", ["3/4", "-3/4", "3/2", "3/4"]),
        (r"1\,234 in 2020 3/4 of -$ 5", [1234, 2020, "3/4", -5]),
        ("48/2=24, 2 5/2, 1/2/3, 5/0, 0.5/2", [24, 24, 2, "5/2", 1, 2, 3, 5, 0, "1/2", 2]),
        ("48 / 2 = 24, 1 1 / 2, 1 / 2 / 3, 5 /6", [24, 24, "3/2", 1, 2, 3, 5, 6]),
        (r"\frac {3} { 4 } \cfrac{-3}{4} -₹500", ["3/4", "-3/4", -500]),
        (r"2.5e3 1.5×10^6 3 \times 10^{-2} 4x10^2", [2500, 1500000, "3/100", 400]),
        ("3-4 3--4 10 - 3 x-5 (2)-1 $3-$5 20%-30%", [3, 4, 3, 4, 10, 3, 5, 2, 1, 3, 5, 20, 30]),
        ("2024-05-01, 12/25/2024", []),
        ("m2 H2O v1.2.3 x1", []),
        ("1.2.3", ["1.2"]),
        ("72km, 3rd, 5\u00b2, \u662f72\u4e2a, _7_, **8**", [72, 3, 5, 72, 7, 8]),
        ("3:30 and \u0663", [3, 30]),  # ASCII digits only
        ("0" * 10_000 + " 7", [7]),  # int() itself would refuse
        ("1" + ",111" * 20_000 + ",11", [1] + [111] * 20_000 + [11]),  # a second, not a minute
    ],
)
def test_numbers_in_a_text(text: str, numbers: list[int | str]) -> None:
    assert find_numbers(text) == [Fraction(number) for number in numbers]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("72", 72), (" $1,234.50. ", "1234.5"), ("-3", -3), ("**72**", 72), ("50%", 50)),
        *(("1 1/2", "3/2"), (r"\boxed{\frac{3}{4}}", "3/4"), ("(72)", 72)),
        *(("72 clips", None), ("3-4", None), ("7, 8", None), ("seven", None), ("", None)),
        *(("5\u00b2", None), ("2024-05-01", None), ("2 5/2", None)),
    ],
)
def test_a_text_that_is_one_number(text: str, number: int | str | None) -> None:
    assert parse_number(text) == (None if number is None else Fraction(number))
