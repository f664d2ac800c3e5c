"""Reads YAML as options: bounded in size, depth and time, each value by the type of its option.

Only what options need is read. Anchors, aliases and `<<` are refused: a kilobyte of them stands for
gigabytes. So are tags, nesting deeper than 16, a key that occurs twice, and more than 1 MiB.

Values are those of YAML 1.2's core schema (https://yaml.org/spec/1.2.2/#103-core-schema), and the
type of the option decides: the number in `name: 12` is a text, the `no` in `packing: no` is false,
`deadline: 2026-11-22T21:30` stays as it is. A number may have `_` between its digits. Numbers that
programs read differently are refused: 010, and 12:30:00.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

MAX_CHARS = 2**20
_MAX_DEPTH = 16
_MAX_NUMBER = 2**63
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_INT = re.compile(r"[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_TIME = re.compile(r"([0-9]{1,9}):([0-9]{1,2})(?::([0-9]{1,2}))?")


class OptionsError(yaml.YAMLError):
    """What is wrong, in one line that begins with the line's number."""


def check_config_file(path: Path) -> None:
    """ValueError for a file that is too large for options, or not UTF-8."""
    try:
        if path.stat().st_size > MAX_CHARS:
            raise ValueError(f"{path}: is larger than 1 MiB, so it holds no options; name another")
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def read_options(text: str, kinds: Mapping[str, Any]) -> Any:
    """The value that `text` stands for; a mapping of options where it is a config file.

    Args:
      kinds: the type of each option, by dotted name; values of other names get YAML's own types.

    Raises OptionsError.
    """
    try:
        _check_events(text)
        node = yaml.compose(text, Loader=_Loader)
    except OptionsError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        why = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise OptionsError(f"{line}no YAML: {why}; quote a text with special characters") from None
    if node is None:
        return None
    lines: dict[str, int] = {}
    return _value(node, "", kinds, lines)


def check_groups(options: Any, kinds: Mapping[str, Any]) -> None:
    """OptionsError unless `options`, of a config file, are options and groups of them.

    jsonargparse would take a text in place of a group for the name of another file to read.
    """
    if not isinstance(options, dict):
        raise OptionsError("holds no options; write lines such as seed: 42")
    for group in {name.partition(".")[0] for name in kinds if "." in name}:
        if group in options and not isinstance(options[group], dict):
            raise OptionsError(f"{group}: is a group of options; write each as {group}.NAME: VALUE")
    for name in ("config", "print_config"):
        if name in options:
            raise OptionsError(f"{name}: is for the command line, not for a file; take it out")


def _check_events(text: str) -> None:
    if len(text) > MAX_CHARS:
        raise OptionsError("more than 1 MiB of text; no options are that long")
    depth = num_documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        where = f"line {event.start_mark.line + 1}: "
        num_documents += isinstance(event, yaml.DocumentStartEvent)
        if num_documents > 1:
            raise OptionsError(f"{where}a second document begins (---); keep one")
        if getattr(event, "anchor", None) is not None:
            mark = "*" if isinstance(event, yaml.AliasEvent) else "&"
            raise OptionsError(
                f"{where}{mark}{event.anchor[:40]}: anchors and aliases are not read; write the "
                "value out"
            )
        if getattr(event, "tag", None) not in (None, "!"):
            raise OptionsError(f"{where}a tag ({event.tag[:40]}) is not read; leave it out")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise OptionsError(f"{where}nested deeper than {_MAX_DEPTH}; no option is")


def _value(node: yaml.Node, name: str, kinds: Mapping[str, Any], lines: dict[str, int]) -> Any:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, name, _kind(name, kinds))
    if isinstance(node, yaml.SequenceNode):
        return [_value(each, name, kinds, {}) for each in node.value]
    found = {}
    for key, value in _pairs(node):
        line = key.start_mark.line + 1
        dotted = f"{name}.{key.value}" if name else key.value
        if key.value == "<<":
            raise OptionsError(f"line {line}: << is not read; write the options out")
        # A group may be in several places, as lora: {r: 8} and lora.alpha: 8; an option may not.
        if key.value in found or dotted in lines:
            before = lines[dotted]
            raise OptionsError(f"line {line}: {dotted} is on line {before} already; keep one")
        lines[dotted] = line
        found[key.value] = _value(value, dotted, kinds, lines)
    return found


def _kind(name: str, kinds: Mapping[str, Any]) -> Any:
    """The type of the option, or of the option whose part it is; None if there is none."""
    return kinds.get(name, kinds.get(name.rpartition(".")[0]))


def _pairs(node: yaml.Node) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise OptionsError(f"line {key.start_mark.line + 1}: the name of an option is a text")
        yield key, value


def _scalar(node: yaml.ScalarNode, name: str, kind: Any) -> Any:
    is_quoted = node.style in ("'", '"', "|", ">")
    if is_text(kind) or (kind is None and is_quoted):
        return node.value if is_quoted or node.value not in _NULLS else None
    return _resolved(node.value, f"line {node.start_mark.line + 1}: {name}", kind)


def is_text(kind: Any) -> bool:
    """Is a text right for an option of this type, or a list or mapping of texts?"""
    kinds = [kind, *get_args(kind)]
    return get_origin(kind) is Literal or any(
        each in kinds for each in (str, list[str], dict[str, str])
    )


def check_value(name: str, text: str, kind: Any) -> None:
    """OptionsError for a value from the command line that must not be read, or is ambiguous.

    `kind` is the option's type, None for a group of options.
    """
    if not is_text(kind):
        _resolved(text, name, kind)


def _resolved(text: str, where: str, kind: Any) -> Any:
    """The value of an option that is no text; `text` where it has none, for the parser to refuse.

    `kind` is None for an option that does not exist, and for a group.
    """
    if "&" in text and "*" in text:  # the parser reads a text again, aliases too
        raise OptionsError(f"{where}: & and * are not read; write the value out")
    if text in _NULLS:
        return None
    if text.lower() in (_BOOLS if kind is bool else ("true", "false")):
        return _BOOLS[text.lower()]
    return text if kind is bool else _number(text, f"{where}: {text[:40]}", kind is not None)


def _number(text: str, where: str, must_be_one: bool) -> Any:
    """The number that `text` is, or `text`."""
    bare = text.lstrip("-+").replace("_", "")
    time = _TIME.fullmatch(text)
    if must_be_one and time:
        hours, minutes, seconds = (int(part or 0) for part in time.groups())
        such = f", such as {hours * 3600 + minutes * 60 + seconds} for seconds" if time[3] else ""
        raise OptionsError(f"{where}: is no number; write a plain one{such}")
    if must_be_one and re.fullmatch("0[0-9]+", bare):
        raise OptionsError(
            f"{where}: programs differ on a number that begins with 0; write "
            f"{bare.lstrip('0')[:40] or 0}"
        )
    if _INT.fullmatch(text) and not re.fullmatch("0[0-9]+", bare):
        if len(bare) > 80 or abs(value := int(text.replace("_", ""), 0)) >= _MAX_NUMBER:
            raise OptionsError(f"{where}: is too large a number")
        return value
    if _FLOAT.fullmatch(text):
        return float(text)
    if found := _NOT_FINITE.fullmatch(text):
        return float(found[1] + found[2])
    return text
