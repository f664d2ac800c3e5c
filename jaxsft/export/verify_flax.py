"""Flax exports: can Tunix compute the model? Are the files beside it what they were made from?"""

import hashlib
from collections.abc import Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp

from jaxsft.common.files import read_json
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.formats.safetensors import SafetensorsDirectory
from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig
from jaxsft.gemma.lora import lora_scale
from jaxsft.weights.names import LINEAR_TENSORS
from jaxsft.weights.peft import WEIGHTS_NAME, read_adapter_config

TUNIX_LORA = "tunix-lora"
_TUNIX_TARGETS = {
    "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "q_einsum": ("q_proj",),
    "kv_einsum": ("k_proj", "v_proj"),
    "attn_vec_einsum": ("o_proj",),
}


def tunix_lacks(config: GemmaConfig) -> str | None:
    """What Tunix's Gemma has written into its code and this one has otherwise, if anything."""
    fixed: dict[str, Any] = {"query_scale": config.head_dim**-0.5, "rms_norm_eps": 1e-6}
    if config.qk_norm:
        pattern = cycle([LOCAL] * 5 + [GLOBAL])
        fixed |= {"layer_types": tuple(islice(pattern, config.num_layers))}
        fixed |= {"attn_softcap": None, "final_softcap": None}
    else:
        fixed |= {"rope_theta_local": 10_000.0, "rope_theta_global": 10_000.0}
    other = {name: value for name, value in fixed.items() if getattr(config, name) != value}
    return ", ".join(f"{name} other than {value}" for name, value in other.items()) or None


def flax_problem(directory: Path, tokenizer: Tokenizer, adapter: Path | None) -> str | None:
    """What is wrong with the files beside the model of a Flax export, if anything."""
    written = (directory / "tokenizer.model").read_bytes()
    if hashlib.sha256(written).digest() != hashlib.sha256(tokenizer.model_bytes).digest():
        return "tokenizer.model is not what was written"
    if adapter is None:
        return None
    settings = read_json(directory / f"{TUNIX_LORA}.json")
    return _tunix_problem(directory / TUNIX_LORA, settings, adapter)


def _tunix_problem(directory: Path, settings: Mapping[str, Any], adapter: Path) -> str | None:
    """What is wrong with a checkpoint of `write_tunix_lora`, which Orbax reads again, if anything.

    `settings` are its `rank` and `alpha`. Random rows x must give x·A·B as PEFT's `adapter` does.
    """
    config, source = read_adapter_config(adapter), SafetensorsDirectory(adapter, WEIGHTS_NAME)
    our_scale = lora_scale(config.rank, config.alpha, config.use_rslora)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        layers = checkpointer.restore((directory / "0" / "model_params").absolute())["layers"]
    rng = np.random.default_rng(0)
    names = {tensor.tree[1]: tensor.hf for tensor in LINEAR_TENSORS}
    compared = 0
    for layer, block in layers.items():
        for module, leaves in {**block.get("attn", {}), **block.get("mlp", {})}.items():
            targets = _TUNIX_TARGETS.get(module, (module,))
            found = {name[-1]: np.asarray(leaf["value"], float) for name, leaf in leaves.items()}
            a = found["a"].reshape(-1, settings["rank"])
            b = found["b"].reshape(settings["rank"], len(targets), -1)
            x = rng.standard_normal((2, len(a)))
            theirs = settings["alpha"] / settings["rank"] * np.einsum("xi,ir,rto->txo", x, a, b)
            for target, each in zip(targets, theirs, strict=True):
                key = f"base_model.model.model.layers.{layer}.{names[target]}.lora_{{}}.weight"
                ours = np.zeros_like(each)
                if target in config.targets:
                    pair = (
                        np.concatenate([rows for _, rows in source.blocks(key.format(ab))])
                        for ab in "AB"
                    )
                    ours = our_scale * np.linalg.multi_dot([x, *(m.T.astype(float) for m in pair)])
                    compared += 1
                if not np.allclose(each, ours, rtol=1e-6, atol=1e-9):
                    return f"{directory.name}/ has another update for {target} of layer {layer}"
    missing = len(source.shapes) // 2 - compared
    return f"{directory.name}/ lacks {missing} of the adapter's matrices" if missing else None
