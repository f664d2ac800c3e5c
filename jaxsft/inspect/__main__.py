"""Shows what the model will see: `python -m jaxsft.inspect [--config RECIPE] [--rows 3] …`.

It takes train's options, and prepares the rows if necessary, or a prepared directory. It shows some
rows token by token with their mask, then the counts of the whole set, and checks every sample. Of a
recipe of grpo it shows the prompts, what is right for them, and which rows were left out.

Exit codes: 0 every sample passes the checks; 1 some do not (examples are named); 2 bad input.
"""

import sys
from collections.abc import Sequence

from jaxsft.cli import kind_of_config, parse_options, run_command, run_process
from jaxsft.config import GrpoConfig
from jaxsft.inspect.options import InspectOptions, check_inspect_options

DESCRIPTION = (
    "Shows some rows as the model will see them, every token with its mask, and the counts of all "
    "rows, and checks every sample; with a recipe of jaxsft.grpo its prompts."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: command(argv), memory_advice="shorter lines take less")


def command(argv: Sequence[str]) -> int:
    """Shows and checks what `argv` asks for. ValueError and OSError are bad input."""
    config, options = parse_options(
        "jaxsft.inspect", DESCRIPTION, argv, kind_of_config(argv), InspectOptions
    )
    check_inspect_options(options)
    if isinstance(config, GrpoConfig):
        from jaxsft.inspect.prompts import show_prompts

        return show_prompts(config, options)
    from jaxsft.inspect.command import show_rows  # the tokenizer and readers take a second

    return show_rows(config, options)


if __name__ == "__main__":
    run_process(main)
