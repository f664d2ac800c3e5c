"""Reads files of prompts as turns, the same turns that `convert_row` makes for training.

A row is what training takes (data/rows.py), up to its last user turn; its answer is not needed. In
a .txt file each line is a prompt.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxsft.data.replies import Rejected
from jaxsft.data.rows import RowOptions, Turn, convert_prompt
from jaxsft.data.sources import read_rows


class FilePrompt(NamedTuple):
    """The turns to answer; `where` names the file and the line."""

    where: str
    turns: tuple[Turn, ...]


class PromptFile(NamedTuple):
    """The prompts of a file, and for each other row its place and why it cannot be answered."""

    prompts: list[FilePrompt]
    left_out: list[str]


def read_prompt_file(path: Path, system: str, how: RowOptions) -> PromptFile:
    """Reads a .txt file, or a file that `read_rows` reads, and converts its rows as `how` says.

    Prompts without a system turn get `system`. ValueError names the file, and where no row is a
    prompt the first row.
    """
    rows = _read_lines(path) if path.suffix.lower() == ".txt" else read_rows(path)
    found = PromptFile([], [])
    for where, row in rows:
        turns = convert_prompt(row, how)
        if isinstance(turns, Rejected):
            found.left_out.append(f"{where} ({turns.detail})")
            continue
        if turns[0].role != "system":
            turns = (Turn("system", system), *turns)
        found.prompts.append(FilePrompt(where, turns))
    if not found.prompts:
        raise ValueError(
            f"{path}: holds no prompts" + "".join(f"; {each}" for each in found.left_out[:1])
        )
    return found


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
