"""A Hugging Face model directory, streamed: the base's tensors with an adapter's update added.

A tensor passes through in blocks of rows, so that memory stays at some of them (a tensor at most,
where a whole one is asked for), whatever the model's size.
"""

import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from jaxsft.common.files import write_json
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma.architecture import GLOBAL, GemmaConfig
from jaxsft.weights.load import TensorSource, WeightsInfo
from jaxsft.weights.merged import DTYPES, MergedWeights

_STORED = {"float32": "F32", "bfloat16": "BF16"}  # safetensors' names
_MODEL_TYPES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
WEIGHTS = "model.safetensors"
_HEADER_ALIGNMENT = 8


def write_weights(
    directory: Path, weights: MergedWeights, *, dtype: str, max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` (a larger tensor gets one
    of its own) and their index, as `save_pretrained` names them.

    Format: https://huggingface.co/docs/safetensors. Its own library wants a whole file in memory.
    """
    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    sizes = {name: math.prod(shape) * item_bytes for name, shape in weights.shapes.items()}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {name: f for f, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / f"{WEIGHTS}.index.json", index)
    for file, names in zip(files, shards, strict=True):
        _write_shard(directory / file, weights, names, dtype)


def _write_shard(path: Path, weights: MergedWeights, names: list[str], dtype: str) -> None:
    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name in names:
        start, end = end, end + math.prod(weights.shapes[name]) * item_bytes
        shape = list(weights.shapes[name])
        header[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for _, block in weights.blocks(name):
                file.write(block.astype(DTYPES[dtype]).tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_configs(directory: Path, config: GemmaConfig, tokenizer: Tokenizer, dtype: str) -> None:
    """Writes `config.json` and `generation_config.json`; generation ends at either stop token."""
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    values = to_hf_config(config) | ids | {"eos_token_id": tokenizer.eos_id, "dtype": dtype}
    write_json(directory / "config.json", values)
    stops = {"eos_token_id": list(tokenizer.stop_ids)}
    write_json(directory / "generation_config.json", ids | stops)


@contextmanager
def base_for_peft(
    source: TensorSource, info: WeightsInfo, tokenizer: Tokenizer, scratch: Path
) -> Iterator[Path]:
    """The base as transformers loads it: itself, or, of another format, written anew for now."""
    if info.format == "safetensors":
        yield source.path
        return
    with TemporaryDirectory(dir=scratch, prefix=".base-") as name:
        path = Path(name)
        write_configs(path, info.config, tokenizer, "float32")
        base = MergedWeights(source, info, None)
        write_weights(path, base, dtype="float32", max_shard_bytes=2**30)
        yield path


def to_hf_config(config: GemmaConfig) -> dict[str, Any]:
    """The `config.json` of a model: what `presets.from_hf_config` reads, the name apart.

    Rotary bases have the names of transformers 4, which 5 understands too.
    """
    model_type = "gemma3_text" if config.qk_norm else "gemma2" if config.post_norms else "gemma"
    values: dict[str, Any] = {
        "architectures": [_MODEL_TYPES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta_global,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    if model_type == "gemma":
        return values | {"hidden_act": "gelu_pytorch_tanh"}
    scalar = config.query_scale**-2
    kinds = ("full_attention" if t == GLOBAL else "sliding_attention" for t in config.layer_types)
    values |= {
        # A whole number in every Gemma; its square root's inverse is not exact.
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        "sliding_window": config.sliding_window,
        "layer_types": list(kinds),
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
    }
    if model_type == "gemma3_text":
        values["rope_local_base_freq"] = config.rope_theta_local
    return values
