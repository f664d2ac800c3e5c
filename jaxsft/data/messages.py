"""Lists of chat messages -> their roles, texts, thoughts and weights.

    {role, content} or {from, value}      content: a text, or a list of text parts
    reasoning_content, reasoning, …       a thought in a field of its own (fields.PARTS)
    {type: thinking, thinking} parts      the same
    weight 0 or 1; train, … true or false  whether an assistant turn is trained

Any other field with text in it, tool calls and parts that are no text reject the row by name.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxsft.data.fields import PARTS, Repeated, has_text, is_harmless
from jaxsft.data.replies import RejectedError, Role

ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
_TOOL_ROLES = ("tool", "tools", "function", "function_call", "function_response", "observation")
_TOOL_FIELDS = ("tool_calls", "function_call", "tool_call_id", "tools", "functions")
_NAMES = (("role", "content"), ("from", "value"))
_WEIGHTS = ("weight", "loss_weight")  # 0 or 1
_SWITCHES = ("train", "trainable", "training", "should_train", "learn", "loss")  # true or false
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


def read_messages(value: Any, where: str) -> Messages:
    """Reads a list of messages; `where` is the field's name, for the reasons.

    Blank system messages are left out; the order of the roles is not checked here.
    """
    if not isinstance(value, list) or not value:
        raise RejectedError("wrong_field", f'"{where}" must be a list of messages')
    messages: list[Message] = []
    unused: set[str] = set()
    for index, each in enumerate(value):
        message = _read_message(each, f"{where}[{index}]", unused)
        if message.role != "system" or message.text.strip():
            messages.append(message)
    return Messages(messages, frozenset(f"{where}[].{name}" for name in unused))


def _read_message(message: Any, where: str, unused: set[str]) -> Message:
    if not isinstance(message, Mapping):
        raise RejectedError("wrong_field", f"{where} must be an object with role and content")
    given = {name: value for name, value in message.items() if value is not None}
    role_name, text_name = _NAMES["from" in given and "role" not in given]
    name = read_text(given, role_name, where)
    tool = next((field for field in _TOOL_FIELDS if given.get(field)), None)
    if tool is not None or name.lower() in _TOOL_ROLES:
        raise RejectedError("tools", f"{where} has {tool or f'the role {name}'}")
    role = ROLES.get(name.lower())
    if role is None:
        raise RejectedError("wrong_roles", f'{where} has the role "{name[:40]}"')
    parts = _read_content(given, text_name, where)
    text, thought = parts
    is_trained = _read_weight(given, where)
    for field in given.keys() - {role_name, text_name, *_WEIGHTS, *_SWITCHES, *_TOOL_FIELDS}:
        used = role == "assistant" and field in PARTS["reasoning"] and thought is None
        if used and has_text(given[field]):
            thought = read_text(given, field, where)
        elif not used and not is_harmless(field) and has_text(given[field]):
            raise RejectedError(
                "unused_text", f'{where} has text in "{field[:40]}", which is not used'
            )
        elif not used:
            unused.add(field)
    return Message(role, text, thought, is_trained)


def _read_content(message: Mapping[str, Any], name: str, where: str) -> tuple[str, str | None]:
    """(text, thought) of a text, or of a list of parts."""
    if not isinstance(parts := message.get(name), list):
        return read_text(message, name, where), None
    texts: list[str] = []
    thoughts: list[str] = []
    for index, part in enumerate(parts):
        place = f"{where}.{name}[{index}]"
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise RejectedError("wrong_field", f"{place} must be a part with type and text")
        kind = part.get("type", "text")
        if kind not in TEXT_PARTS and kind not in _THOUGHT_PARTS:
            raise RejectedError("not_text", f'{place} is of the type "{str(kind)[:40]}"')
        field = "text" if kind in TEXT_PARTS else _THOUGHT_PARTS[kind]
        text = read_text(part, field, place)
        (texts if kind in TEXT_PARTS else thoughts).append(text)
        other = next((k for k, v in part.items() if k not in ("type", field) and has_text(v)), None)
        if other is not None and not is_harmless(other):
            raise RejectedError(
                "unused_text", f'{place} has text in "{other[:40]}", which is not used'
            )
    return "".join(texts), "\n".join(thoughts) or None


def _read_weight(message: Mapping[str, Any], where: str) -> bool:
    is_trained = True
    for name in (*_WEIGHTS, *_SWITCHES):
        value = message.get(name, True)
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RejectedError("weight", f'{where} has "{name}" {str(value)[:20]}, not 0 or 1')
        is_trained = is_trained and bool(value)
    return is_trained


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
