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
    """Options of this command only."""

    topology: str = "v5e:2x4"
    """The TPU slice, v5e or v6e and its shape; or "local" for the devices of this machine, which
    shows the program's hash and memory, not its time."""
    lengths: str | None = None
    """Number of tokens of each sample: a file with one number a line or a JSON histogram
    {length: count}; or "data" to read the run's own rows."""
    search: bool = False
    """Compare other numbers of micro-batches, row lengths and remat policies, the fastest first."""
    plot: str | None = None
    """Draw time and memory as a picture in this file."""
    json: str | None = None
    """Write the plan to this JSON file."""


def check_plan_options(options: PlanOptions, argv: Sequence[str]) -> None:
    """Raises ValueError for options that are wrong or contradict each other."""
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
    """Does the command line itself give a budget? One in the recipe does not count."""
    return any(arg.startswith(("--budget-hours", "--budget_hours")) for arg in argv)


def check_format(path: Path) -> None:
    """Raises ValueError for a name whose ending is no picture format of matplotlib."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"--plot {path}: its name must end in one of .{', .'.join(formats)}")
