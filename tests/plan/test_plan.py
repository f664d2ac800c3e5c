"""The plan of a run: the command on a small model, its exit codes, its hash, its complaints."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import jaxsft.plan.command
import jaxsft.plan.local
from jaxsft.cli import EXIT_BAD_INPUT, parse_config
from jaxsft.plan.__main__ import main
from jaxsft.plan.chips import GIB
from jaxsft.plan.command import EXIT_DOES_NOT_FIT
from jaxsft.plan.estimate import StepEstimate
from jaxsft.plan.local import LocalStep
from jaxsft.plan.pricing import PARTS
from jaxsft.plan.tpu_aot import CompilerError, OutOfMemory

# Gemma 2 in small: two layers, a local and a global one, with heads as wide as the real ones.
MODEL = {
    **{"model_type": "gemma2", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512},
    **{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"head_dim": 256, "max_position_embeddings": 8192, "query_pre_attn_scalar": 256},
    "sliding_window": 4096,
}


@pytest.fixture(scope="module", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of the module's own; afterwards the process's environment is as before."""
    variables = dict(os.environ)
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]
    os.environ.update(variables)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.yaml of 16 rows × 256 tokens in two micro-batches, 1000 steps."""
    directory = tmp_path_factory.mktemp("planned")
    (directory / "config.json").write_text(json.dumps(MODEL))
    values = {
        "model": {"path": str(directory), "dtype": "bfloat16", "param_dtype": "bfloat16"},
        "data": {"train_files": ["rows.jsonl"], "max_length": 256},
        "lora": {"r": 8, "alpha": 16},
        "global_batch_size": 16,
        "gradient_accumulation_steps": 2,
        "max_steps": 1000,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(values))
    return directory / "config.yaml"


@pytest.fixture
def plan(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def plan(*options: str) -> tuple[int, dict[str, Any], str]:
        """(exit code, what --json wrote, the screen)."""
        path = tmp_path / "plan.json"
        code = main(["--config", str(config), "--json", str(path), *options])
        return code, json.loads(path.read_text()), capsys.readouterr().out

    return plan


def test_plan_of_a_real_compilation(plan: Callable[..., Any], tmp_path: Path) -> None:
    code, values, screen = plan("--budget-hours", "9")
    assert code == 0
    assert values["fits"] and values["num_chips"] == 8
    assert 0 < values["estimated_seconds_per_step"] < 0.1
    assert values["hours"] == values["estimated_seconds_per_step"] * 1000 / 3600
    assert sum(values["parts"].values()) == pytest.approx(values["estimated_seconds_per_step"])
    assert set(values["parts"]) == set(PARTS)
    # Cumulative sums over a micro-batch's loss mask, microseconds.
    assert all(op.startswith("reduce-window") for op in values["unpriced"])
    # Embedding 4096 × 256 and two layers of 786,432 parameters, in bfloat16; norms and the rows and
    # columns for the adapter on top.
    assert 0 < values["hbm_gib_by_kind"]["weights"] * GIB - 2 * (4096 * 256 + 2 * 786_432) < 2e6
    assert all(gib >= 0 for gib in values["hbm_gib_by_kind"].values())
    assert sum(values["hbm_gib_by_kind"].values()) == pytest.approx(values["hbm_gib_per_chip"])
    assert values["compiled_over_model_flops"] > 1
    assert 0 < values["lora_mfu"] < 1
    assert "estimate" in screen and values["program_hash"] in screen

    # The same again comes from the cache, whatever is asked of it.
    picture = tmp_path / "step.png"
    code, again, screen = plan("--budget-hours=1e-9", "--plot", str(picture))
    assert code == EXIT_DOES_NOT_FIT == 1
    assert "from cache" in screen and "OVER the budget" in screen
    assert again["program_hash"] == values["program_hash"]
    assert again["compile_seconds"] == values["compile_seconds"]
    assert picture.read_bytes().startswith(b"\x89PNG")

    # 64 samples of half a row: 32 rows packed and 64 unpacked, of which half is padding.
    (tmp_path / "lengths.json").write_text('{"128": 64}')
    lengths = ("--lengths", str(tmp_path / "lengths.json"))
    code, filled, screen = plan(*lengths, "--max_steps", "null", "--num_train_epochs", "2")
    assert (code, filled["steps"], filled["loss_share"]) == (0, 8, 0.5)
    assert filled["workloads"]["packed"]["num_steps"] == 4
    assert filled["workloads"]["one sample a row"]["padding_share"] == 0.5
    # A chip's micro-batch is one chunk of the loss head, which any loss at all costs. Another
    # schedule, so another program, but of the same cost.
    seconds = values["estimated_seconds_per_step"]
    assert filled["estimated_seconds_per_step"] == pytest.approx(seconds, rel=0.01)
    assert values["steps_are_exact"] and not filled["steps_are_exact"]
    assert "train logs another hash" in " ".join(screen.split())


@pytest.mark.parametrize(
    ("step", "formulation"),
    [("auto", "fused"), pytest.param("plain", "plain", marks=pytest.mark.slow)],
)
def test_rows_of_384_and_the_plain_step_by_part(
    plan: Callable[..., Any], step: str, formulation: str
) -> None:
    """384 is no multiple of the row kernels' 256; both formulations have the same scopes."""
    sizes = ("--data.max_length", "384", "--gradient_accumulation_steps", "2")
    code, values, screen = plan(*sizes, "--step", step, "--model.remat", "full")
    assert code == 0 and values["formulation"] == formulation
    assert f"{formulation} step" in screen
    for part in ("attention", "mlp", "lora", "norm", "loss head", "recomputation"):
        assert values["parts"][part] > 0, part
    assert values["recomputed_matmul_share"] > 0.1
    assert values["parts"]["other"] < 0.2 * values["estimated_seconds_per_step"]


def test_plan_without_a_fused_step_says_why(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxsft.plan.command, "estimate_step", fake_estimate)
    code, values, screen = plan("--data.max_length", "640", "--model.remat", "full")
    assert (code, values["formulation"]) == (0, "plain")
    line = "The fused step is not for data.max_length 640 (its kernels take 128, 256"
    assert line in " ".join(screen.split())


def test_too_little_on_chip_memory_says_what_helps(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def vmem(*args: Any, **options: Any) -> tuple[StepEstimate, bool]:
        found, _ = fake_estimate(*args, **options)
        misfit = "130.00 of 128.00 MiB of VMEM"
        return dataclasses.replace(found, misfit=misfit, hbm_bytes={}, seconds=0.0, parts={}), False

    monkeypatch.setattr(jaxsft.plan.command, "estimate_step", vmem)
    code, values, screen = plan()
    assert code == EXIT_DOES_NOT_FIT
    assert values["nearest"] is values["hbm_gib_per_chip"] is None
    screen = " ".join(screen.split())
    assert "lower data.max_length, or --step plain" in screen and "use more devices" not in screen


def test_a_failing_compiler_is_one_line(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise CompilerError("the TPU compiler failed: INTERNAL: Mosaic")

    monkeypatch.setattr(jaxsft.plan.command, "estimate_step", broken)
    assert main(["--config", str(config)]) == 1
    assert capsys.readouterr().err == "error: the TPU compiler failed: INTERNAL: Mosaic\n"


def fake_estimate(config: Any, *_: Any, **__: Any) -> tuple[StepEstimate, bool]:
    """Fits in at least two micro-batches with full remat, and then runs a second a step."""
    accumulation_steps = config.gradient_accumulation_steps
    fits = accumulation_steps >= 2 and config.model.remat == "full"
    estimate = StepEstimate(
        topology="v5e:2x4",
        num_chips=8,
        program_hash=f"{accumulation_steps} {config.model.remat} {config.data.max_length}",
        compiler_options={},
        compiler="libtpu 0",
        compile_seconds=60.0,
        num_positions=config.global_batch_size * config.data.max_length,
        misfit="" if fits else "20.00 of 15.75 GiB of HBM",
        hbm_bytes={"weights": 8 * GIB} if fits else {"needed": 20 * GIB},
        hbm_limit_bytes=16 * GIB,
    )
    if fits:
        parts = dict.fromkeys(PARTS, 0.0) | {"mlp": 0.5 * accumulation_steps}
        seconds, flops = 0.5 * accumulation_steps, 1e15
        estimate = dataclasses.replace(
            estimate, seconds=seconds, parts=parts, matmul_flops=flops, recomputed_flops=0.0
        )
    return estimate, False


def test_what_does_not_fit_is_told_the_nearest_that_does(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(jaxsft.plan.command, "estimate_step", fake_estimate)
    options = ("--gradient_accumulation_steps", "1", "--plot", str(tmp_path / "step.png"))
    code, values, screen = plan(*options)
    assert code == EXIT_DOES_NOT_FIT
    assert (values["fits"], values["hours"], values["hbm_gib_per_chip"]) == (False, None, 20.0)
    assert "DOES NOT FIT: it needs 20.00 of 15.75 GiB of HBM" in screen
    nearest = {"accumulation_steps": 2, "row_length": 256, "remat": "full", "gib": 8.0}
    nearest["options"] = "--gradient_accumulation_steps 2 --model.remat full"
    assert values["nearest"] == nearest | {"estimated_seconds_per_step": 1.0}
    assert f"{nearest['options']} (1.000 s" in screen


def test_local_devices_are_told_what_fits_them(
    plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 GiB for a micro-batch and 2 more for projections that are kept; 8 are free."""

    def compiled(config: Any, *_: Any) -> LocalStep:
        options = f"{config.gradient_accumulation_steps} {config.model.remat}"
        gib = 10 // config.gradient_accumulation_steps + 2 * (config.model.remat != "full")
        return LocalStep(options, "plain", gib * GIB, 8 * GIB)

    monkeypatch.setattr(jaxsft.plan.local, "compile_local", compiled)
    local = ("--topology", "local", "--gradient_accumulation_steps")
    code, values, screen = plan(*local, "2")
    assert (code, values["fits"], values["needed_bytes"]) == (0, True, 7 * GIB)
    assert "memory: fits, 7.00 of 8.00 GiB" in screen and "nearest" not in values
    code, values, screen = plan(*local, "1")
    assert code == EXIT_DOES_NOT_FIT and "DOES NOT FIT, 12.00 of 8.00 GiB" in screen
    nearest = {"accumulation_steps": 2, "row_length": 256, "remat": "none", "gib": 7.0}
    nearest["options"] = "--gradient_accumulation_steps 2 --model.remat none"
    assert values["nearest"] == nearest


def test_search_ranks_by_speed(plan: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxsft.plan.command, "estimate_step", fake_estimate)
    code, values, screen = plan("--model.remat", "full", "--search")
    assert code == 0
    ranked = values["search"]
    fitting = [result["tokens_per_s"] for result in ranked if result["fits"]]
    assert fitting == sorted(fitting, reverse=True)
    assert fitting[0] == 16 * 256 / 1.0
    assert not ranked[-1]["fits"]
    assert "this config" in screen


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            ["--topology", "v5e:3x3"],
            "--topology v5e:3x3 is not known; valid: v5e:1x1, v5e:2x2",
        ),
        (["--lengths", "nowhere.json"], "nowhere.json: not a readable file of lengths"),
        (["--plot", "nowhere/step.png"], "nowhere/step.png: there is no such directory"),
        (["--json", "nowhere/plan.json"], "nowhere/plan.json: there is no such directory"),
        (["--json"], "json.*: expected one argument"),
        (["--budget-hours", "-1"], "budget_hours is -1.0, but must be above 0"),
        (["--budget-hours", "soon"], "budget_hours.*expected a number or null, got 'soon'"),
        (["--plot", "tests"], "--plot tests: is a directory; name a file in it"),
        (["--json", "tests"], "--json tests: is a directory; name a file in it"),
        (["--plot", "step"], "--plot step: its name must end in one of .*[.]png"),
        (["--plot", "step.bmpx"], "--plot step.bmpx: its name must end in one of"),
        (["--lengths", ""], "not a readable file of lengths"),
        (["--topology", "local", "--search"], "and memory, not its time: leave out --search$"),
        (["--topology", "local", "--budget-hours", "1"], "leave out --budget-hours$"),
        (["--step", "fused", "--data.max_length", "640"], "does not go with data.max_length 640"),
        (["--budget-hours", "1", "--max_steps", "null"], "budget_hours needs the number of steps"),
        (["--global_batch_size", "12"], "global_batch_size 12 does not split evenly over 8"),
        (["--topology", "v5e:4x4"], "global_batch_size 16 .* nearest valid: 32"),
        (["--warmup_steps", "1000"], "warmup_steps 1000 is not below"),
        (["--model.path", "google/gemma-9"], "'gemma-9' is not the name of a known model"),
        (["--model.path", "demo", "--data.max_length", "65536"], "beyond the model's 32768"),
        (["--lora.target_modules", "gate"], "did you mean 'gate_proj'"),
        (["--serch"], "unknown option 'serch'"),
    ],
)
def test_mistakes_get_one_line(
    config: Path, capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    code = main(["--config", str(config), *options])
    err = capsys.readouterr().err
    assert code == EXIT_BAD_INPUT == 2
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(complaint, err), err


@pytest.mark.parametrize(
    ("package", "options"), [("libtpu", []), ("matplotlib", ["--plot", "step.png"])]
)
def test_what_is_not_installed_is_named(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    options: list[str],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else name)
    assert main(["--config", str(config), *options]) == EXIT_BAD_INPUT
    assert "pip install 'jaxsft[plan]'" in capsys.readouterr().err


def test_help_names_the_options_of_plan_and_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for option in ("--topology", "--lengths", "--search", "--plot", "--data.max_length"):
        assert option in text


# --- the program that is planned is the one that runs ---

STEPS = ("plain", "fused")


@pytest.fixture(scope="module")
def hashes(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Step -> [train's hash, plan's], on eight simulated devices: this file as a script."""
    directory = tmp_path_factory.mktemp("hashed")
    response = "<think>It has to be so.</think>\nBecause."
    rows = [{"prompt": f"Why {number}?", "response": response} for number in range(16)]
    (directory / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # compiles faster
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-W", "error", __file__, str(tiny_model_dir), str(directory)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return json.loads((directory / "hashes.json").read_text())


@pytest.mark.parametrize("step", STEPS)
def test_plan_is_of_the_program_that_train_runs(hashes: dict[str, Any], step: str) -> None:
    in_train, in_plan = hashes[step]
    assert in_train == in_plan
    assert len({in_train for in_train, _ in hashes.values()}) == len(STEPS)


def print_hashes(model: str, directory: Path) -> None:
    """The child's part."""
    from jaxsft.prepare.rows import load_data
    from jaxsft.run.setup import build
    from jaxsft.weights.find import find_base, open_tokenizer

    # Hashes are of what is compiled, which takes a minute.
    jaxsft.plan.local.compile_or_refuse = lambda *_: OutOfMemory("hbm", 1, 2)
    hashes, data, local = {}, None, ("--topology", "local", "--lengths", "data")
    for step in STEPS:
        argv = [
            *("--config", "single_session_packed", "--model.path", model, "--step", step),
            *("--data.train_files", str(directory / "rows.jsonl"), "--data.max_length", "128"),
            *("--data.eval_files", "[]", "--eval_steps", "null"),
            *("--model.dtype", "float32", "--model.param_dtype", "float32"),
            *("--lora.r", "4", "--global_batch_size", "32", "--warmup_steps", "0"),
        ]
        assert main([*argv, *local, "--json", str(directory / "plan.json")]) == 0
        planned = json.loads((directory / "plan.json").read_text())["program_hash"]
        config, _ = parse_config("jaxsft.train", "", argv)
        origin = find_base(model)
        data = data or load_data(config.data, open_tokenizer(origin.tokenizer))
        hashes[step] = [build(config, data, origin).program_hash, planned]
    (directory / "hashes.json").write_text(json.dumps(hashes))


if __name__ == "__main__":
    print_hashes(sys.argv[1], Path(sys.argv[2]))
