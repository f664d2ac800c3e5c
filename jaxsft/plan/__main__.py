"""Plans a run without a TPU: `python -m jaxsft.plan [--config RECIPE] [--topology v5e:2x4] …`.

Compiles the very train step that `train` would run with XLA's TPU compiler, on this machine, and
says whether it fits, how long it takes and why. All numbers are estimates.

Exit codes: 0 the run fits; 1 it does not fit the chips' memory or --budget-hours, or the compiler
failed; 2 bad input.
"""

import sys
from collections.abc import Sequence

from jaxsft.cli import parse_options, run_command, run_process, typed_options
from jaxsft.config import TrainConfig
from jaxsft.plan.options import PlanOptions, check_plan_options

DEFAULT_RECIPE = "single_session"
DESCRIPTION = (
    "Plans a run on a TPU slice that need not exist: fit, time and memory, by kind and part. Exit "
    "code 1 when the run does not fit or takes longer than --budget-hours."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(lambda: command(argv))


def command(argv: Sequence[str]) -> int:
    """Plans what `argv` asks for. ValueError and OSError are bad input."""
    kinds = TrainConfig, PlanOptions
    config, options = parse_options(
        *("jaxsft.plan", DESCRIPTION, argv), *kinds, default_recipe=DEFAULT_RECIPE
    )
    typed = typed_options("jaxsft.plan", argv, *kinds, default_recipe=DEFAULT_RECIPE)
    check_plan_options(options, argv)
    from jaxsft.plan.command import plan_run  # JAX, which takes seconds

    return plan_run(config, options, typed)


if __name__ == "__main__":
    run_process(main)
