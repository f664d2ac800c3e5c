"""Two processes of one run: what they agree on, and that their checkpoints are one."""

import json
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.tiny_runs import Child, TinyRuns, train_metrics
from support.two_tasks import two_tasks

from jaxsft.cli import EXIT_STOPPED
from jaxsft.common.hosts import any_of, array_from_first, from_first, reached_preemption
from jaxsft.run.checkpoints import Checkpoints

PROGRAM = """
import json, sys
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.evaluate import heldout
from jaxsft.common.hosts import any_of, array_from_first, from_first, join_hosts, reached_preemption
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.gemma.sharding import make_mesh

join_hosts()
index = jax.process_index()

def say(name, value):
    print(json.dumps([name, value]), flush=True)

def message(call, *arguments):
    try:
        call(*arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"

say("any", [any_of(False), any_of(index == 1), any_of(True)])
say("from first", from_first(lambda: {"number": index, "text": "\\u00e9" * 300}))

def fail(error):
    raise error

say("errors", [message(from_first, lambda: fail(kind(f"at {index}")))
               for kind in (ValueError, OSError)])
mine = np.array([-0.0, np.inf, 0.1], np.float32) if index == 0 else None
say("array", array_from_first(mine, (3,), np.float32).tobytes().hex())

mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

def state(step):
    def make():
        return {
            "split": jnp.arange(12.0).reshape(4, 3) * step,
            "half": (jnp.arange(6.0) / 7).astype(jnp.bfloat16),
            "minus": jnp.float32(-0.0),
        }
    return jax.jit(make, out_shardings={"split": split, "half": split, "minus": whole})()

metadata = {"fingerprint": {"seed": 0}}
# No shared directory: the second process has none, and needs none.
checkpoints = Checkpoints(f"{sys.argv[1]}/{index}", 1)
for step in (1, 2):
    checkpoints.save(step, state(step), metadata, 3.0 - step)
    while checkpoints.is_saving:
        checkpoints.poll()
say("steps", [checkpoints.steps(), checkpoints.best])
restored = checkpoints.restore(state(0), {"seed": 0})
for name, expected in state(2).items():
    assert restored.state[name].sharding == expected.sharding
    for mine, right in zip(restored.state[name].addressable_shards, expected.addressable_shards):
        assert np.asarray(mine.data).tobytes() == np.asarray(right.data).tobytes()
# The restored arrays are JAX's own: they can be donated.
jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)(restored.state)

bad = state(3) | {"split": jax.jit(lambda x: x / 0)(state(3)["split"])}
say("refused", [
    message(checkpoints.save, 2, state(2), metadata),
    message(checkpoints.save, 3, bad, metadata),
    message(checkpoints.restore, state(0), {"seed": 1}),
])
blocked = Checkpoints(f"{sys.argv[1]}/file/{index}", 1)
blocked.save(1, state(1), metadata)
say("failed", message(blocked.wait))

# Every token loses its own id; each process has one device, and the mesh the second one first.
rows = PackedRows.from_samples(
    [Sample(np.arange(i, i + 3, dtype=np.int32), np.ones(3, bool)) for i in range(1, 4)],
    [[0], [1], [2]],
    3,
)
shapes = []

def token_log_probs(adapter, frozen, batch, *, spec):
    shapes.append(batch.targets_BT.shape)
    return -batch.targets_BT.astype(jnp.float32)

heldout.token_log_probs = token_log_probs
spec = SimpleNamespace(mesh=make_mesh(2, devices=jax.devices()[::-1]))
losses = heldout.held_out_losses(None, None, rows, rows.loss_mask_N, spec=spec, batch_size=2)
say("losses", [shapes, losses["all"].sums_S.tolist()])

# Without a handler of Python's, as between the start and the first step.
say("ready", True)
step = 0
while True:
    step += 1
    any_of(False)  # the collective of a train step
    if reached_preemption(step):
        break
say("stopped at", step)
"""


@pytest.fixture(scope="module")
def said(
    command_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The directory of the checkpoints, and what both processes said: the same, by name.

    They are started as Slurm does. The second gets a SIGTERM at the end.
    """
    directory = tmp_path_factory.mktemp("hosts")
    (directory / "file").write_text("not a directory")
    with ExitStack() as stack:
        processes = []
        for i, variables in enumerate(two_tasks()):
            err = stack.enter_context((directory / f"{i}.err").open("w"))
            process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(directory)],
                env=command_environment | variables,
                stdout=subprocess.PIPE,
                stderr=err,
                text=True,
            )
            processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        found: list[dict[str, Any]] = [{}, {}]
        for i, process in enumerate(processes):
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith('["'):  # Gloo says something too
                    name, value = json.loads(line)
                    found[i][name] = value
                    if name == "ready":
                        break
            else:
                pytest.fail((directory / f"{i}.err").read_text())
        processes[1].send_signal(signal.SIGTERM)
        for i, process in enumerate(processes):
            out, _ = process.communicate()
            assert process.returncode == 0, (directory / f"{i}.err").read_text()
            found[i] |= dict(json.loads(line) for line in out.splitlines() if line[:2] == '["')
    assert found[0] == found[1]
    return directory, found[0]


def test_one_process_agrees_with_itself() -> None:
    assert any_of(True) and not any_of(False)
    assert from_first(lambda: 3) == 3
    array = np.zeros(2)
    assert array_from_first(array, array.shape, array.dtype) is array
    assert not reached_preemption(1)


def test_processes_agree(said: tuple[Path, dict[str, Any]]) -> None:
    _, found = said
    assert found["any"] == [False, True, True]
    assert found["from first"] == {"number": 0, "text": "é" * 300}
    assert found["errors"] == ["ValueError: at 0", "OSError: at 0"]
    assert found["array"] == np.array([-0.0, np.inf, 0.1], np.float32).tobytes().hex()


def test_a_signal_to_one_process_stops_both_at_one_step(said: tuple[Path, dict[str, Any]]) -> None:
    assert said[1]["stopped at"] > 0  # the fixture compares


def test_checkpoints_of_two_processes_are_one(said: tuple[Path, dict[str, Any]]) -> None:
    directory, found = said
    assert found["steps"] == [[2], [2, 1.0]]
    repeated, not_finite, other_run = found["refused"]
    assert repeated.startswith(f"ValueError: {directory}/0/2: this step is saved already")
    assert not_finite.startswith("FloatingPointError: split is not finite")
    assert "seed is 0 there and 1 here" in other_run
    assert found["failed"].startswith(f"OSError: {directory}/file/0: the checkpoint of step 1")
    assert not (directory / "1").exists()
    # One process reads what two have written.
    like = {
        "split": jax.ShapeDtypeStruct((4, 3), jnp.float32),
        "half": jax.ShapeDtypeStruct((6,), jnp.bfloat16),
        "minus": jax.ShapeDtypeStruct((), jnp.float32),
    }
    restored = Checkpoints(directory / "0", 1).restore(like, {"seed": 0})
    assert restored is not None and restored.step == 2
    assert restored.state["split"].tolist() == (np.arange(12).reshape(4, 3) * 2).tolist()


def test_each_process_measures_its_share_of_the_rows(said: tuple[Path, dict[str, Any]]) -> None:
    assert said[1]["losses"] == [[[2, 3], [2, 3]], [2 + 3, 3 + 4, 4 + 5]]


@pytest.mark.slow
def test_a_run_in_two_processes_is_the_run_of_one(tmp_path: Path) -> None:
    """Stopped by a signal to one of them, at one step, and continued."""
    runs = TinyRuns(tmp_path)
    options = ("--max_steps", "8", "--step", "fused", "--save_steps", "4", "--eval_steps", "4")
    options = (*options, "--eval.num_prompts", "3")
    runs.finish("one", *options)

    def start(stack: ExitStack) -> list[Child]:
        command = [sys.executable, "-m", "jaxsft.train", "--config", str(runs.config)]
        command += ["--name", "two", "--multihost", "true", *options]
        children = [
            # What the second one says is not waited for.
            Child(command, runs.environment | variables, tmp_path / f"two-{i}", said)
            for i, (variables, said) in enumerate(
                zip(two_tasks(), (None, tmp_path / "two-1.out"), strict=True)
            )
        ]
        return [stack.enter_context(child) for child in children]

    with ExitStack() as stack:
        first, second = start(stack)
        first.wait_for("step 6/")
        while not (runs.path("two") / "checkpoints" / "4").is_dir():  # saved in the background
            assert first.process.poll() is None, first.said
            time.sleep(0.01)
        assert first.freeze() and second.freeze()  # neither is to learn of the other's end
        for child in (first, second):
            child.send(signal.SIGKILL)
        assert first.wait() == second.wait() == -signal.SIGKILL
    with ExitStack() as stack:
        first, second = start(stack)
        first.wait_for("step 5/")
        assert "Continuing from step 4." in first.out
        second.send(signal.SIGTERM)
        assert first.wait() == second.wait() == EXIT_STOPPED, first.err + second.err
    stopped_at = train_metrics(runs.path("two"))[-1]["step"]
    checkpoints = runs.path("two") / "checkpoints"
    # 8 where the signal found the second one waiting for the first in step 7.
    assert 5 <= stopped_at <= 8 and (checkpoints / str(stopped_at)).is_dir()

    with ExitStack() as stack:
        first, second = start(stack)
        assert first.wait() == second.wait() == 0, first.err + second.err
        assert f"Continuing from step {stopped_at}." in first.out
        assert "step" not in (tmp_path / "two-1.out").read_text()  # one of them speaks

    samples = [(runs.path(name) / "samples.jsonl").read_text() for name in ("two", "one")]
    assert samples[0] == samples[1] and samples[0].count("\n") == 3 * 3  # at steps 0, 4 and 8
    ours, expected = (train_metrics(runs.path(name)) for name in ("two", "one"))
    assert [line["step"] for line in ours] == [*range(1, 9)]
    for name in ("train/loss", "train/grad_norm"):
        assert [line[name] for line in ours] == pytest.approx(
            [line[name] for line in expected], rel=1e-5
        )
    # `one` knows the rows of the whole batch, process 0 of `two` half of them.
    for name in ("train/num_loss_tokens", "train/learning_rate"):
        assert [line[name] for line in ours] == [line[name] for line in expected]
    adapters = [
        load_file(runs.path(name) / "adapter" / "adapter_model.safetensors")
        for name in ("two", "one")
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, value in adapters[0].items():
        np.testing.assert_allclose(value, adapters[1][name], rtol=1e-5, atol=1e-5)
