"""The loss head: log-probabilities over a large vocabulary without logits in memory.

The loss of a token is a function of its log-probability (`TokenLoss`), so other objectives than
cross-entropy use the same head. Losses are returned as sums: an average of averages gives short
micro-batches too much weight. The one division is the caller's.

Axes: N = B·T positions, C positions of a chunk, D model, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsft.common.batch import Batch
from jaxsft.gemma.attention import soft_cap
from jaxsft.gemma.sharding import AXIS_TABLE, partition_spec

# Rows of the table that meet a chunk of tokens at once: 2048 divides 256,000 and 262,144, and the
# logits of 2048 x 2048 stay in a TPU's on-chip memory.
VOCAB_TILE = 2048
# Up to this logit cap softmax needs no subtraction of the maximum: with entries of the table up to
# 500, exp(70) · 2^18 · 500 < 3.4e38: no sum of exp(logit) · entry over 2^18 columns overflows.
MAX_CAP_WITHOUT_SHIFT = 70.0

# (log-probability of the targets [C], the batch's arrays at the same positions, [C] each) ->
# (loss [C], coefficient [C]): the loss's gradient is coefficient · gradient of -log-probability.
# A trainer may pass a larger tuple than `Batch`; each extra array has one value a position. It is
# called on positions of weight 0 as well, and its results there are dropped. Static in `jit`: use a
# named function.
TokenLoss = Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]]


def cross_entropy(log_probs: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """The `TokenLoss` of supervised training: -log-probability · weight."""
    weights: Any = batch.loss_weights_BT
    return -log_probs * weights, weights


def chunked_loss(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    batch: Batch,
    *,
    token_loss: TokenLoss,
    logit_cap: float | None,
    chunk_tokens: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """The summed loss, a float32 scalar; differentiable with respect to the hidden states alone.

    Positions whose loss weight is not 0 are gathered `chunk_tokens` at a time, each device its own
    rows, and only they cost work. A device stops after its last one: more loss tokens mean more
    chunks, and none is ever lost. The table is frozen: the gradient with respect to the hidden
    states is formed in the same pass over the table, and the backward pass only scales it.
    """

    def local(hidden, table, batch):
        flat, chunk = _flat(hidden, table, batch), _chunk(chunk_tokens, batch)
        with jax.named_scope("loss_head"):
            return _loss_sum(*flat, token_loss, logit_cap, chunk)[None]

    args = hidden_BTD, table_VD, batch
    return jnp.sum(_on_each_device(local, mesh, args))


def chunked_log_probs(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    batch: Batch,
    *,
    logit_cap: float | None,
    chunk_tokens: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """float32 [B, T]: log-probability of every target in nats, 0 where the loss weight is 0."""

    def local(hidden, table, batch):
        flat, chunk = _flat(hidden, table, batch), _chunk(chunk_tokens, batch)
        return target_log_probs(*flat, logit_cap, chunk).reshape(batch.tokens_BT.shape)

    return _on_each_device(local, mesh, (hidden_BTD, table_VD, batch))


def _flat(hidden_BTD: jax.Array, table_VD: jax.Array, batch: Batch) -> tuple[Any, Any, Any]:
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return hidden_ND, table_VD, flat_batch(batch)


def flat_batch(batch: Batch) -> Batch:
    """The batch's arrays as [N]."""
    return jax.tree.map(lambda x: jnp.asarray(x).reshape(-1), batch)


def _chunk(chunk_tokens: int, batch: Batch) -> int:
    return min(chunk_tokens, batch.tokens_BT.size)


def _on_each_device(local: Callable, mesh: Mesh | None, args: tuple) -> jax.Array:
    """`local` of each device's own rows and the whole table."""
    if mesh is None:
        return local(*args)
    rows = partition_spec("batch")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, partition_spec(), rows),
        out_specs=rows,
        axis_names=set(AXIS_TABLE["batch"]),
        check_vma=False,  # the loop's trip count differs from device to device on purpose
    )(*args)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _loss_sum(hidden_ND, table_VD, batch_N, token_loss, logit_cap, chunk) -> jax.Array:
    log_probs_N = target_log_probs(hidden_ND, table_VD, batch_N, logit_cap, chunk)
    losses_N, _ = token_loss(log_probs_N, batch_N)
    return jnp.sum(jnp.where(batch_N.loss_weights_BT != 0, losses_N, 0.0))


def loss_and_hidden_gradient(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    batch_N: Batch,
    token_loss: TokenLoss,
    logit_cap: float | None,
    chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """(loss sum, its gradient with respect to the hidden states [N, D]) in one pass over the table.

    `batch_N` is a `flat_batch`.
    """
    num_positions, dtype = hidden_ND.shape[0], hidden_ND.dtype
    table = table_VD.astype(dtype)
    num_loss, order = _loss_positions(batch_N.loss_weights_BT, chunk_tokens)

    def body(carry):
        start, loss_sum, gradient = carry
        rows, x, batch_C = _gather(order, start, hidden_ND, batch_N, chunk_tokens)
        targets: Any = batch_C.targets_BT
        log_probs, dx = _one_chunk(x, table, targets, logit_cap, with_gradient=True)
        losses, coefficients = token_loss(log_probs, batch_C)
        loss_sum = loss_sum + jnp.sum(jnp.where(rows < num_positions, losses, 0.0))
        dx = dx * coefficients[:, None]
        gradient = gradient.at[rows].set(dx.astype(dtype), mode="drop")
        return start + chunk_tokens, loss_sum, gradient

    start = jnp.int32(0), jnp.float32(0.0), jnp.zeros_like(hidden_ND)
    _, loss_sum, gradient = jax.lax.while_loop(lambda carry: carry[0] < num_loss, body, start)
    return loss_sum, gradient


def target_log_probs(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    batch_N: Batch,
    logit_cap: float | None,
    chunk_tokens: int,
) -> jax.Array:
    """float32 [N]: log-probability of every target in nats, 0 where the loss weight is 0."""
    table = table_VD.astype(hidden_ND.dtype)
    num_loss, order = _loss_positions(batch_N.loss_weights_BT, chunk_tokens)

    def body(carry):
        start, log_probs_N = carry
        rows, x, batch_C = _gather(order, start, hidden_ND, batch_N, chunk_tokens)
        log_probs, _ = _one_chunk(x, table, batch_C.targets_BT, logit_cap, with_gradient=False)
        return start + chunk_tokens, log_probs_N.at[rows].set(log_probs, mode="drop")

    start = jnp.int32(0), jnp.zeros(hidden_ND.shape[0], jnp.float32)
    return jax.lax.while_loop(lambda carry: carry[0] < num_loss, body, start)[1]


def _loss_positions(weights_N: Any, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(how many positions bear loss, all positions: these first and in order).

    Unused slots hold N, one past the last position: reads there give zeros, and writes are dropped.
    """
    mask_N, num_positions = weights_N != 0, weights_N.shape[0]
    order = jnp.nonzero(mask_N, size=num_positions + chunk, fill_value=num_positions)[0]
    return jnp.sum(mask_N, dtype=jnp.int32), order


def _gather(
    order: jax.Array, start: jax.Array, hidden_ND: jax.Array, batch_N: Batch, chunk: int
) -> tuple[jax.Array, jax.Array, Batch]:
    """A chunk's positions, hidden states and batch arrays."""
    rows = jax.lax.dynamic_slice(order, (start,), (chunk,))
    x_CD, batch_C = jax.tree.map(
        lambda x: x.at[rows].get(mode="fill", fill_value=0), (hidden_ND, batch_N)
    )
    return rows, x_CD, batch_C


def _backward(token_loss, logit_cap, chunk, gradient_ND, cotangent) -> tuple[Any, ...]:
    scaled = gradient_ND.astype(jnp.float32) * cotangent
    return scaled.astype(gradient_ND.dtype), None, None


_loss_sum.defvjp(loss_and_hidden_gradient, _backward)


def _one_chunk(
    x_CD, table_VD, target_C, logit_cap, *, with_gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """(log-probabilities of the targets [C], gradient [C, D] of minus their sum with respect to x),
    float32, in one pass over the vocabulary.

    Like flash attention (arXiv:2205.14135) with the table as keys and values: tile by tile, the
    logits' exponentials, their sum and their product with the table accumulate, and the sum divides
    at the end, so that no logit ever leaves the chip. The target's own term, p - 1, is computed
    separately in float32: a difference of two sums would be lost in bfloat16 where p is near 1.
    """
    num_tokens, vocab_size = x_CD.shape[0], table_VD.shape[0]
    tile = min(VOCAB_TILE, vocab_size)
    is_bounded = logit_cap is not None and logit_cap <= MAX_CAP_WITHOUT_SHIFT
    columns = jnp.arange(tile)

    def add_tile(carry, index):
        shift, total, dx = carry
        first = index * tile
        start = jnp.minimum(first, vocab_size - tile)  # the last tile may overlap the one before
        tile_VD = jax.lax.dynamic_slice_in_dim(table_VD, start, tile)
        raw = jnp.einsum("CD,VD->CV", x_CD, tile_VD, preferred_element_type=jnp.float32)
        logits = soft_cap(raw, logit_cap)
        if vocab_size % tile:
            logits = jnp.where(start + columns >= first, logits, -jnp.inf)
        if not is_bounded:
            new_shift = jnp.maximum(shift, jnp.max(logits, axis=-1))
            decay = jnp.exp(shift - new_shift)
            shift, total, dx = new_shift, total * decay, dx * decay[:, None]
        exp = jnp.exp(logits - shift[:, None])
        total = total + jnp.sum(exp, axis=-1)
        if with_gradient:
            slope = exp if logit_cap is None else exp * (1.0 - (logits / logit_cap) ** 2)
            others = jnp.where(start + columns == target_C[:, None], 0.0, slope)
            if vocab_size % tile and logit_cap is not None:
                others = jnp.where(start + columns >= first, others, 0.0)  # 0 · inf
            dx = dx + jnp.einsum(
                "CV,VD->CD",
                others.astype(x_CD.dtype),
                tile_VD,
                preferred_element_type=jnp.float32,
            )
        return (shift, total, dx), None

    shift = jnp.zeros(num_tokens) if is_bounded else jnp.full(num_tokens, -jnp.inf)
    start = (shift, jnp.zeros(num_tokens), jnp.zeros(x_CD.shape, jnp.float32))
    indices = jnp.arange(-(-vocab_size // tile))
    (shift, total, dx), _ = jax.lax.scan(add_tile, start, indices)

    target_CD = table_VD[target_C].astype(jnp.float32)
    raw = jnp.sum(x_CD.astype(jnp.float32) * target_CD, axis=-1)
    target_logit = soft_cap(raw, logit_cap)
    log_probs = -(jnp.log(total) + shift - target_logit)
    slope = 1.0 if logit_cap is None else 1.0 - (target_logit / logit_cap) ** 2
    return log_probs, dx / total[:, None] + (jnp.expm1(log_probs) * slope)[:, None] * target_CD
