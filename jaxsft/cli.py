"""The command line of every command: recipe or file, dotted overrides, errors and exit codes."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from jaxsft.common.out_of_memory import parse_shortage
from jaxsft.common.signals import interrupts_kept
from jaxsft.common.text import visible_line
from jaxsft.config import TrainConfig, validate

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "demo"
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the command again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it

T = TypeVar("T")


def fail(error: object, code: int) -> int:
    """Prints the error as one line; returns the exit code."""
    with contextlib.suppress(OSError):  # stderr may be on the disk that is full
        print(f"error: {visible_line(str(error))}", file=sys.stderr, flush=True)
    return code


def run_command(
    body: Callable[[], int],
    *,
    interrupted: str = "the same command begins anew",
    memory_advice: str = "free some memory",
) -> int:
    """What `body` returns; what it raises for a user becomes one line and an exit code.

    130 for Ctrl-C, 1 where memory ran out, else `failure_code`. Other errors are ours, and raised.
    """
    try:
        with interrupts_kept():
            return body()
    except (ValueError, OSError) as error:
        return fail(error, failure_code(error))
    except (MemoryError, RuntimeError) as error:  # JAX's errors are RuntimeErrors
        if not isinstance(error, MemoryError) and parse_shortage(str(error)) is None:
            raise
        first, _, _ = str(error).partition("\n")
        return fail(f"out of memory{first and f' ({first})'}: {memory_advice}", EXIT_FAILED)
    except KeyboardInterrupt:
        return fail(f"interrupted; {interrupted}", EXIT_INTERRUPTED)


def failure_code(error: ValueError | OSError) -> int:
    """2 for bad input; 1 for a network, a disk or a child process that failed."""
    failed = isinstance(error, ConnectionError | TimeoutError | ChildProcessError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    )
    return EXIT_FAILED if failed else EXIT_BAD_INPUT


def check_output(option: str, path: str) -> None:
    """ValueError, naming the option, for a file that could not be written after hours of work."""
    directory = Path(path).absolute().parent
    if not directory.is_dir():
        raise ValueError(f"{option} {path}: there is no such directory to write it to")
    if Path(path).is_dir():
        raise ValueError(f"{option} {path}: is a directory; name a file in it")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: {directory} is not writable")


def recipe_names() -> list[str]:
    """Names that `--config` accepts besides files."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def parse_config(
    command: str, description: str, argv: Sequence[str], default_recipe: str = DEFAULT_RECIPE
) -> tuple[TrainConfig, str]:
    """(validated config, the same as YAML) from a command line, and a recipe without `--config`.

    `--help` and `--print_config` print and exit 0.

    Raises:
      ValueError: one line that names the option and, for an unknown one, the nearest valid name.
    """
    parser = _make_parser(command, "[--config RECIPE_OR_FILE] [--OPTION VALUE ...]", description)
    parser.add_argument(
        "--config",
        action="config",
        help=f"YAML file or recipe: {', '.join(recipe_names())} (default: {default_recipe}). "
        "Options after it override it.",
    )
    parser.add_class_arguments(TrainConfig)
    try:
        spelt_out = _spelt_out(argv, TrainConfig)
        parsed = parser.parse_args(_with_recipe_paths(_joined(spelt_out), default_recipe))
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(_explain(str(error), parser)) from None
    values = {k: v for k, v in vars(parser.instantiate(parsed)).items() if k != "config"}
    config = TrainConfig(**values)
    validate(config)
    return config, parser.dump(parsed, skip_unset=False)


def parse_options(
    command: str,
    description: str,
    argv: Sequence[str],
    options: type[T],
    defaults: Mapping[str, Any] | None = None,
) -> T:
    """The options of a command that takes a model: `python -m COMMAND MODEL [--OPTION VALUE ...]`.

    Args:
      options: a frozen dataclass; the text under each field is its help, the first is `model`.
      defaults: in place of the dataclass's, by dotted name.

    Raises:
      ValueError: one line that names the option and, for an unknown one, the nearest valid name.
    """
    parser = _make_parser(command, "MODEL [--OPTION VALUE ...]", description)
    parser.add_class_arguments(options)
    parser.set_defaults(dict(defaults or {}))
    args = _joined(_spelt_out(argv, options))
    if args and not args[0].startswith("-"):
        args[:1] = ["--model", args[0]]
    if not any(arg.partition("=")[0] in ("--model", "--help", "-h") for arg in args):
        raise ValueError(f"no model: python -m {command} MODEL; --help says what it may be")
    try:
        parsed = parser.parse_args(args)
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(_explain(str(error), parser)) from None
    return options(**vars(parser.instantiate(parsed)))


def _make_parser(command: str, usage: str, description: str) -> ArgumentParser:
    # The texts under the fields of the dataclasses are their help.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    set_loader("texts", _load, exceptions=(yaml.YAMLError,))
    return ArgumentParser(
        prog=f"python -m {command}",
        usage=f"python -m {command} {usage}",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="texts",
    )


def _load(text: str, **rest: Any) -> Any:
    """YAML, but for a line such as "# 1" or "~", which is a text: null alone is null."""
    value = get_loader("yaml")(text, **rest)
    is_null = "\n" in text or text.strip() in ("", "null")
    return text if value is None and not is_null else value


_OPTION = re.compile(r"--\w[\w.-]*(?:=|$)")


def _spelt_out(argv: Sequence[str], options: type) -> list[str]:
    """--fit-deadline becomes --fit_deadline=true, --prompt -x becomes --prompt=-x."""
    switches, texts = (_options_of_type(options, each) for each in (bool, str | None))
    args, rest = [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not _OPTION.match(arg):
            args.append(arg)
            continue
        name, equals, value = arg.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        has_value = bool(equals) or (rest and not _OPTION.match(rest[0]))
        if name[2:] in switches and not has_value:
            equals, value = "=", "true"
        elif name[2:] in texts and has_value:
            equals, value = "=", value if equals else rest.pop(0)
        args.append(name + equals + value)
    return args


def _options_of_type(options: type, kind: Any, prefix: str = "") -> set[str]:
    """Dotted names of the options of this type."""
    found = set()
    for field in dataclasses.fields(options):
        if field.type == kind:
            found.add(prefix + field.name)
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            found |= _options_of_type(field.type, kind, f"{prefix}{field.name}.")
    return found


def _joined(argv: Sequence[str]) -> list[str]:
    """--option -1e-3 becomes --option=-1e-3: the parser takes a negative number for an option."""
    args: list[str] = []
    for arg in argv:
        if re.fullmatch(r"-\d[\d.e+-]*", arg) and args:
            args[-1] += f"={arg}"
        else:
            args.append(arg)
    return args


def _with_recipe_paths(argv: Sequence[str], default_recipe: str) -> list[str]:
    """Recipe names after --config become paths; without any --config the default goes first."""
    args: list[str] = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        args += [name, value] if name == "--config" and equals else [arg]
    if "--config" not in args:
        args = ["--config", default_recipe, *args]
    for i, arg in enumerate(args[:-1]):
        value = args[i + 1]
        if arg != "--config" or Path(value).is_file():
            continue
        if value in recipe_names():
            args[i + 1] = str(RECIPES / f"{value}.yaml")
        else:
            near = difflib.get_close_matches(value, recipe_names(), 1, 0.0)[0]
            raise ValueError(
                f"--config {value}: no such file or recipe; did you mean {near!r}? "
                f"Recipes: {', '.join(recipe_names())}"
            )
    return args


# Python's types as a person calls them.
_KINDS = {"float": "a number", "int": "a whole number", "str": "a text", "NoneType": "null"}


def _explain(message: str, parser: ArgumentParser) -> str:
    """The parser's complaint in one line, with the nearest name for an unknown option."""
    line = " ".join(message.split()).replace("typing.Literal", "one of ")
    line = re.sub(r"<class '(\w+)'>", r"\1", line)
    union = re.search(r"Does not validate against .*Subtypes: \[(.*?)\] .*value: (.*)", line)
    if union:
        kinds = " or ".join(_KINDS.get(kind, kind) for kind in union[1].split(", "))
        line = f"{line[: union.start()]}expected {kinds}, got {union[2]!r}"
    argument = re.search(r"unrecognized arguments: (\S+)", line)
    key = re.search(
        r"Group '(\S+)' does not accept option '(\S+)'|Option '(\S+)' is not accepted", line
    )
    if argument:
        name = argument[1].split("=")[0]
        if not name.startswith("-"):
            option = "--config" if "--config" in parser._option_string_actions else "--model"
            return f"unexpected argument {name!r}; options begin with --, as in {option} {name}"
        name = name.lstrip("-")
    elif key:
        name = ".".join(filter(None, key.groups()))
    else:
        return line.replace('Parser key "', 'option "')
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    names = {o.lstrip("-") for action in shown for o in action.option_strings}
    # Not --lora, the group of all --lora.…
    options = {o for o in names if not any(other.startswith(f"{o}.") for other in names)}
    # By the last part as well, so that lora_r, lora.rank and rank all come near lora.r.
    spellings = {o.replace(".", "_"): o for o in options} | {o.split(".")[-1]: o for o in options}
    spellings |= {o: o for o in options}
    near = difflib.get_close_matches(name, spellings, 1, 0.0)[0]
    return f"unknown option {name!r}; did you mean --{spellings[near]}? --help lists all"


def parse_preflight(argv: Sequence[str]) -> tuple[bool, list[str]]:
    """(is `--preflight` among the arguments, the others); ValueError where it has a value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preflight", action="store_true")
    try:
        found, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    return found.preflight, rest


def command_line(command: str, argv: Sequence[str]) -> str:
    """The command as a shell takes it, without a deadline, which was this session's."""
    kept = list(argv)
    for i in reversed(range(len(kept))):
        name, equals, _ = kept[i].partition("=")
        if name == "--deadline":
            del kept[i : i + 1 + (not equals)]
    return shlex.join(["python", "-m", command, *kept])
