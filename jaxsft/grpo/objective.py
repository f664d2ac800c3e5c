"""GRPO's objective: the loss of a token as the loss head takes it, and a group's advantages.

GRPO (arXiv:2402.03300), DAPO (arXiv:2503.14476) and Dr. GRPO (arXiv:2503.20783) with the names of
TRL's options. They differ in what a token counts (`completion_weights`); the train step's one
division by the sum of the weights makes each of them.

Axes: P prompts of a rollout, G completions of a prompt (its group), B rows, T positions.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxsft.common.batch import BoolArray, Float32Array, Int32Array

Float64Array = npt.NDArray[np.float64]


class RolloutBatch(NamedTuple):
    """`Batch`, and what the objective knows of the target at every position, float32 [B, T]."""

    tokens_BT: Int32Array
    targets_BT: Int32Array
    loss_weights_BT: Float32Array
    segment_ids_BT: Int32Array
    positions_BT: Int32Array
    old_BT: Float32Array  # its log-probability under the policy that the rollout began with
    reference_BT: Float32Array  # under the reference
    advantages_BT: Float32Array  # of its completion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """The `TokenLoss` of GRPO; options as in TRL 1.16's GRPOConfig.

    With r = e^(log p - old), A the advantage and d = reference - log p, the loss of a token is

        -min(r A, clip(r, 1 - epsilon, 1 + epsilon_high) A) + beta k,   k = e^d - d - 1,

    k being the k3 estimate of KL(policy || reference) (http://joschu.net/blog/kl-approx.html). With
    `use_bias_correction_kl` k is multiplied by r (DeepSeek-V3.2, arXiv:2512.02556). The coefficient
    is minus the derivative with respect to log p, old and reference being constants:

        c = A r [not clipped] + beta (e^d - 1),     or with r k in the place of k
        c = A r [not clipped] + beta r d,

    since d/dlogp (r k) = r k + r (1 - e^d) = -r d. In expectation over the policy that drew the
    tokens, the second is exactly the gradient of the KL, the first is not. Clipped: A > 0 and
    r > 1 + epsilon_high, or A < 0 and r < 1 - epsilon.

    With one update a rollout (`num_iterations` 1) old is the policy itself: r is 1, its derivative
    too, and `old_BT` is not read. Without beta, `reference_BT` is not read.
    """

    loss_type: str  # grpo, dapo or dr_grpo
    epsilon: float
    epsilon_high: float
    beta: float
    use_bias_correction_kl: bool
    num_iterations: int

    def __call__(self, log_probs: jax.Array, batch: RolloutBatch) -> tuple[jax.Array, jax.Array]:
        """(losses, coefficients) of the tokens at which `log_probs` stand, in nats."""
        advantages: Any = batch.advantages_BT
        old = batch.old_BT if self.num_iterations > 1 else log_probs
        ratios = jnp.exp(log_probs - old)
        clipped = jnp.clip(ratios, 1 - self.epsilon, 1 + self.epsilon_high)
        losses = -jnp.minimum(ratios * advantages, clipped * advantages)
        is_clipped = jnp.where(
            advantages > 0, ratios > 1 + self.epsilon_high, ratios < 1 - self.epsilon
        )
        coefficients = jnp.where(is_clipped, 0.0, ratios * advantages)
        if self.beta:
            apart = batch.reference_BT - log_probs
            divergences, pulls = jnp.expm1(apart) - apart, jnp.expm1(apart)
            if self.use_bias_correction_kl:
                divergences, pulls = ratios * divergences, ratios * apart
            losses += self.beta * divergences
            coefficients += self.beta * pulls
        if self.loss_type == "dr_grpo":  # its weights are the denominator's alone
            return losses, coefficients
        weights: Any = batch.loss_weights_BT
        return losses * weights, coefficients * weights


def completion_weights(
    lengths: Sequence[int], loss_type: str, max_completion_length: int
) -> Float64Array:
    """The loss weight of every token of each completion; `lengths` are their tokens.

    The train step divides the summed loss by the summed weights, over all completions of the batch:

    - dapo: 1, so the loss is the mean over tokens.
    - grpo: 1 / length, so it is the mean over completions of the mean over their tokens.
    - dr_grpo: `max_completion_length` / length. `Objective` does not multiply by it, so the loss is
      the sum over tokens, divided by completions × `max_completion_length`.

    Completions that shall not count, cut off ones and groups without variance, are left out of the
    batch or have weight 0: the same, as neither is in the denominator. TRL 1.16 takes masked
    completions out of dapo's denominator alone, and groups without variance out of none.
    """
    if loss_type == "dapo":
        return np.ones(len(lengths))
    per_completion = max_completion_length if loss_type == "dr_grpo" else 1
    return per_completion / np.asarray(lengths, np.float64)


def group_advantages(
    rewards_PG: npt.ArrayLike, scale_rewards: str
) -> tuple[Float64Array, BoolArray]:
    """(advantages [P, G], which groups teach anything [P]), in float64.

    An advantage is the reward minus its group's mean. With `scale_rewards` "group" it is divided by
    the standard deviation of the group, with "batch" by that of all rewards (of a sample, + 1e-4,
    as in TRL), with "none" by nothing. A group of equal rewards teaches nothing: it is not live.
    """
    rewards_PG = np.asarray(rewards_PG, np.float64)
    advantages_PG = rewards_PG - rewards_PG.mean(axis=1, keepdims=True)
    is_live_P = np.ptp(rewards_PG, axis=1) > 1e-8  # sums of the same rewards may differ by rounding
    if scale_rewards == "group":
        advantages_PG /= rewards_PG.std(axis=1, ddof=1, keepdims=True) + 1e-4
    elif scale_rewards == "batch":
        advantages_PG /= rewards_PG.std(ddof=1) + 1e-4
    return advantages_PG, is_live_P
