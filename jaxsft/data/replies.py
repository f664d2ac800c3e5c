"""Assistant texts of a data set -> reasoning and answer.

The thought may stand in a field of its own, or in the text, in one of the tags of `_THOUGHT_TAGS`.
What becomes of a text (T stands for its tag, <think> for instance):

    T r /T a                          reasoning r, answer a
    the answer template's own form    reasoning r, answer a
    r /T a, no T (only </think>)      the same, noted "implicit_open"
    no thought, or T /T a             no reasoning; `data.without_thought` decides
    T never closed                    Rejected "unclosed_thought"
    /T … T                            Rejected "reversed_thought"
    T inside a thought                Rejected "nested_thought"
    more tags than one pair           Rejected "several_thoughts"
    text in front of T                Rejected "text_before_thought"
    nothing after the thought, or at all   Rejected "empty_answer"
    begins with another thought tag   Rejected "unknown_tags"
    a marker of the template anywhere else   Rejected "literal_tags" (it would break the form)
"""

import re
from typing import Literal, NamedTuple

from jaxsft.data.answer_template import AnswerTemplate

ConversionReason = Literal[
    "no_thought", "unclosed_thought", "reversed_thought", "nested_thought", "several_thoughts",
    "text_before_thought", "empty_answer", "empty_prompt", "literal_tags", "unknown_tags",
    "unknown_fields", "unused_text", "wrong_field", "wrong_roles", "tools", "not_text", "weight",
]  # fmt: skip
Role = Literal["system", "user", "assistant"]
LaterReason = Literal[
    "duplicate", "contaminated", "degenerate", "too_short", "too_long", "not_for_training"
]
Note = Literal["implicit_open", "plain_completion", "control_look_alike", "system_has_other_tags"]

_MARKS = ("\ufeff", "\u200b")  # byte order mark, zero-width space
THINK = ("<think>", "</think>")
_THOUGHT_TAGS = (
    THINK,
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),  # OpenThoughts, Sky-T1
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("◁think▷", "◁/think▷"),  # Kimi
)
_OPENINGS = tuple(opening for opening, _ in _THOUGHT_TAGS)
# Tags around the whole answer after a thought; they are removed.
_ANSWER_TAGS = (
    ("<answer>", "</answer>"),
    ("<Answer>", "</Answer>"),
    ("<solution>", "</solution>"),
    ("<final_answer>", "</final_answer>"),
    ("<|begin_of_solution|>", "<|end_of_solution|>"),
)
_NAME = (
    r"(?:think|thought|reasoning|reflect|scratchpad|monologue|rationale|analysis|planning|internal)"
)
# A tag, perhaps with attributes, that begins a text.
_UNKNOWN_TAG = re.compile(
    rf"</?[\w:. -]{{0,30}}{_NAME}[^<>\n]{{0,60}}>|<\|(?:[\w ]*{_NAME}[\w ]*|channel|cot)\|?>"
    rf"|\[/?\w{{0,30}}(?:think|thought|reasoning)\w{{0,30}}\](?!\()|◁/?\w{{1,30}}▷"
    r"|&lt;/?think(?:ing)?&gt;",
    re.IGNORECASE,
)
# The end of such an element anywhere: what stands before it is a thought.
_UNKNOWN_END = re.compile(rf"</\w{{0,30}}{_NAME}\w{{0,30}}>|&lt;/think(?:ing)?&gt;", re.IGNORECASE)
# Tags that no ordinary text has: one that is left over would be taught.
_SPECIAL_TAGS = (
    *(tag for pair in _THOUGHT_TAGS[4:] for tag in pair),
    *_ANSWER_TAGS[-1],
)


class Rejected(NamedTuple):
    """A row that is not used: why, from the closed set, and what in it."""

    reason: ConversionReason | LaterReason  # the latter from filters.py and samples.py
    detail: str


class RejectedError(Exception):
    """Raised where the conversion of a row ends because the row cannot be used."""

    def __init__(self, reason: ConversionReason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.rejected = Rejected(reason, detail)


class ConvertedReply(NamedTuple):
    """An assistant text in the form that training teaches; no reasoning: a plain text."""

    content: str
    reasoning: str | None
    answer: str | None
    note: Note | None = None


def convert_reply(text: str, thought: str | None, template: AnswerTemplate) -> ConvertedReply:
    """Converts one assistant text by the table in the module's docstring.

    Args:
      text: as the data set has it.
      thought: of the field for it, if the row has one; blank is none.
      template: the form to teach.
    """
    text = _trimmed(text)
    if not text:
        raise RejectedError("empty_answer", "the response is empty")
    if thought is not None and _trimmed(thought):
        return _with_field(text, _trimmed(thought), template)
    parts = template.split(text)
    if parts is not None:
        return _formatted(*parts, template)
    tags = _tags_of(text)
    if tags is not None:
        return _split_at_tags(text, tags, template)
    tag = _unknown_tag(text)
    if tag is None and (end := _UNKNOWN_END.search(text)):
        tag = end[0]
    if tag is not None:
        raise RejectedError("unknown_tags", f"{tag} is no thought tag that is converted")
    return _plain(text, template)


def _trimmed(text: str) -> str:
    """Without white space at its ends, and the invisible marks that editors leave there."""
    text = text.strip()
    if text.startswith(_MARKS) or text.endswith(_MARKS):
        text = text.strip("".join(_MARKS)).strip()
    return text


def _with_field(text: str, thought: str, template: AnswerTemplate) -> ConvertedReply:
    """A reply whose thought has a field of its own; the text may repeat the same thought."""
    is_tagged = thought.startswith(_OPENINGS) or text.startswith(_OPENINGS)
    for opening, closing in _THOUGHT_TAGS if is_tagged else ():
        thought = _inside(thought, opening, closing)
        if text.startswith(opening):
            repeated, _, answer = text.removeprefix(opening).partition(closing)
            text = answer.strip() if repeated.strip() in ("", thought) else text
    for part in (text, thought):
        tag = next((tag for tag in THINK if tag in part), _unknown_tag(part))
        if tag:
            raise RejectedError("several_thoughts", f"a field for the thought and {tag} as well")
    return _formatted(thought, text, template)


def _inside(text: str, opening: str, closing: str) -> str:
    """What stands between the tags, if they are around the whole text; else the text."""
    if not (text.startswith(opening) and text.endswith(closing)):
        return text
    inside = text[len(opening) : -len(closing)]
    return text if opening in inside else inside.strip()


def _unknown_tag(text: str) -> str | None:
    """The tag that begins the text and has a name like a thought's."""
    match = _UNKNOWN_TAG.match(text) if text[:1] in "<[◁&" else None
    return match[0] if match else None


def _tags_of(text: str) -> tuple[str, str] | None:
    """The thought tags of a text: <think> anywhere, other words as a pair, in front, or closed."""
    if THINK[0] in text or THINK[1] in text:
        return THINK
    for opening, closing in _THOUGHT_TAGS:
        may_open_before = closing != "</reasoning>"  # which is the marker of a broken answer
        if text.startswith(opening) or (closing in text and (may_open_before or opening in text)):
            return opening, closing
    return None


def _split_at_tags(text: str, tags: tuple[str, str], template: AnswerTemplate) -> ConvertedReply:
    opening, closing = tags
    opened, closed = text.count(opening), text.count(closing)
    detail = f"{opened} {opening} and {closed} {closing}"
    if not closed:
        raise RejectedError("unclosed_thought", detail)
    if (opened, closed) not in ((1, 1), (0, 1)):
        between = rf"{re.escape(opening)}(?:(?!{re.escape(closing)}).)*{re.escape(opening)}"
        nested = re.search(between, text, re.DOTALL)
        raise RejectedError("nested_thought" if nested else "several_thoughts", detail)
    thought, answer = text.split(closing)
    if not opened:
        return _formatted(thought, answer, template, "implicit_open")
    if opening in answer:
        raise RejectedError("reversed_thought", f"{closing} stands before {opening}")
    before, thought = thought.split(opening)
    if before.strip():
        many = len(before.strip())
        raise RejectedError("text_before_thought", f"{many} characters before {opening}")
    return _formatted(thought, answer, template)


def _formatted(
    thought: str, answer: str, template: AnswerTemplate, note: Note | None = None
) -> ConvertedReply:
    reasoning, answer = _trimmed(thought), _trimmed(answer)
    if answer.startswith("<"):
        for opening, closing in _ANSWER_TAGS:
            answer = _inside(answer, opening, closing)
    if not answer:
        raise RejectedError("empty_answer", "nothing follows the reasoning")
    if not reasoning:
        if _tags_of(answer) or _unknown_tag(answer):
            raise RejectedError("several_thoughts", "an empty thought, then another")
        return _plain(answer, template)
    _check_tags(reasoning, "inside the reasoning", template)
    _check_tags(answer, "inside the answer", template)
    if tag := _unknown_tag(reasoning) or _unknown_tag(answer):
        raise RejectedError("unknown_tags", f"{tag} is left in front of a part")
    return ConvertedReply(template.join(reasoning, answer), reasoning, answer, note)


def _plain(text: str, template: AnswerTemplate) -> ConvertedReply:
    _check_tags(text, "in the text", template)
    return ConvertedReply(text, None, None)


def _check_tags(text: str, where: str, template: AnswerTemplate) -> None:
    for tag in template.markers:
        if tag in text:
            raise RejectedError("literal_tags", f"{tag} {where}")
    for tag in _SPECIAL_TAGS:
        if tag in text:
            raise RejectedError("unknown_tags", f"{tag} is left {where}")


def other_tag(text: str, template: AnswerTemplate) -> str | None:
    """The first tag for a thought or an answer in a system text that is not the template's."""
    tags = (tag for pair in (*_THOUGHT_TAGS, *_ANSWER_TAGS) for tag in pair)
    return next((tag for tag in tags if tag in text and tag not in template.markers), None)
