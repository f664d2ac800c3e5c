"""What the rows of `python -m faults` are made with: the command under a fault, and the verdict.

A fault is done to runs of the command on a tiny model, in processes of their own. What comes of
it is compared with a run that nothing happened to.
"""

import itertools
import math
import re
import shlex
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from support.child import Child, ChildError
from support.tiny_runs import TinyRuns, differences, train_metrics

NUM_STEPS = 30
STEPS = ("--num_train_epochs", "2")
STOPPED = 75  # the exit code of a run that was stopped and saved
GO_ON = "To go on, run the same command again: "
_POLL_S = 0.002
_PATIENCE_S = 20


@dataclass
class Row:
    """One row of the table. `lost` has the steps done again after each restart; `wrong` says what
    was not as it must be."""

    fault: str
    tries: int = 0
    saw: str = ""
    lost: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def expect(self, is_right: bool, what: str, child: Child | None = None) -> None:
        """Notes what is wrong, unless it is right."""
        if not is_right:
            self.wrong.append(what if child is None else f"{what}; {child.said}")

    def refused(self, child: Child, *words: str) -> None:
        """Waits for the end, which must be exit code 2 and one line with the words, and shows it.

        Without a word on stdout: that is before rows are read and the model loaded.
        """
        code, err = child.wait(), child.err
        self.expect(code == 2, f"exit code {code} instead of 2", child)
        self.expect(err.startswith("error: ") and err.count("\n") == 1, "not one line", child)
        for word in words:
            self.expect(word in err, f"{word!r} is not in it", child)
        self.saw = err.strip()


Fault = Callable[["Bench", Row], None]


class Bench:
    """Runs of NUM_STEPS steps on the tiny model in `directory`, and what came of them."""

    def __init__(self, directory: Path) -> None:
        for each in (signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(each) is signal.SIG_IGN:  # by nohup, or a shell; children inherit
                signal.signal(each, signal.SIG_DFL)
        self.runs = TinyRuns(directory)
        self._numbers = itertools.count(1)
        self._reference_s = 0.0

    @cached_property
    def reference(self) -> Path:
        """A finished run that nothing happened to."""
        began_s = time.monotonic()
        self.runs.finish("reference", *STEPS)
        self._reference_s = time.monotonic() - began_s
        return self.runs.path("reference")

    @property
    def patience_s(self) -> int:
        """Longer than anything in a run takes that doesn't hang, on a slow machine too."""
        assert self.reference  # whose time is that of all of it, with compilation
        return max(_PATIENCE_S, math.ceil(1.5 * self._reference_s))

    def new_name(self) -> str:
        """Of a run that isn't there yet."""
        return f"run-{next(self._numbers)}"

    @contextmanager
    def start(self, row: Row, name: str, *options: str, **more: str | Path) -> Iterator[Child]:
        """The command, with the steps of the reference; the row learns how many it does again."""
        run_dir = self.runs.path(name)
        done = len(train_metrics(run_dir))
        with self.runs.start(name, *STEPS, *options, **more) as child:  # type: ignore[arg-type]
            yield child
            if done and "\nstep " in child.out:
                row.lost.append(done - resumed_from(child))

    def finish(self, row: Row, name: str, *options: str) -> Child:
        """Runs to the end, which must be that of the reference."""
        with self.start(row, name, *options) as child:
            self.check_end(row, child, self.runs.path(name))
        return child

    def check_end(
        self, row: Row, child: Child, run_dir: Path, reference: Path | None = None
    ) -> None:
        """Waits for the end, which must be that of the reference."""
        code = child.wait()
        row.expect(code == 0, f"exit code {code} instead of 0", child)
        if code == 0:
            row.wrong += differences(run_dir, self.reference if reference is None else reference)

    def command(self, name: str) -> str:
        """The command of a run as it is shown to people."""
        argv = ["python", "-m", "jaxsft.train", "--config", str(self.runs.config), "--name", name]
        return shlex.join([*argv, *STEPS])


def resumed_from(child: Child) -> int:
    """The step that a run said it goes on from; 0 for a run that began anew."""
    found = re.search(r"^Continuing from step (\d+)\.", child.out, re.MULTILINE)
    return int(found[1]) if found else 0


def until(child: Child, condition: Callable[[], bool], what: str) -> None:
    """Returns when the condition holds; ChildError, with `what`, when the process ends before."""
    while not condition():
        if not child.is_running() and not condition():
            raise ChildError(f"no {what}; {child.said}")
        time.sleep(_POLL_S)


def files(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Path -> (time of the last change, contents) of every file."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def try_fault(name: str, fault: Fault, bench: Bench, tries: int) -> Row:
    """The row of one fault, done `tries` times."""
    row = Row(name)
    for _ in range(tries):
        row.tries += 1
        try:
            fault(bench, row)
        except ChildError as error:
            row.wrong.append(str(error))
    return row
