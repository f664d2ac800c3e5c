"""Tiny random twins of the four presets: transformers' models that ours must equal.

Their weights are scaled so that every mechanism matters: Gemma 2's attention scores pass its cap of
50 and its logits the cap of 30, all norm weights are random and non-zero, windows (8 tokens) are
shorter than any test sequence, and the query scale is not head_dim^-0.5.
"""

from pathlib import Path
from typing import Any

import torch
import transformers

from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.model import Gemma
from jaxsft.weights.hf_config import from_hf_config

TWINS = ("gemma1", "gemma2", "gemma3-270m", "gemma3-1b")
WINDOW = 8

_SHARED = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
_GEMMA3 = {
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 24,
}
_SETTINGS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gemma1": (
        transformers.GemmaConfig,
        transformers.GemmaForCausalLM,
        {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 1},
    ),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 12,
        },
    ),
    # Two repetitions of five local layers and a global one.
    "gemma3-270m": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {**_GEMMA3, "num_hidden_layers": 12},
    ),
    # One repetition and a tail of two local layers, as the 1B ends in two.
    "gemma3-1b": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {**_GEMMA3, "num_hidden_layers": 8},
    ),
}

# (mean, standard deviation) by the end of the parameter's name; norms multiply by 1 + weight.
# Larger layer outputs only amplify float32 rounding: the libraries then differ by over 1e-4.
_SCALES = {
    "embed_tokens.weight": (0.0, 0.5),
    "q_proj.weight": (0.0, 0.5),
    "k_proj.weight": (0.0, 0.5),
    "v_proj.weight": (0.0, 0.1),
    "o_proj.weight": (0.0, 0.1),
    "gate_proj.weight": (0.0, 0.15),
    "up_proj.weight": (0.0, 0.15),
    "down_proj.weight": (0.0, 0.2),
    "post_attention_layernorm.weight": (-0.6, 0.2),
    "post_feedforward_layernorm.weight": (-0.3, 0.3),
    "model.norm.weight": (1.0, 0.4),
    "norm.weight": (0.2, 0.3),
}


def make_twin(name: str, *, seed: int = 0, **overrides: Any) -> tuple[Any, GemmaConfig]:
    """(transformers model, float32, eval mode, eager attention; our config of it).

    `overrides` are fields of the Hugging Face config, e.g. num_hidden_layers=8.
    """
    config_class, model_class, settings = _SETTINGS[name]
    config = config_class(**{**_SHARED, **settings, **overrides})
    # sdpa leaves Gemma 2's attention soft cap out.
    config._attn_implementation = "eager"
    model = model_class(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            ends = (end for end in _SCALES if parameter_name.endswith(end))
            mean, std = _SCALES[next(ends)]
            parameter.normal_(mean, std, generator=generator)
    return model, from_hf_config(config.to_dict())


def to_jax(hf_model: Any, tmp_path: Path, **kw: Any) -> Gemma:
    """Our model with the same weights, by way of save_pretrained and load_model.

    `kw` goes to load_model; dtype and param_dtype default to float32.
    """
    from jaxsft.weights.load import load_model

    directory = tmp_path / "twin"
    hf_model.save_pretrained(directory)
    return load_model(directory, **{"dtype": "float32", "param_dtype": "float32", **kw})[0]
