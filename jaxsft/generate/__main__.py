"""Asks a model: `python -m jaxsft.generate MODEL [--prompt TEXT | --prompts FILE] [--OPTION …]`.

MODEL is whatever models.py knows: a run, an adapter, a model directory, a name on the hub, demo.
One prompt, a file of prompts (answers as JSONL, in the file's order), or else a chat in which
/reset forgets what was said, Ctrl-C stops an answer, and /quit or Ctrl-D ends.

Exit codes: 0 done; 1 out of memory, the hub did not deliver, or nobody takes the answers (a full
disk, a pipe whose reader has gone); 2 bad input; 130 interrupted.
"""

import sys
from collections.abc import Sequence

from jaxsft.cli import parse_options, run_command, run_process
from jaxsft.generate.options import GenerateOptions, check_options

DESCRIPTION = (
    "Asks a model, with its adapter: one prompt, a file of prompts, or, without either, a chat in "
    "the terminal. MODEL is a run's directory, a PEFT adapter, a Hugging Face or Flax model "
    "directory, a .gguf file, a name on the hub (owner/name or owner/name@revision), or demo."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(
        lambda: command(argv),
        interrupted="what stands above is all: answers to --prompts are written at the end",
        memory_advice="lower --batch_size or --max_new_tokens, or use --dtype bfloat16",
    )


def command(argv: Sequence[str]) -> int:
    """Answers what `argv` asks for. ValueError and OSError are bad input."""
    (options,) = parse_options("jaxsft.generate", DESCRIPTION, argv, GenerateOptions)
    check_options(options)
    from jaxsft.generate.command import generate_answers  # JAX, which takes seconds

    return generate_answers(options)


if __name__ == "__main__":
    run_process(main)
