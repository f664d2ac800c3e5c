"""The comparison with other trainers, without them: its arithmetic, its rows, its workers."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peer_venvs, peers, tunix_step
from benchmarks.peer_lab import ROOT, make_row_sets, save_rows
from benchmarks.peer_protocol import Worker, WorkerError
from jaxsft.common.batch import Batch
from jaxsft.data.tokenizer import Tokenizer

# Doubles what it is told; steps take no time and the third fails.
TOY = """
from benchmarks.peer_protocol import serve

class Toy:
    steps = 0
    def gradients(self, rows, out):
        print("noise on stdout")
        out.write_text(rows.read_text() * 2)
        return 0.5
    def step(self, rows):
        self.steps += 1
        if self.steps == 3:
            raise FloatingPointError("third step")
        return float(self.steps)

serve(Toy)
"""


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Worker]:
    environment = {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TOY]
    worker = Worker("toy", command, threads=1, environment=environment, log=tmp_path / "log")
    yield worker
    worker.close()


def test_worker_answers_and_reports_errors(toy: Worker, tmp_path: Path) -> None:
    rows, out = tmp_path / "rows", tmp_path / "out"
    rows.write_text("ab")
    toy.ask("load")
    assert toy.ask("gradients", rows=str(rows), out=str(out)) == {"loss": 0.5}
    assert out.read_text() == "abab"
    reply = toy.ask("steps", rows=str(rows), count=2)
    assert (reply["losses"], len(reply["seconds"])) == ([1.0, 2.0], 2)
    assert 2**20 < reply["peak_rss_bytes"] < 2**30
    assert toy.ask("rest") == {}
    with pytest.raises(WorkerError, match="toy: FloatingPointError: third step"):
        toy.ask("steps", rows=str(rows), count=1)


def test_worker_that_dies(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import nowhere_to_be_found"]
    worker = Worker("gone", command, threads=1, environment={}, log=tmp_path / "log")
    with pytest.raises(WorkerError, match=r"gone: ended with exit code 1.*nowhere_to_be_found"):
        worker.ask("load")
    worker.close()


def test_gradient_differences() -> None:
    ours = {"q": np.array([[3.0]]), "o": np.array([[0.0, 5.0]])}
    theirs = {"q": np.array([[4.0]]), "o": np.array([[0.0, 3.0]])}
    found = peers.gradient_differences(ours, theirs)
    # Differences 1 and 2; norms 4 and 3.
    assert found["whole"] == pytest.approx(5**0.5 / 5)
    assert found["worst_matrix"] == pytest.approx(2 / 3)


def test_gradient_differences_of_fused_k_and_v() -> None:
    ours = {
        "0.k_proj.lora_A": np.array([[1.0, 2.0]]),
        "0.v_proj.lora_A": np.array([[3.0, 4.0]]),
        "0.k_proj.lora_B": np.array([[5.0]]),
        "0.v_proj.lora_B": np.array([[6.0]]),
    }
    theirs = {
        "0.kv_proj.lora_A": np.array([[4.0, 6.0]]),
        "0.kv_proj.lora_B": np.array([[5.0], [6.0]]),
    }
    assert peers.gradient_differences(ours, theirs) == {"whole": 0.0, "worst_matrix": 0.0}
    with pytest.raises(WorkerError, match="adapter matrices differ"):
        peers.gradient_differences(ours, {"0.q_proj.lora_A": np.ones((1, 1))})


def test_figures_and_goal() -> None:
    ones = np.ones((4, 8), np.int32)
    loss_mask = np.zeros((4, 8), bool)
    loss_mask[:, 2:7] = True
    segments = ones.copy()
    segments[:, 7] = 0
    batch = Batch(ones, ones, loss_mask, segments, ones)
    theirs = peers.figures([4.0, 2.0, 9.0], [2.0, 2.0, 3.0], batch)
    # The median step is 4 s for 20 loss tokens and 28 tokens; the rounds' ratios are 2, 1 and 3.
    assert (theirs["step_s"], theirs["times_ours"]) == (4.0, 2.0)
    assert (theirs["loss_tokens_per_s"], theirs["real_tokens_per_s"]) == (5.0, 7.0)

    def trainer(gib: float, padded: float, full: float) -> dict:
        return {
            "peak_rss_bytes": gib,
            "padded": {"times_ours": padded},
            "full": {"times_ours": full},
        }

    ours, good = trainer(4, 1, 1), trainer(6, 1.6, 1.5)
    torch, tunix = peers.PEERS
    assert peers.goal_reached({"jaxsft": ours, torch: good, tunix: good})
    assert not peers.goal_reached({"jaxsft": ours, torch: good, tunix: trainer(6, 1.6, 1.4)})
    assert not peers.goal_reached({"jaxsft": ours, torch: trainer(4, 2, 2), tunix: good})


def test_row_sets(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row_sets = make_row_sets(ROOT / "data" / "sample" / "train.jsonl", tokenizer)
    padded, full = row_sets["padded"], row_sets["full"]
    assert padded.tokens_BT.shape == full.tokens_BT.shape == (4, 256)
    assert (padded.segment_ids_BT == 0).any() and (full.segment_ids_BT == 1).all()
    assert np.array_equal(full.positions_BT, np.tile(np.arange(256), (4, 1)))
    # The same tokens: the first full row begins with the first sample and goes on with the second.
    length = int(padded.segment_ids_BT[0].sum())
    assert np.array_equal(full.tokens_BT[0, :length], padded.tokens_BT[0, :length])
    assert np.array_equal(full.tokens_BT[0, length:], padded.tokens_BT[1, : 256 - length])

    save_rows(tmp_path / "rows.npz", padded)
    with np.load(tmp_path / "rows.npz") as rows:
        assert np.array_equal(rows["tokens"], padded.tokens_BT)
        # A label is marked at itself for the peers, at the position before it for us.
        assert np.array_equal(rows["loss_mask"][:, 1:], padded.loss_mask_BT[:, :-1])
        assert (
            not rows["loss_mask"][:, 0].any() and not rows["loss_mask"][rows["tokens"] == 0].any()
        )


def test_too_little_data(
    tmp_path: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tokenizer, "from_gguf", lambda path: tokenizer)
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "Why?", "completion": "Because."}\n')
    assert peers.main(["--data", str(data), "--venvs", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {data}: 1 samples of up to 256 tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "argv", [["--round", "x"], ["--rounds", "0"], ["--json", "no/where"], ["--a"]]
)
def test_bad_options_are_one_line(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_directory_that_is_no_environment_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"mine cannot be made.*--venvs"):
        peer_venvs.ensure("mine", (), tmp_path)
    assert list((tmp_path / "mine").iterdir()) == []


# One fusion of 3,000 cycles: 2 µs at 1.5 GHz.
TUNIX_PROGRAM = """HloModule jit__train_step, is_scheduled=true, num_partitions=8

%gate (x: bf16[8,128]) -> bf16[8,128] {
  %x = bf16[8,128]{1,0} parameter(0)
  ROOT %y = bf16[8,128]{1,0} negate(%x)
}

ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  ROOT %f = bf16[8,128]{1,0} fusion(%p), kind=kLoop, calls=%gate, METADATA
}
""".replace(
    "METADATA",
    'metadata={op_name="jit(_train_step)/jvp(feed_forward)/mul"}, '
    'backend_config={"estimated_cycles":"3000"}',
)


def test_tunix_step_is_four_micro_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.hlo").write_text(TUNIX_PROGRAM)
    (tmp_path / "memory.json").write_text('{"arguments": 1, "peak": 6, "code": 4}')
    monkeypatch.setattr(tunix_step, "_compiled", lambda *args: tmp_path)
    step = tunix_step.tunix_prices("v5e:2x4", remat=False)
    assert step.priced.seconds == pytest.approx(4 * 2e-6)
    assert step.priced.parts["mlp"] == step.priced.seconds
    assert step.memory.total == 10
    with pytest.raises(ValueError, match="8 chips"):
        tunix_step.tunix_prices("v5e:4x4", remat=False)
