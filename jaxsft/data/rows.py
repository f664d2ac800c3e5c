"""Rows of a data set -> conversations with answers in the form that training teaches.

Text only: no token, no file. Accepted rows (`fields.PARTS` has the names of each part):

    {messages} or {conversations}[, system]     lists of {role, content} or {from, value}; if they
                                                end with a user, {response[, reasoning]} answers
    {prompt, response[, reasoning, input, system]}   under any of their names, as {instruction,
                                                input, output} or {problem, solution}; prompt and
                                                response may be lists of messages
    {input, output}                             the input is the prompt
    {question, answer} with "#### …" last       GSM8K: reasoning, then the answer; <<calculator>>
                                                notes are removed
    {text, code, test_list}                     MBPP: the prompt is the text and the tests; CRLF in
                                                code becomes LF

With `data.columns` the user says which column holds which part; a row that has none of these
columns is read by its own names. A null field counts as absent. Anything else that holds text and
is in none of these parts rejects the row by name, unless its name says that it is harmless or the
conversation already holds its text. messages.py and replies.py have what becomes of each message
and each assistant text. All texts are trimmed.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.fields import (
    LEARN,
    PARTS,
    has_text,
    holds_parts,
    is_absent,
    is_blank,
    is_flag,
    is_harmless,
    texts_in,
)
from jaxsft.data.messages import (
    ROLES,
    Message,
    Messages,
    field_against_learning,
    read_messages,
    read_text,
)
from jaxsft.data.replies import (
    ConvertedReply,
    Note,
    Rejected,
    RejectedError,
    Role,
    convert_reply,
    other_tag,
)

# Raise it with every change of what becomes of a row, here or in fields, messages, replies,
# answer_template, sources, filters, loops, chat, tokenizer, vocabulary, samples, packing, bins or
# prepared: rows prepared before are then prepared again. A test in tests/data/test_prepared.py
# fails when the outcome changes and this number does not.
ROWS_VERSION = 3

_CONTROL = re.compile(
    r"<(?:pad|eos|bos|unk|mask|(?:start|end)_of_(?:turn|image)|image_soft_token|unused\d+"
    r"|/?s|\|\w+\|)>"  # the last two are of other models
)
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_OPTIONAL = ("system", "input", "reasoning")  # parts that count as absent if they are blank
# Magpie's own fields about a row, harmless beside its others.
_MAGPIE = frozenset(("knowledge", "quality_explanation", "gen_input_configs"))
_CACHED_FIELDS = 100  # of more no cache is kept: they may be other ones in each row
_MIN_COMMON_CHARS = 40  # a shorter text may stand in another by chance
_MAX_FRAME_CHARS = 400  # that a written-out conversation adds: Alpaca's has about 170


class Turn(NamedTuple):
    """One turn of a conversation; an assistant turn bears loss if `is_trained`."""

    role: Role
    content: str
    is_trained: bool = True


class RowFields(NamedTuple):
    """The names of the fields that became part of a conversation, and of those that did not."""

    used: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


class Conversation(NamedTuple):
    """A conversation that ends with a trained assistant turn.

    `reasoning` and `answer` are that turn's, None where it is a plain text. The note
    "plain_completion" says that some trained turn is one.
    """

    turns: tuple[Turn, ...]
    reasoning: str | None
    answer: str | None
    notes: tuple[Note, ...] = ()
    fields: RowFields = RowFields()


class RowOptions(NamedTuple):
    """How rows are converted; config.DataOptions describes each."""

    columns: Mapping[str, str] | None = None
    without_thought: Literal["reject", "keep_plain", "drop_system"] = "drop_system"
    earlier_reasoning: Literal["keep", "strip"] = "keep"
    template: AnswerTemplate = AnswerTemplate()


DEFAULTS = RowOptions()


def with_reasoning(
    conversation: Conversation, reasoning: str, template: AnswerTemplate
) -> Conversation:
    """The same conversation with another reasoning in its last turn, which must have one."""
    assert conversation.reasoning is not None and conversation.answer is not None
    last = Turn("assistant", template.join(reasoning, conversation.answer))
    return conversation._replace(turns=(*conversation.turns[:-1], last), reasoning=reasoning)


def _roles_fault(roles: Sequence[Role], last: Role) -> str | None:
    """What is wrong with the roles, unless they are [system,] user, assistant, … up to `last`."""
    body = roles[1:] if roles[:1] == ["system"] else roles
    wanted = ["assistant" if i % 2 else "user" for i in range(len(body))]
    if body == wanted and body[-1:] == [last]:
        return None
    return (
        f"the roles are {', '.join(roles[:8]) or 'none'}{', …' if len(roles) > 8 else ''}: "
        f"they must be [system,] user, assistant, user, … and end with {last}"
    )


def _check_order(messages: Sequence[Message], last: Role) -> None:
    if fault := _roles_fault([message.role for message in messages], last):
        raise RejectedError("wrong_roles", fault)


def check_roles(turns: Sequence[Turn], last: Role) -> None:
    """Raises ValueError unless the roles are [system,] user, assistant, … and end in `last`."""
    if fault := _roles_fault([turn.role for turn in turns], last):
        raise ValueError(fault)


def convert_row(row: Any, options: RowOptions = DEFAULTS) -> Conversation | Rejected:
    """Converts one row; the module's docstring lists what is accepted. Raises nothing."""
    try:
        parts, is_named = _find_parts(row, options.columns, needs_answer=True)
        messages, unused = _read_prompt(row, parts, is_named)
        if "messages" not in parts:
            answers = _read_answer(row, parts, is_named)
            messages, unused = messages + answers.messages, unused | answers.unused
        conversation = _converse(messages, options)
        used = tuple(parts.values())
        if len(used) < len(row):
            _check_weight(row)
            if not is_named:
                _check_unused(row, used, messages)
        row_fields = _row_fields if len(row) <= _CACHED_FIELDS else _row_fields.__wrapped__
        return conversation._replace(fields=row_fields(_names(row), used, unused))
    except RejectedError as error:
        return error.rejected
    except RecursionError:
        return Rejected("wrong_field", "a field is nested too deeply")


def convert_prompt(row: Any, options: RowOptions = DEFAULTS) -> tuple[Turn, ...] | Rejected:
    """The turns of a row up to its last user turn; fields for the answer are not looked at."""
    try:
        parts, is_named = _find_parts(row, options.columns, needs_answer=False)
        chat = parts.get("messages")
        if chat is not None and isinstance(row[chat], list):
            users = [i for i, each in enumerate(row[chat]) if _is_of_user(each)]
            row = {**row, chat: row[chat][: users[-1] + 1] if users else row[chat]}
        messages, _ = _read_prompt(row, parts, is_named)
        _check_order(messages, last="user")
        if not is_named:
            used = (*parts.values(), *PARTS["response"], *PARTS["reasoning"], "code")
            _check_unused(row, used, messages)
        return tuple(turn for turn, _ in _turns(messages, options))
    except RejectedError as error:
        return error.rejected
    except RecursionError:
        return Rejected("wrong_field", "a field is nested too deeply")


def _names(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name, value in row.items() if value is not None)


def _find_parts(
    row: Any, columns: Mapping[str, str] | None, needs_answer: bool
) -> tuple[dict[str, str], bool]:
    """(the name of the field that holds each part, whether they are columns that the user named)"""
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise RejectedError("unknown_fields", f"is a {kind}, not an object with fields")
    parts = {part: name for part, name in (columns or {}).items() if not is_absent(row.get(name))}
    if parts:
        if "messages" in parts and "prompt" in parts:
            both = f'"{parts["messages"]}" and "{parts["prompt"]}"'
            raise RejectedError("unused_text", f"{both} both hold the prompt")
        if "messages" in parts and "response" in parts:
            parts["prompt"] = parts.pop("messages")
        return parts, True
    names, blank = _present_names(row)
    layout = _layout if len(row) <= _CACHED_FIELDS else _layout.__wrapped__
    parts = dict(layout(names, blank, needs_answer))
    if "messages" in parts and needs_answer and _ends_with_user(row[parts["messages"]]):
        flat = _parts_by_name(names, ())  # the answer may have a column of its own
        if "response" in flat:
            own = ("response", "reasoning", "system")
            return {"prompt": parts["messages"]} | {p: flat[p] for p in own if p in flat}, False
    written_out = parts.get("prompt") == "prompt" and "instruction" in names
    if written_out and _holds_both(row, parts.get("response")):
        parts["prompt"] = "instruction"
    return parts, False


def _present_names(row: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the names of fields with a value, the names of blank ones); null fields are in neither."""
    names: list[str] = []
    blank: list[str] = []
    for name, value in row.items():
        if isinstance(value, str) and value[:1] > " ":  # the usual case, at once
            is_empty = name in PARTS["reasoning"] and is_flag(value)
        elif is_absent(value):
            continue
        else:
            is_empty = is_blank(value) or (name in PARTS["reasoning"] and is_flag(value))
        (blank if is_empty else names).append(name)
    return tuple(names), tuple(blank)


def _holds_both(row: Mapping[str, Any], response: str | None) -> bool:
    """Whether the prompt is the instruction and its answer, written out."""
    texts = (row["prompt"], row["instruction"], row[response] if response else None)
    if not all(isinstance(text, str) for text in texts):
        return False
    prompt, instruction, answer = map(str, texts)
    return instruction.strip() in prompt and answer.strip() in prompt


@lru_cache(maxsize=1024)
def _layout(names: tuple[str, ...], blank: tuple[str, ...], needs_answer: bool) -> dict[str, str]:
    parts = _parts_by_name(names, blank)
    names += blank
    if "messages" in parts:
        return {part: parts[part] for part in ("messages", "system") if part in parts}
    task = next((name for name in ("text", "prompt") if name in names), None)
    if task and "test_list" in names and ("code" in names or not needs_answer):
        fields = ("code", "test_list", "test_setup_code", "test_imports")
        return {"task": task} | {name: name for name in fields if name in names}
    if "prompt" not in parts and "input" in parts:
        parts["prompt"] = parts.pop("input")
    if "prompt" in parts and ("response" in parts or not needs_answer):
        return parts
    if {"chosen", "rejected"} <= set(names):
        columns = "prompt: prompt, response: chosen" if "prompt" in names else "messages: chosen"
        raise RejectedError(
            "unknown_fields",
            'a pair of "chosen" and "rejected" is for preference training; to train on the chosen '
            f"ones, name them: --data.columns '{{{columns}}}'",
        )
    if "text" in names:
        raise RejectedError(
            "unknown_fields",
            '"text" alone does not say what is prompt and what is answer; write rows with prompt '
            "and response, or messages",
        )
    found = ", ".join(f'"{str(name)[:40]}"' for name in names[:8]) or "no field"
    raise RejectedError(
        "unknown_fields",
        f"no prompt with a response, and no messages, in {found}; name them with data.columns",
    )


def _parts_by_name(names: tuple[str, ...], blank: tuple[str, ...]) -> dict[str, str]:
    """The first name of each part that has a value; else, if it must be there, a blank one."""
    parts = {}
    for part, accepted in PARTS.items():
        found = names if part in _OPTIONAL else (*names, *blank)
        order = [name for name in accepted if name in names] + list(accepted)
        name = next((name for name in order if name in found), None)
        if name is not None:
            parts[part] = name
    if parts.get("messages") in blank and "prompt" in parts and "response" in parts:
        del parts["messages"]
    return parts


def _read_prompt(row: Mapping[str, Any], parts: Mapping[str, str], is_named: bool) -> Messages:
    """The messages up to the answer; of a chat, all."""
    unused: frozenset[str] = frozenset()
    messages: list[Message]
    if "task" in parts:
        text = _mbpp_prompt(row, parts)
        return Messages([Message("user", text)], unused)
    chat = "messages" if "messages" in parts else "prompt"
    if chat not in parts:
        found = ", ".join(f'"{name}"' for name in parts.values())
        raise RejectedError("wrong_field", f"there is no prompt beside {found}")
    if chat == "messages" or isinstance(row[parts["prompt"]], list):
        messages, unused = read_messages(row[parts[chat]], parts[chat], is_named)
        if chat == "prompt":  # only the response is trained, as the row says by its form
            messages = [message._replace(is_trained=False) for message in messages]
        if "input" in parts:
            raise RejectedError(
                "unused_text", f'"{parts["input"]}" has no place beside a list of messages'
            )
    else:
        texts = [read_text(row, parts[part]) for part in ("prompt", "input") if part in parts]
        messages = [Message("user", "\n\n".join(t.strip() for t in texts if t.strip()))]
    if "system" in parts:
        system = read_text(row, parts["system"])
        if not messages or messages[0].role != "system":
            messages = [Message("system", system), *messages] if system.strip() else messages
        elif messages[0].text.strip() != system.strip():
            raise RejectedError(
                "unused_text", f'"{parts["system"]}" differs from the system text of the messages'
            )
    return Messages(messages, unused)


def _read_answer(row: Mapping[str, Any], parts: Mapping[str, str], is_named: bool) -> Messages:
    name = parts.get("code") or parts.get("response")
    if name is None:
        found = ", ".join(f'"{name}"' for name in parts.values())
        raise RejectedError("wrong_field", f"there is no response beside {found}")
    if isinstance(row[name], list):
        if "reasoning" in parts:
            raise RejectedError(
                "unused_text", f'"{parts["reasoning"]}" has no place beside a list of messages'
            )
        return read_messages(row[name], name, is_named)
    text, unused = read_text(row, name), frozenset[str]()
    if "code" in parts:
        return Messages([Message("assistant", text.replace("\r\n", "\n"))], unused)
    thought: str | None = None
    if "reasoning" in parts:
        thought = read_text(row, parts["reasoning"])
    elif (parts["prompt"], name) == ("question", "answer"):
        thought, text = split_gsm8k(text)
    return Messages([Message("assistant", text, thought)], unused)


def split_gsm8k(text: str) -> tuple[str | None, str]:
    """(reasoning, answer) if the last line is "####" and a number or a word; else (None, text)."""
    text = text.rstrip()
    start = text.rfind("\n") + 1
    mark, answer = text[start : start + 4], text[start + 4 :].strip()
    is_final = len(answer.split()) < 2 or any(map(str.isdigit, answer))
    if mark != "####" or answer.startswith("#") or not is_final:
        return None, text
    return _CALCULATOR.sub("", text[:start]), answer


def _mbpp_prompt(row: Mapping[str, Any], parts: Mapping[str, str]) -> str:
    """The task and its tests, in the words of MBPP's own prompt (Austin et al. 2021, section 3)."""
    lines: list[str] = [read_text(row, parts["task"])]
    lines += ["Your code should pass these tests:", ""]
    for name in ("test_imports", "test_setup_code", "test_list"):
        value = row.get(name)
        tests = value if isinstance(value, list) else [value] if has_text(value) else []
        named = {f"{name}[{index}]": test for index, test in enumerate(tests)}
        lines += [read_text(named, each).replace("\r\n", "\n") for each in named]
        if name == "test_list" and not named:
            raise RejectedError("wrong_field", '"test_list" must be a list of tests')
    return "\n".join(lines)


def _converse(messages: Sequence[Message], options: RowOptions) -> Conversation:
    """Joins the messages to a conversation that ends with the last trained answer."""
    _check_order(messages, last="assistant")
    trained = [i for i, each in enumerate(messages) if each.role == "assistant" and each.is_trained]
    if not trained:
        raise RejectedError("weight", "no turn of it is to be trained")
    found = _turns(messages[: trained[-1] + 1], options)
    turns = tuple(turn for turn, _ in found)
    replies = [reply for turn, reply in found if reply is not None and turn.is_trained]
    notes = {reply.note for reply in replies if reply.note}
    if any(reply.reasoning is None for reply in replies):
        if options.without_thought == "reject":
            raise RejectedError("no_thought", "an answer has no thought, or an empty one")
        notes.add("plain_completion")
    if any("<" in turn.content and _CONTROL.search(turn.content) for turn in turns):
        notes.add("control_look_alike")
    if turns[0].role == "system" and other_tag(turns[0].content, options.template):
        notes.add("system_has_other_tags")
    last = replies[-1]
    return Conversation(turns, last.reasoning, last.answer, tuple(sorted(notes)))


def _turns(
    messages: Sequence[Message], options: RowOptions
) -> list[tuple[Turn, ConvertedReply | None]]:
    """The turn of each message, with its reply where it is an assistant's."""
    found: list[tuple[Turn, ConvertedReply | None]] = []
    for index, message in enumerate(messages):
        if message.role != "assistant":
            if message.role == "user" and not message.text.strip():
                raise RejectedError("empty_prompt", "a user turn has no text")
            found.append((Turn(message.role, message.text.strip()), None))
            continue
        reply = convert_reply(message.text, message.thought, options.template)
        turn = Turn("assistant", reply.content, message.is_trained)
        if options.earlier_reasoning == "strip" and index < len(messages) - 1:
            turn = Turn("assistant", options.template.without_reasoning(reply.content), False)
        found.append((turn, reply))
    return found


def _check_weight(row: Mapping[str, Any]) -> None:
    """Rejects a row that says that it is not to be learnt; rows have no other weights."""
    name = field_against_learning(row, "the row")
    if name is None and str(row.get("label")).strip().lower() in ("false", "0", "0.0"):
        name = "label"
    if name is not None:
        raise RejectedError("weight", f'"{name}" says that the row is not to be learnt')


def _check_unused(row: Mapping[str, Any], used: Sequence[str], messages: Sequence[Message]) -> None:
    """Rejects a row with text that is not used, not harmless, and not in the conversation."""
    for name, value in row.items():
        if name in used or name in LEARN or not has_text(value):  # _check_weight read LEARN
            continue
        if is_harmless(name) and not holds_parts(value):
            continue
        if name in PARTS["reasoning"] and is_flag(value):
            continue
        if name in _MAGPIE and "task_category" in row:
            continue
        if all(_is_said(text, messages) for text in texts_in(value)):
            continue
        if name in ("text", "prompt") and isinstance(value, str) and _renders(value, messages):
            continue
        raise RejectedError(
            "unused_text",
            f'"{str(name)[:40]}" holds text that would not be used; name the columns to use '
            "with data.columns, or remove it",
        )


def _is_said(text: str, messages: Sequence[Message]) -> bool:
    """Whether the text is one of the conversation's, or a long enough piece of one."""
    is_long = len(text) >= _MIN_COMMON_CHARS
    texts = (said for each in messages for said in (each.text, each.thought or ""))
    return any(text == said.strip() or (is_long and text in said) for said in texts)


def _renders(text: str, messages: Sequence[Message]) -> bool:
    """Whether the text is the whole conversation written out, as Alpaca's column "text" is."""
    said = [each.text.strip() for each in messages]
    is_all = all(each in text for each in said)
    return is_all and len(text) <= sum(map(len, said)) + _MAX_FRAME_CHARS


@lru_cache(maxsize=1024)
def _row_fields(names: tuple[str, ...], used: tuple[str, ...], others: frozenset[str]) -> RowFields:
    unused = [name for name in names if name not in used]
    # A name with a lone surrogate cannot be written.
    both = (used, (*unused, *sorted(others)))
    shown = ((str(name).encode("utf-8", "replace").decode() for name in each) for each in both)
    return RowFields(*map(tuple, shown))


def _ends_with_user(messages: Any) -> bool:
    return isinstance(messages, list) and bool(messages) and _is_of_user(messages[-1])


def _is_of_user(message: Any) -> bool:
    name = message.get("role") or message.get("from") if isinstance(message, Mapping) else None
    return isinstance(name, str) and ROLES.get(name.lower()) == "user"
