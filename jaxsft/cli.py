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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from jaxsft import __version__
from jaxsft.common.listed import MAX_LINE, shortened
from jaxsft.common.option_values import (
    OptionsError,
    check_config_file,
    check_groups,
    check_value,
    read_options,
)
from jaxsft.common.out_of_memory import parse_shortage
from jaxsft.common.signals import interrupts_kept
from jaxsft.common.streams import make_process_safe, safe_streams
from jaxsft.common.text import harmless, visible_line
from jaxsft.common.tpu import keep_libtpu_quiet
from jaxsft.config import GrpoConfig, RunConfig, TrainConfig
from jaxsft.config_check import validate
from jaxsft.hints import hint_for

RECIPES = Path(__file__).parent / "recipes"
DEFAULT_RECIPE = "demo"
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the command again
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
_OF_GRPO = re.compile(rb"^(rollout|objective|rewards?)\b[\w.]*:", re.MULTILINE)
_MOST_UNKNOWN = 4  # options in one line


def run_process(main: Callable[[], int]) -> NoReturn:
    """Runs a command as a process of its own, and exits with its code."""
    make_process_safe()
    sys.exit(main())


def fail(error: object, code: int) -> int:
    """Prints the error as one line; returns the exit code."""
    line = shortened(f"error: {visible_line(str(error))}", MAX_LINE)
    with contextlib.suppress(OSError):  # stderr may be on the disk that is full
        print(line, file=sys.stderr, flush=True)
    return code


def run_command(
    body: Callable[[], int],
    *,
    interrupted: str = "the same command begins anew",
    interrupted_code: int = EXIT_INTERRUPTED,
    memory_advice: str = "free some memory",
) -> int:
    """Returns what `body` returns. An error of the user's becomes one line and an exit code.

    The code is `interrupted_code` for Ctrl-C, 1 where memory ran out, else `failure_code`. Other
    errors are ours, and raised.
    """
    keep_libtpu_quiet(os.environ, Path("/"))
    with safe_streams():
        return _run(body, interrupted, interrupted_code, memory_advice)


def _run(
    body: Callable[[], int], interrupted: str, interrupted_code: int, memory_advice: str
) -> int:
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
        return fail(f"interrupted; {interrupted}", interrupted_code)


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


def recipe_names(kind: type = TrainConfig) -> list[str]:
    """Names that `--config` of a command with this kind of options accepts besides files."""
    paths = RECIPES.glob("*.yaml")
    return sorted(path.stem for path in paths if issubclass(kind, config_kind(path)))


def config_kind(path: Path) -> type[TrainConfig] | type[GrpoConfig]:
    """Whose options a config file has, told by the names that only one kind has."""
    return GrpoConfig if _OF_GRPO.search(path.read_bytes()) else TrainConfig


def kind_of_config(argv: Sequence[str]) -> type[TrainConfig] | type[GrpoConfig]:
    """`config_kind` of the last file or recipe that --config names; TrainConfig without one."""
    paths = [Path(name) for name in _configs_named(argv)[-1:]]
    paths = [path if path.is_file() else RECIPES / f"{path}.yaml" for path in paths]
    return config_kind(paths[0]) if paths and paths[0].is_file() else TrainConfig


def parse_options(
    command: str,
    description: str,
    argv: Sequence[str],
    *kinds: type,
    default_recipe: str = DEFAULT_RECIPE,
    defaults: Mapping[str, Any] | None = None,
    is_run: bool = True,
) -> list[Any]:
    """The options of a command: an instance of each of `kinds`, which share one command line.

    With a RunConfig among them there is --config, for a recipe or a file. Without, the first
    argument is the option `model`. `--help`, `--version` and `--print_config` print and exit 0.

    Args:
      kinds: frozen dataclasses; the text under each field is its help. Their names are distinct.
      default_recipe: the recipe without `--config`.
      defaults: in place of those of the dataclasses, by dotted name.
      is_run: whether the options are for a run; else they need not be all that a run needs.

    Raises:
      ValueError: one line that names the option and, for an unknown one, what `hint_for` knows.
    """
    of_run = _kind_of_run(kinds)
    _set_loader(dict(each for kind in kinds for each in _option_types(kind)))
    parser = _make_parser(command, description, of_run, default_recipe)
    for kind in kinds:
        parser.add_class_arguments(kind)
    parser.set_defaults(dict(defaults or {}))
    args = _spelt_out(argv, kinds)
    args = (
        _with_recipe_paths(args, default_recipe, of_run) if of_run else _with_model(args, command)
    )
    try:
        values = vars(parser.instantiate(parser.parse_args(args)))
    except (argparse.ArgumentError, TypeError) as error:
        raise ValueError(_explain(str(error), parser)) from None
    found = [kind(**{f.name: values[f.name] for f in dataclasses.fields(kind)}) for kind in kinds]
    for config in [each for each in found if isinstance(each, RunConfig)]:
        if values["print_config"]:
            sys.stdout.write(config_yaml(config, sys.stdout.encoding or "utf-8"))
            raise SystemExit(0)
        if is_run:
            validate(config)
    return found


def _kind_of_run(kinds: Sequence[type]) -> type[RunConfig] | None:
    return next((kind for kind in kinds if issubclass(kind, RunConfig)), None)


def typed_options(
    command: str, argv: Sequence[str], *kinds: type, default_recipe: str = DEFAULT_RECIPE
) -> frozenset[str]:
    """The dotted names of the options that the user gave: in `argv`, or in a file of their own.

    What a recipe says is a default. `argv` is one that `parse_options` took for the same `kinds`.
    """
    _set_loader(dict(each for kind in kinds for each in _option_types(kind)))
    of_run = _kind_of_run(kinds)
    parser = _make_parser(command, "", of_run, default_recipe)
    for kind in kinds:
        parser.add_class_arguments(kind)
    assert of_run is not None
    args = _with_recipe_paths(_spelt_out(argv, kinds), default_recipe, of_run)
    for i in reversed(range(len(args) - 1)):
        if args[i] == "--config" and Path(args[i + 1]).resolve().parent == RECIPES.resolve():
            del args[i : i + 2]
    return frozenset(parser.parse_args(args, defaults=False).as_flat().__dict__)


def config_files(argv: Sequence[str]) -> list[Path]:
    """The files that --config names, without recipes."""
    return [path for path in map(Path, _configs_named(argv)) if path.is_file()]


def _configs_named(argv: Sequence[str]) -> list[str]:
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    return [a.partition("=")[2] or b for a, b in pairs if a.partition("=")[0] == "--config"]


def parse_config(
    command: str, description: str, argv: Sequence[str], default_recipe: str = DEFAULT_RECIPE
) -> tuple[TrainConfig, str]:
    """(config, the same as YAML) of a command that has train's options only; see parse_options."""
    (config,) = parse_options(
        command, description, argv, TrainConfig, default_recipe=default_recipe
    )
    return config, config_yaml(config)


def config_yaml(config: RunConfig, encoding: str = "utf-8") -> str:
    """The config as a file that --config takes.

    YAML's own escapes stand for what the encoding lacks, and for what steers a terminal.
    """
    options: dict[str, Any] = {"sort_keys": False, "default_flow_style": False}
    text = yaml.safe_dump(dataclasses.asdict(config), allow_unicode=True, **options)
    if harmless(text).encode(encoding, "replace").decode(encoding) == text:
        return text
    return yaml.safe_dump(dataclasses.asdict(config), **options)


def _make_parser(
    command: str, description: str, kind: type[RunConfig] | None, default_recipe: str
) -> ArgumentParser:
    # The texts under the fields of the dataclasses are their help.
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    first = "[--config RECIPE_OR_FILE]" if kind else "MODEL"
    parser = ArgumentParser(
        prog=f"python -m {command}",
        usage=f"python -m {command} {first} [--OPTION VALUE ...]",
        description=description,
        exit_on_error=False,
        allow_abbrev=False,
        parser_mode="texts",
        print_config=None,  # it would print a command's own options too, which no other takes
    )
    version, about = f"jaxsft {__version__}", "Print the version and exit."
    parser.add_argument("--version", action="version", version=version, help=about)
    if kind:
        parser.add_argument(
            "--config",
            action="config",
            help=f"YAML file or recipe: {', '.join(recipe_names(kind))} (default: "
            f"{default_recipe}). Options after it override it.",
        )
        parser.add_argument(
            "--print_config",
            action="store_true",
            help="Print all options of a run as a file for --config, and exit.",
        )
    return parser


def _set_loader(kinds: Mapping[str, Any]) -> None:
    """Makes jsonargparse read files and values by `read_options`."""

    def load(text: str, path: object = None) -> Any:
        if path is None:  # a value; one that is no YAML is a text, and so is "# 1" or "~"
            value = read_options(text, {})
            return text if value is None and text.strip() not in ("", "null") else value
        try:
            options = read_options(text, kinds)
            check_groups(options, kinds)
            if unknown := [name for name in _names_in(options, kinds) if name not in kinds]:
                raise OptionsError(_about_unknown(unknown, kinds))
        except OptionsError as error:
            # The parser works in the file's directory.
            raise ValueError(f"{Path(str(path)).absolute()}: {error}") from None
        return options

    set_loader("texts", load, exceptions=(OptionsError,))


def _names_in(options: Mapping[str, Any], kinds: Collection[str], prefix: str = "") -> list[str]:
    """The dotted names of what a config file has for options."""
    names = []
    for name, value in options.items():
        if isinstance(value, dict) and prefix + name not in kinds:
            names += _names_in(value, kinds, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def _about_unknown(names: Sequence[str], options: Collection[str]) -> str:
    """What to use in place of options that there are not, in one line."""
    parts = []
    for name in names[:_MOST_UNKNOWN]:
        hint = _of_grpo_alone(name) or hint_for(name, options) or _of_train(name)
        parts.append(f"unknown option {name!r}" + (f"; {hint}" if hint else ""))
    parts = [part if part.endswith(("?", ".")) else f"{part};" for part in parts]
    rest = len(names) - len(parts)
    more = [f"and {rest} more;"] if rest > 0 else []
    return " ".join([*parts, *more, "--help lists all"])


def _of_grpo_alone(name: str) -> str:
    is_own = name in dict(_option_types(GrpoConfig)) and not _of_train(name)
    return "an option of python -m jaxsft.grpo" if is_own else ""


def _of_train(name: str) -> str:
    is_own = name in dict(_option_types(TrainConfig))
    return "an option of python -m jaxsft.train" if is_own else ""


_OPTION = re.compile(r"--\w[\w.-]*(?:=|$)")


def _spelt_out(argv: Sequence[str], kinds: Sequence[type]) -> list[str]:
    """The arguments as the parser must have them, by the types of the options.

    --fit-deadline becomes --fit_deadline=true, --prompt -x becomes --prompt=-x, --learning_rate -1
    becomes --learning_rate=-1, and --row 3 becomes --row+=3, which may be repeated.
    """
    types = {name: each for kind in kinds for name, each in _option_types(kind)}
    args, rest = [], list(argv)
    while rest:
        arg = rest.pop(0)
        if not _OPTION.match(arg):
            args.append(arg)
            continue
        name, equals, value = arg.partition("=")
        name = name.replace("-", "_").replace("__", "--", 1)
        kind = types.get(name[2:])
        has_value = bool(equals) or (rest and not _OPTION.match(rest[0]))
        if kind is bool and not has_value:
            equals, value = "=", "true"
        elif has_value and (kind == str | None or kind == list[int] | None):
            equals, value = "=" if kind == str | None else "+=", value if equals else rest.pop(0)
        elif rest and not equals and re.fullmatch(r"-\d[\d.e+-]*", rest[0]):
            equals, value = "=", rest.pop(0)  # the parser takes a negative number for an option
        args.append(name + equals + value)
    _check_values(args, types)
    return args


def _check_values(args: Sequence[str], kinds: Mapping[str, Any]) -> None:
    option = ""
    for arg in args:
        name, _, value = arg.partition("=") if _OPTION.match(arg) else (option, "", arg)
        option = name
        try:
            check_value(name, value, kinds.get(name[2:].rstrip("+")))
        except OptionsError as error:
            raise ValueError(str(error)) from None


def _option_types(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of each option."""
    for field in dataclasses.fields(kind):
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from _option_types(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type


def _with_model(argv: Sequence[str], command: str) -> list[str]:
    """The first argument, unless it is an option, becomes --model."""
    args = list(argv)
    if args and not args[0].startswith("-"):
        args[:1] = ["--model", args[0]]
    if not any(arg.partition("=")[0] in ("--model", "--version", "--help", "-h") for arg in args):
        raise ValueError(f"no model: python -m {command} MODEL; --help says what it may be")
    return args


def _with_recipe_paths(argv: Sequence[str], default_recipe: str, kind: type) -> list[str]:
    """Recipe names after --config become paths; without any --config the default goes first."""
    args: list[str] = []
    for arg in argv:
        name, equals, value = arg.partition("=")
        args += [name, value] if name == "--config" and equals else [arg]
    if "--config" not in args:
        args = ["--config", default_recipe, *args]
    for i, arg in enumerate(args[:-1]):
        value = args[i + 1]
        if arg != "--config":
            continue
        if Path(value).is_file():
            check_config_file(Path(value))
            found = config_kind(Path(value))
            if found is GrpoConfig and kind is TrainConfig:
                raise ValueError(f"--config {value}: has options of python -m jaxsft.grpo alone")
            continue
        other, command = (TrainConfig, "train") if kind is GrpoConfig else (GrpoConfig, "grpo")
        names = recipe_names(kind)
        if value in names:
            args[i + 1] = str(RECIPES / f"{value}.yaml")
            continue
        if value in recipe_names(other):
            raise ValueError(f"--config {value}: is a recipe of python -m jaxsft.{command}")
        near = difflib.get_close_matches(value, names, 1, 0.0)[0]
        raise ValueError(
            f"--config {value}: no such file or recipe; did you mean {near!r}? "
            f"Recipes: {', '.join(names)}"
        )
    return args


# Python's types as a person calls them.
_KINDS = {"float": "a number", "int": "a whole number", "str": "a text", "NoneType": "null"}


def _explain(message: str, parser: ArgumentParser) -> str:
    """The parser's complaint in one line, with the nearest name for an unknown option."""
    line = " ".join(message.split()).replace("a typing.Literal", "one of ")
    line = re.sub(r"<class '(\w+)'>", r"\1", line)
    union = re.search(r"Does not validate against .*Subtypes: \[(.*?)\] .*value: (.*)", line)
    if union:
        kinds = " or ".join(_KINDS.get(kind, kind) for kind in union[1].split(", "))
        line = f"{line[: union.start()]}expected {kinds}, got {union[2][:200]!r}"
    argument = re.search(r"unrecognized arguments: (.*)", line)
    if not argument:
        return line.replace('Parser key "', 'option "')
    first, *others = [each.partition("=")[0] for each in argument[1].split()]
    if not first.startswith("-"):
        option = "--config" if "--config" in parser._option_string_actions else "--model"
        return f"unexpected argument {first!r}; options begin with --, as in {option} {first}"
    unknown = dict.fromkeys([first, *(each for each in others if each.startswith("--"))])
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    names = {o.lstrip("-") for action in shown for o in action.option_strings}
    # Not --lora, the group of all --lora.…
    options = {o for o in names if not any(other.startswith(f"{o}.") for other in names)}
    return _about_unknown([name.lstrip("-") for name in unknown], options)


def command_line(command: str, argv: Sequence[str]) -> str:
    """The command as a shell takes it, without a deadline, which was this session's."""
    kept = list(argv)
    for i in reversed(range(len(kept))):
        name, equals, _ = kept[i].partition("=")
        if name == "--deadline":
            del kept[i : i + 1 + (not equals)]
    return shlex.join(["python", "-m", command, *kept])
