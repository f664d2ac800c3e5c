"""metrics.jsonl and TensorBoard, across a resume; the speed arithmetic."""

import json
import math

from tensorboardX.proto.event_pb2 import Event

from jaxsft.metrics import MetricsWriter, Throughput


def read_jsonl(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def read_events(run_dir):
    """All TensorBoard events, file by file; a record is length, crc, bytes, crc."""
    events = []
    for path in sorted((run_dir / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


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
        writer.log(3, {"train/loss": 2.5, "bad": math.nan})
        writer.text(4, "sample", "<answer>*1*</answer>\nend")
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
    assert texts == [(4, b"    <answer>*1*</answer>\n    end\n")]


def test_a_resumed_run_has_each_step_once(tmp_path):
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        for step in (1, 2, 3, 4):
            writer.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # torn by a kill
    with MetricsWriter(tmp_path, resume_step=2) as writer:
        assert [line["step"] for line in read_jsonl(tmp_path)] == [1, 2]
        for step in (3, 4, 5):
            writer.log(step, {"loss": -float(step)})
    lines = read_jsonl(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["loss"] for line in lines] == [1, 2, -3, -4, -5]
    assert not (tmp_path / "metrics.jsonl.tmp").exists()
    # TensorBoard purges steps >= the step of a session start.
    starts = [event.step for event in read_events(tmp_path) if event.HasField("session_log")]
    assert starts == [1, 3]


def test_without_resume_step_lines_are_added(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log(7, {"loss": 1.0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8')
    with MetricsWriter(tmp_path) as writer:
        writer.log(8, {"eval_loss": 2.0})
    assert read_jsonl(tmp_path) == [{"step": 7, "loss": 1.0}, {"step": 8, "eval_loss": 2.0}]


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
