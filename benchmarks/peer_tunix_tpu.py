"""Tunix's own Gemma 2 2B LoRA step, compiled ahead of time for a TPU.

Runs in a virtual environment with google-tunix, qwix and libtpu, under `tpu_aot.AOT_ENVIRONMENT`:
`python -m benchmarks.peer_tunix_tpu TOPOLOGY none|remat OUT_DIR`. Leaves `program.hlo` and
`memory.json`, the fields of `tpu_aot.Memory`, in OUT_DIR.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma import model as gemma
from tunix.sft import peft_trainer

from benchmarks.peer_tunix import TARGETS, model_input
from jaxsft.plan.tpu_aot import Compiled, compile_for_tpu, topology_devices

# The recipe on one v5e-8: fsdp 8, 32 sequences in four micro-batches, alpha = rank.
BATCH_SIZE, ACCUMULATION_STEPS, ROW_LENGTH = 8, 4, 2048
RANK = 64


def constrain(x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
    """`gemma.shard` as it is on a TPU: it does nothing where the default backend is a CPU."""
    mesh = jax.interpreters.pxla.thread_resources.env.physical_mesh
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*axes)))


def lora_model(remat: bool) -> nnx.Module:
    """Gemma 2 2B in bfloat16, as Tunix loads it, with qwix's adapter in all seven projections."""
    config = gemma.ModelConfig.gemma2_2b()
    config.remat_config = gemma.RematConfig.DECODER if remat else gemma.RematConfig.NONE
    base = gemma.Gemma(config, rngs=nnx.Rngs(0))
    nnx.update(base, jax.tree.map(lambda x: x.astype(jnp.bfloat16), nnx.state(base, nnx.Param)))
    provider = qwix.LoraProvider(module_path=TARGETS, rank=RANK, alpha=RANK)
    return qwix.apply_lora_to_model(base, provider, **base.get_model_input(), rngs=nnx.Rngs(0))


def place(module: nnx.Module, mesh: Mesh) -> None:
    """Makes every variable a ShapeDtypeStruct, sharded as its own metadata say."""
    state = nnx.state(module)
    specs = nnx.get_partition_spec(state)
    nnx.update(
        module,
        jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(mesh, spec or PartitionSpec())
            ),
            state,
            specs,
        ),
    )


def main(topology: str, remat: bool, out_dir: Path) -> None:
    """Compiles one micro-step: `optax.MultiSteps` runs the same program four times an update."""
    mesh = Mesh(np.array(topology_devices(topology)).reshape(-1, 1), ("fsdp", "tp"))
    model = nnx.eval_shape(lambda: lora_model(remat))
    trainer = peft_trainer.PeftTrainer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-5, weight_decay=0.01)),
        peft_trainer.TrainingConfig(
            eval_every_n_steps=1_000_000, gradient_accumulation_steps=ACCUMULATION_STEPS
        ),
    ).with_gen_model_input_fn(model_input)
    train_step, _ = trainer.jit_train_and_eval_step(cache_nnx_graph=False)
    place(trainer.model, mesh)
    place(trainer.optimizer, mesh)

    def rows(dtype: Any) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
        return jax.ShapeDtypeStruct((BATCH_SIZE, ROW_LENGTH), dtype, sharding=sharding)

    batch = peft_trainer.TrainingInput(input_tokens=rows(jnp.int32), input_mask=rows(jnp.bool))
    gemma.shard = constrain
    with mesh:
        lowered = train_step.func.lower(*train_step.args, batch)
    compiled = compile_for_tpu(lowered.lowered)
    if not isinstance(compiled, Compiled):
        sys.exit(f"the step does not fit: {compiled}")
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "program.hlo").write_text(compiled.hlo_text)
    (out_dir / "memory.json").write_text(json.dumps(compiled.memory._asdict()))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "remat", Path(sys.argv[3]))
