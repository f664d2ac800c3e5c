"""The files of a run's measurements: across a resume, on disks that fail; the speed arithmetic."""

import json
import math
import shutil

from support.small_disk import fill, set_read_only, small_disk
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from jaxsft.common import append_file
from jaxsft.run import events, metrics
from jaxsft.run.metrics import MetricsWriter, Throughput

ANSWER = {"prompt": "Why?", "text": "<answer>*1*</answer>\nend ü", "exact_format": False}


def read_jsonl(run_dir, name="metrics.jsonl"):
    """Its whole lines; a file that ends in a torn one fails."""
    text = (run_dir / name).read_text()
    assert text.endswith("\n") or not text
    return [json.loads(line) for line in text.splitlines()]


def steps_of(run_dir, name="metrics.jsonl"):
    return [line["step"] for line in read_jsonl(run_dir, name)]


def read_events(run_dir):
    """All TensorBoard events, file by file; a record is length, crc, bytes, crc."""
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            record = data[12 : 12 + length]
            assert int.from_bytes(data[8:12], "little") == masked_crc32c(data[:8])
            assert int.from_bytes(data[12 + length :][:4], "little") == masked_crc32c(record)
            events.append(Event.FromString(record))
            data = data[16 + length :]
    return events


def event_steps(run_dir):
    return [event.step for event in read_events(run_dir) if event.HasField("summary")]


def test_lines_are_flushed_and_null_stands_for_what_json_lacks(tmp_path):
    with MetricsWriter(tmp_path / "run") as writer:
        writer.log(1, {"loss": 2.5, "grad_norm": math.nan})
        writer.log(2, {"loss": math.inf})
        # Before close: a killed run keeps its lines.
        assert read_jsonl(tmp_path / "run") == [
            {"step": 1, "loss": 2.5, "grad_norm": None},
            {"step": 2, "loss": None},
        ]
    writer.close()  # twice is harmless


def test_tensorboard_gets_scalars_and_literal_text(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(3, {"train/loss": 2.5, "bad": math.nan, "train/batch_hash": "0fc2"})
        writer.sample(4, 0, ANSWER)
    values = [
        (event.step, value) for event in read_events(tmp_path) for value in event.summary.value
    ]
    scalars = [
        (step, value.tag, value.simple_value)
        for step, value in values
        if not value.HasField("tensor")
    ]
    texts = [
        (step, value.tensor.string_val[0]) for step, value in values if value.HasField("tensor")
    ]
    assert scalars == [(3, "train/loss", 2.5)]
    assert texts == [(4, b"    Why?\n    \n    <answer>*1*</answer>\n    end \xc3\xbc\n")]
    line = {"step": 3, "train/loss": 2.5, "bad": None, "train/batch_hash": "0fc2"}
    assert read_jsonl(tmp_path) == [line]
    assert read_events(tmp_path)[0].file_version == "brain.Event:2"


def test_events_are_those_of_the_reference_writer():
    values = {"a": 2.5, "train/loss": -1e-7, "zero": 0.0, "large": 3e38, "ü": 1.0}
    points = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    text = summary.text("sample/3", ANSWER["text"] * 100)
    expected = {
        events.file_start(1.5): Event(wall_time=1.5, file_version="brain.Event:2"),
        events.session_start(1e9, 0): Event(wall_time=1e9, session_log=SessionLog(status=1)),
        events.scalars(1e9, 2**40, values): Event(
            wall_time=1e9, step=2**40, summary=Summary(value=points)
        ),
        events.markdown(0.0, 7, "sample/3", ANSWER["text"] * 100): Event(step=7, summary=text),
    }
    for record, event in expected.items():
        assert Event.FromString(record[12:-4]) == event


def test_a_resumed_run_has_each_step_once(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2, 3, 4):
            writer.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn by a kill
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        assert steps_of(tmp_path) == [1, 2]
        for step in (3, 4, 5):
            writer.log(step, {"loss": -float(step)})
    lines = read_jsonl(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == [1, 2, -3, -4, -5]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}
    # TensorBoard purges steps >= the step of a session start.
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 3]


def test_a_resumed_run_has_each_rollout_once(tmp_path, monkeypatch):
    def rollouts(*steps):
        return [{"step": step, "member": i, "text": "ü" * step} for step in steps for i in (0, 1)]

    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in range(1, 6):
            writer.rollout(rollouts(step))
    path = tmp_path / "rollouts.jsonl"
    with path.open("a") as file:
        file.write('{"step": 2, "te')  # torn by a kill
    read = []
    step_of = metrics._step_of
    monkeypatch.setattr(metrics, "_step_of", lambda line: read.append(line) or step_of(line))
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        assert read_jsonl(tmp_path, path.name) == rollouts(1, 2, 3)
        assert len(read) == 5  # of later steps, and the last that stays
        writer.rollout(rollouts(4))
    assert read_jsonl(tmp_path, path.name) == rollouts(1, 2, 3, 4)
    for resume_step, kept in ((None, [1, 2, 3, 4]), (4, [1, 2, 3, 4]), (1, [1])):
        MetricsWriter(tmp_path, resume_step).close()
        assert read_jsonl(tmp_path, path.name) == rollouts(*kept)
    with MetricsWriter(tmp_path, resume_step=1) as writer:
        path.unlink()
        writer.rollout(rollouts(2))
    assert read_jsonl(tmp_path, path.name) == rollouts(2)  # what this process wrote
    MetricsWriter(tmp_path, resume_step=0).close()
    assert not path.exists()


def test_a_measurement_made_again_is_there_once(tmp_path):
    for loss in (3.0, 3.0, 4.0):
        with MetricsWriter(tmp_path, resume_step=2) as writer:
            writer.sample(2, 0, ANSWER)
            writer.log(2, {"eval/loss": loss})
    assert [line["eval/loss"] for line in read_jsonl(tmp_path)] == [3.0, 4.0]
    assert read_jsonl(tmp_path, "samples.jsonl") == [{"step": 2, **ANSWER}]
    assert event_steps(tmp_path) == [2, 2, 2]


def test_a_run_measured_anew_keeps_nothing_of_before(tmp_path):
    for resume_step in (0, -1):
        with MetricsWriter(tmp_path, resume_step) as writer:
            writer.sample(0, 0, ANSWER | {"text": str(resume_step)})
            writer.log(0, {"eval/loss": resume_step})
    assert [line["eval/loss"] for line in read_jsonl(tmp_path)] == [-1]
    assert [line["text"] for line in read_jsonl(tmp_path, "samples.jsonl")] == ["-1"]


def test_without_resume_step_lines_are_added(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(7, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8')
    with MetricsWriter(tmp_path) as writer:
        writer.log(8, {"eval_loss": 2.0})
    assert read_jsonl(tmp_path) == [{"step": 7, "loss": 1.0}, {"step": 8, "eval_loss": 2.0}]


def test_skipped_steps_are_kept_with_their_rows(tmp_path):
    rows = ["a.jsonl:row 7", "b.jsonl:row 1"]
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.log(1, {"loss": 1.0})
        assert not (tmp_path / "skipped.jsonl").exists()
        writer.skip(2, "not finite", loss=math.nan, grad_norm=math.inf, rows=rows)
        writer.skip(4, "spike", loss=9.5, grad_norm=3.0, rows=[])
    first = {"step": 2, "reason": "not finite", "loss": None, "grad_norm": None, "rows": rows}
    second = {"step": 4, "reason": "spike", "loss": 9.5, "grad_norm": 3.0, "rows": []}
    assert read_jsonl(tmp_path, "skipped.jsonl") == [first, second]
    MetricsWriter(tmp_path, resume_step=3).close()
    assert read_jsonl(tmp_path, "skipped.jsonl") == [first]
    MetricsWriter(tmp_path, resume_step=1).close()
    assert not (tmp_path / "skipped.jsonl").exists()
    assert steps_of(tmp_path) == [1]


def test_a_full_disk_tears_no_line_and_loses_none():
    with small_disk(2**18) as disk:
        writer = MetricsWriter(disk / "run", resume_step=0)
        writer.log(1, {"loss": 1.0})
        filler = fill(disk)
        # Lines of 1,000 bytes: four fit into the page that the file has, and a part of the fifth.
        for step in range(2, 12):
            writer.log(step, {"loss": float(step), "text": "x" * 1000})
            writer.skip(step, "spike", float(step), 1.0, [])
        assert steps_of(disk / "run") == [1, 2, 3, 4]
        assert event_steps(disk / "run")[:4] == [1, 2, 3, 4]  # whole records only
        line = f"{disk}/run/metrics.jsonl: No space left on device (lines not written: 7)"
        assert writer.problem == line
        writer.close()  # neither raises nor waits
        assert writer.problem == line

        # A session that begins on the full disk: it needs no room to drop lines.
        with MetricsWriter(disk / "run", resume_step=3) as resumed:
            assert steps_of(disk / "run") == [1, 2, 3]
            filler.unlink()
            resumed.log(4, {"loss": 4.0})
        assert resumed.problem is None
        assert steps_of(disk / "run") == [1, 2, 3, 4]


def test_what_waited_is_written_in_order_once_there_is_room():
    with small_disk(2**18) as disk, MetricsWriter(disk / "run", resume_step=0) as writer:
        filler = fill(disk)
        for step in range(1, 100):
            writer.log(step, {"loss": float(step), "text": "x" * 1000})
        assert writer.problem is not None
        filler.unlink()
        writer.log(100, {"loss": 100.0})
        assert writer.problem is None
        assert steps_of(disk / "run") == event_steps(disk / "run") == list(range(1, 101))


def test_a_read_only_disk_is_waited_for():
    with small_disk(2**18) as disk, MetricsWriter(disk / "run", resume_step=0) as writer:
        writer.log(1, {"loss": 1.0})
        set_read_only(disk, True)
        writer.close()
        assert writer.problem is None  # all is written
        writer.log(2, {"loss": 2.0})
        what = "Read-only file system (lines not written: 1)"
        assert writer.problem == f"{disk}/run/metrics.jsonl: {what}"
        assert steps_of(disk / "run") == [1]
        set_read_only(disk, False)
        writer.close()
        assert writer.problem is None
        assert steps_of(disk / "run") == event_steps(disk / "run") == [1, 2]


def test_a_deleted_run_directory_is_made_anew_with_all_lines(tmp_path):
    run_dir = tmp_path / "run"
    with MetricsWriter(run_dir, resume_step=0) as writer:
        writer.log(1, {"loss": 1.0})
    with MetricsWriter(run_dir, resume_step=1) as writer:
        writer.log(2, {"loss": 2.0})
        shutil.rmtree(run_dir)
        writer.log(3, {"loss": 3.0})
        writer.log(4, {"loss": 4.0})
        assert writer.problem is None
    assert steps_of(run_dir) == [1, 2, 3, 4]
    assert event_steps(run_dir) == [2, 3, 4]


def test_memory_for_waiting_lines_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(append_file, "MAX_KEPT_BYTES", 100)
    path = tmp_path / "run" / "file"
    path.parent.write_text("in the way")  # not a directory
    file = append_file.AppendFile(path)
    for i in range(12):
        file.append(b"%9d\n" % i)
    assert file.problem == f"{path}: Not a directory (lines not written: 12)"
    path.parent.unlink()
    for i in range(12, 16):
        file.append(b"%9d\n" % i)
    written = [*range(10), *range(12, 16)]  # 100 bytes waited, the lines after them were lost
    assert [int(line) for line in path.read_text().split()] == written
    assert file.problem == f"{path}: 2 lines lost, more than 0 MiB had to wait"
    path.unlink()  # of what is written the newest 100 bytes are kept
    file.append(b"%9d\n" % 16)
    assert [int(line) for line in path.read_text().split()] == [*written[-10:], 16]


def test_throughput_leaves_out_the_compiling_step_and_what_is_not_training():
    throughput = Throughput(window_updates=2)
    assert math.isnan(throughput.tokens_per_s)
    throughput.update(100.0, num_tokens=10)  # compiled for 100 s
    assert math.isnan(throughput.step_s)
    assert math.isnan(throughput.eta_s(5))
    throughput.update(102.0, num_tokens=10)
    assert throughput.tokens_per_s == 5.0
    throughput.restart_clock(150.0)  # an evaluation of 48 s
    throughput.update(154.0, num_tokens=50, num_steps=4)
    assert throughput.tokens_per_s == 60 / 6
    assert throughput.step_s == 6 / 5
    assert throughput.eta_s(10) == 12.0
    throughput.update(155.0, num_tokens=50)  # the first one leaves the window
    assert throughput.tokens_per_s == 100 / 5
