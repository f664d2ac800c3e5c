"""What people bring as an adapter: read rightly under any names, or refused by name."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from support.lora_twins import ALPHA, RANK, make_peft
from support.twins import make_twin

from jaxsft.common.listed import MAX_LINE
from jaxsft.gemma import lora
from jaxsft.weights.adapter_config import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from jaxsft.weights.load import check_tensors, open_weights
from jaxsft.weights.merged import MergedWeights
from jaxsft.weights.names import file_tensors
from jaxsft.weights.peft import open_adapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

Tensors = dict[str, np.ndarray]
HF_MODEL, CONFIG = make_twin("gemma1")
PEFT = "base_model.model.model.layers"
TARGETS = ("q_proj", "up_proj")
PATHS = [
    f"model.layers.{layer}.{name}"
    for layer in range(3)
    for name in ("self_attn.q_proj", "mlp.up_proj")
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Tensors]:
    """(config, tensors) of a small adapter that PEFT made."""
    directory = tmp_path_factory.mktemp("adapter")
    make_peft(HF_MODEL, random_b=True, target_modules=list(TARGETS)).save_pretrained(directory)
    config = json.loads((directory / CONFIG_NAME).read_text())
    return config, load_file(directory / WEIGHTS_NAME)


def write(directory: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, directory / WEIGHTS_NAME)
    return directory


def refusal(directory: Path) -> str:
    with pytest.raises(ValueError) as caught:
        open_adapter(directory, read_adapter_config(directory), CONFIG)
    line = str(caught.value)
    assert "\n" not in line and len(line) <= MAX_LINE and line.startswith(str(directory))
    return line


@pytest.mark.parametrize(
    "written",
    [
        {"target_modules": ["self_attn.q_proj", "mlp.up_proj"]},
        {"target_modules": PATHS},
        {"target_modules": ["q_proj", "up_proj", "query_key_value", "w1"]},
        {"target_modules": r"(?:.*?(?:language|text).*?(?:q_proj|up_proj).*?)|(a+)+$"},
        {"target_modules": "all-linear", "exclude_modules": r".*(k|v|o|gate|down)_proj"},
        {"target_modules": list(lora.TARGETS), "exclude_modules": ["k_proj", "v_proj"]},
        {"target_modules": None},
        {"layers_to_transform": [2, 0, 1], "layers_pattern": "layers"},
        {"rank_pattern": {"q_proj": RANK}, "alpha_pattern": {"(a+)+$": ALPHA}},
        {"rank_pattern": {"lm_head": 64}},
        {"r": 9, "rank_pattern": {"self_attn.q_proj": RANK, "(a+)+$": RANK}},
        {"bias": "lora_only", "fan_in_fan_out": True, "init_lora_weights": "eva"},
    ],
    ids=lambda written: "-".join(written),
)
def test_ways_to_write_the_same_adapter(
    written: dict[str, Any], made: tuple[dict[str, Any], Tensors], tmp_path: Path
) -> None:
    config, tensors = made
    found = read_adapter_config(write(tmp_path, config | written, tensors))
    assert (found.rank, found.alpha, found.targets) == (RANK, ALPHA, TARGETS)
    assert open_adapter(tmp_path, found, CONFIG)[0].shapes.keys() == tensors.keys()


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace("model.model.layers", "model.model.language_model.layers"),
        lambda name: name.replace("model.model.layers", "model.language_model.model.layers"),
        lambda name: f"_orig_mod.module.{name}",
        lambda name: re.sub(r"(layers\.\d)", r"\1._fsdp_wrapped_module._checkpoint_x", name),
        lambda name: name.replace("_proj.", "_proj._orig_mod."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.replace("base_model.model", "actor.policy"),
    ],
)
def test_prefixes_that_wrappers_leave(
    renamed: Callable[[str], str], made: tuple[dict[str, Any], Tensors], tmp_path: Path
) -> None:
    config, tensors = made
    others = {renamed(name): array for name, array in tensors.items()}
    assert not others.keys() & tensors.keys()
    found = read_adapter_config(write(tmp_path, config, others))
    source, _ = open_adapter(tmp_path, found, CONFIG)
    for name, array in tensors.items():
        np.testing.assert_array_equal(next(source.blocks(name))[1], array)


A = f"{PEFT}.0.self_attn.q_proj.lora_A.weight"
HEAD = "base_model.model.lm_head"
VISION = "base_model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("settings", "tensors", "expected"),
    [
        ({"lora_parameters": {"rank": 8, "scale": 20.0}}, {}, "mlx_lm.fuse"),
        ({"peft_type": "PREFIX_TUNING"}, {}, "cannot be merged: train a LoRA"),
        ({"peft_type": "LOHA"}, {}, "peft_type='LOHA' (only LORA); merge it"),
        ({"init_lora_weights": "OLoRA"}, {}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, {}, "it changed the base's weights too"),
        ({"use_dora": True, "lora_bias": True}, {}, "lora_bias=True; use_dora=True; merge"),
        ({"modules_to_save": ["lm_head"]}, {}, "modules_to_save=['lm_head']"),
        ({"alpha_pattern": {"mlp.up_proj": 1}}, {}, "alpha_pattern: layers have alpha 1, 7"),
        ({"alpha_pattern": {r".*q_(a+)+$": 1}}, {}, "alpha_pattern={"),
        ({"alpha_pattern": {"^q_proj": 1}}, {}, "alpha_pattern={"),  # PEFT matches the whole name
        ({"alpha_pattern": {"q_pro.": 1}}, {}, "alpha_pattern={"),
        ({"alpha_pattern": {"model.layers.0.mlp.up_proj": 1}}, {}, "alpha_pattern={"),
        ({"lora_alpha": None}, {}, "lora_alpha=None"),
        ({"r": True}, {}, "r=True"),
        ({"rank_pattern": "deep"}, {}, "rank_pattern='deep'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, {}, "layer_replication=[[0, 2], [1, 3]]"),
        ({"trainable_token_indices": 0}, {}, "trainable_token_indices=0"),
        ({"an_invention": "x" * 2000}, {}, "an_invention='xxx"),
        ({}, {f"{PEFT}.0.mlp.up_proj.lora_magnitude_vector": 48}, "DoRA; merge"),
        ({}, {f"{PEFT}.0.mlp.up_proj.lora_B.bias": 48}, "LoRA with a bias (lora_bias)"),
        ({}, {f"{HEAD}.lora_A.weight": 3}, "an adapter of the embedding or the head"),
        ({}, {f"{HEAD}.modules_to_save.default.weight": 3}, "whole embeddings (modules_to_save"),
        ({}, {"model.layers.0.self_attn.q_proj.lora_a": 3}, "an MLX adapter"),
        ({}, {VISION: 3}, "a vision tower"),
        ({}, {A.replace(".weight", ".second.weight"): 3}, "the adapters default, second; save the"),
        ({}, {f"_orig_mod.{A}": 3}, "the same tensor is there twice"),
        ({}, {f"{PEFT}.0.mlp.up_proj.hada_w1_a": 3}, "no tensors of a plain LoRA adapter; merge"),
        ({}, {"\x1b[2J" + "y" * 3000: 3}, "unexpected \\u{1b}[2J"),
    ],
)
def test_what_is_no_plain_lora(
    settings: dict[str, Any],
    tensors: dict[str, int],
    expected: str,
    made: tuple[dict[str, Any], Tensors],
    tmp_path: Path,
) -> None:
    config, whole = made
    more = {name: np.zeros(size, np.float32) for name, size in tensors.items()}
    assert expected in refusal(write(tmp_path, config | settings, whole | more))


def test_directories_without_an_adapter_s_weights(
    made: tuple[dict[str, Any], Tensors], tmp_path: Path
) -> None:
    # Adapters of other kinds have neither r nor lora_alpha.
    (tmp_path / CONFIG_NAME).write_text('{"peft_type": "IA3", "target_modules": ["k_proj"]}')
    assert "peft_type='IA3' (only LORA); merge it" in refusal(tmp_path)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(made[0]))
    for name, advice in {
        "adapter_model.bin": "is a pickle, which could run any code",
        "adapters.safetensors": "is an MLX adapter: mlx_lm.fuse",
        "__0_0.distcp": "is a checkpoint in shards (FSDP)",
        "zero_to_fp32.py": "is DeepSpeed's",
    }.items():
        (tmp_path / name).touch()
        assert f"; {name} {advice}" in refusal(tmp_path)
        (tmp_path / name).unlink()
    ranks = {A: np.zeros((2, 32), np.float32), A.replace(".0.", ".1."): np.zeros((4, 32))}
    ranks = {name: array.astype(np.float32) for name, array in ranks.items()}
    write(tmp_path, made[0] | {"rank_pattern": {"q_proj": 2}}, ranks)
    assert "rank_pattern: layers have ranks 2, 4; merge" in refusal(tmp_path)
    save_file({}, tmp_path / WEIGHTS_NAME)
    assert "holds no tensors of a LoRA adapter" in refusal(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"alpha_pattern": dict.fromkeys(lora.TARGETS, 5)},
        {"r": 8, "use_rslora": True, "rank_pattern": {"self_attn.q_proj": 2, "q_proj": 4}},
    ],
)
def test_merged_weights_are_those_of_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    """rsLoRA above all: alpha / r in the place of alpha / sqrt(r) differs by 1.7 or 1.4."""
    targets = ["q_proj"] if "r" in settings else list(lora.TARGETS)
    model = make_peft(HF_MODEL, random_b=True, **{"target_modules": targets} | settings)
    model.save_pretrained(tmp_path / "adapter")
    HF_MODEL.save_pretrained(tmp_path / "base")
    found = read_adapter_config(tmp_path / "adapter")
    weights = MergedWeights(*open_weights(tmp_path / "base"), tmp_path / "adapter", found)
    theirs = model.merge_and_unload().state_dict()
    for name, array in weights.tensors("float32"):
        np.testing.assert_allclose(array, theirs[name].numpy(), atol=1e-6, err_msg=name)


def test_a_base_with_other_prefixes(tmp_path: Path) -> None:
    HF_MODEL.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    expected = dict(file_tensors(CONFIG, is_gguf=False).values())
    renamed: list[Callable[[str], str]] = [
        lambda name: name.removeprefix("model."),
        lambda name: name.replace("model.", "model.language_model.", 1),
        lambda name: f"language_model.{name}",
        lambda name: f"_orig_mod.module._forward_module.{name}",
        lambda name: re.sub(r"(layers\.\d)", r"\1._checkpoint_wrapped_module", name),
        lambda name: re.sub("(_proj)", r"\1.base_layer", name),
        lambda name: f"policy.{name}",
    ]
    for rename in renamed:
        others = {rename(name): array for name, array in (tensors | head).items()}
        save_file(others, path, {"format": "pt"})
        source, _ = open_weights(tmp_path)
        check_tensors(source, expected, is_gguf=False)
        for name, array in tensors.items():
            rows = np.concatenate([rows for _, rows in source.blocks(name)])
            np.testing.assert_array_equal(rows.reshape(array.shape), array)
    vision = {f"vision_tower.{name}": array for name, array in tensors.items() if "proj" in name}
    for extra, advice in (
        (vision, "21 unexpected: vision_tower.model.layers.0."),
        ({f"model.{A.partition('model.')[2]}": head["lm_head.weight"]}, "save it with merge_and"),
        ({f"_orig_mod.{name}": array for name, array in tensors.items()}, "there twice under"),
    ):
        save_file(tensors | extra, path, {"format": "pt"})
        with pytest.raises(ValueError, match=advice) as caught:
            check_tensors(open_weights(tmp_path)[0], expected, is_gguf=False)
        assert len(str(caught.value)) <= MAX_LINE


NAMES = st.one_of(st.text(max_size=30), st.sampled_from(PATHS), st.just("layers.0." + "w" * 900))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), is_adapter=st.booleans())
def test_no_line_about_tensors_is_long(
    data: st.DataObject,
    is_adapter: bool,
    made: tuple[dict[str, Any], Tensors],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Tensors dropped, renamed, reshaped, retyped and added: one line, or all is as it was."""
    config, whole = made
    if not is_adapter:
        whole = {name: np.zeros(shape, np.float16) for name, shape in SHAPES.items()}
    tensors = dict(whole)
    names = list(whole)
    for action in data.draw(st.lists(st.sampled_from(["drop", "name", "shape", "type", "add"]))):
        some = data.draw(st.slices(len(names)))
        for name in names[some]:
            array = tensors.pop(name, None)
            if array is None or action == "drop":
                continue
            if action == "name":
                name = data.draw(NAMES) + name
            if action == "shape":
                array = np.zeros((*array.shape[::-1], 1), array.dtype)
            if action == "type":
                array = np.zeros(array.shape, data.draw(st.sampled_from(["i8", "u1", "f8"])))
            tensors[name] = array
        if action == "add":
            tensors |= {data.draw(NAMES): np.zeros(2, np.float32)}
    directory = tmp_path_factory.mktemp("mutated")
    try:
        if is_adapter:
            write(directory, config, tensors)
            open_adapter(directory, read_adapter_config(directory), CONFIG)
        else:
            HF_MODEL.config.save_pretrained(directory)
            save_file(tensors, directory / "model.safetensors")
            check_tensors(open_weights(directory)[0], SHAPES, is_gguf=False)
    except ValueError as error:
        line = str(error)
        assert len(line) <= MAX_LINE and line.isprintable() and str(directory) in line
    else:
        assert len(tensors) == len(whole)


SHAPES = dict(file_tensors(CONFIG, is_gguf=False).values())
