"""Planning without a compiler: workloads, hours, FLOPs, settings, and the memory that HLO shows."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jaxsft.cli import parse_config
from jaxsft.config import TrainConfig
from jaxsft.gemma.architecture import PRESETS
from jaxsft.plan.chips import CHIPS, GIB
from jaxsft.plan.estimate import StepEstimate, kernel_flops, num_loss_chunks
from jaxsft.plan.hlo import parse_program, saved_activation_bytes
from jaxsft.plan.kernels import KernelPrice
from jaxsft.plan.pricing import PARTS, price_program
from jaxsft.plan.run_plan import (
    PACKED,
    UNPACKED,
    RunPlan,
    count_workloads,
    model_flops,
    steps_without_data,
)
from jaxsft.plan.search import Setting, all_settings, nearest_savings, try_settings
from jaxsft.plan.workload import fit_lengths, read_lengths
from jaxsft.weights.find import architecture


def recipe(name: str = "single_session", *options: str) -> TrainConfig:
    """A recipe in two micro-batches."""
    argv = ["--config", name, "--gradient_accumulation_steps", "2", *options]
    return parse_config("jaxsft.plan", "Plans.", argv)[0]


def estimate(**changes: Any) -> StepEstimate:
    """A second a step, 0.2 s of it the loss head; 10 GiB."""
    parts = dict.fromkeys(PARTS, 0.0) | {"mlp": 0.8, "loss head": 0.2}
    known: dict[str, Any] = {
        "topology": "v5e:2x4",
        "num_chips": 8,
        "program_hash": "0123456789abcdef",
        "compiler_options": {},
        "compiler": "libtpu 0",
        "compile_seconds": 60.0,
        "num_positions": 65_536,
        "misfit": "",
        "hbm_bytes": {"weights": 6 * GIB, "temporaries": 4 * GIB},
        "hbm_limit_bytes": 16 * GIB,
        "seconds": 1.0,
        "parts": parts,
        "matmul_flops": 1e15,
        "recomputed_flops": 1e14,
    }
    return StepEstimate(**(known | changes))


def plan(config: TrainConfig | None = None, **changes: Any) -> RunPlan:
    known: dict[str, Any] = {
        "config": config or recipe(),
        "model_config": PRESETS["gemma-2-2b"],
        "source": "preset",
        "estimate": estimate(),
        "steps": 22_500,
        "workloads": {},
    }
    return RunPlan(**(known | changes))


# --- lengths and workloads ---


def test_histogram_and_list_are_the_same_lengths(tmp_path: Path) -> None:
    (tmp_path / "histogram.json").write_text('{"300": 2, "100": 1, "50": 0}')
    (tmp_path / "list.txt").write_text("300\n100\n\n 300\n")
    assert read_lengths(tmp_path / "histogram.json") == [100, 300, 300]
    assert sorted(read_lengths(tmp_path / "list.txt")) == [100, 300, 300]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "no lengths in it"),
        ("{}", "no lengths in it"),
        ("12\nmany\n", "lengths:2: a sample's length is 'many'"),
        ("12\n0\n", "lengths:2: .* '0', but must be a whole number from 1"),
        ("12\n-3\n", "lengths:2: .* '-3'"),
        ("1e3\n", "lengths:1: .* '1e3'"),
        ('{"100": 1', "not a JSON histogram"),
        ('{"100": -1}', "length 100: count is '-1'"),
        ('{"100": 1.5}', "length 100: count is '1.5'"),
        ('{"100": true}', "length 100: count is 'True'"),
        ('{"long": 1}', "a length is 'long'"),
        ('{"100": ' + "[" * 200_000, "not a JSON histogram"),
        ('{"100": 1000000000}', "more than 100,000,000 samples"),
        ("\x00\xff", "lengths:1: .*"),
    ],
)
def test_bad_lengths_are_refused_in_a_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "lengths"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=complaint):
        read_lengths(path)


def test_unreadable_lengths_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: not a readable file"):
        read_lengths(tmp_path / "nowhere")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="binary: not a readable file"):
        read_lengths(tmp_path / "binary")


def test_long_samples_follow_the_option() -> None:
    assert fit_lengths([5, 20], 16, "shorten") == [5, 16]
    assert fit_lengths([5, 20], 16, "drop") == [5]
    with pytest.raises(ValueError, match="the longest sample has 20 tokens"):
        fit_lengths([5, 20], 16, "raise")
    with pytest.raises(ValueError, match="every sample is longer"):
        fit_lengths([20], 16, "drop")


def test_workload_by_hand() -> None:
    """Eight samples of 1024 and eight of 512 tokens: 16 rows of 2048 unpacked, 6 packed."""
    options = ("--global_batch_size", "4", "--num_train_epochs", "2", "--max_steps", "null")
    work = count_workloads(recipe("single_session", *options), [1024, 512] * 8)
    assert list(work) == [UNPACKED, PACKED]
    unpacked, packed = work[UNPACKED], work[PACKED]
    assert (unpacked.num_samples, unpacked.num_tokens) == (16, 8 * 1536)
    assert (unpacked.num_rows, unpacked.num_steps) == (16, 8)  # 16 rows twice, 4 a step
    assert unpacked.padding_share == 1 - 12288 / (16 * 2048) == 0.625
    assert (packed.num_rows, packed.num_steps) == (6, 3)
    assert (packed.padding_share, packed.loss_share) == (0.0, 1.0)
    # Half of the tokens are prompts.
    work = count_workloads(recipe("single_session", *options), [1024, 512] * 8, 6144)
    assert (work[UNPACKED].loss_share, work[PACKED].loss_share) == (0.1875, 0.5)


def test_max_steps_stand_for_as_many_epochs_when_packed() -> None:
    """100 steps of 4 rows are 25 epochs of 16 rows; packed, 25 epochs of 6 rows are 37.5 steps."""
    options = ("--global_batch_size", "4", "--max_steps", "100", "--warmup_steps", "0")
    work = count_workloads(recipe("single_session", *options), [1024, 512] * 8)
    assert (work[UNPACKED].num_steps, work[PACKED].num_steps) == (100, 38)


def test_steps_come_from_the_config_where_it_tells() -> None:
    assert steps_without_data(recipe()) == 22_500
    rows = ("--data.start", "0", "--data.stop", "180000", "--num_train_epochs", "1")
    assert steps_without_data(recipe("single_session", "--max_steps", "null", *rows)) == 5625
    assert steps_without_data(recipe("single_session_packed")) is None


# --- the run: hours, FLOPs, MFU ---


def test_hours_and_the_share_of_loss_positions() -> None:
    assert plan().hours == 22_500 / 3600
    work = count_workloads(recipe(), [1024] * 10)  # half of each row is padding
    half = plan(workloads=work)
    assert half.loss_share == 0.5
    # 0.2 s of loss head halved: a chip's micro-batch is 4096 positions, two chunks of 2048.
    assert half.seconds_per_step == pytest.approx(0.9)
    assert sum(half.parts.values()) == pytest.approx(0.9)
    assert half.hours == pytest.approx(5.625)
    # Chunks are whole: a quarter of the positions takes one, and so does all that is above a half.
    assert half.seconds_at(0.25) == pytest.approx(0.9)
    assert half.seconds_at(0.51) == pytest.approx(1.0)
    assert half.seconds_at(0.0) == pytest.approx(0.8)
    # In four micro-batches, as the recipe has it, one chunk holds a micro-batch: nothing is saved.
    own = plan(recipe("single_session", "--gradient_accumulation_steps", "4"), workloads=work)
    assert own.seconds_per_step == pytest.approx(1.0)
    assert plan(steps=None).hours is None
    assert plan(estimate=estimate(misfit="too large", seconds=0.0, parts={})).hours is None


def test_budget() -> None:
    """22,500 steps of one second are 6.25 hours."""
    for hours, is_over in (("6.2", True), ("6.25", False), ("null", False)):
        assert plan(recipe("single_session", "--budget_hours", hours)).is_over_budget is is_over
    unknown = recipe("single_session_packed", "--budget_hours", "1")
    assert not plan(unknown, steps=None).is_over_budget


def test_flops_follow_the_convention() -> None:
    """11.1 GFLOP a token (tpu.md's 0.462 s at 197 TFLOP/s and 8 chips); at 1 s a step 46.2%."""
    flops = model_flops(recipe(), PRESETS["gemma-2-2b"])
    assert flops.base / (32 * 2048) == pytest.approx(11.1e9, rel=0.005)
    assert plan().lora_mfu == pytest.approx(0.462, abs=0.002)
    # Adapters of rank 64 on all projections: 83,066,880 parameters, 6 FLOPs each a token.
    assert flops.total - flops.base == 6 * 83_066_880 * 32 * 2048
    assert plan().compiled_ratio == 1e15 / flops.total


def test_plan_as_data_has_the_units_in_its_names() -> None:
    values = json.loads(json.dumps(plan().as_dict()))
    assert values["estimated_seconds_per_step"] == 1.0
    assert (values["fits"], values["hbm_gib_per_chip"], values["hours"]) == (True, 10.0, 6.25)
    assert sum(values["parts"].values()) == 1.0
    assert (values["recomputed_matmul_share"], values["loss_head_seconds"]) == (0.1, 0.2)
    misfit = estimate(misfit="20 of 16 GiB", seconds=0.0, parts={}, hbm_bytes={"needed": 20 * GIB})
    values = plan(estimate=misfit).as_dict()
    assert (values["fits"], values["hbm_gib_per_chip"]) == (False, 20.0)
    assert values["hours"] is values["estimated_seconds_per_step"] is values["lora_mfu"] is None


def test_too_little_on_chip_memory_is_no_figure_of_hbm() -> None:
    misfit = estimate(misfit="130 of 128 MiB of VMEM", seconds=0.0, parts={}, hbm_bytes={})
    assert plan(estimate=misfit).as_dict()["hbm_gib_per_chip"] is None


def test_formulation() -> None:
    small_heads = dataclasses.replace(PRESETS["gemma-2-2b"], head_dim=128)
    assert plan().formulation == "fused" and plan().fused_obstacles == []
    assert plan(recipe("single_session", "--step", "plain")).formulation == "plain"
    for config, model_config, obstacle in (
        (recipe("single_session", "--lora.dropout", "0.1"), PRESETS["gemma-2-2b"], "lora.dropout"),
        (recipe("single_session", "--data.max_length", "640"), PRESETS["gemma-2-2b"], "640 .* 384"),
        (recipe("single_session", "--data.max_length", "512"), small_heads, "heads of 128"),
    ):
        found = plan(config, model_config=model_config)
        assert found.formulation == "plain"
        (text,) = found.fused_obstacles
        assert re.search(obstacle, text)


def test_loss_chunks_of_a_micro_batch() -> None:
    """32 × 2048 positions on 8 chips, in 2 micro-batches: 4096 each, 8 chunks of 512."""
    assert num_loss_chunks(recipe("single_session", "--loss_chunk_tokens", "512"), 8) == 8
    assert num_loss_chunks(recipe("single_session", "--loss_chunk_tokens", "1000"), 8) == 5
    assert num_loss_chunks(recipe("single_session", "--loss_chunk_tokens", "9999"), 8) == 1
    # A third of the positions, 1365.3: three chunks of 512.
    small = recipe("single_session", "--loss_chunk_tokens", "512")
    assert [num_loss_chunks(small, 8, share) for share in (0, 1e-4, 1 / 3, 0.5)] == [0, 1, 3, 4]


# --- the architecture without weights ---


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("google/gemma-2-2b-it", "gemma-2-2b"),
        ("/models/Gemma-2-2B", "gemma-2-2b"),
        ("gemma-2b", "gemma-2b"),
        ("google/gemma-3-1b-pt", "gemma-3-1b"),
        ("google/gemma-3-270m-it", "gemma-3-270m"),
        ("demo", "gemma-3-270m"),
    ],
)
def test_preset_is_guessed_from_the_name(path: str, name: str) -> None:
    config, source = architecture(path)
    assert config == PRESETS[name]
    assert f"preset {name}" in source


def test_architecture_comes_from_the_files_that_are_there(tmp_path: Path) -> None:
    directory = tmp_path / "gemma-2b"  # the name says something else
    directory.mkdir()
    raw = {
        **{"model_type": "gemma2", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
        **{"head_dim": 16, "max_position_embeddings": 128, "query_pre_attn_scalar": 16},
        "sliding_window": 8,
    }
    (directory / "config.json").write_text(json.dumps(raw))
    config, source = architecture(str(directory))
    assert (config.d_model, config.num_layers) == (32, 2)
    assert source == str(directory / "config.json")
    with pytest.raises(ValueError, match=r"'gemma-9' is not .*gemma-2b, gemma-2-2b, gemma-3-270m"):
        architecture(f"{tmp_path}/gemma-9")


# --- settings near the config's own ---


def test_settings_keep_the_tokens_of_a_step() -> None:
    config = recipe()
    found = all_settings(config, 8, 8192)
    assert found[0] == Setting(2, 2048, "projections")  # the config's own
    assert len(found) == len(set(found)) == 3 * (4 + 3 + 2)  # 8, 4 and 2 rows a chip
    for setting in found:
        changed = setting.applied_to(config)
        assert changed.global_batch_size * changed.data.max_length == 32 * 2048
        assert changed.global_batch_size % (8 * changed.gradient_accumulation_steps) == 0
    assert {setting.row_length for setting in all_settings(config, 8, 2048)} == {1024, 2048}


def test_nearest_savings_come_in_order_of_their_cost() -> None:
    assert nearest_savings(recipe(), 8) == [
        Setting(4, 2048, "projections"),
        Setting(2, 2048, "full"),
        Setting(4, 2048, "full"),
        Setting(8, 1024, "projections"),
        Setting(8, 1024, "full"),
    ]


def test_search_compiles_no_hopeless_setting_and_lists_no_program_twice() -> None:
    compiled = []

    def fake(setting: Setting) -> StepEstimate:
        compiled.append(setting)
        if setting.row_length == 4096:
            raise ValueError("rows too long")
        is_small = setting.accumulation_steps >= 2
        remat = "full" if setting.remat == "full" else "other"
        return estimate(
            misfit="" if is_small else "too large",
            program_hash=f"{setting.accumulation_steps}, {setting.row_length}, {remat}",
        )

    settings = [
        *(Setting(2, 2048, "full"), Setting(1, 2048, "full"), Setting(1, 2048, "none")),
        *(Setting(2, 2048, "projections"), Setting(2, 2048, "none"), Setting(1, 4096, "full")),
        Setting(2, 4096, "full"),
    ]
    found = list(try_settings(settings, fake))
    assert [setting for setting, _ in found] == [
        *(settings[:4]),
        *(settings[5:]),  # [4] is the program of [3]
    ]
    reasons = [result if isinstance(result, str) else result.fits for _, result in found]
    assert reasons == [True, False, "does not fit", True, "does not fit", "rows too long"]
    assert settings[2] not in compiled and settings[5] not in compiled


# --- activations in HLO ---

# One loop stacks something up, the other reads it.
LOOPS = """
HloModule loops, is_scheduled=true, num_partitions=8

%body.1 (p.1: (s32[], bf16[4,128], f32[2,4,128], bf16[128,128])) -> (s32[], bf16[4,128]) {
  %p.1 = CARRY parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %x.1 = bf16[4,128]{1,0} get-tuple-element(%p.1), index=1
  %s.1 = f32[2,4,128]{2,1,0} get-tuple-element(%p.1), index=2
  %w.1 = bf16[128,128]{1,0} get-tuple-element(%p.1), index=3
  %y.1 = bf16[4,128]{1,0} fusion(%x.1, %w.1), kind=kOutput, calls=%f
  %t.1 = f32[2,4,128]{2,1,0} dynamic-update-slice(%s.1, %y.1, %i.1)
  ROOT %r.1 = CARRY tuple(%i.1, %y.1, %t.1, %w.1)
}

%body.2 (p.2: (f32[2,4,128], bf16[128,128], bf16[4,128])) -> (f32[2,4,128]) {
  %p.2 = READ parameter(0)
  ROOT %r.2 = READ fusion(%p.2), kind=kLoop, calls=%f
}

ENTRY %main (w: bf16[128,128], x: bf16[4,128]) -> bf16[4,128] {
  %w = bf16[128,128]{1,0} parameter(0)
  %x = bf16[4,128]{1,0} parameter(1)
  %i = s32[] constant(0)
  %zeros = f32[2,4,128]{2,1,0} broadcast(%i), dimensions={}
  %in.1 = CARRY tuple(%i, %x, %zeros, %w)
  %loop.1 = CARRY while(%in.1), condition=%c, body=%body.1
  %x.2 = bf16[4,128]{1,0:S(1)} get-tuple-element(%loop.1), index=1
  %s.2 = f32[2,4,128]{2,1,0} get-tuple-element(%loop.1), index=2
  %s.3 = f32[2,4,128]{2,1,0} bitcast(%s.2)
  %w.2 = bf16[128,128]{1,0} get-tuple-element(%loop.1), index=3
  %in.2 = READ tuple(%s.3, %w.2, %x.2)
  ROOT %loop.2 = READ while(%in.2), condition=%c, body=%body.2
}
"""
CARRY = "(s32[], bf16[4,128]{1,0:S(1)}, f32[2,4,128]{2,1,0}, bf16[128,128]{1,0})"
READ = "(f32[2,4,128]{2,1,0}, bf16[128,128]{1,0}, bf16[4,128]{1,0:S(1)})"


def test_activations_are_what_one_loop_makes_and_another_reads() -> None:
    """The stack, 2 × 4 × 128 float32. Not: weights, which the loop passes on, and x, in VMEM."""
    program = parse_program(LOOPS.replace("CARRY", CARRY).replace("READ", READ))
    assert saved_activation_bytes(program) == 2 * 4 * 128 * 4


def test_recomputed_flops_are_also_those_of_kernels() -> None:
    """The kernel of the hand-counted program runs 15 times, at 1000 FLOPs each."""
    text = (Path(__file__).parents[1] / "support" / "golden" / "hand_counted.hlo").read_text()
    kernels = {"kernel": KernelPrice(1e-6, 1500, 0, 1000, ())}
    again = text.replace("jvp(attention)/pallas_call", "rematted_computation/pallas_call")
    assert again != text
    for program, recomputed in ((text, 0), (again, 15_000)):
        ops = price_program(program, CHIPS["v5e"], {"kernel": 1e-6}, {}).ops
        assert kernel_flops(ops, kernels) == (15_000, recomputed)


def test_estimate_survives_json() -> None:
    kept = json.loads(json.dumps(dataclasses.asdict(estimate())))
    assert StepEstimate(**kept) == estimate()
    assert re.fullmatch("[0-9a-f]{16}", estimate().program_hash)
