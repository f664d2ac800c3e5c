"""Whether a generated text has the form of an `AnswerTemplate`, and the parts in it."""

from collections.abc import Sequence

from jaxsft.data.answer_template import AnswerTemplate


def exact_parts(text: str, template: AnswerTemplate) -> tuple[str, str] | None:
    r"""(reasoning, answer) of a text in the exact format, None for another.

    With the default template the format is that of the field's GRPO demonstrations (the dot matches
    newlines):

        ^\s*<reasoning>(.+?)</reasoning>.*?<answer>(.+?)</answer>\s*$

    In general the template's literals stand in its order, with any text among those between the two
    parts, and nothing but white space elsewhere. This is code because the pattern takes cubic time
    over many tags. The pattern allows tags inside the parts: `has_each_tag_once` finds those.
    """
    text = text.strip()
    opening, middle, closing = template.literals
    start = _after(text, 0, opening)
    if start is None:
        return None
    stop, at = -1, start + 1  # a part has one character at least
    for literal in middle:
        at = text.find(literal, at)
        if at < 0:
            return None
        stop = at if stop < 0 else stop
        at += len(literal)
    end = _before(text, closing)
    if end is None or not text[at:end]:
        return None
    return text[start:stop], text[at:end]


def _after(text: str, at: int, literals: Sequence[str]) -> int | None:
    """The end of these literals, which stand at `at` with only white space between them."""
    for number, literal in enumerate(literals):
        while number and text[at : at + 1].isspace():
            at += 1
        if not text.startswith(literal, at):
            return None
        at += len(literal)
    return at


def _before(text: str, literals: Sequence[str]) -> int | None:
    """The start of these literals, which end the text with only white space between them."""
    for number, literal in enumerate(reversed(literals)):
        text = text.rstrip() if number else text
        if not text.endswith(literal):
            return None
        text = text.removesuffix(literal)
    return len(text)


def has_each_tag_once(text: str, template: AnswerTemplate) -> bool:
    """Whether each marker of the template stands in the text once, anywhere."""
    return all(text.count(marker) == 1 for marker in template.markers)


def format_fault(text: str, template: AnswerTemplate) -> str | None:
    """Why the text isn't in the exact format with each tag once, in a few words; None if it is."""
    if has_each_tag_once(text, template) and exact_parts(text, template):
        return None
    tags = template.markers
    missing = [tag for tag in tags if tag not in text]
    if missing:
        return "no tags" if len(missing) == len(tags) else f"no {', '.join(missing)}"
    for tag in tags:
        if (num := text.count(tag)) > 1:
            return f"{num} × {tag}"
    if sorted(tags, key=text.index) != list(tags):
        return "tags out of order"
    opening, middle, closing = template.literals
    if not text.lstrip().startswith(opening[0]):
        return f"text before {opening[0]}"
    if closing and not text.rstrip().endswith(closing[-1]):
        return f"text after {closing[-1]}"
    words = [each for each in (*opening, *middle, *closing) if each not in text]
    if words:
        return f"no {words[0]}"
    return "nothing between two tags" if closing else f"nothing around {middle[0]}"


def answer_part(text: str, template: AnswerTemplate) -> str | None:
    """The text between the answer's tags, whatever stands around them; None without the first.

    An answer that is never closed ends with the text. Of several answers the first one after the
    reasoning counts, as the reasoning may quote the tags; of several first tags in a row the last.
    """
    begin, end = template.start_of_answer, template.end_of_answer
    first = text.find(begin, text.find(template.end_of_reasoning) + 1)
    first = text.find(begin) if first < 0 else first
    if first < 0:
        return None
    stop = -1 if end is None else text.find(end, first + len(begin))
    text = text if stop < 0 else text[:stop]
    return text[text.rindex(begin) + len(begin) :]
