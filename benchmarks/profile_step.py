"""An xprof trace of real train steps: `python -m benchmarks.profile_step DIRECTORY [OPTIONS]`.

Runs the step of a recipe (single_session; any option of jaxsft.train) with random weights and
tokens on this machine's devices. To look at it: `pip install xprof`, `xprof --logdir DIRECTORY`.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks.real_step import random_steps
from jaxsft.cli import EXIT_BAD_INPUT, fail, parse_config

RECIPE = "single_session"
NUM_STEPS = 3

DESCRIPTION = "Writes an xprof trace of real train steps to the directory given first."


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments and not arguments[0].startswith("-"):
            directory, *arguments = arguments
        elif "--help" not in arguments:
            raise ValueError("name the directory for the trace first")
        config, _ = parse_config("benchmarks.profile_step", DESCRIPTION, arguments, RECIPE)
        make_directory(Path(directory))
        jax.config.update("jax_default_matmul_precision", "highest")  # as train does
        _, steps = random_steps(config)
        next(steps)  # compiles, and loads what the first step does
        with jax.profiler.trace(directory):
            for number in range(NUM_STEPS):
                with jax.profiler.StepTraceAnnotation("train", step_num=number):
                    next(steps)
    except (ValueError, OSError) as error:
        return fail(error, EXIT_BAD_INPUT)
    print(f"{NUM_STEPS} steps traced into {directory}")
    return 0


def make_directory(path: Path) -> None:
    """Makes it, if need be; ValueError where no trace could be written to it after minutes."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be made for the trace: {error}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"{path} is not writable: name another directory for the trace")


if __name__ == "__main__":
    sys.exit(main())
