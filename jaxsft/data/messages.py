"""Lists of chat messages -> their roles, texts, thoughts and weights.

    {role, content} or {from, value}      content: a text, or a list of text parts
    reasoning_content, reasoning, …       a thought in a field of its own (fields.PARTS)
    {type: thinking, thinking} parts      the same
    weight, train, … (fields.LEARN, SKIP) whether an assistant turn is trained: 0, 1, true, false

Any other field with text in it, tool calls and parts that are no text reject the row by name.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxsft.data.fields import (
    LEARN,
    PARTS,
    SKIP,
    Repeated,
    has_text,
    holds_parts,
    is_absent,
    is_blank,
    is_flag,
    is_harmless,
    texts_in,
)
from jaxsft.data.replies import RejectedError, Role

ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
_TOOL_ROLES = ("tool", "tools", "function", "function_call", "function_response", "observation")
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id", "tools", "functions")
_NAMES = (("role", "content"), ("from", "value"))
_WEIGHT_FIELDS = frozenset((*LEARN, *SKIP))
_MAY_BE_OTHER = ("rejected", "loss")  # a text of a preference pair, a measured loss
_SWITCHES = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}
_THOUGHT_PARTS = {"thinking": "thinking", "reasoning": "reasoning"}  # type -> the part's field
TEXT_PARTS = ("text", "input_text", "output_text")


class Message(NamedTuple):
    """One message as the data set has it. `is_trained` says whether its tokens may bear loss."""

    role: Role
    text: str
    thought: str | None = None
    is_trained: bool = True


class Messages(NamedTuple):
    """The messages, and the names of their fields that were not used."""

    messages: list[Message]
    unused: frozenset[str]


def read_messages(value: Any, where: str, is_named: bool = False) -> Messages:
    """Reads a list of messages.

    Blank system messages are left out; the order of the roles is not checked here.

    Args:
      value: the list.
      where: the field's name, for the reasons.
      is_named: whether the user named the field; other fields of messages are then not used.
    """
    if not isinstance(value, list) or not value:
        raise RejectedError("wrong_field", f'"{where}" must be a list of messages')
    messages: list[Message] = []
    unused: set[str] = set()
    for index, each in enumerate(value):
        message = _read_message(each, f"{where}[{index}]", unused, is_named)
        if message.role != "system" or message.text.strip():
            messages.append(message)
    return Messages(messages, frozenset(f"{where}[].{name}" for name in unused))


def _read_message(message: Any, where: str, unused: set[str], is_named: bool) -> Message:
    if not isinstance(message, Mapping):
        raise RejectedError("wrong_field", f"{where} must be an object with role and content")
    given = {name: value for name, value in message.items() if not is_absent(value)}
    role_name, text_name = _NAMES["from" in given and "role" not in given]
    name = read_text(given, role_name, where)
    tool = next((field for field in _TOOL_FIELDS if has_text(given.get(field))), None)
    if tool is not None or name.lower() in _TOOL_ROLES:
        raise RejectedError("tools", f"{where} has {tool or f'the role {name}'}")
    role = ROLES.get(name.lower())
    if role is None:
        raise RejectedError("wrong_roles", f'{where} has the role "{name[:40]}"')
    content = _read_content(given, text_name, where, unused)
    used = {role_name, text_name, *_TOOL_FIELDS}
    thought = content.thought
    if role == "assistant":
        is_trained = field_against_learning(given, where) is None
        used |= {*LEARN, *SKIP}
        for field in PARTS["reasoning"]:
            if thought is None and has_text(given.get(field)) and not is_flag(given[field]):
                thought = read_text(given, field, where)
                used.add(field)
    elif thought is not None:
        raise RejectedError("unused_text", f"{where} has a thought, which is not used")
    else:
        is_trained = True
    said = (content.text.strip(), (thought or "").strip(), name)
    for field, value in given.items():
        if field in used:
            continue
        is_known = is_harmless(field) and not holds_parts(value)
        is_known |= is_flag(value) and field in PARTS["reasoning"]
        if not (is_named or is_known) and any(text not in said for text in texts_in(value)):
            raise RejectedError(
                "unused_text", f'{where} has text in "{field[:40]}", which is not used'
            )
        unused.add(field)
    return Message(role, content.text, thought, is_trained)


class _Content(NamedTuple):
    text: str
    thought: str | None = None


def _read_content(message: Mapping[str, Any], name: str, where: str, unused: set[str]) -> _Content:
    """The content of a message: a text, or a list of parts."""
    if not isinstance(parts := message.get(name), list):
        return _Content(read_text(message, name, where))
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(parts):
        place = f"{where}.{name}[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise RejectedError("wrong_field", f"{place} must be a part with type and text")
        kind = str(part.get("type", "text"))
        if kind in TEXT_PARTS:
            field = "text"
            texts.append(read_text(part, field, place))
        elif kind in _THOUGHT_PARTS:
            field = _THOUGHT_PARTS[kind]
            thoughts += _thoughts_of(part, field, place)
        else:
            raise RejectedError("not_text", f'{place} is of the type "{kind[:40]}"')
        for other, value in part.items():
            if other in ("type", field) or not has_text(value):
                continue
            if not is_harmless(other):
                raise RejectedError(
                    "unused_text", f'{place} has text in "{other[:40]}", which is not used'
                )
            unused.add(f"{name}[].{other}")
    return _Content("".join(texts), "\n".join(thoughts) or None)


def _thoughts_of(part: Mapping[str, Any], field: str, where: str) -> Iterator[str]:
    """The texts of a thinking part, which is a text, or a list of text parts."""
    pieces = part.get(field)
    for piece in pieces if isinstance(pieces, list) else [part]:
        if not isinstance(piece, Mapping):
            raise RejectedError("wrong_field", f"{where} must hold text parts")
        yield read_text(piece, field if piece is part else "text", where)


def field_against_learning(given: Mapping[str, Any], where: str) -> str | None:
    """The first field that says that a message, or a row, is not to be learnt."""
    found = None
    for name, value in given.items():
        if name not in _WEIGHT_FIELDS or is_absent(value) or is_blank(value):
            continue
        if name in _MAY_BE_OTHER and not isinstance(value, bool):
            continue
        switch = _SWITCHES.get(str(value).strip().lower())
        if switch is None:
            raise RejectedError("weight", f'{where} has "{name}" {str(value)[:20]}, not 0 or 1')
        if switch != (name in LEARN) and found is None:
            found = name
    return found


def read_text(row: Mapping[str, Any], field: str, where: str = "") -> str:
    """`row[field]` if it is a text that can be encoded; else the reason."""
    name = f'{where} "{field}"'.strip()
    value = row.get(field)
    if isinstance(value, Repeated):
        raise RejectedError("wrong_field", f"{name} is there more than once")
    if not isinstance(value, str):
        kind = "missing or null" if value is None else f"a {type(value).__name__}, not a text"
        raise RejectedError("wrong_field", f"{name} is {kind}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RejectedError("wrong_field", f"{name} holds a lone surrogate") from None
    return value
