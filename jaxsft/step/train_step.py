"""The one jitted train step and the eval step.

Only the adapter is differentiated: frozen weights get no gradient and no optimizer state. Two
formulations of one function: `StepSpec.fused` None differentiates model.py (the reference: any
device, dropout, sharded weights), otherwise fused.py computes the gradient, each device on its own
rows, with one gather of the adapter before and one reduction of its gradient after.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxsft.common.batch import Batch
from jaxsft.gemma.loss import chunked_cross_entropy, chunked_token_losses
from jaxsft.gemma.sharding import (
    constrain,
    gather_shards,
    named,
    partition_spec,
    reduce_to_shards,
    shard_dim,
    shard_spec,
    state_shardings,
)
from jaxsft.step.fused import FusedSpec, loss_and_gradients
from jaxsft.step.fused import losses as fused_losses
from jaxsft.step.fused_weights import group_adapter, write_adapter
from jaxsft.step.optimizer import SpikeHistory, empty_history, is_spike, record


class TrainState(NamedTuple):
    """What a step changes and a checkpoint keeps. Adapter and moments are float32.

    `step` counts batches consumed, `num_updates` the updates applied: a step whose loss or gradient
    is not finite, or that is a spike, is consumed but not applied.
    """

    step: jax.Array  # int32 scalar
    num_updates: jax.Array  # int32 scalar
    adapter: nnx.State
    moments: optax.OptState
    history: SpikeHistory | None = None  # None unless spikes are skipped


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Everything static about the step; hashable, so that `jit` compiles once for each."""

    graphdef: nnx.GraphDef
    transform: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    logit_cap: float | None
    chunk_tokens: int
    accumulation_steps: int = 1
    use_dropout: bool = False
    seed: int = 0
    fused: FusedSpec | None = None
    spike_sigmas: float | None = None  # None: no step is skipped as a spike


def init_state(adapter: nnx.State, spec: StepSpec) -> TrainState:
    """TrainState at step 0 on the mesh."""

    def init(adapter: nnx.State) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        history = None if spec.spike_sigmas is None else empty_history()
        moments = spec.transform.init(adapter)
        # Donation wants distinct buffers: a zero each.
        return TrainState(zero, jnp.zeros((), jnp.int32), adapter, moments, history)

    shardings = train_state_shardings(jax.eval_shape(init, adapter), spec)
    return jax.jit(init, out_shardings=shardings)(adapter)


def train_state_shardings(state: TrainState, spec: StepSpec) -> TrainState:
    """NamedSharding of every array: with the fused step adapter and moments are split over the
    devices (ZeRO, arXiv:1910.02054), else replicated."""
    num_shards = 1 if spec.fused is None else spec.mesh.shape["data"]
    shardings = jax.tree.map(
        lambda x: NamedSharding(spec.mesh, shard_spec(x.shape, num_shards)),
        state._replace(history=None),
    )
    return shardings._replace(history=jax.tree.map(lambda _: named(spec.mesh), state.history))


def _loss(
    head: Callable[..., Any],
    adapter: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    key: jax.Array | None,
    spec: StepSpec,
) -> Any:
    """`head`, one of loss.py's chunked functions, of one micro-batch [B, T]."""
    model = nnx.merge(spec.graphdef, adapter, frozen)
    hidden_BTD = model(
        batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, mesh=spec.mesh, dropout_key=key
    )
    return head(
        hidden_BTD,
        model.embedding[...],
        jnp.asarray(batch.targets_BT),
        jnp.asarray(batch.loss_mask_BT),
        logit_cap=spec.logit_cap,
        chunk_tokens=spec.chunk_tokens,
        mesh=spec.mesh,
    )


def _gradient_sum(
    adapter: nnx.State, frozen: nnx.State, batch: Batch, key: jax.Array | None, spec: StepSpec
) -> tuple[nnx.State, jax.Array, jax.Array]:
    """Gradient of the loss *sum*, that sum, and its token count, over all micro-batches."""
    grad_fn = jax.value_and_grad(partial(_loss, chunked_cross_entropy), has_aux=True)
    count = spec.accumulation_steps
    if count == 1:
        (loss_sum, num_tokens), grads = grad_fn(adapter, frozen, batch, key, spec)
        return grads, loss_sum, num_tokens

    def split(x_BT: jax.Array) -> jax.Array:
        # Micro-batch a takes rows a, a + A, a + 2A, …: every device keeps its own rows.
        x_ABT = x_BT.reshape(-1, count, x_BT.shape[-1]).swapaxes(0, 1)
        return constrain(x_ABT, spec.mesh, None, "batch", None)

    def body(carry, indexed):
        index, micro_batch = indexed
        micro_key = None if key is None else jax.random.fold_in(key, index)
        (loss_sum, num_tokens), grads = grad_fn(adapter, frozen, micro_batch, micro_key, spec)
        return jax.tree.map(jnp.add, carry, (grads, loss_sum, num_tokens)), None

    zeros = jax.tree.map(jnp.zeros_like, adapter), jnp.float32(0.0), jnp.int32(0)
    micro_batches = jnp.arange(count), jax.tree.map(split, batch)
    return jax.lax.scan(body, zeros, micro_batches)[0]


def _fused_gradient_sum(
    adapter: nnx.State, weights: dict[str, Any], batch: Batch, spec: StepSpec
) -> tuple[nnx.State, jax.Array, jax.Array, dict[str, Any]]:
    """As _gradient_sum, its gradient sharded like the adapter; and the weights it wrote into."""
    assert spec.fused is not None
    settings, num_shards = spec.fused, spec.mesh.shape["data"]
    leaves, tree = jax.tree.flatten(adapter)
    dims = [shard_dim(x.shape, num_shards) for x in leaves]
    specs = [shard_spec(x.shape, num_shards) for x in leaves]
    group = partial(group_adapter, layout=settings.layout)

    def local(shards, weights, batch):
        whole = gather_shards([x.astype(settings.dtype) for x in shards], dims)
        grouped = group(jax.tree.unflatten(tree, whole))
        pairs = zip(weights["stacks"], grouped, strict=True)
        stacks = [list(map(write_adapter, *pair)) for pair in pairs]
        weights = weights | {"stacks": stacks}

        def body(carry, micro_batch):
            loss_sum, num_tokens, grads = carry
            added, grads, _ = loss_and_gradients(weights, grouped, micro_batch, grads, settings)
            num_tokens += jnp.sum(micro_batch.loss_mask_BT, dtype=jnp.int32)
            return (loss_sum + added, num_tokens, grads), None

        count = spec.accumulation_steps
        micro_batches = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), grouped)
        start = jnp.float32(0.0), jnp.int32(0), zeros
        (loss_sum, num_tokens, grads), _ = jax.lax.scan(body, start, micro_batches)
        with jax.named_scope("optimizer"):
            abstract = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in whole]
            transpose = jax.linear_transpose(group, jax.tree.unflatten(tree, abstract))
            (by_projection,) = transpose(grads)
            reduced = reduce_to_shards(jax.tree.leaves(by_projection), dims)
        return reduced, *jax.lax.psum((loss_sum, num_tokens), "data"), weights

    whole_spec, rows = partition_spec(), partition_spec("batch")
    reduced, loss_sum, num_tokens, weights = jax.shard_map(
        local,
        mesh=spec.mesh,
        in_specs=(specs, whole_spec, rows),
        out_specs=(specs, whole_spec, whole_spec, whole_spec),
        check_vma=False,  # the loss head's trip count differs from device to device on purpose
    )(leaves, weights, batch)
    return jax.tree.unflatten(tree, reduced), loss_sum, num_tokens, weights


@jax.named_scope("optimizer")
def _update(
    state: TrainState, grads: nnx.State, learning_rate: Any, applied: jax.Array, spec: StepSpec
) -> tuple[nnx.State, Any]:
    """(adapter, moments) after the gradients, or as they were where not `applied`."""
    updates, moments = spec.transform.update(grads, state.moments, state.adapter)
    adapter = jax.tree.map(lambda p, u: p - learning_rate * u, state.adapter, updates)
    kept = state.adapter, state.moments
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), (adapter, moments), kept)


@partial(jax.jit, static_argnames="spec", donate_argnames=("state", "frozen"))
def train_step(
    state: TrainState, frozen: Any, batch: Batch, *, spec: StepSpec
) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    """One optimizer step on a global batch [B, T]; donates `state` and `frozen`.

    `frozen` is the model's frozen state, or with `spec.fused` its fused weights, whose pads the
    step writes: hence returned, all else in it unchanged.

    Returns the new state, the frozen weights, and scalars: loss (nats per loss token),
    num_loss_tokens, grad_norm (before clipping), learning_rate, applied (False: loss or gradient
    was not finite, or a spike, and adapter and moments are unchanged).
    """
    key = None
    if spec.use_dropout:
        key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
    if spec.fused is not None:
        sums = _fused_gradient_sum(state.adapter, frozen, batch, spec)
        grads, loss_sum, num_tokens, frozen = sums
    else:
        grads, loss_sum, num_tokens = _gradient_sum(state.adapter, frozen, batch, key, spec)
        # Placed as it came, or the next step would compile again.
        frozen = jax.lax.with_sharding_constraint(frozen, state_shardings(frozen, spec.mesh))
    # The one division. A batch without loss tokens has zero gradients; 1 keeps it finite.
    denominator = jnp.maximum(num_tokens, 1).astype(jnp.float32)
    loss = loss_sum / denominator
    grads = jax.tree.map(lambda g: g / denominator, grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (num_tokens > 0)
    applied, history = finite, state.history
    if history is not None:
        assert spec.spike_sigmas is not None
        applied &= ~is_spike(history, loss, grad_norm, spec.spike_sigmas)
        history = record(history, loss, grad_norm, finite)

    learning_rate = spec.schedule(state.num_updates)
    adapter, moments = _update(state, grads, learning_rate, applied, spec)
    new_state = TrainState(state.step + 1, state.num_updates + applied, adapter, moments, history)
    metrics = {
        "loss": loss,
        "num_loss_tokens": num_tokens,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
        "applied": applied,
    }
    shardings = train_state_shardings(new_state, spec)
    return jax.lax.with_sharding_constraint(new_state, shardings), frozen, metrics


@partial(jax.jit, static_argnames="spec")
def eval_step(adapter: nnx.State, frozen: Any, batch: Batch, *, spec: StepSpec) -> jax.Array:
    """float32 [B, T]: the loss in nats of every position, 0 where it bears none; no dropout."""
    if spec.fused is None:
        return _loss(chunked_token_losses, adapter, frozen, batch, None, spec)
    settings, rows = spec.fused, partition_spec("batch")

    def local(adapter, weights, batch):
        whole = jax.tree.map(lambda x: x.astype(settings.dtype), adapter)
        return fused_losses(weights, group_adapter(whole, settings.layout), batch, settings)

    whole_spec = partition_spec()
    return jax.shard_map(
        local,
        mesh=spec.mesh,
        in_specs=(whole_spec, whole_spec, rows),
        out_specs=rows,
        check_vma=False,
    )(adapter, frozen, batch)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A process's rows [B / num_processes, T] as global arrays split over the mesh's batch axes."""
    sharding = named(mesh, "batch", None)
    return Batch(*(jax.make_array_from_process_local_data(sharding, x) for x in batch))
