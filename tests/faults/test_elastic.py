"""A run stopped on eight simulated devices goes on on four, one and eight: the same training."""

import re
import signal

import pytest
from support.tiny_runs import TinyRuns, train_metrics

from jaxsft.cli import EXIT_STOPPED

NUM_STEPS = 30
# Devices, and the step whose line is answered with SIGTERM; None runs to the end.
PARTS = ((8, 4), (4, 10), (1, 16), (8, None))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> TinyRuns:
    return TinyRuns(tmp_path_factory.mktemp("elastic"))


def xla_flags(num_devices: int) -> str:
    return f"--xla_force_host_platform_device_count={num_devices}"


@pytest.mark.slow
@pytest.mark.parametrize("step", ["plain", "fused"])
def test_the_number_of_devices_may_change(runs: TinyRuns, step: str) -> None:
    options = ("--step", step, "--max_steps", str(NUM_STEPS), "--data.eval_files", "[]")
    runs.finish(f"{step}-one", *options, XLA_FLAGS=xla_flags(1))
    stopped_at = 0
    for num_devices, last in PARTS:
        with runs.start(f"{step}-many", *options, XLA_FLAGS=xla_flags(num_devices)) as child:
            if last is not None:
                child.wait_for(f"step {last}/")
                child.send(signal.SIGTERM)
            code = child.wait()
        assert code == (0 if last is None else EXIT_STOPPED), child.out + child.err
        found = re.search(r"^Continuing from step (\d+)\.", child.out, re.MULTILINE)
        assert (int(found[1]) if found else 0) == stopped_at
        stopped_at = len(train_metrics(runs.path(f"{step}-many")))
        assert last is None or last <= stopped_at < NUM_STEPS

    ours, expected = (train_metrics(runs.path(f"{step}-{name}")) for name in ("many", "one"))
    assert [line["step"] for line in ours] == [*range(1, NUM_STEPS + 1)]
    for name in ("train/batch_hash", "train/num_loss_tokens", "train/learning_rate"):
        assert [line[name] for line in ours] == [line[name] for line in expected]
    losses = [line["train/loss"] for line in ours]
    assert losses == pytest.approx([line["train/loss"] for line in expected], rel=1e-5)
    assert losses[-1] < 0.9 * losses[0]
