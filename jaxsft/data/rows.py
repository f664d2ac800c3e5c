"""Rows of a data set -> conversations with answers in the form that training teaches.

Text only: no token, no file. The target form of an assistant turn is `completion_text`'s
`<reasoning>{r}</reasoning>\\n<answer>{a}</answer>`. Accepted rows, the first match counts:

    {messages} or {conversations}: a list of {role, content[, reasoning_content]} or {from, value}
    {prompt, response}      Glaive: the response must hold a thought
    {prompt, completion[, reasoning_content]}
    {instruction, response} Magpie
    {question, answer}      GSM8K: reasoning, then "#### number"; <<calculator>> notes are removed
    {text, code, test_list} MBPP: the prompt is the text and the tests; CRLF in code becomes LF

What becomes of an assistant text (all texts are trimmed; every outcome is counted by the caller):

    <think>r</think> a                        accepted, converted
    <reasoning>r</reasoning> <answer>a</answer>  accepted as it is
    r </think> a, no <think>                  accepted, noted "implicit_open"
    no thought, and not Glaive or GSM8K       accepted as it is, noted "plain_completion"
    <end_of_turn>, <bos>, … inside any text   accepted as ordinary text, noted "control_look_alike"
    no <think> and no </think> (Glaive)       Rejected "no_thought"
    <think> never closed                      Rejected "unclosed_thought"
    </think> … <think>                        Rejected "reversed_thought"
    <think> inside a thought                  Rejected "nested_thought"
    more tags than one pair                   Rejected "several_thoughts"
    text in front of <think>                  Rejected "text_before_thought"
    nothing between the tags                  Rejected "empty_thought"
    nothing after the thought, or at all      Rejected "empty_answer"
    a user turn without text                  Rejected "empty_prompt"
    <reasoning>, <answer> … anywhere else     Rejected "literal_tags" (they would break the form)
    no "####" (GSM8K)                         Rejected "no_final_answer"

A field that is missing, null or no string, an unknown role or a wrong order of roles is a mistake
of the file: ValueError. A blank system turn and a null or blank `reasoning_content` count as none.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

# Raise it with every change of what becomes of a row, here or in sources, filters, chat, tokenizer,
# vocabulary, samples, packing, bins or prepared: rows prepared before are then prepared again.
# A test in tests/data/test_prepared.py fails when the outcome changes and this number does not.
ROWS_VERSION = 1

ACCEPTED_SCHEMAS = (
    "{messages: [{role, content}]}, {conversations: [{from, value}]}, {prompt, response}, "
    "{prompt, completion[, reasoning_content]}, {instruction, response}, {question, answer}, "
    "{text, code, test_list}"
)

Role = Literal["system", "user", "assistant"]
ConversionReason = Literal[
    "no_thought", "unclosed_thought", "reversed_thought", "nested_thought", "several_thoughts",
    "text_before_thought", "empty_thought", "empty_answer", "empty_prompt", "literal_tags",
    "no_final_answer",
]  # fmt: skip
LaterReason = Literal["duplicate", "contaminated", "degenerate", "too_short", "too_long"]
Note = Literal["implicit_open", "plain_completion", "control_look_alike"]

_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
_FORMAT_TAG = re.compile(r"</?(?:reasoning|answer)>")
_COMPLETION = re.compile(r"<reasoning>(.+)</reasoning>\s*<answer>(.+)</answer>", re.DOTALL)
_CONTROL = re.compile(
    r"<(?:pad|eos|bos|unk|mask|(?:start|end)_of_(?:turn|image)|image_soft_token|unused\d+)>"
)
_CALCULATOR = re.compile(r"<<[^<>]*>>")


class Turn(NamedTuple):
    """One turn of a conversation."""

    role: Role
    content: str


class Conversation(NamedTuple):
    """`reasoning` and `answer` are the last assistant turn's, None where it is a plain text."""

    turns: tuple[Turn, ...]
    reasoning: str | None
    answer: str | None
    notes: tuple[Note, ...] = ()


class Rejected(NamedTuple):
    """A row that is not used: why, from the closed set, and what in it."""

    reason: ConversionReason | LaterReason  # the latter from filters.py and samples.py
    detail: str


class _Reply(NamedTuple):
    content: str
    reasoning: str | None
    answer: str | None
    note: Note | None = None


def completion_text(reasoning: str, answer: str) -> str:
    """The assistant text that training teaches."""
    return f"<reasoning>{reasoning}</reasoning>\n<answer>{answer}</answer>"


def split_completion(text: str) -> tuple[str, str] | None:
    """The inverse of `completion_text`, up to white space around the parts; None for other text."""
    match = _COMPLETION.fullmatch(text.strip())
    if match is None or len(_FORMAT_TAG.findall(text)) != 4:
        return None
    reasoning, answer = match[1].strip(), match[2].strip()
    return (reasoning, answer) if reasoning and answer else None


def with_reasoning(conversation: Conversation, reasoning: str) -> Conversation:
    """The same conversation with another reasoning in its last turn, which must have one."""
    assert conversation.reasoning is not None and conversation.answer is not None
    last = Turn("assistant", completion_text(reasoning, conversation.answer))
    return conversation._replace(turns=(*conversation.turns[:-1], last), reasoning=reasoning)


def check_roles(turns: Sequence[Turn], last: Role) -> None:
    """Raises ValueError unless the roles are [system,] user, assistant, … and end in `last`."""
    roles = [turn.role for turn in turns]
    body = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["assistant" if i % 2 else "user" for i in range(len(body))]
    if body != wanted or body[-1:] != [last]:
        raise ValueError(
            f"the roles are {', '.join(roles[:8]) or 'none'}{', …' if len(roles) > 8 else ''}: "
            f"they must be [system,] user, assistant, user, … and end with {last}"
        )


def convert_row(row: dict[str, Any]) -> Conversation | Rejected:
    """Converts one row; the module's docstring lists the schemas and every outcome.

    Raises:
      ValueError: the row fits no schema, or a field, a role or the order of roles is wrong.
    """
    if "messages" in row or "conversations" in row:
        return _convert_messages(row, "messages" if "messages" in row else "conversations")
    reply: _Reply | Rejected
    if "prompt" in row and "response" in row:
        prompt, reply = "prompt", _reply(_text(row, "response"), None, thought_required=True)
    elif "prompt" in row and "completion" in row:
        prompt, reply = "prompt", _reply(_text(row, "completion"), _optional_reasoning(row))
    elif "instruction" in row and "response" in row:
        prompt, reply = "instruction", _reply(_text(row, "response"), None)
    elif "question" in row and "answer" in row:
        prompt, reply = "question", _gsm8k_reply(_text(row, "answer"))
    elif "text" in row and "code" in row and "test_list" in row:
        reply = _reply(_text(row, "code").replace("\r\n", "\n"), None)
        return _conversation([("user", _mbpp_prompt(row))], [reply])
    else:
        names = ", ".join(str(name)[:40] for name in list(row)[:8]) or "none"
        raise ValueError(f"no accepted set of fields (found: {names}); use {ACCEPTED_SCHEMAS}")
    return _conversation([("user", _text(row, prompt))], [reply])


def _convert_messages(row: dict[str, Any], field: str) -> Conversation | Rejected:
    messages = row[field]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'"{field}" must be a non-empty list; accepted rows: {ACCEPTED_SCHEMAS}')
    turns: list[Turn] = []
    replies: list[_Reply | Rejected] = []
    for index, message in enumerate(messages):
        where = f"{field}[{index}]"
        if not isinstance(message, dict):
            raise ValueError(f"{where} must be an object with role and content")
        role_key, text_key = ("from", "value") if "from" in message else ("role", "content")
        name = _text(message, role_key, where)
        if name not in _ROLES:
            raise ValueError(f'{where} has the role "{name[:40]}"; use system, user or assistant')
        role = _ROLES[name]
        content = _text(message, text_key, where)
        if role == "assistant":
            replies.append(_reply(content, _optional_reasoning(message, where)))
        elif role == "system" and not content.strip():
            continue
        turns.append(Turn(role, content))
    check_roles(turns, last="assistant")
    others = [(turn.role, turn.content) for turn in turns if turn.role != "assistant"]
    return _conversation(others, replies)


def _conversation(
    others: Sequence[tuple[Role, str]], replies: Sequence[_Reply | Rejected]
) -> Conversation | Rejected:
    """Joins [system,] user, user, … with the reply to each user turn."""
    turns: list[Turn] = []
    notes: set[Note] = set()
    remaining = iter(replies)
    for role, content in others:
        turns.append(Turn(role, content.strip()))
        if role == "system":
            continue
        if not content.strip():
            return Rejected("empty_prompt", "a user turn has no text")
        reply = next(remaining)
        if isinstance(reply, Rejected):
            return reply
        if reply.note:
            notes.add(reply.note)
        turns.append(Turn("assistant", reply.content))
    if any(_CONTROL.search(turn.content) for turn in turns):
        notes.add("control_look_alike")
    last = replies[-1]
    assert isinstance(last, _Reply)
    return Conversation(tuple(turns), last.reasoning, last.answer, tuple(sorted(notes)))


def _reply(
    text: str, reasoning_content: str | None, thought_required: bool = False
) -> _Reply | Rejected:
    """Converts one assistant text by the table in the module's docstring."""
    text = text.strip()
    if not text:
        return Rejected("empty_answer", "the response is empty")
    opened, closed = text.count("<think>"), text.count("</think>")
    if reasoning_content is not None:
        if opened or closed or re.search("</?think>", reasoning_content):
            return Rejected("several_thoughts", "reasoning_content and <think> tags as well")
        return _formatted(reasoning_content, text)
    if not opened and not closed:
        return _reply_without_thought(text, thought_required)
    detail = f"{opened} <think> and {closed} </think>"
    if not closed:
        return Rejected("unclosed_thought", detail)
    if (opened, closed) not in ((1, 1), (0, 1)):
        nested = re.search(r"<think>(?:(?!</think>).)*<think>", text, re.DOTALL)
        return Rejected("nested_thought" if nested else "several_thoughts", detail)
    thought, answer = text.split("</think>")
    if not opened:
        return _formatted(thought, answer, "implicit_open")
    if "<think>" in answer:
        return Rejected("reversed_thought", "</think> stands before <think>")
    before, thought = thought.split("<think>")
    if before.strip():
        return Rejected("text_before_thought", f"{len(before.strip())} characters before <think>")
    return _formatted(thought, answer)


def _reply_without_thought(text: str, thought_required: bool) -> _Reply | Rejected:
    parts = split_completion(text)
    if parts is not None:
        return _formatted(*parts)
    if thought_required:
        return Rejected("no_thought", "no <think> and no </think>")
    if tag := _FORMAT_TAG.search(text):
        return Rejected("literal_tags", f"{tag[0]} in the text")
    return _Reply(text, None, None, "plain_completion")


def _formatted(reasoning: str, answer: str, note: Note | None = None) -> _Reply | Rejected:
    reasoning, answer = reasoning.strip(), answer.strip()
    if not reasoning:
        return Rejected("empty_thought", "the reasoning is empty")
    if not answer:
        return Rejected("empty_answer", "nothing follows the reasoning")
    for name, part in (("reasoning", reasoning), ("answer", answer)):
        if tag := _FORMAT_TAG.search(part):
            return Rejected("literal_tags", f"{tag[0]} inside the {name}")
    return _Reply(completion_text(reasoning, answer), reasoning, answer, note)


def _gsm8k_reply(text: str) -> _Reply | Rejected:
    if not text.strip():
        return Rejected("empty_answer", "the answer is empty")
    reasoning, mark, answer = text.rpartition("####")
    if not mark:
        return Rejected("no_final_answer", 'no "####" in the answer')
    return _formatted(_CALCULATOR.sub("", reasoning), answer)


def _mbpp_prompt(row: dict[str, Any]) -> str:
    """The task and its tests, in the words of MBPP's own prompt (Austin et al. 2021, section 3)."""
    if not isinstance(tests := row["test_list"], list) or not tests:
        raise ValueError(f'"test_list" must be a non-empty list; accepted rows: {ACCEPTED_SCHEMAS}')
    named = {f"test_list[{index}]": test for index, test in enumerate(tests)}
    lines = [_text(row, "text"), "Your code should pass these tests:", ""]
    return "\n".join(lines + [_text(named, name) for name in named])


def _text(row: dict[str, Any], field: str, where: str = "") -> str:
    """`row[field]` as text that can be encoded; ValueError says what it is instead."""
    name = f'{where} "{field}"'.strip()
    if field not in row:
        raise ValueError(f"{name} is missing; accepted rows: {ACCEPTED_SCHEMAS}")
    value = row[field]
    if not isinstance(value, str):
        kind = "null" if value is None else f"a {type(value).__name__}"
        raise ValueError(f"{name} is {kind}, not a string; accepted rows: {ACCEPTED_SCHEMAS}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} holds a lone surrogate: write the text as UTF-8") from None
    return value


def _optional_reasoning(row: dict[str, Any], where: str = "") -> str | None:
    if row.get("reasoning_content") is None:
        return None
    return _text(row, "reasoning_content", where).strip() or None
