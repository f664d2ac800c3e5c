"""One try of each fault of `python -m faults`: the command stops, refuses or goes on as promised,
and what it leaves equals what a run leaves that nothing happened to."""

import pytest
from faults.__main__ import FAULTS
from faults.bench import Bench, try_fault

SAVE_STEPS = 5  # of the tiny runs
# Where nothing but a save that works may be lost: a kill, a hang, a second signal.
MAY_LOSE = {"a second signal", "fit-deadline, kill -9", "a hang", "a second trainer, kill -9"}
# The longest, and those that are much like another row or that other tests hold in part.
SLOW = {
    *("fit-deadline, kill -9", "another rank, model, data, …", "fork", "fork of another model"),
    *("a hang", "two trainers at once", "stdout on a full disk", "directory deleted"),
    *("disk read-only for some steps", "more steps than time", "the session's end"),
    *("loss spikes, kill -9", "a second trainer, kill -9", "disk full to the end"),
    "SIGTERM, SIGINT, SIGHUP",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults"))


QUICK = "a session too short"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=[pytest.mark.slow] * (name in SLOW) + [pytest.mark.quick] * (name == QUICK)
        )
        for name in FAULTS
    ],
)
def test_nothing_is_lost(name: str, bench: Bench) -> None:
    row = try_fault(name, FAULTS[name], bench, tries=1)
    assert row.wrong == []
    assert row.saw
    # One save is under way while the next one's steps are taken.
    most = 2 * SAVE_STEPS if "kill" in name or name in MAY_LOSE else 0
    assert max(row.lost, default=0) <= most
