"""What kills did to runs, counted and as a table."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table


@dataclass
class Tally:
    """What the kills did. `lost` has the steps done again after each kill, where any were done."""

    save_steps: int = 0
    runs: int = 0
    kills: int = 0
    kills_during_save: int = 0
    mismatches: list[str] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    resumed: Counter[str] = field(default_factory=Counter)  # where -> how often
    seconds: float = 0.0

    @property
    def save_share(self) -> float:
        """Kills during a save, of all kills."""
        return self.kills_during_save / max(self.kills, 1)


def total(tallies: Sequence[Tally]) -> Tally:
    """All of them as one."""
    return Tally(
        save_steps=max(each.save_steps for each in tallies),
        runs=sum(each.runs for each in tallies),
        kills=sum(each.kills for each in tallies),
        kills_during_save=sum(each.kills_during_save for each in tallies),
        mismatches=[line for each in tallies for line in each.mismatches],
        lost=[steps for each in tallies for steps in each.lost],
        resumed=sum((each.resumed for each in tallies), Counter()),
        seconds=sum(each.seconds for each in tallies),
    )


def show(console: Console, tallies: Mapping[str, Tally]) -> None:
    """One line a scenario, one for all, and every mismatch."""
    table = Table("", "runs", "kills", "during a save", "mismatches", title="SIGKILL")
    for name in ("steps lost, mean", "max", "save_steps", "resumed", "minutes"):
        table.add_column(name)
    for name, tally in [*tallies.items(), ("total", total([*tallies.values()]))]:
        lost = (
            (f"{statistics.mean(tally.lost):.1f}", f"{max(tally.lost)}") if tally.lost else ("", "")
        )
        table.add_row(
            *(name, f"{tally.runs}", f"{tally.kills}"),
            f"{tally.kills_during_save} ({tally.save_share:.0%})",
            f"{len(tally.mismatches)}",
            *lost,
            f"{tally.save_steps}",
            ", ".join(f"{count} {where}" for where, count in sorted(tally.resumed.items())),
            f"{tally.seconds / 60:.1f}",
        )
    console.print(table)
    for tally in tallies.values():
        for line in tally.mismatches:
            console.print(f"mismatch: {line}")
