"""Fine-tunes a Gemma on reasoning traces: `python -m jaxsft.train [--config RECIPE] [--OPTION …]`.

Measures the model on held-out rows, trains, measures again, and leaves everything in
output_dir/name, the adapter in PEFT format among it. The same command again continues an
interrupted run, and a finished one says so. `--preflight` checks the step on this machine, times it
and stops; on a TPU every run begins with that.

Exit codes: 0 finished; 1 the preflight or the run failed (one line says how; the last checkpoint is
good); 2 bad input (one line says what, nothing was trained); 75 stopped by a signal or the clock
and saved, run the command again; 130 or 143 ended at once by a second SIGINT or SIGTERM.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence

from jaxsft.cli import (
    EXIT_STOPPED,
    command_line,
    parse_options,
    run_command,
    run_process,
    typed_options,
)
from jaxsft.common.out_of_memory import GENERAL_ADVICE
from jaxsft.config import TrainConfig

DESCRIPTION = (
    "Fine-tunes a Gemma with LoRA on reasoning traces. Without options: the demo. On a TPU every "
    "run begins with the preflight."
)


@dataclasses.dataclass(frozen=True)
class TrainOptions:
    """Only of this command."""

    preflight: bool = False
    """Check the train step on this machine against another way to compute it, time it on the run's
    own rows, and stop: exit code 1 if it disagrees or the run would take longer than budget_hours.
    """


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    began_s = time.monotonic()  # a clock that nobody sets
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(
        lambda: command(argv, began_s),
        interrupted=f"nothing is lost. To go on: {command_line('jaxsft.train', argv)}",
        interrupted_code=EXIT_STOPPED,
        memory_advice=GENERAL_ADVICE,
    )


def command(argv: list[str], began_s: float) -> int:
    """Trains as `argv` asks. ValueError and OSError are bad input."""
    kinds = TrainConfig, TrainOptions
    config, options = parse_options("jaxsft.train", DESCRIPTION, argv, *kinds)
    from jaxsft.train.command import run_training  # JAX, which takes seconds

    return run_training(
        config=config,
        typed=typed_options("jaxsft.train", argv, *kinds),
        preflight_only=options.preflight,
        argv=argv,
        began_s=began_s,
    )


if __name__ == "__main__":
    run_process(main)
