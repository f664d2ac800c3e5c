"""GRPO's objective by hand, against autodiff, and advantages against float64."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.plain_loss import OBJECTIVE, plain_objective

from jaxsft.grpo.batches import CompletionRows
from jaxsft.grpo.objective import Objective, RolloutBatch, completion_weights, group_advantages

LOSS_TYPES = ("grpo", "dapo", "dr_grpo")


def change(**settings: Any) -> Objective:
    return dataclasses.replace(OBJECTIVE, **settings)


def test_a_table_by_hand() -> None:
    """Two prompts, two completions each, of at most three tokens."""
    advantages_PG, is_live_P = group_advantages([[1.2, 0.2], [0.0, 1.0]], "none")
    np.testing.assert_allclose(advantages_PG, [[0.5, -0.5], [-0.5, 0.5]])
    assert is_live_P.all()
    ratios = [[1.0, 1.5, 0.5], [1.0, 1.5, 0.5], [1.0, 1.5], [0.5]]
    # -min(r A, clip(r, 0.8, 1.28) A); clipped are 1.5 for A > 0, 0.5 for A < 0.
    policy = [[-0.5, -0.64, -0.25], [0.5, 0.75, 0.4], [0.5, 0.75], [-0.25]]
    slopes = [[0.5, 0.0, 0.25], [-0.5, -0.75, 0.0], [-0.5, -0.75], [0.25]]
    # The reference's probability is twice the policy's: k3 is 2 - 1 - log 2 at every token.
    k3 = 1 - math.log(2)
    expected = {
        (False, "grpo"): ((-1.39 / 3 + 1.65 / 3 + 1.25 / 2 - 0.25) / 4 + 0.1 * k3),
        (False, "dapo"): (-1.39 + 1.65 + 1.25 - 0.25) / 9 + 0.1 * k3,
        (False, "dr_grpo"): (-1.39 + 1.65 + 1.25 - 0.25) / 12 + 0.1 * k3 * 9 / 12,
        (True, "grpo"): ((-1.39 / 3 + 1.65 / 3 + 1.25 / 2 - 0.25) / 4)
        + 0.1 * k3 * (1 + 1 + 2.5 / 2 + 0.5) / 4,
        (True, "dapo"): (-1.39 + 1.65 + 1.25 - 0.25) / 9 + 0.1 * k3 * 9 / 9,
        (True, "dr_grpo"): (-1.39 + 1.65 + 1.25 - 0.25) / 12 + 0.1 * k3 * 9 / 12,
    }
    lengths = [len(of_one) for of_one in ratios]
    rows = CompletionRows([[1]] * 4, [[2] * n for n in lengths], row_length=8, num_rows=4)
    now = [np.log(np.array(of_one) / 4) for of_one in ratios]  # the old probability is a quarter
    for (is_unbiased, loss_type), loss in expected.items():
        batch = rows.rollout_batch(
            weights=completion_weights(lengths, loss_type, 3),
            advantages=advantages_PG.reshape(-1),
            old=[math.log(1 / 4)] * 4,
            reference=[x + math.log(2) for x in now],
        )
        objective = change(loss_type=loss_type, use_bias_correction_kl=is_unbiased)
        losses_BT, coefficients_BT = objective(jnp.asarray(rows.write(now)), batch)
        weights_BT = batch.loss_weights_BT
        counted_BT = np.where(weights_BT != 0, losses_BT, 0)
        assert counted_BT.sum() / weights_BT.sum() == pytest.approx(loss, rel=1e-6)
        if loss_type == "dapo":
            pulls = [np.array(r) * math.log(2) if is_unbiased else np.ones(len(r)) for r in ratios]
            kls = [k3 * np.array(r) if is_unbiased else k3 * np.ones(len(r)) for r in ratios]
            for read, base, more in zip(rows.read(losses_BT), policy, kls, strict=True):
                np.testing.assert_allclose(read, np.array(base) + 0.1 * more, rtol=1e-5)
            for read, base, more in zip(rows.read(coefficients_BT), slopes, pulls, strict=True):
                np.testing.assert_allclose(read, np.array(base) + 0.1 * more, rtol=1e-5)


@pytest.mark.parametrize("num_iterations", [1, 3])
@pytest.mark.parametrize("is_unbiased", [False, True])
@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo"])
def test_the_coefficient_is_the_derivative(
    loss_type: str, is_unbiased: bool, num_iterations: int
) -> None:
    rng = np.random.default_rng(0)
    now, old, reference = rng.normal(-1, 0.4, (3, 1, 500)).astype(np.float32)
    advantages, weights = rng.normal(size=(2, 1, 500)).astype(np.float32)
    zeros = np.zeros((1, 500), np.int32)
    batch = RolloutBatch(zeros, zeros, abs(weights), zeros, zeros, old, reference, advantages)
    objective = change(
        loss_type=loss_type, use_bias_correction_kl=is_unbiased, num_iterations=num_iterations
    )

    def total(log_probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = plain_objective(log_probs, batch, objective)
        return jnp.sum(losses), losses

    slopes, expected = jax.grad(total, has_aux=True)(jnp.asarray(now))
    losses, coefficients = objective(jnp.asarray(now), batch)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(coefficients, -slopes, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
def test_advantages_in_float64(scale_rewards: str) -> None:
    rng = np.random.default_rng(3)
    rewards_PG = rng.choice([0.0, 0.2, 1.2], (6, 5))
    rewards_PG[2], rewards_PG[4] = 0.2, [0.1 + 0.2, 0.3, 0.3, 0.3, 0.3]  # equal but for rounding
    advantages_PG, is_live_P = group_advantages(rewards_PG.tolist(), scale_rewards)
    assert advantages_PG.dtype == np.float64
    assert is_live_P.tolist() == [len({*np.round(row, 9)}) > 1 for row in rewards_PG]
    flat = [float(reward) for reward in rewards_PG.reshape(-1)]
    for p, row in enumerate(rewards_PG):
        mean = math.fsum(row) / 5
        of = {"none": None, "group": [*map(float, row)], "batch": flat}[scale_rewards]
        scale = 1.0
        if of is not None:
            middle = math.fsum(of) / len(of)
            scale = math.sqrt(math.fsum((x - middle) ** 2 for x in of) / (len(of) - 1)) + 1e-4
        expected = [(reward - mean) / scale for reward in row]
        np.testing.assert_allclose(advantages_PG[p], expected, rtol=1e-12, atol=1e-12)
