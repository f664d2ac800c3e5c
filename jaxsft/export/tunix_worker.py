"""Computes a Flax export's logits with Tunix. A script for a subprocess: nothing imports it.

    python tunix_worker.py MODEL PROBES.npz OUT.npz [LORA]

PROBES: `ids_N` (token ids [T]) and `at_N` (positions to compare) of probe N; `settings`, JSON, with
`config`, the fields of a GemmaConfig; `lora`, the arguments of `qwix.LoraProvider` for the
checkpoint LORA; `texts` for the tokenizer.model beside MODEL. OUT: `logits_N`, float32
[len(at), V], and `text_N`, the ids of text N. Everything is computed in float32.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from orbax import checkpoint as ocp


def main(model_dir: str, probes_path: str, out_path: str, lora_dir: str | None = None) -> None:
    """Loads the model and the adapter with Tunix's own functions and writes their results."""
    with np.load(probes_path) as found:
        probes = dict(found)
    settings = json.loads(str(probes["settings"]))
    config = settings["config"]
    model = _gemma3(model_dir, config) if config["qk_norm"] else _gemma(model_dir, config)
    if lora_dir is not None:
        import qwix
        from tunix.sft.checkpoint_manager import CheckpointManager

        provider = qwix.LoraProvider(**settings["lora"])
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        manager = CheckpointManager(lora_dir, ocp.CheckpointManagerOptions(read_only=True))
        manager.maybe_restore(model, restore_only_lora_params=True)
        manager.close()
    results: dict[str, Any] = {}
    for name in [key.removeprefix("ids_") for key in probes if key.startswith("ids_")]:
        ids = jnp.asarray(probes[f"ids_{name}"])[None]
        positions = jnp.arange(ids.shape[1])[None]
        mask = jnp.tril(jnp.ones((1, ids.shape[1], ids.shape[1]), bool))
        # NumPy copies the rows that are asked for; all others, and the padding, are freed.
        logits = np.asarray(model(ids, positions, None, mask)[0])
        results[f"logits_{name}"] = logits[0, probes[f"at_{name}"], : config["vocab_size"]]
    if settings["texts"]:
        from tunix.generate.tokenizer_adapter import Tokenizer

        path = str(Path(model_dir).parent / "tokenizer.model")
        tokenizer = Tokenizer(tokenizer_path=path, add_bos=False, add_eos=False)
        for i, text in enumerate(settings["texts"]):
            results[f"text_{i}"] = np.asarray(tokenizer.encode(text))
    with Path(out_path).open("wb") as file:
        np.savez(file, **results)


def _sizes(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "num_layers": len(config["layer_types"]),
        "embed_dim": config["d_model"],
        "hidden_dim": config["d_ff"],
        "num_heads": config["num_heads"],
        "head_dim": config["head_dim"],
        "num_kv_heads": config["num_kv_heads"],
        "sliding_window_size": config["sliding_window"],
    }


def _gemma3(checkpoint: str, config: dict[str, Any]) -> Any:
    from tunix.models.gemma3 import model, params

    model_config = model.ModelConfig(
        num_embed=config["vocab_size"],
        global_base_frequency=config["rope_theta_global"],
        local_base_frequency=config["rope_theta_local"],
        param_dtype=jnp.float32,
        **_sizes(config),
    )
    return params.create_model_from_checkpoint(checkpoint, model_config, dtype=jnp.float32)


def _gemma(checkpoint: str, config: dict[str, Any]) -> Any:
    """Gemma 1 and 2 as Tunix's `Gemma.from_params`, which has the real sizes only."""
    from tunix.models.gemma import model, params

    variables = params.load_and_format_params(checkpoint)["transformer"]
    variables = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), variables)
    kinds = {
        "local": model.AttentionType.LOCAL_SLIDING,
        "global": model.AttentionType.GLOBAL,
    }
    model_config = model.ModelConfig(
        num_embed=len(variables["embedder"]["input_embedding"]),  # padding is Kaggle's
        final_logit_softcap=config["final_softcap"],
        attn_logits_soft_cap=config["attn_softcap"],
        use_post_attn_norm=config["post_norms"],
        use_post_ffw_norm=config["post_norms"],
        attention_types=[kinds[kind] for kind in config["layer_types"]],
        **_sizes(config),
    )
    return model.module_from_linen_variables(
        module_factory=lambda: model.Gemma(model_config, rngs=nnx.Rngs(params=0)),
        variables=variables,
        map_key_fn=model._map_linen_var_names,
        assign_val_fn=model._assign_linen_params_to_nnx_state,
    )


if __name__ == "__main__":
    # float32 means float32 on accelerators too; their default is bfloat16 passes.
    jax.config.update("jax_default_matmul_precision", "highest")
    main(*sys.argv[1:])
