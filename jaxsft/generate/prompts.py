"""Reads files of prompts as turns, the same turns that `convert_row` makes for training.

    {prompt}, {question}, {instruction}, {text, test_list}    one user turn
    {messages} or {conversations}                             up to the last user turn
    a line of a .txt file                                     one user turn

Other fields of a row, such as an answer, are left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.data.rows import Rejected, Turn, convert_row
from jaxsft.data.sources import read_rows

_ANSWER = "-"  # `convert_row` asks for one


class FilePrompt(NamedTuple):
    """The turns to answer; `where` names the file and the line."""

    where: str
    turns: tuple[Turn, ...]


def read_prompt_file(path: Path, system: str) -> list[FilePrompt]:
    """The prompts of a .txt file, or of a file that `read_rows` reads.

    Prompts without a system turn get `system`. ValueError names the file and the line.
    """
    rows = _read_lines(path) if path.suffix.lower() == ".txt" else read_rows(path)
    prompts = []
    for where, row in rows:
        try:
            converted = convert_row(_with_answer(row))
            if isinstance(converted, Rejected):
                raise ValueError(converted.detail)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        turns = converted.turns[:-1]
        if turns[0].role != "system":
            turns = (Turn("system", system), *turns)
        prompts.append(FilePrompt(where, turns))
    if not prompts:
        raise ValueError(f"{path}: holds no prompts")
    return prompts


def _with_answer(row: dict[str, Any]) -> dict[str, Any]:
    """The row up to its last prompt, with an answer."""
    for field in ("messages", "conversations"):
        if isinstance(messages := row.get(field), list):
            users = [i for i, message in enumerate(messages) if _role(message) in ("user", "human")]
            asked = messages[: users[-1] + 1] if users else messages
            return {field: [*asked, {"role": "assistant", "content": _ANSWER}]}
        if field in row:
            return row
    for field in ("prompt", "question", "instruction"):
        if field in row:
            if row.get("input"):  # Alpaca's second half of the prompt
                raise ValueError(f'has "input" beside "{field}"; put both into "prompt"')
            return {"prompt": row[field], "completion": _ANSWER}
    if "test_list" in row:
        return row | {"code": _ANSWER}
    names = ", ".join(str(name)[:40] for name in list(row)[:8]) or "none"
    raise ValueError(f"has no prompt, question, instruction or messages (found: {names})")


def _role(message: Any) -> Any:
    return message.get("role", message.get("from")) if isinstance(message, dict) else None


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}:{number}", {"prompt": line}
