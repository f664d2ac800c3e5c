"""What a run that starts from another adapter takes from it, and where it says that it cannot."""

import dataclasses
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxsft.cli import config_yaml, parse_config, parse_options, typed_options
from jaxsft.config import GrpoConfig, LoraOptions, RunConfig, TrainConfig
from jaxsft.run.fork import Fork, describe_fork, with_fork
from jaxsft.weights.adapter_config import CONFIG_NAME, WEIGHTS_NAME

ALL = "--data.train_files=[rows]"


def write_adapter(directory: Path, *targets: str) -> Path:
    """A PEFT adapter of rank 8 and alpha 16 on the first layer, with rsLoRA."""
    directory.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "use_rslora": True}
    config |= {"target_modules": r".*_proj", "lora_dropout": 0.1}
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    names = [f"layers.0.self_attn.{target}.lora_{ab}.weight" for target in targets for ab in "AB"]
    zeros = np.zeros((8, 8), np.float32)
    save_file(dict.fromkeys(names, zeros), directory / WEIGHTS_NAME)
    return directory


def forked(source: Path, *arguments: str) -> tuple[TrainConfig, Fork | None]:
    argv = [ALL, "--fork_from", str(source), *arguments]
    typed = typed_options("jaxsft.train", argv, TrainConfig)
    return with_fork(parse_config("jaxsft.train", "", argv)[0], typed)


def test_the_adapter_s_shape_goes_on(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", "q_proj", "v_proj")
    config, fork = forked(adapter, "--lora.dropout", "0.2")
    shape = LoraOptions(8, 16.0, 0.2, use_rslora=True, target_modules="q_proj,v_proj")
    assert config.lora == shape and fork is not None and fork.source == adapter
    assert describe_fork(config).endswith(": rank 8, alpha 16 with rsLoRA, on q_proj,v_proj.")
    # What was typed and agrees stays as it was written: the run's fingerprint has it.
    config, _ = forked(adapter, "--lora.target_modules", "v_proj,q_proj", "--lora.alpha=16")
    assert config.lora.target_modules == "v_proj,q_proj"
    unforked = dataclasses.replace(config, fork_from=None)
    assert with_fork(unforked, {"lora.r"}) == (unforked, None)


@pytest.mark.parametrize(
    ("arguments", "complaints"),
    [
        (["--lora.r=16"], ["lora.r is 8 there and 16 here"]),
        (["--lora.r=64"], ["lora.r is 8 there and 64 here"]),  # the default, and typed
        (["--lora.use_rslora", "false"], ["lora.use_rslora is True there and False here"]),
        (["--lora", '{"alpha": 8}'], ["lora.alpha is 16.0 there and 8.0 here"]),
        (["--config", "own.yaml"], ["lora.r is 8 ", "target_modules is q_proj there and o_proj "]),
    ],
)
def test_an_option_that_contradicts_it_is_refused(
    arguments: list[str],
    complaints: Collection[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("lora:\n  r: 4\n  target_modules: o_proj\n")
    adapter = write_adapter(tmp_path / "adapter", "q_proj")
    with pytest.raises(ValueError) as caught:
        forked(adapter, *arguments)
    line = str(caught.value)
    assert line.startswith(f"fork_from {adapter}: ") and all(each in line for each in complaints)
    assert "leave the option out" in line


def test_what_a_recipe_says_is_not_typed(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("seed: 3\ndata:\n  max_length: 300\n")
    argv = ["--config", "single_session", f"--config={tmp_path}/own.yaml", "--lora.r", "2"]
    typed = typed_options("jaxsft.train", argv, TrainConfig)
    assert typed == {"config", "seed", "data.max_length", "lora.r"}
    assert typed_options("jaxsft.train", [], TrainConfig) == frozenset()


@pytest.mark.parametrize(("kind", "recipe"), [(TrainConfig, "demo"), (GrpoConfig, "grpo_gsm8k")])
def test_an_unfinished_run_s_options_are_in_its_config(
    tmp_path: Path, kind: type[RunConfig], recipe: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    argv = ["--config", recipe, "--lora.r=3", "--lora.target_modules=v_proj,q_proj", "--name=x"]
    (there,) = parse_options("jaxsft.train", "", argv, kind)
    (tmp_path / "config.yaml").write_text(config_yaml(there))
    config, fork = forked(tmp_path)
    assert fork == Fork(tmp_path / "checkpoints", None)
    assert (config.lora.r, config.lora.target_modules) == (3, "v_proj,q_proj")
    assert "r: 3\n" in config_yaml(config)
    with pytest.raises(ValueError, match=r"lora\.alpha is 64\.0 there and 1\.0 here"):
        forked(tmp_path, "--lora.alpha=1")


def test_directories_of_trainers(tmp_path: Path) -> None:
    """The newest checkpoint inside is named; the adapter of the top is taken where there is one."""
    out = tmp_path / "out"
    for step in (9, 100, 20, 3):
        write_adapter(out / f"checkpoint-{step}", "q_proj")

    def refusal(source: Path) -> str:
        with pytest.raises(ValueError) as caught:
            forked(source)
        return str(caught.value)

    advice = (
        f"of them, checkpoint-9 and checkpoint-20 and checkpoint-100: give {out}/checkpoint-100"
    )
    assert refusal(out).endswith(f"there are 4 {advice}")
    assert f"give {out}/checkpoint-100" in refusal(tmp_path)
    (out / CONFIG_NAME).write_text("{}")  # a trainer that was stopped
    assert f"has no weights of its own; there are 4 {advice}" in refusal(out)
    write_adapter(out, "q_proj")
    assert forked(out)[0].lora.r == 8
    (tmp_path / "weights").mkdir()
    (out / WEIGHTS_NAME).rename(tmp_path / "weights" / WEIGHTS_NAME)
    assert f"it holds {WEIGHTS_NAME} alone: copy {CONFIG_NAME} to it" in refusal(
        tmp_path / "weights"
    )
    (tmp_path / "tunix" / "7" / "model_params").mkdir(parents=True)
    assert "is a checkpoint of Tunix" in refusal(tmp_path / "tunix")
    assert refusal(tmp_path / "none").endswith("none: there is no such directory")
    run = tmp_path / "run"
    (run / "checkpoints" / "5").mkdir(parents=True)
    (run / "config.yaml").write_text(parse_config("jaxsft.train", "", [ALL])[1])
    assert refusal(run / "checkpoints" / "5").endswith(f"it belongs to a run: give {run}")
