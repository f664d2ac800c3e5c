"""Makes unknown text safe to print: shows characters that hide, colour or reorder text."""

import re
import unicodedata

# A token of the hub, and the user and password in an address.
_SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^\s/@]+(?=@)")
_INVISIBLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode categories


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
