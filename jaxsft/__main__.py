"""The commands in one: `jaxsft`, or `python -m jaxsft`, lists them; `jaxsft train …` runs one.

Exit codes: those of the command; 0 for the list; 2 for an unknown command.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxsft import __version__
from jaxsft.cli import EXIT_BAD_INPUT, fail, run_process
from jaxsft.common.streams import safe_streams

COMMANDS = {
    "plan": "plans a run without its TPU: memory, hours, the batch that fits",
    "prepare": "makes a run's rows, once: reads, converts, filters, tokenises, packs",
    "inspect": "shows rows as the model sees them, every token with its mask, and checks all",
    "train": "fine-tunes a Gemma with LoRA; the same command again continues a run",
    "grpo": "trains a Gemma on rewards of its own answers: sums, code, rewards of yours",
    "evaluate": "measures a model on held-out rows, or compares two on the same rows",
    "generate": "asks a model: one prompt, a file of prompts, or a chat",
    "export": "writes a run's model for other programs, and checks that they compute the same",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if name in COMMANDS:
        return importlib.import_module(f"jaxsft.{name}.__main__").main(rest)
    with safe_streams():
        return command(name)


def command(name: str) -> int:
    """Answers what is no command: --help, --version, or a mistake."""
    if name == "--version":
        print(f"jaxsft {__version__}")
        return 0
    if name in ("--help", "-h", "help"):
        print("usage: jaxsft COMMAND [--OPTION VALUE ...], or python -m jaxsft.COMMAND …\n")
        for each, what in COMMANDS.items():
            print(f"  {each:<9} {what}")
        print("\n--help after a command lists its options, --version prints the version.")
        return 0
    near = difflib.get_close_matches(name, COMMANDS, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    return fail(f"no command {name!r}; {hint}Commands: {', '.join(COMMANDS)}", EXIT_BAD_INPUT)


def console_script() -> NoReturn:
    """`jaxsft`, as pyproject.toml installs it."""
    run_process(main)


if __name__ == "__main__":
    console_script()
