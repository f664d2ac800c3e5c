"""The same step without adapters: what their part of the time is measured against.

Forward and activation gradients of the frozen model over the same micro-batches, in the fused
step's formulation, but without adapters, their gradients' reduction and the optimizer.
"""

import dataclasses
import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console

from jaxsft.common.batch import Batch
from jaxsft.common.files import cache_dir
from jaxsft.gemma.sharding import partition_spec
from jaxsft.plan.estimate import StepEstimate, estimate_lowered
from jaxsft.plan.run_plan import RunPlan
from jaxsft.plan.tpu_aot import topology_devices
from jaxsft.run.program import abstract_setup, abstract_weights, make_model, num_bytes_per_device
from jaxsft.step.fused import FusedSpec, loss_and_gradients


def estimate_frozen(plan: RunPlan, console: Console) -> StepEstimate:
    """The estimate of the plan's step, a fused one, without adapters."""
    config, topology = plan.config, plan.estimate.topology
    arguments = abstract_setup(config, plan.model_config, topology_devices(topology), 1)
    assert arguments.spec.model.fused is not None
    layout = dataclasses.replace(arguments.spec.model.fused.layout, targets=())
    fused = arguments.spec.model.fused._replace(layout=layout)
    model = dataclasses.replace(arguments.spec.model, fused=fused)
    bare = nnx.eval_shape(partial(make_model, config, plan.model_config))
    weights = abstract_weights(nnx.split(bare)[1], model)
    step = jax.jit(
        partial(
            frozen_step,
            mesh=model.mesh,
            fused=fused,
            accumulation_steps=arguments.spec.update.accumulation_steps,
        )
    )
    with console.status(f"Compiling the step without adapters for {topology} …"):
        return estimate_lowered(
            step.lower(weights, arguments.batch),
            {"weights": num_bytes_per_device(weights)},
            config,
            topology,
            cache_dir=cache_dir("plan"),
            environment=os.environ,
        )[0]


def frozen_step(
    weights: dict[str, Any], batch: Batch, *, mesh: Mesh, fused: FusedSpec, accumulation_steps: int
) -> tuple[jax.Array, jax.Array]:
    """(loss sum, sum of the gradient by the embedded tokens) of a global batch [B, T]."""
    bare: list[list[dict[str, Any]]] = [[{} for _ in kinds] for kinds, _ in fused.layout.segments]

    def local(weights: dict[str, Any], batch: Batch) -> tuple[jax.Array, jax.Array]:
        def body(carry: Any, micro_batch: Batch) -> tuple[Any, None]:
            loss_sum, _, dx_ND = loss_and_gradients(weights, bare, micro_batch, bare, fused)
            # Reading the gradient keeps the backward pass in the program.
            sums = loss_sum, jnp.sum(dx_ND, dtype=jnp.float32)
            return jax.tree.map(jnp.add, carry, sums), None

        micro_batches = jax.tree.map(
            lambda x: x.reshape(accumulation_steps, -1, x.shape[-1]), batch
        )
        sums, _ = jax.lax.scan(body, (jnp.float32(0.0), jnp.float32(0.0)), micro_batches)
        return jax.lax.psum(sums, "data")

    whole, rows = partition_spec(), partition_spec("batch")
    shard_map = partial(jax.shard_map, mesh=mesh, check_vma=False)
    return shard_map(local, in_specs=(whole, rows), out_specs=(whole, whole))(weights, batch)
