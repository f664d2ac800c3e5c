"""Cross-entropy over a large vocabulary: the plain form (oracle) and the chunked one.

Both return (sum of the losses in nats, number of loss tokens); nothing is averaged here: averages
of averages weigh short micro-batches too much. The one division is the caller's.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsft.gemma.attention import soft_cap
from jaxsft.gemma.sharding import AXIS_TABLE, partition_spec

# Rows of the table that meet a chunk of tokens at once: 2048 divides 256,000 and 262,144, and the
# logits of 2048 x 2048 stay in a TPU's on-chip memory.
VOCAB_TILE = 2048
# Up to this cap the maximum is not needed: no sum of exp(logit) · entry over 2^18 columns overflows
# float32 for entries of the table up to 500, as exp(70) · 2^18 · 500 < 3.4e38.
MAX_CAP_WITHOUT_SHIFT = 70.0


def chunked_cross_entropy(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    logit_cap: float | None,
    chunk_tokens: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The same sum without logits in memory; the head does work for loss-carrying positions alone.

    Positions that bear loss are gathered `chunk_tokens` at a time, each device its own rows; a
    device stops after its last one, so more loss tokens mean more chunks and none is ever lost. The
    table is frozen: the gradient of the hidden states is formed in the same pass over the table,
    and the backward pass only scales it.
    """

    def local(hidden, table, targets, mask):
        flat = _flat(hidden, table, targets, mask)
        with jax.named_scope("loss_head"):
            loss_sum = _chunked_sum(*flat, logit_cap, min(chunk_tokens, flat[0].shape[0]))
        return loss_sum[None], jnp.sum(mask, dtype=jnp.int32)[None]

    args = hidden_BTD, table_VD, targets_BT, mask_BT
    loss_sum, num_tokens = _on_each_device(local, mesh, args, (partition_spec("batch"),) * 2)
    return jnp.sum(loss_sum), jnp.sum(num_tokens)


def chunked_token_losses(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    logit_cap: float | None,
    chunk_tokens: int,
    mesh: Mesh | None = None,
) -> jax.Array:
    """float32 [B, T]: the loss in nats of every position, 0 where the mask is false."""

    def local(hidden, table, targets, mask):
        flat = _flat(hidden, table, targets, mask)
        losses = token_losses(*flat, logit_cap, min(chunk_tokens, flat[0].shape[0]))
        return losses.reshape(targets.shape)

    args = hidden_BTD, table_VD, targets_BT, mask_BT
    return _on_each_device(local, mesh, args, partition_spec("batch"))


def _flat(hidden_BTD, table_VD, targets_BT, mask_BT) -> tuple[Any, Any, Any, Any]:
    hidden_ND = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    return hidden_ND, table_VD, targets_BT.reshape(-1), mask_BT.reshape(-1)


def _on_each_device(local: Callable, mesh: Mesh | None, args: tuple, out_specs: Any) -> Any:
    """`local` of each device's own rows and the whole table."""
    if mesh is None:
        return local(*args)
    batch = partition_spec("batch")
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(batch, partition_spec(), batch, batch),
        out_specs=out_specs,
        axis_names=set(AXIS_TABLE["batch"]),
        check_vma=False,  # the loop's trip count differs from device to device on purpose
    )(*args)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked_sum(hidden_ND, table_VD, targets_N, mask_N, logit_cap, chunk) -> jax.Array:
    return jnp.sum(token_losses(hidden_ND, table_VD, targets_N, mask_N, logit_cap, chunk))


def loss_and_gradient(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    mask_N: jax.Array,
    logit_cap: float | None,
    chunk_tokens: int,
) -> tuple[jax.Array, jax.Array]:
    """(loss sum in nats, its gradient by hidden state [N, D]) in one pass over the table."""
    num_positions, dtype = hidden_ND.shape[0], hidden_ND.dtype
    table = table_VD.astype(dtype)
    num_loss, order = _loss_positions(mask_N, chunk_tokens)

    def body(carry):
        start, loss_sum, gradient = carry
        rows = jax.lax.dynamic_slice(order, (start,), (chunk_tokens,))
        x = hidden_ND.at[rows].get(mode="fill", fill_value=0)
        target = targets_N.at[rows].get(mode="fill", fill_value=0)
        losses, dx = _one_chunk(x, table, target, logit_cap, with_gradient=True)
        loss_sum = loss_sum + jnp.sum(jnp.where(rows < num_positions, losses, 0.0))
        gradient = gradient.at[rows].set(dx.astype(dtype), mode="drop")
        return start + chunk_tokens, loss_sum, gradient

    start = jnp.int32(0), jnp.float32(0.0), jnp.zeros_like(hidden_ND)
    _, loss_sum, gradient = jax.lax.while_loop(lambda carry: carry[0] < num_loss, body, start)
    return loss_sum, gradient


def token_losses(
    hidden_ND: jax.Array,
    table_VD: jax.Array,
    targets_N: jax.Array,
    mask_N: jax.Array,
    logit_cap: float | None,
    chunk_tokens: int,
) -> jax.Array:
    """float32 [N]: the loss in nats of every position, 0 where `mask_N` is false."""
    table = table_VD.astype(hidden_ND.dtype)
    num_loss, order = _loss_positions(mask_N, chunk_tokens)

    def body(carry):
        start, losses_N = carry
        rows = jax.lax.dynamic_slice(order, (start,), (chunk_tokens,))
        x = hidden_ND.at[rows].get(mode="fill", fill_value=0)
        target = targets_N.at[rows].get(mode="fill", fill_value=0)
        losses, _ = _one_chunk(x, table, target, logit_cap, with_gradient=False)
        return start + chunk_tokens, losses_N.at[rows].set(losses, mode="drop")

    start = jnp.int32(0), jnp.zeros(hidden_ND.shape[0], jnp.float32)
    return jax.lax.while_loop(lambda carry: carry[0] < num_loss, body, start)[1]


def _loss_positions(mask_N: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(how many bear loss, all positions: these first and in order).

    The slots after them name position N, which no row has: reads there are filled with zeros and
    writes dropped.
    """
    num_positions, num_loss = mask_N.shape[0], jnp.sum(mask_N, dtype=jnp.int32)
    order = jnp.nonzero(mask_N, size=num_positions + chunk, fill_value=num_positions)[0]
    return num_loss, order


def _backward(logit_cap, chunk, gradient_ND, cotangent) -> tuple[Any, ...]:
    scaled = gradient_ND.astype(jnp.float32) * cotangent
    return scaled.astype(gradient_ND.dtype), None, None, None


_chunked_sum.defvjp(loss_and_gradient, _backward)


def _one_chunk(
    x_CD, table_VD, target_C, logit_cap, *, with_gradient: bool
) -> tuple[jax.Array, jax.Array]:
    """Losses [C] and their gradients by x [C, D], float32, in one pass over the vocabulary.

    Like flash attention (arXiv:2205.14135) with the table as keys and values: tile by tile, the
    logits' exponentials, their sum and their product with the table accumulate, and the sum divides
    at the end, so that no logit ever leaves the chip. The target's own term, p - 1, is formed apart
    in float32: as a difference of two sums it would drown in bfloat16 where p is near 1.
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
    losses = jnp.log(total) + shift - target_logit
    slope = 1.0 if logit_cap is None else 1.0 - (target_logit / logit_cap) ** 2
    return losses, dx / total[:, None] + (jnp.expm1(-losses) * slope)[:, None] * target_CD
