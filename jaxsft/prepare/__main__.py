"""Makes a run's rows, once: `python -m jaxsft.prepare [--config RECIPE] [--OPTION …]`.

Reads, converts, filters, tokenises and packs what the config names and keeps the result, so that
`train`, which does the same where it is missing, begins at once. The same command again with
nothing changed only says what is there; any option that changes a row makes a set of its own.

Exit codes: 0 done; 2 bad input (one line says where, what and how to fix it; nothing is left); 130
interrupted.
"""

import sys
from collections.abc import Sequence

from jaxsft.cli import parse_config, run_command, run_process

DESCRIPTION = (
    "Reads, converts, filters, tokenises and packs the rows that a config names and keeps them for "
    "jaxsft.train. Takes the options of jaxsft.train; those of data, and the model's tokenizer, "
    "count."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: command(argv), memory_advice="shorter lines take less")


def command(argv: Sequence[str]) -> int:
    """Prepares the rows that `argv` asks for. ValueError and OSError are bad input."""
    config, _ = parse_config("jaxsft.prepare", DESCRIPTION, argv)
    from jaxsft.prepare.command import prepare_rows  # the tokenizer and readers take a second

    return prepare_rows(config)


if __name__ == "__main__":
    run_process(main)
