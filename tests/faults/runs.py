"""Rows of `faults.faults`: numbers that are not finite, spikes, and runs that are others."""

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from faults.bench import STEPS, Bench, Row, files, resumed_from
from safetensors.numpy import load_file, save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from support.tiny_runs import checkpoint_arrays, metrics, train_metrics, write_rows

from jaxsft.data.packing import epoch_order

POISONED_STEPS = (70, 80)  # the first 64 are not judged
_SPIKE_STEPS = 90

T = TypeVar("T")


def not_finite(bench: Bench, row: Row) -> None:
    """Updates that blow the adapter up: the next losses are not finite."""
    name = bench.new_name()
    with bench.start(row, name, "--learning_rate", "1e30", "--save_steps", "1") as child:
        code = child.wait()
    row.saw = child.err.strip()
    run_dir = bench.runs.path(name)
    row.expect(code == 1, f"exit code {code} instead of 1", child)
    row.expect(row.saw.startswith("error: loss or gradient not finite in steps "), row.saw)
    row.expect(child.err.count("\n") == 1 and "train.jsonl:row " in row.saw, row.saw)
    lines = [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]
    applied = {line["step"]: line["train/applied"] for line in metrics(run_dir) if line["step"]}
    row.expect([applied[line["step"]] for line in lines] == [0, 0, 0], f"applied: {applied}")
    checkpoints = [path for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()]
    row.expect(bool(checkpoints), "nothing was saved")
    for path in checkpoints:
        arrays = checkpoint_arrays(path).values()
        row.expect(all(np.isfinite(array).all() for array in arrays), f"{path} is not finite")


def not_finite_adapter(bench: Bench, row: Row) -> None:
    """An adapter that is beyond all measure from the start."""
    adapter, name = bench.runs.directory / "huge", bench.new_name()
    shutil.copytree(bench.reference / "adapter", adapter, dirs_exist_ok=True)
    weights = load_file(bench.reference / "adapter/adapter_model.safetensors")
    huge = {tensor: 1e30 * value for tensor, value in weights.items()}
    save_file(huge, adapter / "adapter_model.safetensors")
    with bench.start(row, name, "--fork-from", str(adapter), "--data.eval_files", "[]") as child:
        code = child.wait()
    row.saw = child.err.strip()
    row.expect(code == 1, f"exit code {code} instead of 1", child)
    row.expect(row.saw.startswith("error: loss or gradient not finite in steps 1 to 3; "), row.saw)
    row.expect(not (bench.runs.path(name) / "adapter").exists(), "there is a result")


def spikes(bench: Bench, row: Row) -> None:
    """Steps with rows of another kind are skipped, by a run that is killed between them as well."""
    options = _spike_options(bench)
    reference, name = bench.new_name(), bench.new_name()
    out = bench.runs.finish(reference, *options).out
    row.saw = next((line for line in out.splitlines() if "a spike" in line), "")
    skipped = _skipped(bench.runs.path(reference))
    row.expect([line["step"] for line in skipped] == [*POISONED_STEPS], f"skipped {skipped}")
    for line in skipped:
        row.expect(line["reason"] == "spike" and len(line["rows"]) == 1, f"skipped {line}")
        row.expect(line["rows"][0].startswith(f"{bench.runs.directory}/poisoned.jsonl:row "), "")
    with bench.runs.start(name, *options) as child:
        child.wait_for(f"step {POISONED_STEPS[0] + 3}/")
        child.kill()
    done = len(train_metrics(bench.runs.path(name)))
    with bench.runs.start(name, *options) as child:
        bench.check_end(row, child, bench.runs.path(name), bench.runs.path(reference))
    row.lost.append(done - resumed_from(child))
    row.expect(_skipped(bench.runs.path(name)) == skipped, "others were skipped")


def another_run(bench: Bench, row: Row) -> None:
    """Each of what makes a run that run, changed: refused, and nothing on disk is."""
    _, unfinished = _unfinished(bench)
    model, tokenizer = _another_model(bench), _another_tokenizer(bench)
    changes = {
        "lora.r": ("--lora.r", "32"),
        "lora.target_modules": ("--lora.target_modules", "q_proj,v_proj"),
        "model": ("--model.path", str(model)),
        "tokenizer": ("--model.tokenizer", str(tokenizer)),
        "data": ("--data.stop", "100"),
        "data.packing": ("--data.packing", "true"),
        "global_batch_size": ("--global_batch_size", "4"),
        "seed": ("--seed", "7"),
    }

    def refuse(change: tuple[str, tuple[str, str]]) -> None:
        option, arguments = change
        name = bench.new_name()
        run_dir = bench.runs.path(name)
        shutil.copytree(unfinished, run_dir)
        before = files(run_dir)
        with bench.start(row, name, *arguments) as child:
            there = f"{option} is "
            row.refused(child, "is of another run: ", there, " there and ", " here", "--fork-from")
        row.expect(files(run_dir) == before, f"{option}: files were changed")

    _all(refuse, changes.items())


def fork(bench: Bench, row: Row) -> None:
    """A new run from the adapter of a finished run, of an unfinished one, and of a directory."""
    _, unfinished = _unfinished(bench)
    result = json.loads((bench.reference / "result.json").read_text())
    end = result["after"]["loss"]
    steps = ("--max_steps", "2", "--warmup_steps", "1")

    def go_on(source: Path) -> None:
        name = bench.new_name()
        child = bench.runs.finish(name, *steps, "--fork-from", str(source))
        loss = json.loads((bench.runs.path(name) / "result.json").read_text())["before"]["loss"]
        is_right = loss == end
        if source == unfinished:
            is_right = end < loss < result["before"]["loss"]
        row.expect(is_right, f"{source.name} began with loss {loss}, {end} was the last", child)
        row.saw = f"step 0: held-out loss {loss:.3f}, where the other run ended"

    _all(go_on, (unfinished, bench.reference, bench.reference / "adapter"))


def fork_of_another(bench: Bench, row: Row) -> None:
    """The adapter of another model, or of another rank."""
    _, unfinished = _unfinished(bench)
    rank, model = ("--lora.r", "32"), ("--model.path", str(_another_model(bench)))

    def refuse(change: tuple[Path, tuple[str, str], str]) -> None:
        source, arguments, words = change
        name = bench.new_name()
        with bench.start(row, name, *arguments, "--fork-from", str(source)) as child:
            row.refused(child, str(source), " there and ", words)
        row.expect(not bench.runs.path(name).exists(), "there is debris")

    changes = (
        (bench.reference / "adapter", rank, "lora.r is 64 there and 32 here"),
        (unfinished, rank, "lora.r is 64 there and 32 here"),
        (unfinished, model, "model is "),
    )
    _all(refuse, changes)


def _unfinished(bench: Bench) -> tuple[str, Path]:
    """A run that was killed after its first checkpoint, the same each time."""
    name = "unfinished"
    run_dir = bench.runs.path(name)
    if not run_dir.exists():
        with bench.runs.start(name, *STEPS) as child:
            child.wait_for("step 12/")
            child.kill()
    return name, run_dir


def _all(do: Callable[[T], None], cases: Iterable[T]) -> None:
    """Two at once: a start takes seconds on one core."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(do, cases))


def _another_model(bench: Bench) -> Path:
    """The same, but for one number."""
    path = bench.runs.directory / "another-model"
    if not path.exists():
        shutil.copytree(bench.runs.directory / "model", path)
        weights = load_file(path / "model.safetensors")
        name = min(weights)
        weights[name] = weights[name].copy()
        weights[name].flat[0] += 1
        save_file(weights, path / "model.safetensors")
    return path


def _another_tokenizer(bench: Bench) -> Path:
    """The same, but for the last piece, which is missing."""
    model = ModelProto.FromString((bench.runs.directory / "model/tokenizer.model").read_bytes())
    del model.pieces[-1]
    path = bench.runs.directory / "another.model"
    path.write_bytes(model.SerializeToString())
    return path


def _spike_options(bench: Bench) -> tuple[str, ...]:
    """A row a step, from the reference's adapter, which barely changes. Steps 70 and 80 have rows
    of another kind."""
    path = bench.runs.directory / "poisoned.jsonl"
    write_rows(path, range(_SPIKE_STEPS))
    lines = path.read_text().splitlines()
    order = epoch_order(42, 0, _SPIKE_STEPS)  # 42 is the default seed
    for step in POISONED_STEPS:
        odd = f"<think>Zyx wvu {step} QPO nml; KJI?</think>\n{{hgf}} = [edc] ~ BA."
        row = {"prompt": f"Qwzx {step}: vbnm?", "response": odd}
        lines[order[step - 1]] = json.dumps(row)
    path.write_text("\n".join(lines) + "\n")
    return (
        *("--data.train_files", str(path), "--global_batch_size", "1", "--num_train_epochs", "1"),
        *("--fork-from", str(bench.reference), "--learning_rate", "1e-6"),
        *("--skip-spikes-sigmas", "4"),
    )


def _skipped(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "skipped.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]
