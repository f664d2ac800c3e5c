"""PEFT adapter directories, both ways, against the peft package itself."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.lora_twins import ALPHA, RANK, clone, inject_random, make_peft, twin
from support.twins import TWINS, WINDOW, our_logits

from jaxsft.gemma import lora
from jaxsft.gemma.lora import TARGETS
from jaxsft.gemma.model import Gemma
from jaxsft.weights.adapter_config import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    read_adapter_config,
)
from jaxsft.weights.peft import load_adapter, save_adapter

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    # peft 0.21 reads it of every transformers model.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
]

LOGIT_BOUND = 1e-4
TOKENS_BT = np.random.default_rng(0).integers(4, 256, (2, 3 * WINDOW))
DIGEST = "0123456789abcdef" * 4
# Targets and rsLoRA cover one another; "gemma3-1b" has layers outside the stack.
CASES = [
    ("gemma1", TARGETS, False),
    ("gemma2", TARGETS, True),
    ("gemma3-270m", ("q_proj", "v_proj"), False),
    ("gemma3-1b", TARGETS, False),
    ("gemma3-1b", ("o_proj", "down_proj"), True),
]
assert {name for name, _, _ in CASES} == set(TWINS)


def their_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(TOKENS_BT)).logits.numpy()


def injected(name: str, targets: tuple[str, ...], use_rslora: bool) -> tuple[Gemma, AdapterConfig]:
    """A copy of our twin with a random adapter, and its settings."""
    model = clone(twin(name)[1])
    config = inject_random(model, targets, use_rslora)
    noted = {"base_model_name": "google/twin", "base_digest": DIGEST, "base_revision": "v1"}
    return model, dataclasses.replace(config, dropout=0.05, **noted)


def peft_twin(name: str, **settings: Any) -> peft.PeftModel:
    """PEFT's own adapter on a copy of the twin, with random B."""
    return make_peft(twin(name)[0], random_b=True, **settings).eval()


@pytest.mark.parametrize(("name", "targets", "use_rslora"), CASES)
def test_ours_loads_in_peft(
    name: str, targets: tuple[str, ...], use_rslora: bool, tmp_path: Path
) -> None:
    model, config = injected(name, targets, use_rslora)
    save_adapter(tmp_path, model, config)

    reference = peft.PeftModel.from_pretrained(copy.deepcopy(twin(name)[0]), tmp_path).eval()

    ours = our_logits(model, TOKENS_BT)
    assert np.abs(ours - their_logits(reference)).max() <= LOGIT_BOUND
    assert np.abs(ours - their_logits(twin(name)[0])).max() > 1000 * LOGIT_BOUND
    found = reference.peft_config["default"]
    assert (found.r, found.lora_alpha, found.lora_dropout) == (RANK, ALPHA, 0.05)
    assert (found.use_rslora, found.target_modules) == (use_rslora, set(targets))
    assert (found.task_type, found.base_model_name_or_path) == ("CAUSAL_LM", "google/twin")
    assert found.revision == "v1"
    loaded = clone(twin(name)[1])
    assert load_adapter(tmp_path, loaded) == config
    np.testing.assert_array_equal(our_logits(loaded, TOKENS_BT), ours)


@pytest.mark.parametrize(("name", "targets", "use_rslora"), CASES)
def test_pefts_loads_here(
    name: str, targets: tuple[str, ...], use_rslora: bool, tmp_path: Path
) -> None:
    reference = peft_twin(name, target_modules=list(targets), use_rslora=use_rslora)
    reference.save_pretrained(tmp_path)
    model = clone(twin(name)[1])

    config = load_adapter(tmp_path, model)

    assert (config.rank, config.alpha, config.targets) == (RANK, ALPHA, targets)
    assert (config.use_rslora, config.dropout) == (use_rslora, 0.0)
    assert np.abs(our_logits(model, TOKENS_BT) - their_logits(reference)).max() <= LOGIT_BOUND
    # And out again: PEFT's own tensors, bit for bit.
    save_adapter(tmp_path / "again", model, config)
    theirs, ours = (load_file(d / WEIGHTS_NAME) for d in (tmp_path, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == np.float32 and ours[key].tobytes() == array.tobytes()


def test_all_linear_made_by_peft(tmp_path: Path) -> None:
    peft_twin("gemma1", target_modules="all-linear").save_pretrained(tmp_path)
    path = tmp_path / CONFIG_NAME
    config = json.loads(path.read_text())
    for targets in (config["target_modules"], "all-linear"):
        path.write_text(json.dumps(config | {"target_modules": targets}))
        assert load_adapter(tmp_path, clone(twin("gemma1")[1])).targets == TARGETS


def test_the_same_adapter_has_the_same_bytes(tmp_path: Path) -> None:
    (model, config), contents = injected("gemma1", ("q_proj",), False), set()
    for _ in range(10):  # the library puts two entries of metadata in either order
        save_adapter(tmp_path, model, config)
        contents.add((tmp_path / WEIGHTS_NAME).read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / WEIGHTS_NAME, framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "base_digest": DIGEST}


@pytest.mark.parametrize(
    ("metadata", "revision"), [({"base_digest": "\x1b[31m" * 16}, 3), (None, None), ({}, "")]
)
def test_a_base_that_is_noted_badly_is_not_noted(
    metadata: Any, revision: Any, adapter: tuple[dict, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = adapter
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config | {"revision": revision}))
    save_file(tensors, tmp_path / WEIGHTS_NAME, metadata)
    found = read_adapter_config(tmp_path)
    assert (found.base_digest, found.base_revision) == (None, None)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_adapter_config(tmp_path)


def test_targets_given_as_a_pattern(tmp_path: Path) -> None:
    """Unsloth's adapters have one, which PEFT matches with the modules' names."""
    reference = peft_twin("gemma1", target_modules=r".*\.(self_attn\.q|mlp\.up)_proj")
    reference.save_pretrained(tmp_path)
    model = clone(twin("gemma1")[1])
    assert load_adapter(tmp_path, model).targets == ("q_proj", "up_proj")
    np.testing.assert_allclose(
        our_logits(model, TOKENS_BT), their_logits(reference), atol=LOGIT_BOUND
    )
    # In some layers alone it is more than plain LoRA here.
    peft_twin("gemma1", target_modules=r".*\.1\..*\.q_proj").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is on layers 1 only of the model's 3"):
        load_adapter(tmp_path, clone(twin("gemma1")[1]))


def test_half_precision_adapter(tmp_path: Path) -> None:
    reference = peft_twin("gemma2", target_modules=["k_proj"])
    reference.to(torch.bfloat16).save_pretrained(tmp_path)
    model = clone(twin("gemma2")[1])
    config = load_adapter(tmp_path, model)
    theirs = load_file(tmp_path / WEIGHTS_NAME)
    save_adapter(tmp_path / "again", model, config)
    for key, array in load_file(tmp_path / "again" / WEIGHTS_NAME).items():
        np.testing.assert_array_equal(array, theirs[key].astype(np.float32))


def test_files_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = injected("gemma1", ("q_proj",), False)
    save_adapter(tmp_path, model, config)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert before.keys() == {CONFIG_NAME, WEIGHTS_NAME}

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxsft.weights.peft.save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tmp_path, model, config)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict[str, np.ndarray]]:
    """(config, tensors) of a small adapter that PEFT made."""
    directory = tmp_path_factory.mktemp("adapter")
    peft_twin("gemma1", target_modules=["q_proj", "up_proj"]).save_pretrained(directory)
    config = json.loads((directory / CONFIG_NAME).read_text())
    return config, load_file(directory / WEIGHTS_NAME)


def refusal(directory: Path, config: dict, tensors: dict[str, np.ndarray]) -> str:
    """The message that loading ends with; the model stays as it was."""
    (directory / CONFIG_NAME).write_text(json.dumps(config))
    save_file(tensors, directory / WEIGHTS_NAME)
    model = clone(twin("gemma1")[1])
    with pytest.raises(ValueError) as info:
        load_adapter(directory, model)
    assert "\n" not in str(info.value) and str(info.value).startswith(str(directory))
    assert not nnx.to_flat_state(lora.split(model)[1])
    return str(info.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "some"}, "bias='some'"),
        ({"layers_to_transform": 0}, "layers_to_transform=0 with tensors of layers 0-2"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights='pissa_niter_16'"),
        ({"an_invention": {"a": 1}}, "an_invention={'a': 1}"),
        ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is not a linear layer"),
        ({"target_modules": []}, "target_modules lacks q_proj, up_proj, which has tensors"),
        ({"target_modules": ["q_proj"]}, "target_modules lacks up_proj, which has tensors"),
        ({"target_modules": ["q_proj", "up_proj", "v_proj"]}, "names v_proj, without tensors"),
        ({"target_modules": 3}, "target_modules=3"),
        ({"r": 0}, "r=0"),
        ({"r": 2.5}, "r=2.5"),
        ({"r": "three"}, "not a readable PEFT config"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
    ],
)
def test_unsupported_settings_are_refused_by_name(
    settings: dict, expected: str, adapter: tuple[dict, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = adapter
    assert expected in refusal(tmp_path, config | settings, tensors)


def test_bad_tensors_are_all_named(
    adapter: tuple[dict, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    config, tensors = adapter
    key = "base_model.model.model.layers.{}.{}.weight".format
    changed = dict(tensors)
    del changed[key(0, "self_attn.q_proj.lora_A")], changed[key(2, "mlp.up_proj.lora_B")]
    changed[key(3, "mlp.up_proj.lora_B")] = np.zeros((48, 3), np.float32)
    changed[key(1, "mlp.up_proj.lora_B")] = np.zeros((48, 4), np.float32)
    message = refusal(tmp_path, config, changed)
    names = f"{key(0, 'self_attn.q_proj.lora_A')}, {key(2, 'mlp.up_proj.lora_B')}"
    assert (
        f"2 missing: {names} (all base_model.model.model.layers.*.weight, layers 0, 2)" in message
    )
    assert f"unexpected {key(3, 'mlp.up_proj.lora_B')}" in message
    assert f"misshapen {key(1, 'mlp.up_proj.lora_B')} (is [48, 4], must be [48, 3])" in message

    changed = dict(tensors)
    changed[key(1, "mlp.up_proj.lora_A")] = np.full((3, 32), np.nan, np.float32)
    assert f"tensor {key(1, 'mlp.up_proj.lora_A')} holds NaN" in refusal(tmp_path, config, changed)


def test_missing_and_damaged_files(
    adapter: tuple[dict, dict[str, np.ndarray]], tmp_path: Path
) -> None:
    model = clone(twin("gemma1")[1])
    with pytest.raises(ValueError, match=r"adapter_config\.json: not a readable PEFT config"):
        load_adapter(tmp_path, model)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(adapter[0]))
    with pytest.raises(ValueError, match=r"has neither adapter_model\.safetensors nor"):
        load_adapter(tmp_path, model)
    save_file(adapter[1], tmp_path / WEIGHTS_NAME)
    whole = (tmp_path / WEIGHTS_NAME).read_bytes()
    (tmp_path / WEIGHTS_NAME).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_adapter(tmp_path, model)
    for text in ("", "[]", "{}", '{"r": 3}', "null"):
        (tmp_path / CONFIG_NAME).write_text(text)
        with pytest.raises(ValueError, match=r"adapter_config\.json: not a readable PEFT config"):
            load_adapter(tmp_path, model)
