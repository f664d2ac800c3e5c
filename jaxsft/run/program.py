"""The train step of a config as a program: its static part, its arguments' shapes, its hash.

`train` runs and `plan` compiles the program made here: equal hashes show that a plan is about the
step that will run. Nothing here holds weights or takes memory on a device.
"""

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental.mosaic.dialects import tpu
from jax.extend.mlir import ir
from jax.sharding import Mesh

from jaxsft.common.batch import Batch
from jaxsft.config import RunConfig, TrainConfig
from jaxsft.data.packing import num_steps
from jaxsft.gemma import lora
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.loss import TokenLoss, cross_entropy
from jaxsft.gemma.model import Gemma
from jaxsft.gemma.sharding import make_mesh, named, state_shardings
from jaxsft.step import flash_attention
from jaxsft.step.fused import FusedSpec
from jaxsft.step.fused_weights import fuse, make_layout
from jaxsft.step.optimizer import make_schedule, make_transform
from jaxsft.step.score import ModelSpec
from jaxsft.step.train_step import (
    StepSpec,
    TrainState,
    UpdateSpec,
    init_state,
    train_state_shardings,
    train_step,
)


class StepArguments(NamedTuple):
    """The arguments of `train_step`. Arrays, or their `ShapeDtypeStruct`s with shardings."""

    spec: StepSpec
    state: TrainState
    frozen: Any  # the model's frozen state, or its fused weights
    batch: Batch


def check_positions(config: RunConfig, model_config: GemmaConfig) -> None:
    """ValueError when rows are longer than the model's positions."""
    if config.data.max_length > model_config.max_positions:
        raise ValueError(
            f"data.max_length {config.data.max_length} is beyond the model's "
            f"{model_config.max_positions} positions"
        )


def num_run_steps(config: TrainConfig, num_rows: int) -> int:
    """Optimizer steps of a run over `num_rows`; ValueError unless the warm-up is shorter."""
    steps = config.max_steps or num_steps(
        num_rows, config.num_train_epochs, config.global_batch_size
    )
    if config.warmup_steps >= steps:
        raise ValueError(f"warmup_steps {config.warmup_steps} is not below the run's {steps} steps")
    return steps


def mesh_of(config: RunConfig, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh of a run on `devices`, a multiple of `config.fsdp`."""
    return make_mesh(len(devices) // config.fsdp, config.fsdp, devices)


def inject_adapter(config: RunConfig, model: Gemma) -> None:
    """Puts the fresh adapter that the options ask for into the model, in place."""
    options = config.lora
    lora.inject(
        model,
        rank=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        use_rslora=options.use_rslora,
        targets=options.target_modules,
        rngs=nnx.Rngs(lora=config.seed),
    )


def fused_obstacles(config: RunConfig, model_config: GemmaConfig, platform: str) -> list[str]:
    """What in the config and the model the fused step does not support on "tpu", "cpu", …"""
    options, length, on_tpu = config.model, config.data.max_length, platform == "tpu"
    obstacles = (
        (config.lora.dropout > 0, f"lora.dropout {config.lora.dropout}"),
        (config.fsdp > 1, f"fsdp {config.fsdp}"),
        (
            options.dtype != options.param_dtype,
            f"model.param_dtype {options.param_dtype} with dtype {options.dtype}",
        ),
        (
            on_tpu and model_config.head_dim % flash_attention.HEAD_DIM > 0,
            f"the model's heads of {model_config.head_dim} (its kernels cut heads by "
            f"{flash_attention.HEAD_DIM})",
        ),
        (
            on_tpu and not flash_attention.supports_row_length(length),
            f"data.max_length {length} (its kernels take 128, 256, 384 and multiples of "
            f"{flash_attention.BLOCK_Q} up to {flash_attention.MAX_ROW_LENGTH})",
        ),
    )
    return [text for holds, text in obstacles if holds]


def make_fused_spec(config: RunConfig, model_config: GemmaConfig, mesh: Mesh) -> FusedSpec | None:
    """The fused step's settings, None for the plain step; ValueError where `step` is impossible."""
    platform = mesh.devices.flat[0].platform
    on_tpu = platform == "tpu"
    obstacles = fused_obstacles(config, model_config, platform)
    if config.step == "fused" and obstacles:
        raise ValueError(f"step fused does not go with {' and '.join(obstacles)}; use step plain")
    if config.step == "plain" or obstacles or (config.step == "auto" and not on_tpu):
        return None
    options = config.lora
    layout = make_layout(
        model_config,
        row_length=config.data.max_length,
        rank=options.r,
        scale=lora.lora_scale(options.r, options.alpha, options.use_rslora),
        targets=lora.resolve_targets(options.target_modules),
    )
    return FusedSpec(
        layout=layout,
        dtype=jnp.dtype(config.model.dtype),
        chunk_tokens=config.loss_chunk_tokens,
        recompute_layers=config.model.remat == "full",
        use_kernel=on_tpu,
    )


def learning_rate_schedule(config: RunConfig, steps: int) -> optax.Schedule:
    """Learning rate by update, for a run of `steps` steps."""
    return make_schedule(
        config.lr_scheduler_type,
        peak=config.learning_rate,
        end=config.min_learning_rate,
        warmup_steps=config.warmup_steps,
        num_steps=steps,
    )


def make_spec(
    config: RunConfig,
    model_config: GemmaConfig,
    graphdef: nnx.GraphDef,
    mesh: Mesh,
    steps: int,
    token_loss: TokenLoss = cross_entropy,
) -> StepSpec:
    """Everything static about the step of the run."""
    model = ModelSpec(
        graphdef=graphdef,
        mesh=mesh,
        logit_cap=model_config.final_softcap,
        chunk_tokens=config.loss_chunk_tokens,
        fused=make_fused_spec(config, model_config, mesh),
    )
    update = UpdateSpec(
        transform=make_transform(
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        ),
        schedule=learning_rate_schedule(config, steps),
        accumulation_steps=config.gradient_accumulation_steps,
        use_dropout=config.lora.dropout > 0,
        seed=config.seed,
        spike_sigmas=config.skip_spikes_sigmas,
        token_loss=token_loss,
    )
    return StepSpec(model, update)


def make_model(config: RunConfig, model_config: GemmaConfig) -> Gemma:
    """The model without an adapter, randomly initialised: for `nnx.eval_shape`."""
    options = config.model
    return Gemma(
        model_config,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        remat=options.remat,
        rngs=nnx.Rngs(0),
    )


def abstract_setup(
    config: TrainConfig,
    model_config: GemmaConfig,
    devices: Sequence[jax.Device],
    steps: int,
) -> StepArguments:
    """The step's arguments as shapes, dtypes and shardings; the devices need not exist."""
    check_positions(config, model_config)
    spec, state, frozen = abstract_model(config, model_config, devices, steps)
    batch = abstract_batch(config, spec.model.mesh)
    return StepArguments(spec, state, abstract_weights(frozen, spec.model), batch)


def abstract_model(
    config: RunConfig,
    model_config: GemmaConfig,
    devices: Sequence[jax.Device],
    steps: int,
) -> tuple[StepSpec, TrainState, nnx.State]:
    """The step's static part, the shapes of its state, and those of the model's frozen state."""

    def build() -> Gemma:
        model = make_model(config, model_config)
        inject_adapter(config, model)
        return model

    graphdef, adapter, frozen = lora.split(nnx.eval_shape(build))
    spec = make_spec(config, model_config, graphdef, mesh_of(config, devices), steps)
    state = jax.eval_shape(lambda adapter: init_state(adapter, spec), adapter)
    return spec, jax.tree.map(_struct, state, train_state_shardings(state, spec)), frozen


def abstract_weights(frozen: nnx.State, spec: ModelSpec) -> Any:
    """Shapes and shardings of the frozen weights as the step takes them."""
    if spec.fused is None:
        return jax.tree.map(_struct, frozen, state_shardings(frozen, spec.mesh))
    weights = jax.eval_shape(partial(fuse, layout=spec.fused.layout), frozen)
    return jax.tree.map(lambda x: _struct(x, named(spec.mesh)), weights)


def abstract_batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Shapes and sharding of a global batch [B, T], as `put_batch` makes it."""
    shape = (config.global_batch_size, config.data.max_length)
    sharding = named(mesh, "batch", None)
    structs: list[Any] = [
        jax.ShapeDtypeStruct(
            shape, jnp.float32 if name == "loss_weights_BT" else jnp.int32, sharding=sharding
        )
        for name in Batch._fields
    ]
    return Batch(*structs)


def lower_step(arguments: StepArguments) -> jax.stages.Lowered:
    """The train step as StableHLO, for the platform of the mesh."""
    spec, *arrays = arguments
    return train_step.lower(*arrays, spec=spec)


def program_hash(lowered: jax.stages.Lowered) -> str:
    """16 hex digits that tell apart any two programs.

    The SHA-256 of the StableHLO, which holds shapes, shardings, constants and Pallas kernels, with
    their limits, but neither source locations nor the kind of device. The step is compiled with
    XLA's defaults: it has no compiler options of its own.
    """
    text = _KERNEL_BODY.sub(_kernel_without_locations, lowered.as_text())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# A Pallas kernel in a custom call: MLIR bytecode, with the paths and lines of its source in it.
_KERNEL_BODY = re.compile(r"(?<=\\22body\\22: \\22)[A-Za-z0-9+/=]+(?=\\22)")


def _kernel_without_locations(body: re.Match[str]) -> str:
    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context:
        module = ir.Module.parse(base64.b64decode(body.group()))
        return str(module.operation.get_asm(enable_debug_info=False))


def num_bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays (or shapes with shardings) on one device."""
    return sum(
        x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree)
    )


def _struct(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
