"""Trains a Gemma on its own answers and their rewards: `python -m jaxsft.grpo --config RECIPE …`.

Draws groups of answers to prompts, rewards them, and raises the probability of those that earned
more than the others of their group. Measures, saves, stops and continues as `train` does.
`--score FILE` scores given completions without a model, `--page RUN` writes a page of a run's
completions.

Exit codes as of `train`: 0 finished; 1 failed; 2 bad input; 75 stopped and saved, run the command
again; 130 or 143 ended at once by a second signal.
"""

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from jaxsft.cli import (
    EXIT_STOPPED,
    command_line,
    config_files,
    parse_options,
    run_command,
    run_process,
    typed_options,
)
from jaxsft.common.console import make_console
from jaxsft.common.out_of_memory import GENERAL_ADVICE
from jaxsft.config import GrpoConfig, named_rewards
from jaxsft.config_check import validate_reward

DESCRIPTION = (
    "Trains a Gemma with LoRA on rewards of its own answers (GRPO). Without options: the demo, "
    "which goes on from the adapter that `train --config grpo_warmup` makes."
)
DEFAULT_GRPO_RECIPE = "grpo_demo"
# Beside a run's config.yaml.
_OF_RUN = (
    *("adapter", "adapter-best", "before.json", "checkpoints", "metrics.jsonl", "result.json"),
    *("rollouts.jsonl", "samples.jsonl", "start"),
)


@dataclasses.dataclass(frozen=True)
class GrpoOptions:
    """Only of this command."""

    score: str | None = None
    """Score the rows of this file, each with its "completion", and train nothing. A completion
    counts as ended by its stop token unless the row says "stopped": false."""
    json: bool = False
    """With score: a JSON object a row on stdout, instead of a table."""
    page: str | None = None
    """Write rollouts.html, a page of the completions of this run's directory, and train nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    began_s = time.monotonic()  # a clock that nobody sets
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(
        lambda: command(argv, began_s),
        interrupted=f"nothing is lost. To go on: {command_line('jaxsft.grpo', argv)}",
        interrupted_code=EXIT_STOPPED,
        memory_advice=GENERAL_ADVICE,
    )


def command(argv: list[str], began_s: float) -> int:
    """Trains as `argv` asks. ValueError and OSError are bad input."""
    kinds = GrpoConfig, GrpoOptions
    config, options = parse_options(
        "jaxsft.grpo",
        DESCRIPTION,
        argv,
        *kinds,
        default_recipe=DEFAULT_GRPO_RECIPE,
        is_run=not any(arg.partition("=")[0] in ("--score", "--page") for arg in argv),
    )
    if options.score is not None and options.page is not None:
        raise ValueError("--score and --page are two jobs: give one of them")
    if options.json and options.score is None:
        raise ValueError("--json is for --score FILE")
    if options.page is not None:
        from jaxsft.grpo.page import write_page

        print(f"The page is {write_page(Path(options.page))}")
        return 0
    from jaxsft.data.rows import RowOptions
    from jaxsft.data.samples import answer_template
    from jaxsft.rewards.scorer import Scorer

    validate_reward(config.reward)
    template = answer_template(config.data.answer_template, config.data.system_prompt)
    how = RowOptions(config.data.columns, template=template)
    with Scorer(
        named_rewards(config.rewards),
        template,
        config.reward,
        beside=code_directory(config, argv),
        log=make_console(on_stderr=True).print,
    ) as scorer:  # its processes start before JAX does
        if options.score is not None:
            from jaxsft.grpo.score import score_file

            return score_file(Path(options.score), scorer, how, as_json=options.json)
        from jaxsft.grpo.command import run_grpo  # JAX, which takes seconds

        return run_grpo(
            config=config,
            typed=typed_options("jaxsft.grpo", argv, *kinds, default_recipe=DEFAULT_GRPO_RECIPE),
            scorer=scorer,
            argv=argv,
            began_s=began_s,
        )


def code_directory(config: GrpoConfig, argv: Sequence[str]) -> Path | None:
    """The directory of the config file, where reward functions may be beside it; None without one.

    ValueError if a config file is a run's, and the rewards name code that the command line does
    not: a run that came from elsewhere must not bring code with it.
    """
    files = config_files(argv)
    code = [name for name in named_rewards(config.rewards) if ":" in name]
    foreign = [name for name in code if not any(name in arg for arg in argv)]
    for file in files if foreign else []:
        if any((file.parent / name).exists() for name in _OF_RUN):
            raise ValueError(
                f"--config {file}: is of another run, whose code is not taken: name {foreign[0]} "
                "on the command line (--rewards), or in a config file of yours"
            )
    return files[-1].parent if files else None


if __name__ == "__main__":
    run_process(main)
