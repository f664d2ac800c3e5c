"""A run's files on a local server that speaks Google Cloud Storage's protocol."""

import importlib
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from etils import epath
from support.fake_gcs import FakeGcs, running_gcs

from jaxsft.run.remote import RunFiles, is_remote
from jaxsft.run.run_dir import ReplacedError


@pytest.fixture
def gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGcs]:
    with running_gcs() as gcs:
        for name, value in gcs.environment().items():
            monkeypatch.setenv(name, value)
        for name in ("EPATH_USE_TF", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"):
            monkeypatch.setenv(name, "false")  # RunFiles sets them
        # From the environment it is read at import only.
        monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
        importlib.import_module("gcsfs")  # by now: it reads the environment as well
        yield gcs


def begin(scratch: Path, process_index: int = 0) -> RunFiles:
    """A run begun or continued on a machine with that scratch directory."""
    files = RunFiles("gs://bucket/runs", "x", scratch, process_index)
    files.pull()
    return files


def local(files: RunFiles) -> dict[str, str]:
    """What lies in the scratch directory, but for the owner."""
    paths = (path for path in files.path.rglob("*") if path.is_file())
    there = {path.relative_to(files.path).as_posix(): path.read_text() for path in paths}
    del there[".owner"]
    return there


def uploads(gcs: FakeGcs) -> list[str]:
    """Names of the objects of the run in the order in which they were last written."""
    written = sorted(gcs.objects.items(), key=lambda item: item[1].generation)
    return [name.removeprefix("runs/x/") for (_, name), _ in written]


def test_a_local_run_is_left_where_it_is(tmp_path: Path) -> None:
    files = RunFiles(str(tmp_path / "runs"), "x", tmp_path / "scratch")
    files.pull()
    assert files.push() is None
    assert files.path == files.shown == tmp_path / "runs" / "x"
    assert files.checkpoint_dir == tmp_path / "runs" / "x" / "checkpoints"
    assert list(tmp_path.iterdir()) == []


def test_another_machine_goes_on_with_the_files(gcs: FakeGcs, tmp_path: Path) -> None:
    first = begin(tmp_path / "a")
    assert str(first.shown) == "gs://bucket/runs/x"
    assert str(first.checkpoint_dir) == "gs://bucket/runs/x/checkpoints"
    (first.path / "tensorboard").mkdir()
    (first.path / "tensorboard" / "events.0").write_text("points")
    (first.path / "metrics.jsonl").write_text("1\n")
    assert first.push() is None
    gcs.objects["bucket", "runs/x/checkpoints/8/data"] = gcs.objects["bucket", "runs/x/.owner"]
    gcs.objects["bucket", "runs/xy/result.json"] = gcs.objects["bucket", "runs/x/.owner"]
    # Consoles make such objects for folders.
    gcs.objects["bucket", "runs/x/"] = gcs.objects["bucket", "runs/x/.owner"]
    gcs.objects["bucket", "runs/x/tensorboard/"] = gcs.objects["bucket", "runs/x/.owner"]

    second = begin(tmp_path / "b")
    assert local(second) == {"tensorboard/events.0": "points", "metrics.jsonl": "1\n"}
    (second.path / "metrics.jsonl").write_text("1\n2\n")
    assert second.push() is None

    # The first machine's files are those of an earlier state now, and go.
    (first.path / "metrics.jsonl").write_text("1\nother\n")
    (first.path / "skipped.jsonl").write_text("other\n")
    again = begin(tmp_path / "a")
    assert local(again) == {"tensorboard/events.0": "points", "metrics.jsonl": "1\n2\n"}


def test_only_what_changed_is_copied_and_the_result_last(gcs: FakeGcs, tmp_path: Path) -> None:
    files = begin(tmp_path)
    for name in ("result.json", "samples.jsonl", "metrics.jsonl"):
        (files.path / name).write_text("")
    assert files.push() is None
    assert uploads(gcs) == [".owner", "metrics.jsonl", "samples.jsonl", "result.json"]
    (files.path / "samples.jsonl").write_text("new")
    del gcs.log[:]
    assert files.push() is None
    assert [line for line in gcs.log if line.startswith("POST")] == [
        "POST /upload/storage/v1/b/bucket/o?uploadType=multipart"
    ]
    assert gcs.read("bucket", "runs/x/samples.jsonl") == b"new"
    # Nor is what was just fetched.
    files = begin(tmp_path / "b")
    del gcs.log[:]
    assert files.push() is None
    assert not [line for line in gcs.log if line.startswith("POST")]


def test_a_copy_that_fails_is_said_and_made_up_for(gcs: FakeGcs, tmp_path: Path) -> None:
    files = begin(tmp_path)
    (files.path / "metrics.jsonl").write_text("1\n")
    gcs.refused = "^POST"
    problem = files.push()
    assert problem is not None and problem.count("\n") == 0
    assert problem.startswith("gs://bucket/runs/x: metrics and results couldn't be copied there (")
    assert str(files.path) in problem
    assert uploads(gcs) == [".owner"]
    gcs.refused = None
    # The process ends here. What it could not copy is not replaced by the older state there.
    files = begin(tmp_path)
    assert local(files) == {"metrics.jsonl": "1\n"}
    assert files.push() is None
    assert gcs.read("bucket", "runs/x/metrics.jsonl") == b"1\n"


def test_the_run_that_was_continued_elsewhere_stops(gcs: FakeGcs, tmp_path: Path) -> None:
    first = begin(tmp_path / "a")
    second = begin(tmp_path / "b")
    (first.path / "metrics.jsonl").write_text("first")
    (second.path / "metrics.jsonl").write_text("second")
    assert second.push() is None
    with pytest.raises(ReplacedError, match="another machine has continued this run"):
        first.push()
    assert gcs.read("bucket", "runs/x/metrics.jsonl") == b"second"


def test_a_directory_removed_there_is_made_again(gcs: FakeGcs, tmp_path: Path) -> None:
    files = begin(tmp_path)
    (files.path / "metrics.jsonl").write_text("1\n")
    assert files.push() is None
    gcs.objects.clear()
    assert files.push() is None
    assert uploads(gcs) == [".owner", "metrics.jsonl"]
    # Before a start it means: begin again.
    gcs.objects.clear()
    assert local(begin(tmp_path)) == {}


def test_other_processes_of_the_run_only_read(gcs: FakeGcs, tmp_path: Path) -> None:
    writer = begin(tmp_path)
    (writer.path / "before.json").write_text("{}")
    assert writer.push() is None
    before = dict(gcs.objects)
    reader = RunFiles("gs://bucket/runs", "x", tmp_path, process_index=1)
    for _ in range(2):
        reader.pull()
        assert reader.path != writer.path
        assert [path.name for path in reader.path.iterdir()] == ["before.json"]
    (reader.path / "before.json").write_text("other")
    assert reader.push() is None
    assert gcs.objects == before


@pytest.mark.parametrize("refused", ["^GET", "^POST"])
def test_no_permission_is_said_before_anything_starts(
    gcs: FakeGcs, tmp_path: Path, refused: str
) -> None:
    gcs.refused = refused
    with pytest.raises(OSError, match=r"^gs://bucket/runs/x: can't be read and w.+; check"):
        begin(tmp_path)


def test_etils_sees_what_others_write(gcs: FakeGcs, tmp_path: Path) -> None:
    files = begin(tmp_path)
    assert isinstance(files.shown, epath.Path)
    assert [path.name for path in files.shown.iterdir()] == [".owner"]
    gcs.objects["bucket", "runs/x/new"] = gcs.objects["bucket", "runs/x/.owner"]
    assert [path.name for path in files.shown.iterdir()] == [".owner", "new"]


@pytest.mark.parametrize("path", ["s3://bucket/runs", "gs:/bucket/runs", "gs://", "gs:///runs"])
def test_other_places_are_refused(path: str, tmp_path: Path) -> None:
    assert is_remote(path)
    with pytest.raises(ValueError, match=f"^output_dir {path}: must be .* gs://BUCKET/DIRECTORY$"):
        RunFiles(path, "x", tmp_path)


def test_the_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gs://bucket: needs the package gcsfs, pip install 'jax"):
        RunFiles("gs://bucket", "x", tmp_path)
