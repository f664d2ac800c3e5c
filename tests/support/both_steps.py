"""The plain and the fused step of one model, ready to be run and compared."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxsft.gemma import lora
from jaxsft.gemma.lora import TARGETS
from jaxsft.gemma.model import Gemma
from jaxsft.gemma.sharding import make_mesh, named, state_shardings
from jaxsft.step.fused import FusedSpec
from jaxsft.step.fused_weights import FusedLayout, fuse, make_layout
from jaxsft.step.optimizer import make_schedule
from jaxsft.step.score import ModelSpec
from jaxsft.step.train_step import StepSpec, TrainState, UpdateSpec, init_state

ROW_LENGTH = 40
MESH = make_mesh(1, devices=jax.devices()[:1])
LEARNING_RATE = 1e-3
# The transform keeps the step's gradient as its state, and hands it on: plain gradient descent.
RECORD = optax.trace(decay=0.0)

Ready = tuple[TrainState, Any, StepSpec]


def layout_of(model: Gemma, targets: tuple[str, ...] = TARGETS) -> FusedLayout:
    """For rows of `ROW_LENGTH` and the adapter that the model has."""
    block = model.blocks[0]
    lora_module = next(
        module.lora
        for part in (block.attn, block.mlp)
        for name in TARGETS
        if (module := getattr(part, name, None)) is not None and module.lora is not None
    )
    return make_layout(
        model.config,
        row_length=ROW_LENGTH,
        rank=lora_module.a[...].shape[-1],
        scale=lora_module.scale,
        targets=targets,
    )


def with_fused(spec: StepSpec, fused: FusedSpec) -> StepSpec:
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, fused=fused))


def both_steps(
    model: Gemma,
    layout: FusedLayout,
    *,
    mesh: Mesh = MESH,
    learning_rate: float = LEARNING_RATE,
    **settings: Any,
) -> list[Ready]:
    """(state, frozen weights, spec) of the plain and the fused step; `settings` of UpdateSpec."""
    graphdef, adapter, frozen = lora.split(model)
    schedule = make_schedule("constant", peak=learning_rate, end=0.0, warmup_steps=0, num_steps=5)
    update = UpdateSpec(RECORD, schedule, **settings)
    plain = StepSpec(ModelSpec(graphdef, mesh, model.config.final_softcap, 16), update)
    fused_spec = FusedSpec(
        layout, jnp.dtype("float32"), chunk_tokens=16, recompute_layers=False, use_kernel=False
    )
    fused = with_fused(plain, fused_spec)
    copied, weights = jax.tree.map(jnp.copy, (frozen, fuse(frozen, layout)))  # both are donated
    copied = jax.device_put(copied, state_shardings(frozen, mesh))
    return [
        (init_state(adapter, plain), copied, plain),
        (init_state(adapter, fused), jax.device_put(weights, named(mesh)), fused),
    ]
