"""A run on gs:// as a user starts it, against a local server that speaks the protocol.

What no such server can show is named in remote.py.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_gcs import FakeGcs, running_gcs
from support.tiny_runs import TinyRuns, differences

LENGTH = ("--max_steps", "12", "--save_total_limit", "3")
OPTIONS = (*LENGTH, "--output_dir", "gs://bucket/runs")


@pytest.fixture
def gcs() -> Iterator[FakeGcs]:
    with running_gcs() as gcs:
        yield gcs


def finish(runs: TinyRuns, environment: dict[str, str]) -> str:
    """What the run says on its way to a good end."""
    with runs.start("run", *OPTIONS, **environment) as child:
        assert child.wait() == 0, child.said
    # TensorStore says where it has its credentials from.
    assert all("google_auth_provider" in line for line in child.err.splitlines()), child.err
    return child.out


def export(gcs: FakeGcs, directory: Path) -> Path:
    """The objects of the run as files."""
    for name in gcs.names("bucket"):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gcs.read("bucket", name))
    return directory / "runs" / "run"


@pytest.mark.slow
def test_a_run_killed_in_a_save_goes_on_on_another_machine(gcs: FakeGcs, tmp_path: Path) -> None:
    runs = TinyRuns(tmp_path)
    runs.finish("run", *LENGTH)
    machines = [gcs.environment() | {"XDG_CACHE_HOME": str(tmp_path / name)} for name in "ab"]

    gcs.held = "POST .*checkpoints/10/commit_success"
    with runs.start("run", *OPTIONS, **machines[0]) as first:
        while not gcs.holding.wait(0.1):
            assert first.is_running(), first.said
    gcs.held = None
    gcs.release.set()
    assert "runs/run/checkpoints/5/commit_success.txt" in gcs.names("bucket")
    assert gcs.read("bucket", "runs/run/metrics.jsonl").count(b"train/loss") >= 10

    out = finish(runs, machines[1])
    assert "Continuing from step 5." in out
    assert "The adapter is in gs://bucket/runs/run/adapter" in out
    assert differences(export(gcs, tmp_path / "exported"), runs.path("run")) == []

    # The first machine, where files of step 10 lie, learns that the run is finished.
    assert "is finished" in finish(runs, machines[0])
