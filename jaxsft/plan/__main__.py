"""Plans a run without a TPU: `python -m jaxsft.plan [--config RECIPE] [--topology v5e:2x4] …`.

Compiles the very train step that `train` would run with XLA's TPU compiler, on this machine, and
says whether it fits, how long it takes and why. All numbers are estimates.

Exit codes: 0 the run fits; 1 it does not fit the chips' memory or --budget-hours, or the compiler
failed; 2 bad input.
"""

import sys
from collections.abc import Sequence

from jaxsft.cli import parse_config, run_command
from jaxsft.plan.options import parse_options

DEFAULT_RECIPE = "single_session"
DESCRIPTION = (
    "Plans a run on a TPU slice that need not exist: fit, time and memory, by kind and part. "
    "Options of its own: --topology v5e:2x4 (or another slice of v5e or v6e; local: the memory and "
    "the hash of the program on this machine's devices), --budget-hours H (exit code 1 when the "
    "run takes longer), --lengths FILE (tokens of each sample: a JSON histogram {length: count} or "
    "one number a line), --data (read the run's own data for them), --search (rank micro-batches, "
    "row lengths and remat policies), --plot FILE.png, --json FILE. All others are train's."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: command(argv))


def command(argv: Sequence[str]) -> int:
    """Plans what `argv` asks for. ValueError and OSError are bad input."""
    options, rest = parse_options(argv)
    config, _ = parse_config("jaxsft.plan", DESCRIPTION, rest, DEFAULT_RECIPE)
    from jaxsft.plan.command import plan_run  # JAX, which takes seconds

    return plan_run(config, options)


if __name__ == "__main__":
    sys.exit(main())
