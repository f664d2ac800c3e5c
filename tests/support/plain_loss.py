"""What the loss head is compared with: log-probabilities by their definition, GRPO's objective."""

import jax
import jax.numpy as jnp

from jaxsft.gemma.attention import soft_cap
from jaxsft.grpo.objective import Objective, RolloutBatch


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


OBJECTIVE = Objective(
    loss_type="dapo",
    epsilon=0.2,
    epsilon_high=0.28,
    beta=0.1,
    use_bias_correction_kl=False,
    num_iterations=3,
)


def plain_objective(log_probs: jax.Array, batch: RolloutBatch, objective: Objective) -> jax.Array:
    """The objective's losses, to be differentiated by JAX: TRL's lines of it."""
    old = batch.old_BT if objective.num_iterations > 1 else jax.lax.stop_gradient(log_probs)
    ratio, advantages = jnp.exp(log_probs - old), batch.advantages_BT
    kept = jnp.clip(ratio, 1 - objective.epsilon, 1 + objective.epsilon_high)
    losses = -jnp.minimum(ratio * advantages, kept * advantages)
    apart = batch.reference_BT - log_probs
    k3 = jnp.exp(apart) - apart - 1
    losses += objective.beta * (k3 * ratio if objective.use_bias_correction_kl else k3)
    return losses if objective.loss_type == "dr_grpo" else losses * batch.loss_weights_BT
