"""Causal attention over packed segments: the mask, and the XLA reference.

Axes: B batch, T query position, S key position, K KV heads, G query heads per KV head, H head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Far below any logit, far from float32's overflow: exp() of it is exactly 0.
MASKED_LOGIT = -1e30


class Tokens(NamedTuple):
    """Tokens' `positions` inside their segment, and their `segment_ids` (0 is padding)."""

    positions: jax.Array  # int32 [B, T]
    segment_ids: jax.Array  # int32 [B, T]


def attention_mask(query: Tokens, key: Tokens, window: int | None) -> jax.Array:
    """bool [B, T, S]: the key is in the query's segment, not after it, and in the window.

    A window of w sees w keys, itself included: k > q - w.
    """
    distance = query.positions[:, :, None] - key.positions[:, None, :]
    mask = (query.segment_ids[:, :, None] == key.segment_ids[:, None, :]) & (distance >= 0)
    return mask if window is None else mask & (distance < window)


def soft_cap(logits: jax.Array, cap: float | None) -> jax.Array:
    """cap · tanh(logits / cap), or the logits themselves (Gemma 2, arXiv:2408.00118)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def attend(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    *,
    scale: float,
    logit_cap: float | None,
) -> jax.Array:
    """softmax(cap(scale · q kᵀ)) v with grouped KV heads -> [B, T, N, H] in q's dtype.

    Logits and softmax are float32 whatever the input dtype. Query head n uses KV head n // G.
    """
    batch, length, num_heads, head_dim = q_BTNH.shape
    num_kv_heads = k_BSKH.shape[2]
    q = q_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", q, k_BSKH, preferred_element_type=jnp.float32)
    logits = soft_cap(logits * scale, logit_cap)
    logits = jnp.where(mask_BTS[:, None, None], logits, MASKED_LOGIT)
    weights = jax.nn.softmax(logits, axis=-1).astype(v_BSKH.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v_BSKH)
    return out.reshape(batch, length, num_heads, head_dim)
