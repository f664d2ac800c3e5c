"""Makes unknown text safe to print: shows characters that hide, colour or reorder text.

`harmless` is for all that goes to a terminal (streams.py and console.py call it, so that nobody
else has to); `visible_text` is for text that a person is to see exactly.
"""

import re
import unicodedata

# A token of the hub, and the user and password in an address.
_SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^\s/@]+(?=@)")
# What steers a terminal or reorders a line: C0 but line end and tab, DEL, C1, bidi controls and
# marks (Unicode Standard Annex 9), and surrogates, as Python has bytes that are not UTF-8.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_INVISIBLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode categories


def harmless(text: str) -> str:
    """The text with \\u{code} for every character that steers a terminal or reorders a line.

    Line ends, tabs, and the joiners that many scripts and emoji need, stay.
    """
    return _STEERING.sub(lambda found: f"\\u{{{ord(found[0]):x}}}", text)


def visible_text(text: str) -> str:
    """The text with ↵ at line ends, ⇥ at tabs, and other invisible characters as \\u{code}."""
    marks = {"\n": "↵\n", "\t": "⇥\t"}
    return "".join(
        marks.get(c) or (f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in _INVISIBLE else c)
        for c in text
    )


def plural(count: int, noun: str) -> str:
    """1 sample, 2 samples."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def visible_line(text: str) -> str:
    """`visible_text` on one line, with single spaces, and *** for secrets."""
    return visible_text(_SECRET.sub("***", " ".join(text.split())))
