"""Makes foreign text safe to show: characters that hide, colour or reorder it become visible."""

import re
import unicodedata

# A token of the hub, and what stands before the host of an address.
_SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=://)[^\s/@]+(?=@)")
_INVISIBLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode categories


def visible_text(text: str) -> str:
    """The text with ↵ at the end of lines, ⇥ at tabs, and what else has no shape as \\u{code}."""
    marks = {"\n": "↵\n", "\t": "⇥\t"}
    return "".join(
        marks.get(c) or (f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in _INVISIBLE else c)
        for c in text
    )


def visible_line(text: str) -> str:
    """The text on one line, with single spaces and secrets as ***; else as `visible_text`."""
    return visible_text(_SECRET.sub("***", " ".join(text.split())))
