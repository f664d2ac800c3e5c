"""Tiny random twins of the four presets: transformers' models that ours must equal.

Their weights are scaled so that every mechanism matters: Gemma 2's attention scores pass its cap of
50 and its logits the cap of 30, all norm weights are random and non-zero, windows (8 tokens) are
shorter than any test sequence, and the query scale is not head_dim^-0.5.
"""

from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx

from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.model import Gemma
from jaxsft.weights.hf_config import from_hf_config
from jaxsft.weights.load import load_model

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


# llama.cpp's names of the Hugging Face ones; attention and MLP differ in nothing but the name.
_GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
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
    directory = tmp_path / "twin"
    hf_model.save_pretrained(directory)
    return load_model(directory, **{"dtype": "float32", "param_dtype": "float32", **kw})[0]


def our_logits(model: Gemma, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 [B, T, V] of rows without padding."""
    return np.asarray(_logits(*nnx.split(model), jnp.asarray(tokens_BT)))


@partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, state)
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return model.logits(model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT)))


def write_gguf(
    path: Path,
    name: str,
    hf_model: Any,
    matrix_type: str = "F32",
    *,
    drop: Collection[str] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """A GGUF as llama.cpp's converter writes it; returns its tensors under Hugging Face names.

    Norms are stored as 1 + weight in float32, matrices as `matrix_type`; there is no vocabulary.
    Settings and tensors in `drop` are left out; `extra` has tensors to add, or to put in the place
    of others.
    """
    raw = hf_model.config.to_dict()
    architecture = {"gemma1": "gemma", "gemma2": "gemma2"}.get(name, "gemma3")
    writer = gguf.GGUFWriter(path, architecture)
    values = {
        "name": f"{name} twin",
        "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"],
        "feed_forward_length": raw["intermediate_size"],
        "head_count": raw["num_attention_heads"],
        "head_count_kv": raw["num_key_value_heads"],
        "layer_norm_rms_eps": raw["rms_norm_eps"],
        "key_length": raw["head_dim"],
        "value_length": raw["head_dim"],
    }
    if architecture == "gemma2":
        values |= {key: raw[key] for key in raw if key.endswith("_logit_softcapping")}
    if architecture == "gemma3":
        values["rope_freq_base"] = raw["rope_parameters"]["full_attention"]["rope_theta"]
    if architecture != "gemma":
        values["sliding_window"] = raw["sliding_window"]
    for key in values.keys() - set(drop):
        getattr(writer, f"add_{key}")(values[key])
    kind = gguf.GGMLQuantizationType[matrix_type]
    extra, stored = dict(extra or {}), {}
    for hf_name, tensor in hf_model.model.state_dict().items():
        array, short = tensor.numpy(), hf_name.removesuffix(".weight")
        *layer, rest = short.split(".", 2)[1:] if short.startswith("layers.") else (short,)
        gguf_name = "".join(f"blk.{number}." for number in layer) + _GGUF_NAMES[rest]
        if architecture == "gemma":
            gguf_name = gguf_name.replace("post_attention_norm", "ffn_norm")
        if gguf_name in drop or gguf_name in extra:
            continue
        if array.ndim == 1:
            stored[f"model.{hf_name}"] = (array + np.float32(1)) - np.float32(1)
            writer.add_tensor(f"{gguf_name}.weight", array + np.float32(1))
        else:
            quantized = gguf.quantize(array, kind)
            stored[f"model.{hf_name}"] = gguf.dequantize(quantized, kind)
            raw_dtype = None if matrix_type in ("F32", "F16") else kind
            writer.add_tensor(f"{gguf_name}.weight", quantized, raw_dtype=raw_dtype)
    for gguf_name, array in extra.items():
        writer.add_tensor(f"{gguf_name}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored
