"""Writes what was trained for other programs: `python -m jaxsft.export RUN --format merged`.

Another library loads the export in its own process. The export gets its name after the logits have
been compared. Without Tunix, or with a model that Tunix cannot compute, jaxsft reads a Flax export
itself, and the manifest says that it is not verified. An interrupted export leaves nothing. The
check holds the whole model in float32, first here, then in the other library; writing holds one
tensor.

Exit codes: 0 exported; 1 drifting (kept as NAME.drifting), not written, no memory; 2 bad input.
"""

import sys
from collections.abc import Sequence

from jaxsft.cli import command_line, parse_options, run_command, run_process
from jaxsft.export.options import ExportOptions

DESCRIPTION = (
    "Writes a run's model, an adapter or a base model for other programs, with a model card and a "
    "manifest, and has the other library (transformers and PEFT; Tunix for flax) load it and "
    "compute the same logits."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return run_command(
        lambda: command(argv),
        interrupted="nothing of the export is left",
        memory_advice="the check holds the model in float32, --no-verify goes without it",
    )


def command(argv: Sequence[str]) -> int:
    """Exports what `argv` asks for. ValueError and OSError are bad input."""
    (options,) = parse_options("jaxsft.export", DESCRIPTION, argv, ExportOptions)
    from jaxsft.export.command import export  # JAX, which takes seconds

    return export(options, command_line("jaxsft.export", argv))


if __name__ == "__main__":
    run_process(main)
