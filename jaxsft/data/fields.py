"""What the fields of a row are for, by name: the one table that readers and `rows.py` share.

A field is read if it may hold a part of the conversation (`PARTS`). It is harmless if its name says
that it describes the row (`is_harmless`: ids, sources, scores, languages, counts), or if nothing in
it is text. Any other field with text in it must not be dropped without a word: `rows.py` rejects
the row and names the field.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

# The parts of a conversation, and the names that data sets use for them; the first of a row counts.
PARTS: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversations", "conversation"),
    "system": ("system", "system_prompt", "system_message"),
    "prompt": ("prompt", "instruction", "question", "problem", "query"),
    "input": ("input", "context"),
    "reasoning": (
        *("reasoning_content", "reasoning", "thinking", "thought", "thoughts", "rationale"),
        *("chain_of_thought", "cot"),
    ),
    "response": ("response", "completion", "output", "solution", "answer"),
}
_MBPP = ("text", "code", "test_list", "test_setup_code", "test_imports")
# Whether something is to be learnt: 1 or true in LEARN, 0 or false in SKIP; also of a message.
LEARN = (
    *("weight", "loss_weight", "sample_weight", "loss_scale", "loss_mask", "train", "trainable"),
    *("training", "should_train", "is_trained", "train_on_turn", "learn", "loss", "desirable"),
    *("kto_tag", "weights", "train_detail", "training_detail"),
)
SKIP = ("mask", "masked", "ignore", "ignored", "skip", "rejected")
_READ = frozenset((*(name for names in PARTS.values() for name in names), *_MBPP))
_WEIGHTS = frozenset((*LEARN, *SKIP, "label"))

_HARMLESS_NAME = re.compile(
    r"(.*_)?(id|ids|idx|index|uid|uuid|guid|hash|md5|sha|sha1|sha256|digest|fingerprint)"
    r"|(.*_)?(source|sources|origin|dataset|data_source|subset|split|repo|filename)"
    r"|(.*_)?(url|urls|link|links|license|licence|author|annotator|worker|creator)"
    r"|(.*_)?(lang|language|languages|locale)|turn_identifier|hashed_ip|toxic|redacted|signature"
    r"|(.*_)?(date|time|timestamp|created|created_at|updated_at|version|revision|seed)"
    r"|(.*_)?(model|model_name|generator|teacher|engine|tokenizer|finish_reasons?|stop_reason)"
    r"|(.*_)?(score|scores|rating|ratings|quality|difficulty|level|reward|rewards|logprob|logprobs)"
    r"|(.*_)?(perplexity|ppl|loss|similarity|distance|confidence|agreement|votes|likes|rank)"
    r"|(.*_)?(count|counts|length|lengths|tokens|token_count|num_tokens|chars|size|cost)"
    r"|(.*_)?(category|categories|topic|domain|tag|tags|label|labels|type|types)"
    r"|(.*_)?(intent|skill|skills|status|flag|flags|metadata|meta)|llama_guard_2"
    r"|challenge_test_list"
)
_NO_TEXT = frozenset(("[]", "{}", "null", "none", "nan", "n/a"))
# Values of a field such as "reasoning" that switch thinking on or off; no thoughts.
_FLAGS = frozenset(
    (*_NO_TEXT, "on", "off", "yes", "no", "true", "false", "enabled", "disabled", "auto")
)


class Repeated(tuple[Any, ...]):
    """The values of a key that stands more than once in one JSON object.

    Readers put it where the value would be. It is an error only if the field is used.
    """


class _Unread:
    """The type of `UNREAD`."""

    def __repr__(self) -> str:
        return "a column that was not read"


# Readers put it in the place of a column that was not decoded (see `is_wanted`).
UNREAD = _Unread()


def is_harmless(name: str) -> bool:
    """Whether the name says that the field describes the row, and is no part of its text."""
    return name not in _READ and _HARMLESS_NAME.fullmatch(name.lower()) is not None


def is_wanted(name: str, holds_text: bool, columns: Mapping[str, str] | None = None) -> bool:
    """Whether a reader must decode a column; for others it gives `UNREAD`.

    Args:
      name: of the column.
      holds_text: whether its type can hold text: strings, and lists or structs of them. Numbers,
        times, bytes, and media (a struct with bytes in it) cannot.
      columns: `data.columns`, the columns that the user named for each part.
    """
    if name in _WEIGHTS or is_part(name, columns):
        return True
    return columns is None and holds_text and not is_harmless(name)


def is_part(name: str, columns: Mapping[str, str] | None = None) -> bool:
    """Whether a column may be a part of the conversation; arguments as for `is_wanted`."""
    return name in _READ if columns is None else name in columns.values()


def is_absent(value: Any) -> bool:
    """Whether a value is null: None, NaN (pandas' null) or a column that was not read."""
    return value is None or value is UNREAD or (isinstance(value, float) and value != value)


def is_blank(value: Any) -> bool:
    """Whether a value is an empty list or object, or a text without anything but white space."""
    if isinstance(value, str):
        return not value.strip()
    return isinstance(value, list | dict) and not value


def is_flag(value: Any) -> bool:
    """Whether a value only switches thinking on or off, and is no thought."""
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _FLAGS)


def has_text(value: Any) -> bool:
    """Whether there is a string in the value that is not blank."""
    return next(texts_in(value), None) is not None


def texts_in(value: Any) -> Iterator[str]:
    """The strings in the value that are not blank, at any depth; no names of roles and types."""
    if isinstance(value, str):
        if value.strip() and value.strip().lower() not in _NO_TEXT:
            yield value.strip()
    elif isinstance(value, Mapping):
        for name, each in value.items():
            if name not in ("role", "from", "type"):
                yield from texts_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from texts_in(each)


def holds_parts(value: Any) -> bool:
    """Whether an object inside the value has a field with the name of a part."""
    if isinstance(value, Mapping):
        return any(name in _READ or holds_parts(each) for name, each in value.items())
    return isinstance(value, list | tuple) and any(map(holds_parts, value))
