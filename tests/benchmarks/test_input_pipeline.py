"""The benchmark of the input pipeline, without TRL: measuring a command, the naive path."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.fake_tokenizer import FakeTokenizer

from benchmarks import process_tree
from benchmarks.glaive_like import write_glaive_like
from benchmarks.input_feeding import feed_prepared, naive_batches, training_turns
from benchmarks.input_peers import write_trl_rows
from benchmarks.process_tree import CommandError, run_measured
from jaxsft.data.chat import encode_chat
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.data.rows import convert_row
from jaxsft.data.sources import read_rows

# A child of a process that holds 200 MiB, both until a file says that the memory of both was seen.
HOLDING = """
import os, subprocess, sys, time
held = bytearray(b"1") * (200 << 20)
print("first", sorted(os.sched_getaffinity(0)), flush=True)
if len(sys.argv) == 2:
    subprocess.run([sys.executable, __file__, sys.argv[1], "child"], check=True)
for _ in range(6000):
    if os.path.exists(sys.argv[1]):
        break
    time.sleep(0.01)
time.sleep(0.5)
"""


def test_run_measured_counts_children_and_binds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, seen = tmp_path / "holding.py", tmp_path / "seen"
    script.write_text(HOLDING)
    command = [sys.executable, str(script), str(seen)]
    resident_bytes = process_tree._resident_bytes

    def look(pid: int) -> tuple[int, int]:
        found = resident_bytes(pid)
        if found[1] > 2 * 200 << 20:
            seen.touch()
        return found

    monkeypatch.setattr(process_tree, "_resident_bytes", look)
    usage = run_measured(command, num_cores=1, environment={}, log=tmp_path / "log")
    assert 2 * 200 < usage.peak_anonymous_bytes / 2**20 < 2 * 250
    assert usage.peak_rss_bytes > usage.peak_anonymous_bytes
    assert usage.seconds > 1 and 0 < usage.cpu_s < usage.seconds
    lines = [line.removeprefix("first ") for line in usage.output.splitlines()]
    assert len(lines) == 2 and all(len(json.loads(line)) == 1 for line in lines)


def test_run_measured_that_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no rows today')"]
    with pytest.raises(CommandError, match="ended with 1: no rows today"):
        run_measured(command, num_cores=2, environment={}, log=tmp_path / "log")


def test_naive_batches_are_cut_and_padded_samples(tmp_path: Path) -> None:
    [file] = write_glaive_like(tmp_path, 3, seed=0)
    tokenizer = FakeTokenizer()
    batch = next(naive_batches([file], tokenizer, 1500, 4))  # type: ignore[arg-type]
    assert batch.tokens_BT.shape == (4, 1500)
    np.testing.assert_array_equal(batch.tokens_BT[0], batch.tokens_BT[3])  # the next epoch
    for b, (_, row) in enumerate(read_rows(file)):
        ids = encode_chat(tokenizer, training_turns(convert_row(row))).ids  # type: ignore
        used = min(len(ids), 1500)
        np.testing.assert_array_equal(batch.tokens_BT[b, :used], ids[:used])
        assert not batch.tokens_BT[b, used:].any()


def test_feed_counts_positions_and_tokens() -> None:
    sample = Sample(np.ones(6, np.int32), np.ones(6, bool))
    rows = PackedRows.from_samples([sample] * 4, [[0], [1], [2], [3]], 8)
    feed = feed_prepared(rows, batch_size=2, seconds=0.05)
    assert feed.num_steps > 0
    assert feed.tokens_per_s / feed.positions_per_s == pytest.approx(6 / 8)


def test_trl_gets_the_converted_rows(tmp_path: Path) -> None:
    [file] = write_glaive_like(tmp_path, 40, seed=0, defect_rate=0.5)
    tokenizer = FakeTokenizer()
    tokenizer.model_bytes = b"model"  # type: ignore[attr-defined]
    path, first_ids = write_trl_rows([file], 40, tokenizer, tmp_path)  # type: ignore[arg-type]
    rows = [row for _, row in read_rows(path)]
    assert 8 < len(rows) < 32 and len(first_ids) == min(16, len(rows))
    for row, ids in zip(rows, first_ids, strict=False):
        [user], [assistant] = row["prompt"], row["completion"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        text = tokenizer.decode(ids)
        assert text == (
            f"<bos><start_of_turn>user\n{user['content']}<end_of_turn>\n"
            f"<start_of_turn>model\n{assistant['content']}<end_of_turn>"
        )
