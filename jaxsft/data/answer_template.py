"""The form of an answer that training teaches: a text with the parts {reasoning} and {answer}.

The default is `<reasoning>{reasoning}</reasoning>\\n<answer>{answer}</answer>`. The tags around the
two parts are its markers. They may stand in an answer only where the template has them.
"""

import re
from dataclasses import dataclass
from functools import cached_property

from jaxsft.config import ANSWER_TEMPLATE

_PARTS = ("{reasoning}", "{answer}")
_TAG = re.compile(r"<[^<>\s]+>")
_TAG_OR_WORD = re.compile(r"<[^<>\s]+>|[^\s<]+|<")


@dataclass(frozen=True)
class AnswerTemplate:
    """A template such as "<think>{reasoning}</think>{answer}".

    Raises:
      ValueError: it does not have {reasoning} and then {answer}, each once; there is no marker
        before the reasoning or between the two; or two markers are the same.
    """

    text: str = ANSWER_TEMPLATE

    def __post_init__(self) -> None:
        where = [self.text.find(part) for part in _PARTS]
        if any(self.text.count(part) != 1 for part in _PARTS) or where != sorted(where):
            raise ValueError("must have {reasoning} and then {answer}, each once")
        opening, middle, _ = self._around
        if not opening.strip() or not middle.strip():
            raise ValueError("must have a tag before {reasoning} and one before {answer}")
        if len(set(self.markers)) != len(self.markers):
            raise ValueError("has the same tag or word twice; all must differ")

    @cached_property
    def _around(self) -> tuple[str, str, str]:
        opening, _, rest = self.text.partition(_PARTS[0])
        middle, _, closing = rest.partition(_PARTS[1])
        return opening.lstrip(), middle, closing.rstrip()

    @cached_property
    def markers(self) -> tuple[str, ...]:
        """The tags around the parts, in order; where there is no tag, all the words."""
        return tuple(marker for part in self._around for marker in _markers(part))

    @property
    def end_of_reasoning(self) -> str:
        """The first marker after the reasoning, "</reasoning>" by default."""
        return _markers(self._around[1])[0]

    def pattern(self, reasoning: str, answer: str) -> str:
        """A regular expression for an answer; the arguments stand for its parts.

        White space between markers, and between markers and parts, does not matter.
        """
        opening, middle, closing = (
            r"\s*".join(map(re.escape, _TAG_OR_WORD.findall(part))) for part in self._around
        )
        return f"{opening}{reasoning}{middle}{answer}{closing}"

    @cached_property
    def _whole(self) -> re.Pattern[str]:
        return re.compile(self.pattern("(.+)", "(.+)"), re.DOTALL)

    @property
    def opening(self) -> str:
        """What stands before the reasoning."""
        return self._around[0]

    def closing(self, answer: str) -> str:
        """What stands after the reasoning, with the answer."""
        _, middle, closing = self._around
        return f"{middle}{answer}{closing}"

    def join(self, reasoning: str, answer: str) -> str:
        """The text that training teaches."""
        return f"{self.opening}{reasoning}{self.closing(answer)}"

    def split(self, text: str) -> tuple[str, str] | None:
        """(reasoning, answer) of a text in this form, each trimmed; None for any other text."""
        match = self._whole.fullmatch(text.strip())
        if match is None or any(text.count(marker) != 1 for marker in self.markers):
            return None
        reasoning, answer = match[1].strip(), match[2].strip()
        return (reasoning, answer) if reasoning and answer else None

    def without_reasoning(self, text: str) -> str:
        """The text as later turns see it if earlier reasoning is stripped: "<answer>4</answer>"."""
        return text.split(self.end_of_reasoning)[-1].strip()


def _markers(literal: str) -> list[str]:
    return _TAG.findall(literal) or ([literal.strip()] if literal.strip() else [])
