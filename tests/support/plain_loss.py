"""Log-probabilities by their definition: what the chunked loss head is compared with."""

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
