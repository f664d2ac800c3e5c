r"""A row as a task: the prompt that is shown, and what a right answer is held against.

    {question, answer} with "#### 72"          GSM8K, the number behind the last ####; under any
                                               names of a prompt and a response, and for messages
                                               with an assistant last
    {prompt, answer}                           a number or a few words: of a text with a thought
                                               (<think>, reasoning_content, …) the part after it, of
                                               one with a \boxed{…} what is in the last of them
    {prompt, tests}, {text, test_list, …}      code, as MBPP; the prompt is the text and the first
                                               test, in the words that training uses for MBPP
    {prompt, kind}                             for a reward of the user's own

`kind` is "code" with tests, "number" for an answer that is one number, else "text", unless the row
says another. A row is never used with less than what it says: text in fields that nobody reads
rejects it by name, unless a reward of the user's own gets the whole row.
"""

import ast
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from jaxsft.data.fields import PARTS, UNREAD, is_absent, is_blank
from jaxsft.data.messages import read_text
from jaxsft.data.replies import Rejected, RejectedError
from jaxsft.data.rows import DEFAULTS, RowOptions, Turn, convert_prompt, convert_row, split_gsm8k
from jaxsft.rewards.code_tests import split_tests
from jaxsft.rewards.number_text import parse_number
from jaxsft.rewards.one_number import read_one_number
from jaxsft.rewards.records import Task

BUILT_IN = ("format", "answer", "tests")  # rewards; others are FILE.py:FUNCTION
MBPP_TRAINING_IDS = range(601, 975)  # 11–510 are its test ids, 511–600 validation, 1–10 examples
MAX_ANSWER_WORDS = 50
_MBPP_ID = re.compile(
    r"(?:.*mbpp[\W_]*)?([0-9]{1,9})(?:\.0*)?", re.ASCII | re.IGNORECASE | re.DOTALL
)

_ANSWERS = ("final_answer", "ground_truth", "expected_answer", "target", "answer")  # the first
_TESTS = ("tests", "test_list")
_SETUPS = ("test_imports", "test_setup_code", "setup")  # in the order in which they run
_TASK_FIELDS = frozenset(("kind", *_ANSWERS[:-1], *_TESTS, *_SETUPS))
_MBPP_FIELDS = ("code", "challenge_test_list", "source_file")  # its own, that no task needs
_MARKED = re.compile(
    r"(?<!#)####(?!#)[ \t:]*((?:(?!####)[^\n])*)"
)  # GSM8K's mark of a final answer
_BOXED = re.compile(r"\\boxed\s*\{")


def read_task(
    row: Any, how: RowOptions = DEFAULTS, rewards: Collection[str] = BUILT_IN
) -> Task | Rejected:
    """The task of a row, or why it has none. Raises nothing.

    Args:
      row: as `read_rows` gives it with `whole`.
      how: as training converts rows; its `columns` may name those of prompt and response.
      rewards: the names of the run's rewards. With one of the user's own among them a row needs
        neither answer nor tests if it has a `kind`, and may have other fields with text.
    """
    try:
        return _read(row, how, any(name not in BUILT_IN for name in rewards))
    except RejectedError as error:
        return error.rejected
    except RecursionError:
        return Rejected("wrong_field", "a field is nested too deeply")


def turns_of(task: Task, system_prompt: str | None) -> list[Turn]:
    """The turns of a task's prompt; a system text of the row's own stands in place of the run's."""
    turns = [*task.earlier, Turn("user", task.prompt)]
    if system_prompt and turns[0].role != "system":
        turns = [Turn("system", system_prompt), *turns]
    return turns


def is_for_training(task: Task) -> bool:
    """Whether a task may be trained on: all may, but for MBPP's tasks with other ids than 601–974.

    The others are its test, validation and example tasks. A task with tests is MBPP's if it has
    `test_list`, or a `task_id` such as MBPP's: 11, "11", "Mbpp/11", null. One of MBPP's whose id
    can't be read is not for training.
    """
    if not task.tests or not task.row.keys() & {"test_list", "task_id"}:
        return True
    given = task.row.get("task_id")
    number = _MBPP_ID.fullmatch("" if isinstance(given, bool) else str(given).strip())
    if number is None:
        return "test_list" not in task.row and isinstance(given, str) and bool(given.strip())
    return int(number[1]) in MBPP_TRAINING_IDS


def _read(row: Any, how: RowOptions, has_own_rewards: bool) -> Task:
    if not isinstance(row, Mapping):
        kind = type(row).__name__
        raise RejectedError("unknown_fields", f"is a {kind}, not an object with fields")
    kind = _kind(row)
    setup = "\n".join(text for name in _SETUPS for text in _texts(row, name))
    tests = _tests(row)
    fields = _conversation(row, how, bool(tests), has_own_rewards)
    *earlier, user = _turns(fields, how)
    prompt, answer = user.content, None
    if tests:
        if kind in ("number", "text"):
            raise RejectedError("wrong_field", f'"kind" is {kind}, but the row has tests')
        hidden = [test for test in tests[1:] if test not in prompt]
        if not hidden:
            raise RejectedError(
                "wrong_field",
                "all its tests are shown in the prompt: give at least two, of which the first is",
            )
        if isinstance(fault := split_tests(tests, setup), str):
            raise RejectedError("wrong_field", fault)
        if tests[0] not in prompt:
            prompt = _with_test(row, prompt, tests[0])
        tests = (tests[0], *hidden)
    elif kind == "code":
        raise RejectedError("wrong_field", '"kind" is code, but the row has no tests')
    elif _has_answer(row, how):
        answer = _answer(row, fields, how)
        is_number = parse_number(answer) is not None
        kind = kind or ("number" if is_number else "text")
        if kind == "number" and read_one_number(answer).number is None:
            raise RejectedError("wrong_field", f'"kind" is number, but the answer is {answer[:40]}')
    elif not (kind and has_own_rewards) or kind in ("number", "text"):
        found = ", ".join(f'"{str(name)[:40]}"' for name in list(row)[:8])
        raise RejectedError(
            "unknown_fields",
            f"no answer and no tests in {found}: name the column of the answer with data.columns "
            "(response), or give the row a kind for a reward of your own",
        )
    read = {name: value for name, value in row.items() if value is not UNREAD}
    return Task(prompt, kind or "code", answer, tests, setup, read, tuple(earlier))


def _kind(row: Mapping[str, Any]) -> str:
    """The row's own kind; "" if it has none."""
    if is_absent(row.get("kind")):
        return ""
    kind = read_text(row, "kind").strip()
    is_known = kind.lower() in ("number", "text", "code")
    return kind.lower() if is_known else kind[:100]


def _texts(row: Mapping[str, Any], name: str) -> list[str]:
    """The texts of a field that has one, a list of them, or nothing; LF ends their lines."""
    value = row.get(name)
    if is_absent(value) or is_blank(value):
        return []
    if not isinstance(value, list):
        return [read_text(row, name).replace("\r\n", "\n")]
    named = {f"{name}[{index}]": each for index, each in enumerate(value)}
    return [read_text(named, each).replace("\r\n", "\n") for each in named]


def _tests(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The tests of the row, those in one text taken apart; none is an empty tuple."""
    tests: list[str] = []
    for name in _TESTS:
        found = [text.strip() for text in _texts(row, name)]
        tests += (
            found if isinstance(row.get(name), list) else [t for x in found for t in _asserts(x)]
        )
    return tuple(tests)


def _asserts(text: str) -> list[str]:
    """The assert statements of a text that has nothing else; any other text as it is."""
    try:
        with warnings.catch_warnings():  # of odd escapes in strings
            warnings.simplefilter("ignore")
            statements = ast.parse(text).body
    except (SyntaxError, ValueError, MemoryError):
        return [text]
    if not all(isinstance(each, ast.Assert) for each in statements):
        return [text]
    return [str(ast.get_source_segment(text, each)) for each in statements]


def _conversation(
    row: Mapping[str, Any], how: RowOptions, is_code: bool, has_own_rewards: bool
) -> dict[str, Any]:
    """The fields of the row that make its prompt, and those that nobody would read."""
    fields = {name: value for name, value in row.items() if name not in _TASK_FIELDS}
    if how.columns:
        return fields | {name: row[name] for name in how.columns.values() if name in row}
    if is_code:
        fields = {name: value for name, value in fields.items() if name not in _MBPP_FIELDS}
        if all(is_absent(row.get(name)) for name in PARTS["prompt"]) and "text" in fields:
            fields["prompt"] = fields.pop("text")
    known = {name for names in PARTS.values() for name in names}
    is_read = known if has_own_rewards else fields.keys()
    return {name: value for name, value in fields.items() if name in is_read}


def _turns(fields: Mapping[str, Any], how: RowOptions) -> tuple[Turn, ...]:
    turns = convert_prompt(fields, how)
    if isinstance(turns, Rejected):
        raise RejectedError(turns.reason, turns.detail)  # type: ignore[arg-type]
    return turns


def _with_test(row: Mapping[str, Any], prompt: str, test: str) -> str:
    """The prompt in MBPP's own words, with one test."""
    setup = {name: row[name] for name in ("test_imports", "test_setup_code") if name in row}
    fields = {"text": prompt, "test_list": [test], **setup}
    if not is_absent(row.get("setup")):
        fields["test_setup_code"] = "\n".join(
            text for name in _SETUPS[1:] for text in _texts(row, name)
        )
    return _turns(fields, DEFAULTS)[-1].content


def _has_answer(row: Mapping[str, Any], how: RowOptions) -> bool:
    if how.columns:
        names: Collection[str] = [how.columns[name] for name in ("response", "messages")
                                  if name in how.columns]  # fmt: skip
    else:
        names = (*_ANSWERS, *PARTS["response"])
        if _ends_with_answer(row):
            return True
    return any(not (is_absent(row.get(name)) or is_blank(row[name])) for name in names)


def _ends_with_answer(row: Mapping[str, Any]) -> bool:
    """Whether the row's messages end with a turn that is not the user's."""
    return any(
        isinstance(chat := row.get(name), list)
        and chat
        and isinstance(chat[-1], Mapping)
        and str(chat[-1].get("role") or chat[-1].get("from")).lower() not in ("user", "human")
        for name in PARTS["messages"]
    )


def _answer(row: Mapping[str, Any], conversation: Mapping[str, Any], how: RowOptions) -> str:
    r"""The answer alone: without a thought, calculations before "####", or text around \boxed{}."""
    names: Sequence[str] = [how.columns.get("response", "")] if how.columns else _ANSWERS
    names = [name for name in names if not is_absent(row.get(name))]
    plain = how._replace(columns=None, without_thought="keep_plain")
    if names and not isinstance(row.get(names[0]), list):
        fields = {"prompt": "?", "response": _as_text(row, names[0])}
        fields |= {
            name: row[name] for name in PARTS["reasoning"] if not how.columns and name in row
        }
        found = convert_row(fields, plain)
    else:
        found = convert_row(conversation, how)
    if isinstance(found, Rejected):
        raise RejectedError(found.reason, found.detail)  # type: ignore[arg-type]
    text = found.turns[-1].content if found.answer is None else found.answer
    _, text = split_gsm8k(text)
    marked = _MARKED.findall(text)
    final = marked[-1].strip() if marked else ""
    is_last = text.rstrip().endswith(final) and len(final.split()) < 2
    if marked and (is_last or parse_number(final) is not None):
        text = final
    elif boxed := _last_boxed(text):
        text = boxed
    elif marked:
        raise RejectedError("wrong_field", "behind the last #### of its answer is no number alone")
    if not text.strip():
        raise RejectedError("empty_answer", "nothing after the #### of its answer")
    if (num_words := len(text.split())) > MAX_ANSWER_WORDS:
        raise RejectedError(
            "wrong_field",
            f"the answer has {num_words} words: only a number or a few words can be told right",
        )
    return text


def _as_text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float | Decimal):
        number = Decimal(repr(value) if isinstance(value, float) else value)
        if not number.is_finite() or abs(number.adjusted()) > 90:
            raise RejectedError("wrong_field", f'"{name}" is no number of ordinary size')
        return format(number, "f")
    return read_text(row, name)


def _last_boxed(text: str) -> str | None:
    r"""What is in the last \boxed{…} of a text; None without one that is closed."""
    for found in reversed(list(_BOXED.finditer(text))[-3:]):
        depth = 1
        for at in range(found.end(), len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if not depth:
                return text[found.end() : at].strip() or None
    return None
