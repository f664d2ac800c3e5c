"""The evaluate command on a tiny model: losses against transformers, files, comparison, errors."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from jaxsft.config import SYSTEM_PROMPT
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.chat import encode_chat
from jaxsft.data.rows import Turn
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.evaluate.__main__ import main
from jaxsft.gemma import lora
from jaxsft.weights.adapter_config import AdapterConfig
from jaxsft.weights.load import load_model
from jaxsft.weights.peft import save_adapter

pytestmark = pytest.mark.usefixtures("quick_compilation")
ROWS = [("What is 2 + 3?", "2 + 3 is 5.", "5"), ("And 4 + 4?", "Twice four.", "8")]
SHORT = ("--eval.max-new-tokens", "4", "--eval.batch-size", "2", "--max-length", "256")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "heldout.jsonl"
    lines = [{"question": q, "answer": f"{r}\n#### {a}"} for q, r, a in ROWS]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def adapter(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random rank-2 adapter of the tiny model."""
    model, _ = load_model(tiny_model_dir, dtype="float32", param_dtype="float32")
    lora.inject(model, rank=2, alpha=4.0, rngs=nnx.Rngs(0))
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        if path[-1] == "b":
            key = jax.random.key(len(str(path)))
            variable.set_value(0.3 * jax.random.normal(key, variable.get_value().shape))
    directory = tmp_path_factory.mktemp("adapter")
    settings = AdapterConfig(2, 4.0, 0.0, False, lora.TARGETS, str(tiny_model_dir))
    save_adapter(directory, model, settings)
    return directory


def losses_of_transformers(model_dir: Path) -> dict[str, float]:
    """Mean loss per completion token, of all and by part, one row after the other."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = Tokenizer.from_file(model_dir / "tokenizer.model")
    parts: dict[str, list[float]] = {"loss": [], "loss_reasoning": [], "loss_answer": []}
    for question, reasoning, answer in ROWS:
        completion = AnswerTemplate().join(reasoning, answer)
        turns = [Turn("system", SYSTEM_PROMPT), Turn("user", question)]
        sample = encode_chat(tokenizer, [*turns, Turn("assistant", completion)])
        ids = torch.tensor(sample.ids[None].astype(np.int64))
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").numpy()
        of_completion = losses[sample.loss_mask[1:]]
        num_answer = len(tokenizer.encode(completion[completion.index("<answer>") :])) + 1
        parts["loss"] += of_completion.tolist()
        parts["loss_reasoning"] += of_completion[:-num_answer].tolist()
        parts["loss_answer"] += of_completion[-num_answer:].tolist()
    return {name: float(np.mean(values)) for name, values in parts.items()}


def test_losses_equal_transformers(
    tiny_model_dir: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ("--files", str(rows), "--output", str(tmp_path))
    assert main([str(tiny_model_dir), *output, *SHORT]) == 0
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    for name, expected in losses_of_transformers(tiny_model_dir).items():
        assert metrics[name]["models"][0]["value"] == pytest.approx(expected, rel=1e-4), name
    loss = metrics["loss"]["models"][0]
    assert loss["num"] == 2 and loss["low"] <= loss["value"] <= loss["high"]
    assert metrics["perplexity"]["models"][0]["value"] == pytest.approx(np.exp(loss["value"]))
    assert metrics["accuracy"]["models"][0]["value"] == 0.0
    assert "of the reasoning" in capsys.readouterr().out


def test_two_models_side_by_side(
    tiny_model_dir: Path, adapter: Path, rows: Path, tmp_path: Path
) -> None:
    shots = ("--few-shot", "1", "--few-shot-files", str(tmp_path / "shots.jsonl"))
    (tmp_path / "shots.jsonl").write_text(rows.read_text().splitlines()[1].replace("And", "Is"))
    output = tmp_path / "found"
    arguments = ("--compare", "base", "--files", str(rows), "--output", str(output), *shots)
    assert main([str(adapter), *arguments, *SHORT]) == 0
    found = json.loads((output / "evaluation.json").read_text())
    left, right = found["metrics"]["loss"]["models"]
    gain = found["metrics"]["loss"]["difference"]
    assert left["value"] != right["value"]
    assert gain["value"] == pytest.approx(right["value"] - left["value"])
    assert 0 < gain["p_value"] <= 1
    expected = losses_of_transformers(tiny_model_dir)["loss"]  # examples are for answers alone
    assert right["value"] == pytest.approx(expected, rel=1e-4)
    answers = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert [answer["prompt"] for answer in answers] == [question for question, _, _ in ROWS]
    assert answers[0]["reference"] == AnswerTemplate().join("2 + 3 is 5.", "5")
    weights = (adapter / "adapter_model.safetensors").read_bytes()
    assert found["adapters"] == [hashlib.sha256(weights).hexdigest(), None]
    assert list(answers[0]["answers"]) == found["models"] == [str(adapter), str(tiny_model_dir)]
    scores = answers[0]["scores"][str(adapter)]
    assert scores["num_tokens"] == 4 and scores["truncated"] and not scores["correct"]
    assert "<html" in (output / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "no rows to measure on: give --files"),
        (("--files", "missing.jsonl"), "missing.jsonl"),
        (("--files", "ROWS", "--few-shot", "2"), "few_shot needs --few_shot_files"),
        (("--files", "ROWS", "--few_shot_style", "text"), "few_shot_style needs few_shot"),
        (("--files", "ROWS", "--few-shot", "3", "--few_shot_files", "SHOTS"), "1 rows"),
        (("--files", "ROWS", "--compare", "base"), "has no adapter"),
        (("--files", "ROWS", "--compare", "SELF"), "is the model itself"),
        (("--files", "rows\udcff.jsonl"), "is not UTF-8"),
        (("--files", "ROWS", "--eval.batch_size", "0"), "eval.batch_size is 0"),
        (("--files", "ROWS", "--eval.temperature", "-1"), "eval.temperature is -1"),
        (("--files", "ROWS", "--eval.top_p", "0.9"), "do nothing at eval.temperature 0"),
        (("--files", "ROWS", "--base_model", "demo"), "base_model is for adapters"),
        (("--files", "ROWS", "--few-shot", "1", "--few_shot_files", "ROWS"), "is among the rows"),
        (("--files", "ROWS", "--eval.max_new_tokens", "500"), "has 512 positions"),
        (("--files", "ROWS", "--eval.temperatur", "1"), "did you mean --eval.temperature"),
        (("--files", "ROWS", "--output", "SHOTS"), "shots.jsonl is a file; name a directory"),
        (("--files", "ROWS", "--output", "SHOTS/x"), "shots.jsonl is a file; name a directory"),
        (("--files", "ROWS", "--output", "HERE"), "holds shots.jsonl; name a directory of its own"),
    ],
)
def test_bad_input_is_one_line(
    tiny_model_dir: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: Sequence[str],
    line: str,
) -> None:
    shots = tmp_path / "shots.jsonl"
    shots.write_text(rows.read_text().splitlines()[1].replace("And", "Is"))
    places = {"ROWS": str(rows), "SHOTS": str(shots), "HERE": str(tmp_path)}
    places |= {"SELF": f"{tiny_model_dir}/../{tiny_model_dir.name}", "SHOTS/x": f"{shots}/x"}
    arguments = [places.get(argument, argument) for argument in arguments]
    assert main([str(tiny_model_dir), "--output", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and line in error
    assert [each.name for each in tmp_path.iterdir()] == ["shots.jsonl"]


def test_the_second_model_is_checked_before_the_first_is_measured(
    tiny_model_dir: Path,
    adapter: Path,
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    spoilt = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    config = spoilt / "adapter_config.json"
    config.write_text(config.read_text().replace(str(tiny_model_dir), str(base)))
    weights = spoilt / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"format": "pt", "base_digest": "0" * 64})
    earlier = tmp_path / "out" / "evaluation.json"
    earlier.parent.mkdir()
    earlier.write_text("{}")
    output = ("--files", str(rows), "--output", str(earlier.parent))

    def refused() -> str:
        assert main([str(tiny_model_dir), "--compare", str(spoilt), *output, *SHORT]) == 2
        assert earlier.read_text() == "{}"
        return capsys.readouterr().err

    assert "was trained on other weights (SHA-256 000000000000)" in refused()
    (base / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing model-00001-of-00002.safetensors" in refused()
