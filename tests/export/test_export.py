"""The command as a user runs it: on a tiny Gemma 3 with real tokens, and on the real 270M."""

import dataclasses
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
import yaml
from safetensors.numpy import load_file, save_file
from support.lora_twins import inject_random

from jaxsft.common.files import read_json
from jaxsft.config import ANSWER_TEMPLATE, SYSTEM_PROMPT
from jaxsft.data.added_tokens import AddedToken
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.__main__ import main
from jaxsft.export.chat_template import chat_template
from jaxsft.export.peers import TUNIX
from jaxsft.export.tokenizer import tokenizer_json
from jaxsft.export.verify import (
    LOGIT_BOUND,
    flax_problem,
    ids_problem,
    pieces_problem,
    tunix_lacks,
)
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.weights.adapter_config import read_adapter_config
from jaxsft.weights.find import Taught, find_model, find_tokenizer, open_tokenizer, taught_by
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.load import load_model, without_weights
from jaxsft.weights.peft import save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def write_adapter(directory: Path, config: GemmaConfig, base: str, size: float) -> Path:
    """A random adapter of rank 4, as training writes it, whose B has entries of about `size`."""
    model = without_weights(config)
    settings = inject_random(model, rank=4, alpha=6.0, size=size)
    save_adapter(directory, model, dataclasses.replace(settings, base_model_name=base))
    return directory


@pytest.fixture(scope="module")
def run_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run, as far as export looks at it."""
    directory = tmp_path_factory.mktemp("runs") / "tiny"
    write_adapter(
        directory / "adapter", from_hf_config(tiny_model_dir / "config.json"), "tiny", 0.1
    )
    config = {
        "name": "tiny",
        "model": {"path": str(tiny_model_dir)},
        "lora": {"r": 4},
        "data": {"train_files": ["/home/me/train.jsonl"], "max_length": 160},
        "global_batch_size": 4,
        "learning_rate": 1e-3,
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    before = {"loss": 5.25, "exact_format": 0.0, "intervals": {}, "answers": []}
    intervals = {"loss": [None, None], "exact_format": [0.5, 0.875]}
    after = {"loss": 1.125, "exact_format": 0.75, "intervals": intervals, "answers": []}
    result = {"before": before, "after": after, "data": {"rows_read": 9}, "command": "the command"}
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def manifest_of(directory: Path) -> dict[str, Any]:
    """The manifest, after its digests were compared with the files, all of them."""
    manifest = json.loads((directory / "manifest.json").read_text())
    files = {p.relative_to(directory).as_posix(): p for p in directory.rglob("*") if p.is_file()}
    del files["manifest.json"]
    assert manifest["files"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()
    }
    return manifest


def prompt_of_card(output: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the card's code, run where the export lies, gives the model for a prompt, as text."""
    code = (output / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(output.parent)
    names: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=256", "max_new_tokens=2"), names)
    return str(names["tokenizer"].decode(names["inputs"]["input_ids"][0]))


def test_merged(
    run_dir: Path,
    tiny_model_dir: Path,
    command_environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "jaxsft.export", str(run_dir), "--output", str(output)]
    environment = command_environment | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--dtype", "float32", "--max-shard-bytes", "100000"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "logits of transformers are the same within" in done.stdout

    manifest = manifest_of(output)
    assert manifest["verified"] and manifest["max_abs_logit_difference"] <= LOGIT_BOUND
    assert manifest["bound"] == LOGIT_BOUND and manifest["run"] == "tiny"
    assert (manifest["format"], manifest["dtype"]) == ("merged", "float32")
    assert manifest["peer_versions"]["torch"] == torch.__version__
    digest = load_model(tiny_model_dir, dtype="float32", param_dtype="float32")[1].digest
    assert manifest["base"]["digest"] == digest
    assert len(list(output.glob("model-*-of-*.safetensors"))) > 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    embedding = "model.embed_tokens.weight"
    found = load_file(output / index["weight_map"][embedding])[embedding]
    base = load_file(tiny_model_dir / "model.safetensors")[embedding]
    assert found.tobytes() == base.tobytes()

    settings = transformers.GenerationConfig.from_pretrained(output)
    assert (settings.eos_token_id, settings.bos_token_id, settings.pad_token_id) == ([1, 106], 2, 0)
    card = (output / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "gemma" and front["pipeline_tag"] == "text-generation"
    assert "LoRA: rank 4, alpha 6 (alpha / r)" in card and "`train.jsonl`" in card
    assert "/home/me" not in card
    assert "completion token | 5.2500 | 1.1250 |" in card
    assert "| exact format | 0.0% | 75.0% [50.0, 87.5] |" in card
    assert "- rows read: 9" in card and "trained with `the command`" in card
    asked = f"<bos><start_of_turn>user\n{SYSTEM_PROMPT}\n\nWhy is the sky blue?"
    assert prompt_of_card(output, monkeypatch).startswith(asked)


@pytest.fixture
def grown_base(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """As transformers 5 saves a model with added tokens: a padded embedding, no tokenizer.model."""
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    raw = tokenizer_json(Tokenizer.from_file(base / "tokenizer.model"))
    num = len(raw["model"]["vocab"])
    added = (AddedToken(num + i, name) for i, name in enumerate(("<think>", "</think>")))
    raw["added_tokens"] += [token._asdict() for token in added]
    (base / "tokenizer.json").write_text(json.dumps(raw))
    (base / "tokenizer.model").unlink()
    config, weights = base / "config.json", base / "model.safetensors"
    rows = -(-(num + 2) // 64) * 64
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": rows}))
    tensors = load_file(weights)
    old = tensors["model.embed_tokens.weight"]
    tensors["model.embed_tokens.weight"] = np.concatenate([old, old[: rows - num]])
    save_file(tensors, weights, {"format": "pt"})
    return base


def test_peft(
    run_dir: Path, grown_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    command = [str(run_dir), "--format=peft", "--base-model", str(grown_base)]
    assert main([*command, "--output", str(output)]) == 0
    manifest = manifest_of(output)
    assert manifest["verified"] and manifest["max_abs_logit_difference"] <= 1e-4
    assert manifest["peer"] == "transformers and PEFT"
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(grown_base)
    base = transformers.AutoModelForCausalLM.from_pretrained(grown_base)
    assert peft.PeftModel.from_pretrained(base, output).peft_config["default"].r == 4
    ours, theirs = (
        load_file(d / "adapter_model.safetensors") for d in (run_dir / "adapter", output)
    )
    assert all(theirs[name].tobytes() == array.tobytes() for name, array in ours.items())
    assert f"user\n{SYSTEM_PROMPT}\n\nWhy" in prompt_of_card(output, monkeypatch)
    # Others get the tokens that were added, and we get them again.
    theirs = transformers.AutoTokenizer.from_pretrained(output)
    ours, before = (open_tokenizer(find_tokenizer(d, None)) for d in (output, grown_base))
    ids = ours.encode("a<think>b")
    assert theirs("a<think>b", add_special_tokens=False).input_ids == ids and len(ids) == 3
    assert ours.digest == before.digest and not (output / "tokenizer.model").exists()


def test_other_ids_are_a_problem() -> None:
    texts, ours = ["one", "two"], [[1, 2], [3, 4, 5]]
    assert ids_problem(texts, ours, ours) is None
    found = ids_problem(texts, ours, [[1, 2], [3, 4]])
    assert found == "the exported tokenizer has other ids for 'two': at 2 [], and not [5]"
    assert pieces_problem(["a", "<x>"], [0, 1]) is None
    found = pieces_problem(["a", "<x>"], [0, 3])
    assert found == "the exported tokenizer has '<x>' at 3, and not at 1"


def test_flax_without_tunix_is_not_called_verified(
    run_dir: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        "jaxsft.export.verify.TUNIX", TUNIX._replace(packages=("jaxsft-no-such-package",))
    )
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = json.loads((base / "config.json").read_text())
    assert tunix_lacks(from_hf_config(config)) == "query_scale other than 0.25"
    (base / "config.json").write_text(json.dumps(config | {"query_pre_attn_scalar": 16}))
    usual = ["--format=flax", "--base-model", str(base)]
    assert main([str(run_dir), *usual, "--output", str(tmp_path / "out")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    manifest = manifest_of(tmp_path / "out")
    gap = "model/, tunix-lora/ and tokenizer.model were read by jaxsft alone, not by Tunix: "
    gap += "Tunix is not installed here; --peer_python names a Python that has it"
    assert manifest["not_checked"] == gap and f"NOT verified: {gap}" in said
    assert gap in (tmp_path / "out" / "README.md").read_text()
    assert manifest["verified"] is False and manifest["problem"] is None
    assert manifest["max_abs_logit_difference"] <= 1e-4 and manifest["peer_versions"] == {}

    command = [str(run_dir), *usual, "--peer-python", sys.executable]
    assert main([*command, "--output", str(tmp_path / "named")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs jaxsft-no-such-package (importlib.metadata.PackageNotFoundError" in line

    # Another adapter's LoRA-only checkpoint is noticed.
    origin = find_model(str(run_dir))
    other = write_adapter(tmp_path / "other", from_hf_config(config), "tiny", 0.2)
    tokenizer = open_tokenizer(origin.tokenizer)
    found = flax_problem(tmp_path / "out", tokenizer, other, read_adapter_config(other))
    assert found is not None and found.startswith("tunix-lora/ has another update for ")


@pytest.mark.parametrize(
    ("text", "form", "earlier"),
    [
        (None, ANSWER_TEMPLATE, "keep"),
        ("Be brief.", "<think>{reasoning}</think>{answer}", "strip"),
    ],
)
def test_every_format_knows_what_was_taught(
    text: str | None, form: str, earlier: Any, run_dir: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(run_dir, tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    taught = {"system_prompt": text, "answer_template": form, "earlier_reasoning": earlier}
    config["data"] |= taught
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    expected = Taught(text or "", AnswerTemplate(form), earlier)
    steps = [
        ("run", "peft", "peft"),
        ("run", "merged", "merged"),
        ("run", "flax", "flax/model"),
        ("peft", "merged", "again"),
        ("flax/model", "flax", "again-flax"),  # which is a checkpoint, as its model/ is
        ("again-flax", "merged", "at-last"),
    ]
    for model, format, place in steps:
        output = tmp_path / place.removesuffix("/model")
        command = [str(tmp_path / model), "--format", format, "--output", str(output)]
        assert main([*command, "--no-verify"]) == 0
        assert taught_by(find_model(str(tmp_path / place))) == expected, place
        assert "To take an answer, `text`, apart" in (output / "README.md").read_text()
        if format != "flax":
            settings = read_json(output / "tokenizer_config.json")
            assert settings["chat_template"] == chat_template(expected)
    assert taught_by(find_model(str(tmp_path / "again-flax" / "model"))) == expected


def test_the_card_of_an_adapter_on_a_flax_base(
    run_dir: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its command makes the base that its code loads."""
    base, output = tmp_path / "my base", tmp_path / "out"
    arguments = [str(tiny_model_dir), "--format=flax", "--output", str(base)]
    assert main([*arguments, "--no-verify"]) == 0
    arguments = [str(run_dir), "--format=peft", "--base-model", str(base), "--output", str(output)]
    assert main([*arguments, "--no-verify"]) == 0
    card = (output / "README.md").read_text()
    (line,) = [line for line in card.splitlines() if "/path/to/" in line]
    command = shlex.split(line.replace("/path/to", str(tmp_path)))
    assert command[:3] == ["python", "-m", "jaxsft.export"]
    monkeypatch.chdir(tmp_path)
    assert main([*command[3:], "--no-verify"]) == 0
    assert f"user\n{SYSTEM_PROMPT}\n\nWhy" in prompt_of_card(output, monkeypatch)


@pytest.mark.parametrize(
    ("python", "message"),
    [("no/such/python", "cannot be run: No such file"), ("/bin/true", "is no Python")],
)
def test_a_python_that_is_none(
    python: str, message: str, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(run_dir), "--peer-python", python, "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert f"--peer_python {python}: {message}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_out_of_memory_is_one_line(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A worker that is killed, as the system does where memory runs out."""
    worker = tmp_path / "transformers_worker.py"
    worker.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr("jaxsft.export.peers._WORKERS", tmp_path)
    assert main([str(run_dir), "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory") and "--no-verify" in line
    assert [path.name for path in tmp_path.iterdir()] == [worker.name]


def test_a_drifting_export_is_refused(
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The fault: alpha without its division by the rank, in the merge alone."""
    monkeypatch.setattr("jaxsft.weights.merged.lora_scale", lambda rank, alpha, rs: alpha)
    assert main([str(run_dir), "--output", str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the export drifts: logits of transformers are ")
    assert [path.name for path in tmp_path.iterdir()] == ["out.drifting"]
    manifest = manifest_of(tmp_path / "out.drifting")
    assert not manifest["verified"] and manifest["max_abs_logit_difference"] > 10 * LOGIT_BOUND
    assert "DRIFTING" in (tmp_path / "out.drifting" / "README.md").read_text()


def test_without_the_other_libraries(
    run_dir: Path,
    command_environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", command_environment["PYTHONPATH"])
    command = [str(run_dir), "--output", str(tmp_path / "out")]
    assert main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs torch, transformers, peft (ImportError: torch at run time)" in line
    assert "pip install 'jaxsft[export]', or --peer_python PATH of" in line
    assert line.endswith("or --no-verify to go without it")
    assert not list(tmp_path.iterdir())

    assert main([*command, "--no-verify"]) == 0
    assert "NOT verified" in capsys.readouterr().out
    manifest = manifest_of(tmp_path / "out")
    assert manifest["verified"] is False and manifest["max_abs_logit_difference"] is None
    assert manifest["problem"] is None and manifest["not_checked"] == "not checked: --no-verify"
    assert manifest["peer_versions"] == {} and manifest["dtype"] == "bfloat16"

    # The same export again takes its place; another one, or foreign files beside it, do not.
    assert main([*command, "--no-verify"]) == 0
    assert main([*command, "--no-verify", "--format", "peft"]) == 2
    assert "exists and is not an earlier peft export of the same weights" in capsys.readouterr().err
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main([*command, "--no-verify"]) == 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_base_model_has_no_adapter(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tiny_model_dir), "--format", "peft", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "has no adapter" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("step", ["plain", "fused"])
def test_after_training(
    step: str, tiny_model_dir: Path, command_environment: dict[str, str], tmp_path: Path
) -> None:
    """Whatever layout the step keeps the weights in: train, export, load elsewhere."""
    row = {"prompt": "Name a red fruit.", "response": "<think>I recall: Apple.</think>\nApple."}
    (tmp_path / "train.jsonl").write_text((json.dumps(row) + "\n") * 8)
    options = {
        "output_dir": str(tmp_path / "runs"),
        "name": "tiny",
        "step": step,
        "model.path": str(tiny_model_dir),
        "data.train_files": str(tmp_path / "train.jsonl"),
        "data.eval_files": "[]",
        "data.max_length": 160,
        "data.drop_duplicates": "false",
        "lora.r": 4,
        "global_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    done = subprocess.run(
        [sys.executable, "-m", "jaxsft.train", *arguments],
        env=command_environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"train step: {step}" in done.stdout
    for format in ("merged", "peft"):
        output = tmp_path / format
        assert main([str(tmp_path / "runs/tiny"), "--format", format, "--output", str(output)]) == 0
        assert manifest_of(output)["max_abs_logit_difference"] <= LOGIT_BOUND


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "dtype"), [("merged", "float32"), ("merged", "bfloat16"), ("peft", "float32")]
)
def test_real_model(format: str, dtype: str, tmp_path: Path, real_gguf: Path) -> None:
    from jaxsft.formats.gguf import GGUFFile, hf_config

    config = from_hf_config(hf_config(GGUFFile(real_gguf)))
    adapter = write_adapter(tmp_path / "adapter", config, "google/gemma-3-270m", 0.02)
    command = [str(adapter), "--base-model", "demo", "--format", format, "--dtype", dtype]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    manifest = manifest_of(tmp_path / "out")
    assert manifest["verified"] and manifest["max_abs_logit_difference"] <= 2e-3


PEAK = """
import re
import sys
from pathlib import Path
from jaxsft.data.added_tokens import AddedToken
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.__main__ import main
code = main(sys.argv[1:])
# Not getrusage: what the parent process had counts there too.
kib = re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]
print("PEAK", int(kib) * 1024)
sys.exit(code)
"""


@pytest.mark.slow
def test_memory_of_a_merged_export(tmp_path: Path, real_gguf: Path) -> None:
    """1,072 MB of float32 tensors pass through in blocks: the base is not in memory, nor a shard.

    821 MB were seen: 449 after the imports, 240 are pages of the GGUF, which the system may take
    back, the rest is the vocabulary.
    """
    output = ["--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "demo", "--no-verify", "--dtype=float32", *output],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model.safetensors").stat().st_size > 1_070_000_000
    peak = int(done.stdout.split("PEAK ")[1])
    assert peak < 1_000_000_000, peak
