"""The options of the plan command that are not train's."""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from jaxsft.cli import check_output
from jaxsft.plan.chips import TOPOLOGIES

LOCAL = "local"
DATA = "data"


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """Only of this command."""

    topology: str = "v5e:2x4"
    """A slice of v5e or v6e; or "local": the hash and memory of the program on this machine."""
    lengths: str | None = None
    """Tokens of each sample: a file with one number a line, or a JSON histogram {length: count}; or
    "data": read the run's own rows for them."""
    search: bool = False
    """Rank other micro-batches, row lengths and remat policies."""
    plot: str | None = None
    """Draw time and memory to this file."""
    json: str | None = None
    """Write the plan to this file."""


def check_plan_options(options: PlanOptions, argv: Sequence[str]) -> None:
    """ValueError for options that are wrong or do not go together."""
    if options.topology != LOCAL and options.topology not in TOPOLOGIES:
        valid = ", ".join((*TOPOLOGIES, LOCAL))
        raise ValueError(f"--topology {options.topology} is not known; valid: {valid}")
    if options.topology == LOCAL:
        given = {"--search": options.search, "--plot": options.plot is not None}
        given["--budget-hours"] = gives_budget(argv)
        if ignored := [name for name, is_given in given.items() if is_given]:
            raise ValueError(
                f"--topology {LOCAL} tells the program's hash and memory, not its time: leave out "
                f"{' and '.join(ignored)}"
            )
    for name, path in (("--plot", options.plot), ("--json", options.json)):
        if path is not None:
            check_output(name, path)
    if options.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install 'jaxsft[plan]'")
        check_format(Path(options.plot))


def gives_budget(argv: Sequence[str]) -> bool:
    """Is there a budget on the command line, not only in the recipe?"""
    return any(arg.startswith(("--budget-hours", "--budget_hours")) for arg in argv)


def check_format(path: Path) -> None:
    """ValueError for a name that does not end as one of matplotlib's picture formats."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"--plot {path}: its name must end in one of .{', .'.join(formats)}")
