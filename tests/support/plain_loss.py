"""What the loss head is compared with: log-probabilities by their definition, GRPO's objective."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxsft.gemma.attention import soft_cap


def plain_log_probs(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, logit_cap: float | None
) -> jax.Array:
    """log softmax(logits)[target], float32 [B, T], with [B, T, V] logits in memory."""
    logits = jnp.einsum(
        "BTD,VD->BTV",
        hidden_BTD,
        table_VD.astype(hidden_BTD.dtype),
        preferred_element_type=jnp.float32,
    )
    log_probs = jax.nn.log_softmax(soft_cap(logits, logit_cap), axis=-1)
    return jnp.take_along_axis(log_probs, targets_BT[..., None], axis=-1)[..., 0]


class Rollouts(NamedTuple):
    """`Batch` with what GRPO knows of every token."""

    tokens_BT: Any
    targets_BT: Any
    loss_weights_BT: Any
    segment_ids_BT: Any
    positions_BT: Any
    old_BT: Any
    reference_BT: Any
    advantages_BT: Any


LOW, HIGH, BETA = 0.2, 0.28, 0.1


def clipped(log_probs: jax.Array, batch: Rollouts) -> jax.Array:
    """-min(r A, clip(r) A) + beta k3, times the weight (arXiv:2402.03300, arXiv:2503.14476)."""
    ratio, advantages = jnp.exp(log_probs - batch.old_BT), batch.advantages_BT
    gain = jnp.minimum(ratio * advantages, jnp.clip(ratio, 1 - LOW, 1 + HIGH) * advantages)
    apart = batch.reference_BT - log_probs
    return (BETA * (jnp.expm1(apart) - apart) - gain) * batch.loss_weights_BT


def clipped_token_loss(log_probs: jax.Array, batch: Rollouts) -> tuple[jax.Array, jax.Array]:
    """`clipped` as the head takes it: c = A r [not clipped] - beta (1 - e^(reference - log p))."""
    ratio, advantages = jnp.exp(log_probs - batch.old_BT), batch.advantages_BT
    is_clipped = jnp.where(advantages > 0, ratio > 1 + HIGH, ratio < 1 - LOW)
    coefficient = jnp.where(is_clipped, 0.0, advantages * ratio)
    coefficient += BETA * jnp.expm1(batch.reference_BT - log_probs)
    return clipped(log_probs, batch), coefficient * batch.loss_weights_BT
