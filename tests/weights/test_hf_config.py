"""`config.json`, in both its forms: read, written, and what is not supported."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

from jaxsft.gemma.architecture import PRESETS, GemmaConfig
from jaxsft.weights.hf_config import from_hf_config, to_hf_config

# As published, by hand from the model cards' config.json; keys that say nothing about the
# architecture are left out.
PUBLISHED: dict[str, dict[str, Any]] = {
    "gemma-2b": {
        "attention_bias": False,
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
        "attention_bias": False,
        "attn_logit_softcapping": 50.0,
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
        "attention_bias": False,
        "attn_logit_softcapping": None,
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


def unnamed(config: GemmaConfig) -> GemmaConfig:
    return dataclasses.replace(config, name="")


def hf_config(name: str) -> Any:
    settings = dict(PUBLISHED[name])
    return CONFIG_CLASSES[settings.pop("model_type")](**settings)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_the_published_config(name: str) -> None:
    assert PRESETS[name].name == name
    assert unnamed(from_hf_config(PUBLISHED[name])) == unnamed(PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_what_transformers_5_writes(name: str, tmp_path: Path) -> None:
    config = hf_config(name)
    assert config.rope_parameters  # the new form
    config.save_pretrained(tmp_path)
    assert unnamed(from_hf_config(tmp_path / "config.json")) == unnamed(PRESETS[name])


@pytest.mark.parametrize("name", PRESETS)
def test_config_round_trip(name: str) -> None:
    written = to_hf_config(PRESETS[name])
    assert unnamed(from_hf_config(written)) == unnamed(PRESETS[name])
    assert json.loads(json.dumps(written)) == written


def changed(name: str, **changes: Any) -> dict[str, Any]:
    return {**PUBLISHED[name], **changes}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (changed("gemma-2-2b", model_type="llama"), "model_type 'llama'"),
        (changed("gemma-3-1b", model_type="gemma3"), "model_type 'gemma3'"),
        (
            changed("gemma-2-2b", attention_bias=True, tie_word_embeddings=False),
            "attention_bias=True (only False); tie_word_embeddings=False",
        ),
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
        (
            changed("gemma-2-2b", rope_scaling=["linear"]),
            "rope_scaling=['linear'] (only 'default')",
        ),
        (changed("gemma-2b", rope_scaling={"type": "dynamic", "factor": 1.0}), "'dynamic'"),
        (
            changed("gemma-2b", rope_scaling={"type": "default", "rope_theta": 5e5}),
            "rope_theta given as 10000.0 and as 500000.0",
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


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "default"},
        {"type": "default", "factor": 1.0},
        {"rope_type": "linear", "factor": 1.0},
        {},
    ],
)
def test_scaling_that_changes_nothing(scaling: dict[str, Any], name: str) -> None:
    raw = changed(name, rope_scaling=dict(scaling))  # transformers writes into it
    assert unnamed(from_hf_config(raw)) == unnamed(PRESETS[name])
    model_type = raw.pop("model_type")
    theirs = CONFIG_CLASSES[model_type](**raw).to_dict()
    assert unnamed(from_hf_config(theirs)) == unnamed(PRESETS[name])


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "head_dim", "num_hidden_layers", "query_pre_attn_scalar"]
)
def test_missing_keys_are_named(key: str) -> None:
    raw = {k: v for k, v in PUBLISHED["gemma-2-2b"].items() if k != key}
    with pytest.raises(ValueError, match=key):
        from_hf_config(raw)


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
