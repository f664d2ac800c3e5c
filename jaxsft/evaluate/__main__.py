"""Measures a model: `python -m jaxsft.evaluate MODEL [--compare OTHER] [--files ROWS] …`.

Held-out loss per completion token, of the reasoning and of the answer apart, and what the answers
to the rows' prompts are worth: form, length, repetition, and accuracy where the rows have numbers
for answers (GSM8K). Two models are compared on the same rows with a paired test. The numbers, the
answers and a page that shows them side by side are written to a directory.

Exit codes: 0 done; 1 out of memory, or a disk or a network that failed; 2 bad input; 130
interrupted.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from jaxsft.cli import parse_options, run_command, run_process
from jaxsft.evaluate.options import EvaluateOptions

DESCRIPTION = (
    "Measures a model (a run, an adapter, or anything that train takes as model.path) on held-out "
    "rows: loss, and the form and accuracy of its answers, with 95% intervals. The defaults are a "
    "run's own held-out rows, system text, lengths, precision and decoding options: the model's, "
    "or else those of the run that it is compared with."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    advice = "lower --eval.batch_size or --max_length"
    return run_command(lambda: command(argv), memory_advice=advice)


def command(argv: Sequence[str]) -> int:
    """Measures what `argv` asks for. ValueError and OSError are bad input."""

    def parse(defaults: Mapping[str, Any]) -> EvaluateOptions:
        (options,) = parse_options(
            *("jaxsft.evaluate", DESCRIPTION, argv), EvaluateOptions, defaults=defaults
        )
        return options

    parse({})
    from jaxsft.evaluate.command import evaluate  # JAX, which takes seconds

    return evaluate(parse)


if __name__ == "__main__":
    run_process(main)
