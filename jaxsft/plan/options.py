"""The options of the plan command that are not train's."""

import argparse
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxsft.cli import check_output
from jaxsft.plan.chips import TOPOLOGIES

LOCAL = "local"


class PlanOptions(NamedTuple):
    """The options of this command that are not train's."""

    topology: str = "v5e:2x4"
    lengths: str | None = None
    data: bool = False
    search: bool = False
    plot: str | None = None
    json: str | None = None


def parse_options(argv: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """(this command's options, the others); ValueError in one line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--topology", default=PlanOptions().topology)
    for name in ("--lengths", "--plot", "--json"):
        parser.add_argument(name)
    for name in ("--data", "--search"):
        parser.add_argument(name, action="store_true")
    try:
        found, rest = parser.parse_known_args(_with_train_names(argv))
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    options = PlanOptions(**vars(found))
    if options.topology != LOCAL and options.topology not in TOPOLOGIES:
        valid = ", ".join((*TOPOLOGIES, LOCAL))
        raise ValueError(f"--topology {options.topology} is not known; valid: {valid}")
    if options.lengths is not None and options.data:
        raise ValueError("--lengths and --data both give the data's lengths; choose one")
    if options.topology == LOCAL:
        given = {"--search": options.search, "--plot": options.plot is not None}
        given["--budget-hours"] = any(arg.startswith("--budget_hours") for arg in rest)
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
    return options, rest


def _with_train_names(argv: Sequence[str]) -> list[str]:
    """--budget-hours is train's --budget_hours."""
    return [re.sub(r"^--budget-hours(?==|$)", "--budget_hours", argument) for argument in argv]


def check_format(path: Path) -> None:
    """ValueError for a name that does not end as one of matplotlib's picture formats."""
    from matplotlib.backend_bases import FigureCanvasBase

    formats = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        raise ValueError(f"--plot {path}: its name must end in one of .{', .'.join(formats)}")
