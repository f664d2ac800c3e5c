"""The peer in JAX: Tunix's Gemma 3 270M with qwix's LoRA, trained by Tunix's own PeftTrainer.

Runs in a virtual environment with google-tunix and qwix:
`python -m benchmarks.peer_tunix MODEL_DIR ADAPTER_DIR LEARNING_RATE`.

qwix gives the fused K and V projection one A: the adapter must hold the same A in both, and the
gradient of that A is written as `kv_proj.lora_A`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from safetensors.numpy import load_file, save_file
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import params_safetensors
from tunix.sft import peft_trainer, utils

from benchmarks.peer_protocol import serve

# As in Tunix's own examples: all seven projections.
TARGETS = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"
# PEFT's module -> Tunix's weight, beside which qwix keeps <weight>_lora_a and <weight>_lora_b.
WEIGHTS = {
    "self_attn.q_proj": ("attn", "q_einsum", "w"),
    "self_attn.kv_proj": ("attn", "kv_einsum", "w"),
    "self_attn.o_proj": ("attn", "attn_vec_einsum", "w"),
    "mlp.gate_proj": ("mlp", "gate_proj", "kernel"),
    "mlp.up_proj": ("mlp", "up_proj", "kernel"),
    "mlp.down_proj": ("mlp", "down_proj", "kernel"),
}


def model_input(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
    """Arguments of Tunix's loss function, made as in its examples; padding is token 0."""
    is_token = batch.input_tokens != 0
    return {
        "input_tokens": batch.input_tokens,
        "input_mask": batch.input_mask,
        "positions": utils.build_positions_from_mask(is_token),
        "attention_mask": utils.make_causal_attn_mask(is_token),
    }


class TunixTrainer:
    """AdamW on a qwix adapter, float32, gradients clipped to norm 1."""

    def __init__(self, model_dir: str, adapter_dir: str, learning_rate: float):
        config = gemma3.ModelConfig.gemma3_270m()
        config.param_dtype = jnp.float32
        self.num_layers = config.num_layers
        base = params_safetensors.create_model_from_safe_tensors(
            model_dir, config, dtype=jnp.float32
        )
        settings = json.loads((Path(adapter_dir) / "adapter_config.json").read_text())
        provider = qwix.LoraProvider(
            module_path=TARGETS, rank=settings["r"], alpha=settings["lora_alpha"]
        )
        self.model = qwix.apply_lora_to_model(
            base, provider, **base.get_model_input(), rngs=nnx.Rngs(0)
        )
        tensors = load_file(Path(adapter_dir) / "adapter_model.safetensors")
        for key, path in self._slots():
            self._set(path, _with_fused_kv(tensors, key))
        optimizer = optax.adamw(learning_rate, weight_decay=0.01)
        self.trainer = peft_trainer.PeftTrainer(
            self.model,
            optax.chain(optax.clip_by_global_norm(1.0), optimizer),
            peft_trainer.TrainingConfig(eval_every_n_steps=1_000_000),
        ).with_gen_model_input_fn(model_input)
        self.train_step, _ = self.trainer.jit_train_and_eval_step(cache_nnx_graph=True)

    def _slots(self) -> Iterator[tuple[str, tuple]]:
        """(PEFT's key, path in the model) of every adapter matrix."""
        for layer in range(self.num_layers):
            for module, weight in WEIGHTS.items():
                prefix = f"base_model.model.model.layers.{layer}.{module}"
                path = ("layers", layer, *weight)
                yield f"{prefix}.lora_A.weight", (*path[:-1], f"{path[-1]}_lora_a")
                yield f"{prefix}.lora_B.weight", (*path[:-1], f"{path[-1]}_lora_b")

    def _set(self, path: tuple, tensor: np.ndarray) -> None:
        node: Any = self.model
        for name in path:
            node = node[name] if isinstance(name, int) else getattr(node, name)
        # PEFT's matrices are [out, in]; several dimensions of qwix's make up one of theirs.
        node.set_value(jnp.asarray(tensor.T.reshape(node.get_value().shape)))

    def gradients(self, rows: Path, out: Path) -> float:
        """See `peer_protocol.Trainer`."""

        @nnx.jit
        def loss_and_gradients(model: nnx.Module, batch: peft_trainer.TrainingInput) -> Any:
            wrt = nnx.DiffState(0, nnx.LoRAParam)
            return nnx.value_and_grad(self.trainer.loss_fn, argnums=wrt)(
                model, **model_input(batch)
            )

        loss, gradients = loss_and_gradients(self.model, _batch(rows))
        by_path = {path: v.get_value() for path, v in nnx.to_flat_state(gradients)}
        tensors = {}
        for key, path in self._slots():
            array = np.asarray(by_path[path])
            is_a = key.endswith("lora_A.weight")
            rank = array.shape[-1] if is_a else array.shape[0]
            matrix = array.reshape(-1, rank) if is_a else array.reshape(rank, -1)
            tensors[key] = np.ascontiguousarray(matrix.T)
        save_file(tensors, out)
        return float(loss)

    def step(self, rows: Path) -> float:
        """See `peer_protocol.Trainer`."""
        loss, _, norm = self.train_step(_batch(rows))
        jax.block_until_ready((loss, norm))
        return float(loss)


def _batch(rows: Path) -> peft_trainer.TrainingInput:
    with np.load(rows) as arrays:
        return peft_trainer.TrainingInput(
            input_tokens=jnp.asarray(arrays["tokens"]), input_mask=jnp.asarray(arrays["loss_mask"])
        )


def _with_fused_kv(tensors: dict[str, np.ndarray], key: str) -> np.ndarray:
    """PEFT's tensor `key`, where `kv_proj` is K's and V's together: their A, both B in a row."""
    if "kv_proj" not in key:
        return tensors[key]
    k, v = (tensors[key.replace("kv_proj", name)] for name in ("k_proj", "v_proj"))
    if key.endswith("lora_A.weight"):
        assert np.array_equal(k, v), "K and V share one A in qwix"
        return k
    return np.concatenate([k, v])


if __name__ == "__main__":
    model_dir, adapter_dir, learning_rate = sys.argv[1:]
    serve(lambda: TunixTrainer(model_dir, adapter_dir, float(learning_rate)))
