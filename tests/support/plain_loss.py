"""Cross-entropy by its definition: what the chunked loss head is compared with."""

import jax
import jax.numpy as jnp

from jaxsft.gemma.attention import soft_cap


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
