"""Prepared rows on disk: what is in them, when they are made again, what damages them."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.fake_tokenizer import FakeTokenizer
from support.samples import load_samples

from jaxsft.common.locks import DirectoryLock
from jaxsft.config import DataOptions
from jaxsft.data.packing import PackedRows
from jaxsft.data.prepared import Prepared, open_prepared, prepare
from jaxsft.data.rows import ROWS_VERSION
from jaxsft.data.samples import DataReport

OPTIONS = DataOptions(max_length=256, packing=True, system_prompt=None)


def write_rows(path: Path, num_rows: int, name: str = "p") -> Path:
    rows = [
        {"prompt": f"{name}{i}", "response": f"<think>{'So. ' * (1 + i % 7)}</think>{name}{i}"}
        for i in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", 50)


def make(root: Path, *files: Path, **options) -> Prepared:
    return prepare(files, FakeTokenizer(), dataclasses.replace(OPTIONS, **options), root)


def test_rows_on_disk_are_those_in_memory(rows_file, tmp_path):
    found = make(tmp_path / "sets", rows_file)
    samples, report = load_samples(rows_file, FakeTokenizer(), OPTIONS)
    assert isinstance(found.rows.tokens_N, np.memmap)
    assert found.rows.num_samples == len(samples) == report.samples == 50
    for i, sample in enumerate(samples):
        for ours, theirs in zip(found.rows.sample(i), sample, strict=True):
            np.testing.assert_array_equal(ours, theirs)
    # The same samples in the same rows, whoever laid them there.
    starts = found.rows.row_offsets
    bins = np.split(found.rows.row_samples, starts[1:-1])
    again = PackedRows.from_samples(samples, [row.tolist() for row in bins], 256)
    assert again.digest() == found.rows.digest() == found.manifest["digest"]
    assert found.sample_rows.tolist() == list(range(50))
    assert found.report == report
    assert found.manifest["fill"] == found.rows.fill == report.num_tokens / (len(found.rows) * 256)
    assert found.rows.num_loss_tokens == report.num_loss_tokens
    assert found.manifest["fewest_rows"] <= len(found.rows)


# Of every kind of outcome one: converted, noted, rejected, shortened, a system text of its own, an
# untrained turn, columns that are not used.
FIXED_ROWS = [
    {"prompt": "p", "response": "<think>One and one.</think>Two"},
    {"prompt": "p", "response": "<think>One and one.</think>Two"},
    {"prompt": "q <end_of_turn>", "response": "never opened</think>Two"},
    {"prompt": "r", "response": "no thought"},
    {"prompt": "s", "response": f"<think>Ten. {'Wir zählen. ' * 30}</think>10"},
    {"prompt": "t", "response": f"<think>{' '.join(f'{n}: {n * n}.' for n in range(99))}</think>9"},
    {"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
    {"text": "Add.", "code": "def f():\r\n    return 1", "test_list": ["assert f() == 1"]},
    {"messages": [{"role": r, "content": c} for r, c in [("system", "S."), ("user", "u")]]
     + [{"role": "assistant", "content": "2", "reasoning_content": "1 + 1"}]},
    {"instruction": "Add.", "input": "2, 3", "output": "5", "rationale": "2 + 3", "source": "x"},
    {"system": "Rhyme.", "conversations": [
        {"from": "human", "value": "v"}, {"from": "gpt", "value": "No.", "weight": 0},
        {"from": "human", "value": "w"}, {"from": "gpt", "value": "[THINK]r[/THINK]Yes."}]},
    {"prompt": "x", "response": "y", "hint": "z"},
]  # fmt: skip


def test_rows_change_with_their_version_alone(tmp_path, tokenizer):
    """Prepared rows are found by ROWS_VERSION: what changes them must raise it."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in FIXED_ROWS))
    options = DataOptions(max_length=128, min_completion_tokens=2, max_drop=1.0)
    found = prepare(path, tokenizer, options, tmp_path / "sets")
    counts = found.report
    assert counts.rejected == {"unused_text": 1, "duplicate": 1, "degenerate": 1}
    assert counts.noted == {"implicit_open": 1, "control_look_alike": 1, "plain_completion": 2}
    assert counts.columns[str(path)]["unused"] == ["source"]
    assert counts.shortened == 1
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text(json.dumps(FIXED_ROWS[6]) + "\n")
    other = dataclasses.replace(
        options,
        overlong="drop",
        loss_on_prompt=True,
        system_prompt=None,
        without_thought="reject",
        earlier_reasoning="strip",
        packing=True,
        weights=[1.5],
        drop_duplicates=False,
    )
    others = prepare(path, tokenizer, other, tmp_path / "sets", heldout_files=[heldout])
    assert others.report.rejected.keys() == {"no_thought", "degenerate", "too_long", "contaminated"}
    digests = [found.rows.digest()[:16], others.rows.digest()[:16]]
    assert (ROWS_VERSION, digests) == (3, ["2d41a3b43d0b7084", "dd8b9eb4ea717d91"]), (
        "prepared rows have changed: raise ROWS_VERSION in jaxsft/data/rows.py, then put its new "
        "value and the new digests here"
    )


def test_the_data_side_imports_nothing_slow():
    """Neither JAX nor what only some files of rows need."""
    script = (
        "import importlib, pkgutil, sys, jaxsft.data\n"
        "names = {each.name for each in pkgutil.iter_modules(jaxsft.data.__path__)}\n"
        "for name in names - {'arrow_rows', 'ipc_rows', 'parquet_rows'}:\n"
        "    importlib.import_module(f'jaxsft.data.{name}')\n"
        "print(*{'jax', 'flax', 'datasets', 'pyarrow', 'torch', 'pandas'} & sys.modules.keys())"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip(), found.stderr) == (0, "", "")


def test_sample_rows_count_over_all_files_and_rejects(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", 3)
    first.write_text(first.read_text() + '{"prompt": "x", "response": "no thought"}\n')
    found = make(tmp_path / "sets", first, write_rows(tmp_path / "b.jsonl", 2, "q"))
    assert found.sample_rows.tolist() == [0, 1, 2, 4, 5]
    counts = {Path(name).name: counts for name, counts in found.report.by_source.items()}
    assert counts == {
        "a.jsonl": {"rows_read": 4, "samples": 3},
        "b.jsonl": {"rows_read": 2, "samples": 2},
    }


def test_weights_repeat_samples(tmp_path):
    files = [write_rows(tmp_path / f"{name}.jsonl", 10, name) for name in "abc"]
    found = make(tmp_path / "sets", *files, weights=[2.0, 1.0, 0.3])
    uses = np.bincount(found.rows.row_samples, minlength=30)
    assert uses[:10].tolist() == [2] * 10 and uses[10:20].tolist() == [1] * 10
    assert uses[20:].sum() == 3 and uses[20:].max() == 1
    again = make(tmp_path / "other", *files, weights=[2.0, 1.0, 0.3])
    assert again.rows.digest() == found.rows.digest()
    lengths = np.diff(found.rows.sample_offsets)
    assert found.rows.num_tokens == (lengths * uses).sum() > found.report.num_tokens
    masks = [found.rows.sample(i).loss_mask.sum() for i in range(30)]
    assert found.rows.num_loss_tokens == (masks * uses).sum()
    with pytest.raises(ValueError, match=r"a.jsonl: an epoch has none of its 10 samples; raise"):
        make(tmp_path / "sets", *files, weights=[0.01, 1.0, 1.0])
    unclosed = tmp_path / "unclosed.jsonl"
    unclosed.write_text('{"prompt": "p", "response": "<think>So."}\n')
    with pytest.raises(ValueError, match=r"unclosed.jsonl: no sample of it is left; .*1 unclosed"):
        make(tmp_path / "sets", files[0], unclosed, max_drop=1.0)
    with pytest.raises(ValueError, match=r"data.weights has 2 numbers for 3 files: give one each"):
        make(tmp_path / "sets", *files, weights=[1.0, 1.0])


def test_nothing_changed_is_not_made_again(rows_file, tmp_path):
    root = tmp_path / "sets"
    first = make(root, rows_file)
    before = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    again = make(root, rows_file, max_drop=0.5, train_files=["anything"])
    assert again.directory == first.directory
    assert {path: path.stat().st_mtime_ns for path in first.directory.iterdir()} == before


@pytest.mark.parametrize(
    "option",
    [
        *({"max_length": 128}, {"packing": False}, {"overlong": "drop"}, {"system_prompt": "S."}),
        *({"loss_on_prompt": True}, {"min_completion_tokens": 30}, {"drop_duplicates": False}),
        *({"drop_degenerate": False}, {"start": 1}, {"stop": 9}, {"weights": [2.0]}),
    ],
)
def test_another_option_is_another_set(option, rows_file, tmp_path):
    root = tmp_path / "sets"
    assert make(root, rows_file, **option).directory != make(root, rows_file).directory


def test_changed_data_tokenizer_or_heldout_rows_are_another_set(rows_file, tmp_path, monkeypatch):
    root = tmp_path / "sets"
    directories = [make(root, rows_file).directory]
    heldout = write_rows(tmp_path / "heldout.jsonl", 1)
    with_heldout = prepare(rows_file, FakeTokenizer(), OPTIONS, root, heldout_files=heldout)
    assert with_heldout.report.rejected == {"contaminated": 1}
    directories.append(with_heldout.directory)
    write_rows(rows_file, 51)
    directories.append(make(root, rows_file).directory)
    monkeypatch.setattr(FakeTokenizer, "digest", "another")
    directories.append(make(root, rows_file).directory)
    monkeypatch.setattr("jaxsft.data.prepared.ROWS_VERSION", 0)
    directories.append(make(root, rows_file).directory)
    copy = Path(shutil.copy(rows_file, tmp_path / "copy.jsonl"))  # the report names the file
    directories.append(make(root, copy).directory)
    assert len(set(directories)) == 6


def test_failures_leave_nothing(rows_file, tmp_path):
    root = tmp_path / "sets"
    broken = rows_file.read_text() + '{"prompt": "cut'
    rows_file.write_text(broken)
    with pytest.raises(ValueError, match=r"rows.jsonl:51: broken or cut off"):
        make(root, rows_file)
    rows_file.write_text('{"prompt": "p", "response": "no thought"}\n')
    with pytest.raises(ValueError, match="no sample is left"):
        make(root, rows_file)
    assert [path.name for path in root.iterdir()] == ["files.json"]


def test_what_a_killed_process_left_is_removed_and_work_of_others_is_not(rows_file, tmp_path):
    dead, alive = (tmp_path / "sets" / f".0123456789abcdef.partial-{name}" for name in "da")
    dead.mkdir(parents=True)
    with DirectoryLock(alive):  # as another process holds it
        make(tmp_path / "sets", rows_file)
        assert alive.exists() and not dead.exists()


def raise_disk_full(*_: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_is_named(rows_file, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxsft.data.prepared._write_rows", raise_disk_full)
    with pytest.raises(OSError, match=r"sets: No space left on device while rows .* make room"):
        make(tmp_path / "sets", rows_file)
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["files.json"]


def test_a_file_that_changes_while_it_is_read_is_refused(rows_file, tmp_path):
    def append(report: DataReport) -> None:
        rows_file.write_text(rows_file.read_text() + "\n")

    with pytest.raises(ValueError, match=r"rows.jsonl: was changed while it was read; run it ag"):
        prepare(rows_file, FakeTokenizer(), OPTIONS, tmp_path / "sets", progress=append)
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["files.json"]


def test_another_file_of_the_same_size_and_time_is_seen(rows_file, tmp_path):
    first = make(tmp_path / "sets", rows_file)
    before = rows_file.stat()
    rows_file.write_text(rows_file.read_text().replace("So.", "Or."))
    os.utime(rows_file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert make(tmp_path / "sets", rows_file).directory != first.directory


def test_a_set_where_nothing_can_be_written(rows_file, tmp_path, monkeypatch):
    first = make(tmp_path / "sets", rows_file)
    copy = Path(shutil.copy(rows_file, tmp_path / "again.jsonl"))
    copy.replace(rows_file)  # the same bytes: another inode and time
    monkeypatch.setattr("jaxsft.data.prepared.write_json", raise_disk_full)
    assert make(tmp_path / "sets", rows_file).directory == first.directory


@pytest.mark.parametrize(
    "name",
    [
        *("tokens", "loss_mask", "sample_offsets", "row_samples", "row_offsets", "sample_rows"),
        "manifest",
    ],
)
def test_damage_is_seen(name, rows_file, tmp_path):
    directory = make(tmp_path / "sets", rows_file).directory
    path = directory / ("manifest.json" if name == "manifest" else f"{name}.npy")
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-20] ^= 1
    for damaged in (flipped, whole[: len(whole) // 2], b"{}", b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"damaged, or no prepared rows; delete it"):
            open_prepared(directory)
    path.unlink()
    with pytest.raises(ValueError, match=r"damaged, or no prepared rows; delete it"):
        make(tmp_path / "sets", rows_file)
