"""The one jitted train step, the eval step, the optimizer and its schedule.

Only the adapter is differentiated: frozen weights get no gradient and no optimizer state.
"""

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from jaxsft.loss import chunked_cross_entropy
from jaxsft.packing import Batch
from jaxsft.sharding import constrain, named


class TrainState(NamedTuple):
    """What a step changes and a checkpoint keeps. Adapter and moments are float32.

    `step` counts batches consumed, `num_updates` the updates applied: a step whose loss or gradient
    is not finite is consumed but not applied.
    """

    step: jax.Array  # int32 scalar
    num_updates: jax.Array  # int32 scalar
    adapter: nnx.State
    moments: optax.OptState


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


def make_schedule(
    kind: str, *, peak: float, end: float, warmup_steps: int, num_steps: int
) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0 to `peak`, then `kind` down to `end`.

    `kind` is cosine, linear or constant (which ignores `end`).
    """
    decay_steps = max(num_steps - warmup_steps, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, alpha=end / peak if peak else 0),
        "linear": optax.linear_schedule(peak, end, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[kind]
    if warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def make_transform(
    *, beta1: float, beta2: float, eps: float, weight_decay: float, max_grad_norm: float
) -> optax.GradientTransformation:
    """AdamW without the learning rate, which the step multiplies in: clip, Adam, decay.

    Decay (arXiv:1711.05101) applies to matrices only; `max_grad_norm` 0 turns clipping off.
    """

    def is_matrix(params: Any) -> Any:
        return jax.tree.map(lambda x: x.ndim >= 2, params)

    return optax.chain(
        optax.clip_by_global_norm(max_grad_norm) if max_grad_norm else optax.identity(),
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask=is_matrix),
    )


def init_state(adapter: nnx.State, spec: StepSpec) -> TrainState:
    """TrainState at step 0, replicated over the mesh."""

    def init(adapter: nnx.State) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, jnp.zeros((), jnp.int32), adapter, spec.transform.init(adapter))

    return jax.jit(init, out_shardings=named(spec.mesh))(adapter)


def _loss_sum(
    adapter: nnx.State, frozen: nnx.State, batch: Batch, key: jax.Array | None, spec: StepSpec
) -> tuple[jax.Array, jax.Array]:
    """(sum of the losses in nats, number of loss tokens) of one micro-batch [B, T]."""
    model = nnx.merge(spec.graphdef, adapter, frozen)
    hidden_BTD = model(
        batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT, mesh=spec.mesh, dropout_key=key
    )
    return chunked_cross_entropy(
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
    grad_fn = jax.value_and_grad(_loss_sum, has_aux=True)
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


@partial(jax.jit, static_argnames="spec", donate_argnames="state")
def train_step(
    state: TrainState, frozen: nnx.State, batch: Batch, *, spec: StepSpec
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on a global batch [B, T]; donates `state`.

    Returns the new state and scalars: loss (nats per loss token), num_loss_tokens, grad_norm
    (before clipping), learning_rate, applied (False: loss or gradient was not finite and adapter
    and moments are unchanged).
    """
    key = None
    if spec.use_dropout:
        key = jax.random.fold_in(jax.random.key(spec.seed), state.step)
    grads, loss_sum, num_tokens = _gradient_sum(state.adapter, frozen, batch, key, spec)
    # The one division. A batch without loss tokens has zero gradients; 1 keeps it finite.
    denominator = jnp.maximum(num_tokens, 1).astype(jnp.float32)
    loss = loss_sum / denominator
    grads = jax.tree.map(lambda g: g / denominator, grads)
    grad_norm = optax.tree.norm(grads)
    applied = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (num_tokens > 0)

    learning_rate = spec.schedule(state.num_updates)
    updates, moments = spec.transform.update(grads, state.moments, state.adapter)
    adapter = jax.tree.map(lambda p, u: p - learning_rate * u, state.adapter, updates)
    adapter, moments = jax.tree.map(
        lambda new, old: jnp.where(applied, new, old),
        (adapter, moments),
        (state.adapter, state.moments),
    )
    new_state = TrainState(state.step + 1, state.num_updates + applied, adapter, moments)
    metrics = {
        "loss": loss,
        "num_loss_tokens": num_tokens,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
        "applied": applied,
    }
    return jax.lax.with_sharding_constraint(new_state, named(spec.mesh)), metrics


@partial(jax.jit, static_argnames="spec")
def eval_step(
    adapter: nnx.State, frozen: nnx.State, batch: Batch, *, spec: StepSpec
) -> tuple[jax.Array, jax.Array]:
    """(loss sum in nats, number of loss tokens) of a batch [B, T], without dropout."""
    return _loss_sum(adapter, frozen, batch, None, spec)


def put_batch(batch: Batch, mesh: Mesh) -> Batch:
    """A process's rows [B / num_processes, T] as global arrays split over the mesh's batch axes."""
    sharding = named(mesh, "batch", None)
    return Batch(*(jax.make_array_from_process_local_data(sharding, x) for x in batch))
