"""A model's answer as it comes, in pieces: tokens to text, text to what is shown in which way.

Neither a character of several tokens nor a tag is shown in halves: what may still become one is
held back.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from jaxsft.common.text import visible
from jaxsft.data.tokenizer import Tokenizer

Kind = Literal["text", "tag", "reasoning", "answer"]

# What a tag begins.
_BEGINS: dict[str, Kind] = {
    "<reasoning>": "reasoning",
    "</reasoning>": "text",
    "<answer>": "answer",
    "</answer>": "text",
}
_TAG = re.compile("|".join(_BEGINS))
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # how the vocabulary spells one byte of UTF-8
_MAX_HELD_BYTES = 3  # of a character's four


class Part(NamedTuple):
    """A piece of an answer, and what it is a part of."""

    kind: Kind
    text: str


def text_of_tokens(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text in pieces, one for most tokens; joined they are `tokenizer.decode(ids)`."""
    held: list[int] = []  # byte tokens that may begin a character
    for token in ids:
        held.append(token)
        num_held = 0
        if _BYTE.fullmatch(tokenizer.piece(token)):
            text = tokenizer.decode(held)
            # Each byte of an unfinished character is a U+FFFD of its own.
            num_held = min(len(text) - len(text.rstrip("\ufffd")), _MAX_HELD_BYTES)
        whole = len(held) - num_held
        if whole:
            yield tokenizer.decode(held[:whole])
        held = held[whole:]
    if held:
        yield tokenizer.decode(held)


def parts_of_text(texts: Iterable[str]) -> Iterator[Part]:
    """Cuts a text that comes in pieces at its tags; joined, the parts are the text."""
    kind: Kind = "text"
    held = ""
    for text in texts:
        held += text
        while tag := _TAG.search(held):
            if tag.start():
                yield Part(kind, held[: tag.start()])
            yield Part("tag", tag[0])
            kind, held = _BEGINS[tag[0]], held[tag.end() :]
        start = held.rfind("<")
        if start < 0 or not any(name.startswith(held[start:]) for name in _BEGINS):
            start = len(held)
        if start:
            yield Part(kind, held[:start])
        held = held[start:]
    if held:
        yield Part(kind, held)


def printable(text: str) -> str:
    """The text with only lines and tabs left of what could move the cursor; see `visible`.

    Joiners (U+200C and U+200D) stay as well: Persian words and many emoji are spelt with them.
    """
    return re.sub(r"[^\n\t\u200c\u200d]+", lambda run: visible(run[0]), text)
