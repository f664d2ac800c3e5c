"""Cross-entropy over a large vocabulary: the plain form (oracle) and the chunked one.

Both return (sum of the losses in nats, number of loss tokens); nothing is averaged here: averages
of averages weigh short micro-batches too much. The one division is the caller's.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxsft.attention import soft_cap
from jaxsft.sharding import AXIS_TABLE, partition_spec


def plain_cross_entropy(
    hidden_BTD: jax.Array,
    table_VD: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    logit_cap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """The definition, with [B, T, V] logits: -log softmax(logits)[target] where masked."""
    logits = jnp.einsum(
        "BTD,VD->BTV",
        hidden_BTD,
        table_VD.astype(hidden_BTD.dtype),
        preferred_element_type=jnp.float32,
    )
    log_probs = jax.nn.log_softmax(soft_cap(logits, logit_cap), axis=-1)
    losses = -jnp.take_along_axis(log_probs, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * mask_BT), jnp.sum(mask_BT, dtype=jnp.int32)


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
    table is frozen: the gradient of the hidden states is formed in the same pass over the logits,
    and the backward pass only scales it.
    """
    shape = (-1, hidden_BTD.shape[-1])

    def local(hidden, table, targets, mask):
        flat = hidden.reshape(shape), table, targets.reshape(-1), mask.reshape(-1)
        loss_sum = _chunked_sum(*flat, logit_cap, min(chunk_tokens, flat[0].shape[0]))
        return loss_sum[None], jnp.sum(mask, dtype=jnp.int32)[None]

    args = hidden_BTD, table_VD, targets_BT, mask_BT
    if mesh is None:
        loss_sum, num_tokens = local(*args)
    else:
        batch = partition_spec("batch")
        sums = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(batch, partition_spec(), batch, batch),
            out_specs=(partition_spec("batch"), partition_spec("batch")),
            axis_names=set(AXIS_TABLE["batch"]),
            check_vma=False,  # the loop's trip count differs from device to device on purpose
        )
        loss_sum, num_tokens = sums(*args)
    return jnp.sum(loss_sum), jnp.sum(num_tokens)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked_sum(hidden_ND, table_VD, targets_N, mask_N, logit_cap, chunk) -> jax.Array:
    return _sum_and_gradient(
        hidden_ND, table_VD, targets_N, mask_N, logit_cap, chunk, with_gradient=False
    )[0]


def _forward(hidden_ND, table_VD, targets_N, mask_N, logit_cap, chunk) -> tuple[jax.Array, Any]:
    return _sum_and_gradient(
        hidden_ND, table_VD, targets_N, mask_N, logit_cap, chunk, with_gradient=True
    )


def _backward(logit_cap, chunk, gradient_ND, cotangent) -> tuple[Any, ...]:
    scaled = gradient_ND.astype(jnp.float32) * cotangent
    return scaled.astype(gradient_ND.dtype), None, None, None


_chunked_sum.defvjp(_forward, _backward)


def _sum_and_gradient(
    hidden_ND, table_VD, targets_N, mask_N, logit_cap, chunk, *, with_gradient: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Loss sum (float32) and its gradient by hidden state [N, D], chunk by chunk."""
    num_positions, dtype = hidden_ND.shape[0], hidden_ND.dtype
    table = table_VD.astype(dtype)
    num_loss = jnp.sum(mask_N, dtype=jnp.int32)
    # Loss positions first, in order; the slots after them name position N, which no row has:
    # reads there are filled with zeros and writes dropped.
    order = jnp.nonzero(mask_N, size=num_positions + chunk, fill_value=num_positions)[0]

    def body(carry):
        start, loss_sum, gradient = carry
        rows = jax.lax.dynamic_slice(order, (start,), (chunk,))
        valid = rows < num_positions
        x = hidden_ND.at[rows].get(mode="fill", fill_value=0)
        target = targets_N.at[rows].get(mode="fill", fill_value=0)
        raw = jnp.einsum("CD,VD->CV", x, table, preferred_element_type=jnp.float32)
        logits = soft_cap(raw, logit_cap)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        losses = log_z - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        loss_sum = loss_sum + jnp.sum(jnp.where(valid, losses, 0.0))
        if gradient is not None:
            is_target = jnp.arange(logits.shape[1])[None, :] == target[:, None]
            d_logits = jnp.exp(logits - log_z[:, None]) - is_target
            if logit_cap is not None:
                d_logits = d_logits * (1.0 - (logits / logit_cap) ** 2)  # d tanh
            dx = jnp.einsum("CV,VD->CD", d_logits.astype(dtype), table)
            gradient = gradient.at[rows].set(dx, mode="drop")
        return start + chunk, loss_sum, gradient

    start = (jnp.int32(0), jnp.float32(0.0), jnp.zeros_like(hidden_ND) if with_gradient else None)
    _, loss_sum, gradient = jax.lax.while_loop(lambda carry: carry[0] < num_loss, body, start)
    return loss_sum, gradient
