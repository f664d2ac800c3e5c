"""Foreign text for a terminal or a page: nothing in it that hides, colours or rearranges."""

import unicodedata

_INVISIBLE = ("Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp")  # Unicode categories


def visible(text: str) -> str:
    """The text with ↵ at the end of lines, ⇥ at tabs, and what else has no shape as \\u{code}."""
    marks = {"\n": "↵\n", "\t": "⇥\t"}
    return "".join(
        marks.get(c) or (f"\\u{{{ord(c):x}}}" if unicodedata.category(c) in _INVISIBLE else c)
        for c in text
    )


def visible_line(text: str) -> str:
    """The text on one line, white space as single spaces, otherwise as `visible`."""
    return visible(" ".join(text.split()))
