"""The one jitted train step.

Only the adapter is differentiated: frozen weights get no gradient and no optimizer state. With
`ModelSpec.fused` None, autodiff differentiates model.py. Otherwise fused.py computes the gradient,
each device on its own rows, with one gather of the adapter before and one reduction of its gradient
after.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from jaxsft.common.batch import Batch
from jaxsft.gemma.loss import TokenLoss, chunked_loss, cross_entropy
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
from jaxsft.step.fused import loss_and_gradients
from jaxsft.step.fused_weights import group_adapter, write_adapter
from jaxsft.step.optimizer import SpikeHistory, empty_history, is_spike, record
from jaxsft.step.score import ModelSpec

BatchT = TypeVar("BatchT")  # `Batch`, or what a trainer has in its place (see `TokenLoss`)


class TrainState(NamedTuple):
    """What a step changes and a checkpoint stores. Adapter and moments are float32.

    `step` counts the batches seen, `num_updates` the updates applied: no update is applied when the
    loss or the gradient is not finite, or the step is a spike.
    """

    step: jax.Array  # int32 scalar
    num_updates: jax.Array  # int32 scalar
    adapter: nnx.State
    moments: optax.OptState
    history: SpikeHistory | None = None  # None unless spikes are skipped


@dataclasses.dataclass(frozen=True)
class UpdateSpec:
    """Compile-time settings of an update: the loss of a token, and what is done with the gradient.
    Hashable."""

    transform: optax.GradientTransformation
    schedule: optax.Schedule
    accumulation_steps: int = 1
    use_dropout: bool = False
    seed: int = 0  # of dropout
    spike_sigmas: float | None = None  # None: no step is skipped as a spike
    token_loss: TokenLoss = cross_entropy


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """Compile-time settings of the step; `jit` compiles once for each value."""

    model: ModelSpec
    update: UpdateSpec


def init_state(adapter: nnx.State, spec: StepSpec) -> TrainState:
    """TrainState at step 0 on the mesh."""

    def init(adapter: nnx.State) -> TrainState:
        zero = jnp.zeros((), jnp.int32)
        history = None if spec.update.spike_sigmas is None else empty_history()
        moments = spec.update.transform.init(adapter)
        # Two zeros: donation needs distinct buffers.
        return TrainState(zero, jnp.zeros((), jnp.int32), adapter, moments, history)

    shardings = train_state_shardings(jax.eval_shape(init, adapter), spec)
    return jax.jit(init, out_shardings=shardings)(adapter)


def train_state_shardings(state: TrainState, spec: StepSpec) -> TrainState:
    """NamedSharding of every array of the state.

    With the fused step, adapter and moments are split over the devices (ZeRO, arXiv:1910.02054);
    otherwise they are replicated.
    """
    num_shards = 1 if spec.model.fused is None else spec.model.mesh.shape["data"]
    shardings = jax.tree.map(
        lambda x: NamedSharding(spec.model.mesh, shard_spec(x.shape, num_shards)),
        state._replace(history=None),
    )
    return shardings._replace(history=jax.tree.map(lambda _: named(spec.model.mesh), state.history))


def _loss_sum(
    adapter: nnx.State, frozen: nnx.State, batch: Batch, key: jax.Array | None, spec: StepSpec
) -> jax.Array:
    """The summed loss of one micro-batch [B, T]; dropout where there is a `key`."""
    of_model = spec.model
    model = nnx.merge(of_model.graphdef, adapter, frozen)
    hidden_BTD = model(
        batch.tokens_BT,
        batch.positions_BT,
        batch.segment_ids_BT,
        mesh=of_model.mesh,
        dropout_key=key,
    )
    return chunked_loss(
        hidden_BTD,
        model.embedding[...],
        batch,
        token_loss=spec.update.token_loss,
        logit_cap=of_model.logit_cap,
        chunk_tokens=of_model.chunk_tokens,
        mesh=of_model.mesh,
    )


class _Sums(NamedTuple):
    """Sums over all micro-batches and devices."""

    loss: jax.Array  # float32 scalar, nats
    weight: jax.Array  # float32 scalar: exact for ones, up to 2^24 of them
    num_tokens: jax.Array  # int32 scalar: targets whose weight is not 0


def _sums(loss: jax.Array, batch: Batch) -> _Sums:
    weights_BT = batch.loss_weights_BT
    num_tokens = jnp.sum(weights_BT != 0, dtype=jnp.int32)
    return _Sums(loss, jnp.sum(weights_BT, dtype=jnp.float32), num_tokens)


def _gradient_sum(
    adapter: nnx.State, frozen: nnx.State, batch: Batch, key: jax.Array | None, spec: StepSpec
) -> tuple[nnx.State, _Sums]:
    """The gradient of the loss *sum* with respect to the adapter, and the sums."""
    grad_fn, count = jax.value_and_grad(_loss_sum), spec.update.accumulation_steps
    are_given = batch.tokens_BT.ndim == 3
    if count == 1 and not are_given:
        loss_sum, grads = grad_fn(adapter, frozen, batch, key, spec)
        return grads, _sums(loss_sum, batch)

    def split(x_BT: jax.Array) -> jax.Array:
        # Micro-batch a takes rows a, a + A, a + 2A, …: every device keeps its own rows.
        x_ABT = x_BT.reshape(-1, count, x_BT.shape[-1]).swapaxes(0, 1)
        return constrain(x_ABT, spec.model.mesh, None, "batch", None)

    def body(carry, indexed):
        index, micro_batch = indexed
        micro_key = None if key is None else jax.random.fold_in(key, index)
        added = grad_fn(adapter, frozen, micro_batch, micro_key, spec)
        return jax.tree.map(jnp.add, carry, added), None

    zeros = jnp.float32(0.0), jax.tree.map(jnp.zeros_like, adapter)
    if are_given:
        micro_batches = jnp.arange(len(batch.tokens_BT)), batch
        loss_sum, grads = _scan_nonempty(body, zeros, micro_batches, batch)
    else:
        micro_batches = jnp.arange(count), jax.tree.map(split, batch)
        (loss_sum, grads), _ = jax.lax.scan(body, zeros, micro_batches)
    return grads, _sums(loss_sum, batch)


def _scan_nonempty(body: Callable, carry: Any, micro_batches: Any, batch: Batch) -> Any:
    """The carry of a scan up to the last micro-batch that bears loss: those behind it take no time.

    One program for every number of filled rows; rows of padding cost as much as others.
    """
    bears_loss_A = jnp.any(batch.loss_weights_BT != 0, axis=(1, 2))
    count = jnp.max(jnp.where(bears_loss_A, 1 + jnp.arange(len(bears_loss_A)), 0))

    def one(index: jax.Array, carry: Any) -> Any:
        return body(carry, jax.tree.map(lambda x: x[index], micro_batches))[0]

    return jax.lax.fori_loop(0, count, one, carry)


def _fused_gradient_sum(
    adapter: nnx.State, weights: dict[str, Any], batch: Batch, spec: StepSpec
) -> tuple[nnx.State, _Sums, dict[str, Any]]:
    """As `_gradient_sum`, the gradient sharded like the adapter; and the weights with the adapter
    written into their pads."""
    settings, num_shards = spec.model.fused, spec.model.mesh.shape["data"]
    assert settings is not None
    are_given = batch.tokens_BT.ndim == 3
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
            loss_sum, grads = carry
            added, grads, _ = loss_and_gradients(
                weights, grouped, micro_batch, grads, settings, spec.update.token_loss
            )
            return (loss_sum + added, grads), None

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), grouped)
        start = jnp.float32(0.0), zeros
        if are_given:
            loss_sum, grads = _scan_nonempty(body, start, batch, batch)
        else:
            count = spec.update.accumulation_steps
            micro_batches = jax.tree.map(lambda x: x.reshape(count, -1, x.shape[-1]), batch)
            (loss_sum, grads), _ = jax.lax.scan(body, start, micro_batches)
        with jax.named_scope("optimizer"):
            abstract = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in whole]
            transpose = jax.linear_transpose(group, jax.tree.unflatten(tree, abstract))
            (by_projection,) = transpose(grads)
            reduced = reduce_to_shards(jax.tree.leaves(by_projection), dims)
        return reduced, jax.lax.psum(_sums(loss_sum, batch), "data"), weights

    whole_spec = partition_spec()
    rows = partition_spec(None, "batch") if are_given else partition_spec("batch")
    reduced, sums, weights = jax.shard_map(
        local,
        mesh=spec.model.mesh,
        in_specs=(specs, whole_spec, rows),
        out_specs=(specs, whole_spec, whole_spec),
        check_vma=False,  # the loss head's trip count differs from device to device on purpose
    )(leaves, weights, batch)
    return jax.tree.unflatten(tree, reduced), sums, weights


@jax.named_scope("optimizer")
def _update(
    state: TrainState,
    grads: nnx.State,
    learning_rate: Any,
    applied: jax.Array,
    transform: optax.GradientTransformation,
) -> tuple[nnx.State, Any]:
    """(adapter, moments) after the update, or unchanged where not `applied`."""
    updates, moments = transform.update(grads, state.moments, state.adapter)
    adapter = jax.tree.map(lambda p, u: p - learning_rate * u, state.adapter, updates)
    kept = state.adapter, state.moments
    return jax.tree.map(lambda new, old: jnp.where(applied, new, old), (adapter, moments), kept)


@partial(jax.jit, static_argnames="spec", donate_argnames=("state", "frozen"))
def train_step(
    state: TrainState, frozen: Any, batch: Batch, *, spec: StepSpec
) -> tuple[TrainState, Any, dict[str, jax.Array]]:
    """One optimizer step on a global batch [B, T]; donates `state` and `frozen`.

    A batch [A, B, T] comes as A micro-batches, whatever `accumulation_steps` says. Those behind the
    last that bears loss take no time.

    `frozen` is the model's frozen state, or with `spec.model.fused` the fused weights. The step
    writes the adapter into their pads and changes nothing else in them.

    Returns the new state, the frozen weights (the ones passed in are donated), and scalars: loss
    (the weighted mean, in nats), num_loss_tokens (targets whose weight is not 0), grad_norm (before
    clipping), learning_rate, applied (False: loss or gradient was not finite, or the step was a
    spike, and adapter and moments are unchanged).
    """
    model, update = spec.model, spec.update
    if model.fused is not None:
        grads, sums, frozen = _fused_gradient_sum(state.adapter, frozen, batch, spec)
    else:
        key = None
        if update.use_dropout:
            key = jax.random.fold_in(jax.random.key(update.seed), state.step)
        grads, sums = _gradient_sum(state.adapter, frozen, batch, key, spec)
        # With the sharding that it came with, or the next step would compile again.
        frozen = jax.lax.with_sharding_constraint(frozen, state_shardings(frozen, model.mesh))
    # The one division. A batch without loss tokens has zero gradients; 1 keeps it finite.
    denominator = jnp.where(sums.num_tokens > 0, sums.weight, 1.0)
    loss = sums.loss / denominator
    grads = jax.tree.map(lambda g: g / denominator, grads)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (sums.num_tokens > 0)
    applied, history = finite, state.history
    if history is not None:
        assert update.spike_sigmas is not None
        applied &= ~is_spike(history, loss, grad_norm, update.spike_sigmas)
        history = record(history, loss, grad_norm, finite)

    learning_rate = update.schedule(state.num_updates)
    adapter, moments = _update(state, grads, learning_rate, applied, update.transform)
    new_state = TrainState(state.step + 1, state.num_updates + applied, adapter, moments, history)
    metrics = {
        "loss": loss,
        "num_loss_tokens": sums.num_tokens,
        "grad_norm": grad_norm,
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
        "applied": applied,
    }
    shardings = train_state_shardings(new_state, spec)
    return jax.lax.with_sharding_constraint(new_state, shardings), frozen, metrics


def put_batch(batch: BatchT, mesh: Mesh) -> BatchT:
    """A process's rows [B / num_processes, T], or micro-batches [A, B / num_processes, T], as
    global arrays split over the mesh's batch axes."""

    def put(x: Any) -> jax.Array:
        sharding = named(mesh, *[None] * (x.ndim - 2), "batch", None)
        return jax.make_array_from_process_local_data(sharding, x)

    return jax.tree.map(put, batch)
