"""The form of an answer that training teaches: a text with the parts {reasoning} and {answer}.

The default is `<reasoning>{reasoning}</reasoning>\\n<answer>{answer}</answer>`. The tags around the
two parts are its markers. They may stand in an answer only where the template has them.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Literal, NamedTuple

from jaxsft.config import ANSWER_TEMPLATE

_PARTS = ("{reasoning}", "{answer}")
_TAG = re.compile(r"<[^<>\s]+>")
_TAG_OR_WORDS = re.compile(r"<[^<>\s]+>|[^\s<](?:[^<]*[^\s<])?|<")  # words up to the next tag

PartName = Literal["text", "reasoning", "answer"]


class TextPiece(NamedTuple):
    """A piece of a text: the part that it is in, or that its marker belongs to."""

    text: str
    part: PartName
    is_marker: bool = False


@dataclass(frozen=True)
class AnswerTemplate:
    """A template such as "<think>{reasoning}</think>{answer}".

    Raises:
      ValueError: it does not have {reasoning} and then {answer}, each once; there is no marker
        before the reasoning or between the two; a marker is, or holds, another one; or it has a
        line end spelt out.
    """

    text: str = ANSWER_TEMPLATE

    def __post_init__(self) -> None:
        where = [self.text.find(part) for part in _PARTS]
        if any(self.text.count(part) != 1 for part in _PARTS) or where != sorted(where):
            raise ValueError("must have {reasoning} and then {answer}, each once")
        opening, middle, _ = self._around
        if not opening.strip() or not middle.strip():
            raise ValueError("must have a tag before {reasoning} and one before {answer}")
        if "\\n" in self.text:
            raise ValueError(
                "has a backslash and an n, which are no line end; write $'…\\n…' in a shell, or "
                "double quotes in YAML"
            )
        if any(one in other for one, other in permutations(self.markers, 2)):
            raise ValueError("has a tag or word twice, or inside another one; all must differ")

    @cached_property
    def _around(self) -> tuple[str, str, str]:
        opening, _, rest = self.text.partition(_PARTS[0])
        middle, _, closing = rest.partition(_PARTS[1])
        return opening.lstrip(), middle, closing.rstrip()

    @cached_property
    def literals(self) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """What must stand before the reasoning, between the two parts, and after the answer: tags,
        and the words between them."""
        opening, middle, closing = (tuple(_TAG_OR_WORDS.findall(part)) for part in self._around)
        return opening, middle, closing

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """The tags around the parts, in order; where there is no tag, all the words."""
        return tuple(marker for part in self._around for marker in _markers(part))

    @property
    def end_of_reasoning(self) -> str:
        """The first marker after the reasoning, "</reasoning>" by default."""
        return _markers(self._around[1])[0]

    @property
    def start_of_answer(self) -> str:
        """The last marker before the answer, "<answer>" by default; may be `end_of_reasoning`."""
        return _markers(self.middle)[-1]

    @property
    def end_of_answer(self) -> str | None:
        """The first marker after the answer, "</answer>" by default; None if there is none."""
        return next(iter(_markers(self.end)), None)

    def pieces(self, texts: Iterable[str]) -> Iterator[TextPiece]:
        """Cuts a text, which comes in any pieces, at the markers; together the pieces are the text.

        No marker is ever cut: text that may be the beginning of one is held back.
        """
        any_marker = re.compile("|".join(map(re.escape, self.markers)))
        begins = {marker[:size] for marker in self.markers for size in range(1, len(marker))}
        longest = max(map(len, self.markers)) - 1
        opening = _markers(self.opening)
        part: PartName = "text"
        held = ""
        for text in texts:
            held += text
            while marker := any_marker.search(held):
                if marker.start():
                    yield TextPiece(held[: marker.start()], part)
                is_first = marker[0] in opening or marker[0] == self.end_of_reasoning
                yield TextPiece(marker[0], "reasoning" if is_first else "answer", is_marker=True)
                part = "reasoning" if marker[0] == opening[-1] else "text"
                part = "answer" if marker[0] == self.start_of_answer else part
                held = held[marker.end() :]
            sizes = range(min(longest, len(held)), 0, -1)
            num_held = next((size for size in sizes if held[-size:] in begins), 0)
            if num_held < len(held):
                yield TextPiece(held[: len(held) - num_held], part)
            held = held[len(held) - num_held :]
        if held:
            yield TextPiece(held, part)

    def pattern(self, reasoning: str, answer: str) -> str:
        """A regular expression for an answer; the arguments stand for its parts.

        White space between markers, and between markers and parts, does not matter.
        """
        opening, middle, closing = (r"\s*".join(map(re.escape, each)) for each in self.literals)
        return f"{opening}{reasoning}{middle}{answer}{closing}"

    @cached_property
    def _whole(self) -> re.Pattern[str]:
        return re.compile(self.pattern("(.+)", "(.+)"), re.DOTALL)

    @property
    def opening(self) -> str:
        """What stands before the reasoning."""
        return self._around[0]

    @property
    def middle(self) -> str:
        """What stands between the reasoning and the answer."""
        return self._around[1]

    @property
    def end(self) -> str:
        """What stands after the answer; may be ""."""
        return self._around[2]

    def closing(self, answer: str) -> str:
        """What stands after the reasoning, with the answer."""
        return f"{self.middle}{answer}{self.end}"

    def join(self, reasoning: str, answer: str) -> str:
        """The text that training teaches."""
        return f"{self.opening}{reasoning}{self.closing(answer)}"

    def split(self, text: str) -> tuple[str, str] | None:
        """(reasoning, answer) of a text in this form, each trimmed; None for any other text."""
        if any(text.count(marker) != 1 for marker in self.markers):
            return None  # before the pattern, which takes quadratic time over many tags
        match = self._whole.fullmatch(text.strip())
        if match is None:
            return None
        reasoning, answer = match[1].strip(), match[2].strip()
        return (reasoning, answer) if reasoning and answer else None

    def without_reasoning(self, text: str) -> str:
        """The text as later turns see it if earlier reasoning is stripped: "<answer>4</answer>"."""
        return text.split(self.end_of_reasoning)[-1].strip()


def _markers(literal: str) -> list[str]:
    return _TAG.findall(literal) or ([literal.strip()] if literal.strip() else [])
