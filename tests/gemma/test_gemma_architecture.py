"""Presets against transformers' own models; config.json in both its forms; formulas by hand."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from jaxsft.gemma.architecture import GLOBAL, LOCAL, PRESETS, GemmaConfig
from jaxsft.gemma.lora import TARGETS
from jaxsft.weights.hf_config import from_hf_config

# As published, by hand from the model cards' config.json; keys that say nothing about the
# architecture are left out.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": 256,
        "hidden_act": "gelu",
        "hidden_activation": None,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "max_position_embeddings": 8192,
        "model_type": "gemma",
        "num_attention_heads": 8,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "vocab_size": 256000,
    },
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "max_position_embeddings": 8192,
        "model_type": "gemma2",
        "num_attention_heads": 8,
        "num_hidden_layers": 26,
        "num_key_value_heads": 4,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "vocab_size": 256000,
    },
    "gemma-3-270m": {
        "_sliding_window_pattern": 6,
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 640,
        "intermediate_size": 2048,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 18,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "use_bidirectional_attention": False,
        "vocab_size": 262144,
    },
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32768,
        "model_type": "gemma3_text",
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "vocab_size": 262144,
    },
}
CONFIG_CLASSES = {
    "gemma": transformers.GemmaConfig,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
}
NUM_PARAMS = {
    "gemma-2b": 2_506_172_416,
    "gemma-2-2b": 2_614_341_888,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
}


def unnamed(config: GemmaConfig) -> GemmaConfig:
    return dataclasses.replace(config, name="")


def hf_config(name: str) -> Any:
    settings = dict(PUBLISHED[name])
    return CONFIG_CLASSES[settings.pop("model_type")](**settings)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_published_config(name: str, tmp_path: Path) -> None:
    assert PRESETS[name].name == name
    assert unnamed(from_hf_config(PUBLISHED[name])) == unnamed(PRESETS[name])
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
    assert from_hf_config(path) == from_hf_config(PUBLISHED[name])


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_what_transformers_5_writes(name: str, tmp_path: Path) -> None:
    config = hf_config(name)
    assert config.rope_parameters  # the new form
    assert unnamed(from_hf_config(config.to_dict())) == unnamed(PRESETS[name])
    config.save_pretrained(tmp_path)
    assert unnamed(from_hf_config(tmp_path / "config.json")) == unnamed(PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_num_params(name: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(hf_config(name))
    parameters = {id(p): p.numel() for p in model.parameters()}  # the tied embedding once
    assert PRESETS[name].num_params == sum(parameters.values()) == NUM_PARAMS[name]
    linears = model.model.layers[0].self_attn, model.model.layers[0].mlp
    for target, (in_dim, out_dim) in PRESETS[name].linear_shapes.items():
        linear = next(getattr(m, target) for m in linears if hasattr(m, target))
        assert (linear.in_features, linear.out_features) == (in_dim, out_dim)


def test_layer_patterns() -> None:
    assert PRESETS["gemma-2b"].layer_pattern == (GLOBAL,)
    assert PRESETS["gemma-2-2b"].layer_pattern == (LOCAL, GLOBAL)
    global_layers = {
        name: [i for i, kind in enumerate(PRESETS[name].layer_types) if kind == GLOBAL]
        for name in ("gemma-3-270m", "gemma-3-1b")
    }
    assert global_layers == {"gemma-3-270m": [5, 11, 17], "gemma-3-1b": [5, 11, 17, 23]}
    for name in global_layers:
        assert PRESETS[name].layer_pattern == (LOCAL,) * 5 + (GLOBAL,)
    irregular = dataclasses.replace(PRESETS["gemma-2b"], layer_types=(LOCAL, GLOBAL, GLOBAL))
    assert irregular.layer_pattern == (LOCAL, GLOBAL, GLOBAL)


# ---- formulas ----


def test_lora_params() -> None:
    gemma2 = PRESETS["gemma-2-2b"]
    assert gemma2.lora_params(64, TARGETS) == pytest.approx(83.1e6, rel=1e-3)
    # q: 64 · (2304 + 2048) in each of 26 layers.
    assert gemma2.lora_params(64, ("q_proj",)) == 26 * 64 * (2304 + 2048)


def test_lora_step_flops() -> None:
    gemma2 = PRESETS["gemma-2-2b"]

    def per_token(**changes: int) -> float:
        sizes = {"num_tokens": 65_536, "num_loss_tokens": 65_536, "row_length": 2048}
        return gemma2.lora_step_flops(**{**sizes, "lora_params": 0, **changes}) / 65_536

    assert per_token() == pytest.approx(11.1e9, rel=5e-3)
    lora_params = gemma2.lora_params(64, TARGETS)
    assert per_token(lora_params=lora_params) - per_token() == pytest.approx(6 * lora_params)
    head = 4 * 256_000 * 2304
    assert per_token() - per_token(num_loss_tokens=0) == pytest.approx(head)
    # At 16,384 a local layer looks at 4096 keys, a global one at 8192 on average.
    attention = per_token(row_length=16_384) - per_token()
    assert attention == pytest.approx(12 * 8 * 256 * 13 * (4096 + 8192 - 2 * 1024))


# ---- what is not supported, by name ----


def changed(name: str, **changes: Any) -> dict[str, Any]:
    return {**PUBLISHED[name], **changes}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed("gemma-2-2b", model_type="llama"), "model_type 'llama'"),
        (changed("gemma-3-1b", model_type="gemma3"), "model_type 'gemma3'"),
        (changed("gemma-3-1b", model_type=None), "model_type None"),
        (changed("gemma-2-2b", attention_bias=True), "attention_bias=True"),
        (changed("gemma-2-2b", tie_word_embeddings=False), "tie_word_embeddings=False"),
        (
            changed("gemma-3-270m", use_bidirectional_attention=True),
            "use_bidirectional_attention=True",
        ),
        (changed("gemma-2b", quantization_config={"bits": 4}), "quantization_config={'bits': 4}"),
        (
            changed("gemma-3-1b", rope_scaling={"rope_type": "linear", "factor": 8.0}),
            "rope_scaling={'rope_type': 'linear'",
        ),
        (
            changed("gemma-2-2b", rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
            "rope_type='yarn'",
        ),
        (
            changed(
                "gemma-3-1b",
                rope_parameters={
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                },
            ),
            "rope_parameters[full_attention].rope_type='linear'",
        ),
        (changed("gemma-2-2b", hidden_activation="gelu"), "hidden_activation='gelu'"),
        (changed("gemma-2b", hidden_act="silu"), "hidden_activation='silu'"),
        (
            changed("gemma-2-2b", layer_types=["chunked_attention"] * 26),
            "layer_types entry 'chunked_attention'",
        ),
        (changed("gemma-2-2b", layer_types=["full_attention"] * 25), "25 entries for 26 layers"),
        (changed("gemma-2-2b", num_hidden_layers="many"), "lacks or garbles"),
    ],
)
def test_unsupported_settings_are_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        from_hf_config(raw)
    assert "\n" not in str(caught.value)


def test_all_unsupported_settings_are_named_at_once() -> None:
    raw = changed("gemma-2-2b", attention_bias=True, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"attention_bias=True.*tie_word_embeddings=False"):
        from_hf_config(raw)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "head_dim", "num_hidden_layers", "query_pre_attn_scalar"]
)
def test_missing_keys_are_named(key: str) -> None:
    raw = {k: v for k, v in PUBLISHED["gemma-2-2b"].items() if k != key}
    with pytest.raises(ValueError, match=key):
        from_hf_config(raw)


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe", b"[]", b"7"])
def test_unreadable_file_is_named(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        from_hf_config(path)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "none.json"))):
        from_hf_config(tmp_path / "none.json")


@pytest.mark.parametrize("name", PRESETS)
def test_left_out_keys_mean_what_transformers_reads(name: str) -> None:
    """A key that transformers would fill in is refused or filled in alike, never dropped."""
    for key in PUBLISHED[name]:
        raw = {k: v for k, v in PUBLISHED[name].items() if k != key}
        try:
            ours = from_hf_config(raw)
        except ValueError:
            continue
        model_type = raw.pop("model_type")
        theirs = from_hf_config(CONFIG_CLASSES[model_type](**raw).to_dict())
        assert unnamed(ours) == unnamed(theirs), key
