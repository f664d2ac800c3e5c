"""Loss, gradients and advantages of GRPO are those of TRL's GRPOTrainer, over several updates.

It counts what is masked or dead in more denominators than `completion_weights` does: its loss is
ours times the share that counts.
"""

import copy
import dataclasses
from typing import Any

import numpy as np
import peft
import pytest
import transformers
import trl
from support.both_steps import MESH, ROW_LENGTH, Ready, both_steps, layout_of
from support.grpo_twin import GROUP, MAX_NEW_TOKENS, GivenRollout, PeerTrainer, make_rollout
from support.lora_twins import (
    AdapterTensors,
    make_peft,
    max_relative_difference,
    our_tensors,
    twin,
    with_adapter,
)
from support.plain_loss import OBJECTIVE

from jaxsft.gemma import lora
from jaxsft.gemma.model import Gemma
from jaxsft.grpo.batches import CompletionRows, split_rows
from jaxsft.grpo.objective import Objective, completion_weights, group_advantages
from jaxsft.hints import hint_for
from jaxsft.step.score import token_log_probs
from jaxsft.step.train_step import put_batch, train_step

pytestmark = pytest.mark.usefixtures("quick_compilation")

LEARNING_RATE = 0.1  # of plain gradient descent: some ratios leave the clip range, most do not
KL: dict[str, dict[str, Any]] = {
    "no KL": {"beta": 0.0},
    "k3": {"beta": 0.1, "use_bias_correction_kl": False},
    "k3 × ratio": {"beta": 0.1, "use_bias_correction_kl": True},
}
CORE = {("grpo", "no KL"), ("dapo", "k3 × ratio"), ("dr_grpo", "k3")}
CASES = [
    pytest.param(*case, marks=() if case in CORE else pytest.mark.slow)
    for case in ((loss_type, kl) for loss_type in ("grpo", "dapo", "dr_grpo") for kl in KL)
]


def models() -> tuple[peft.PeftModel, peft.PeftModel, Gemma, Gemma]:
    """(policy, reference) of PEFT, and ours; the two differ in the adapter."""
    hf_model, model = twin("gemma2", num_hidden_layers=1)
    policy, reference = (make_peft(hf_model, random_b=True, seed=seed) for seed in (1, 2))
    return policy, reference, with_adapter(model, policy), with_adapter(model, reference)


def peer_of(
    policy: peft.PeftModel, reference: peft.PeftModel, rollout: GivenRollout, objective: Objective
) -> PeerTrainer:
    settings = dataclasses.asdict(objective)
    settings |= {"mask_truncated_completions": True, "scale_rewards": "none"}
    return PeerTrainer(copy.deepcopy(policy), reference, rollout, **settings)


def our_updates(
    ready: Ready, reference: Gemma, rollout: GivenRollout, objective: Objective, num_updates: int
) -> tuple[float, list[tuple[float, AdapterTensors]]]:
    """(the share of TRL's denominator that counts here, loss and gradients of each update)."""
    rewards_PG = np.reshape(rollout.rewards, (-1, GROUP))
    advantages_PG, is_live_P = group_advantages(rewards_PG, "none")
    counts = np.flatnonzero(np.repeat(is_live_P, GROUP) & rollout.has_stopped)
    rows = CompletionRows(
        [rollout.prompts[i] for i in counts],
        [rollout.completions[i] for i in counts],
        row_length=ROW_LENGTH,
        num_rows=2 * len(counts),
    )
    state, frozen, spec = ready
    scored, parts = put_batch(rows.batch, MESH), lora.split(reference)
    old, of_reference = (
        rows.read(token_log_probs(adapter, frozen, scored, spec=spec.model))
        for adapter in (state.adapter, parts[1])
    )
    batch = rows.rollout_batch(
        weights=completion_weights(rows.lengths, objective.loss_type, MAX_NEW_TOKENS),
        advantages=advantages_PG.reshape(-1)[counts],
        old=old,
        reference=of_reference,
    )
    batch, results = put_batch(split_rows(batch, len(counts)), MESH), []
    for _ in range(num_updates):
        state, frozen, metrics = train_step(state, frozen, batch, spec=spec)
        assert int(metrics["num_loss_tokens"]) == sum(rows.lengths)
        gradients = our_tensors(parts[0], state.moments.trace, parts[2])
        results.append((float(metrics["loss"]), gradients))
    sizes = np.ones(len(rollout.completions))
    if objective.loss_type == "dapo":
        sizes = rollout.has_stopped * [len(ids) for ids in rollout.completions]
    return sizes[counts].sum() / sizes.sum(), results


@pytest.mark.parametrize(("loss_type", "kl"), CASES)
def test_three_updates_equal_trl(loss_type: str, kl: str) -> None:
    """Without KL, a group of equal rewards is among the rollout."""
    rollout = make_rollout(3 + (kl == "no KL"))
    rollout.rewards[3 * GROUP :] = [0.2] * len(rollout.rewards[3 * GROUP :])
    objective = dataclasses.replace(OBJECTIVE, loss_type=loss_type, **KL[kl])
    policy, reference, our_policy, our_reference = models()
    peer = peer_of(policy, reference, rollout, objective)
    expected: list[tuple[float, AdapterTensors]] = []
    settings: Any = {"learning_rate": LEARNING_RATE, "accumulation_steps": 2}
    for ready in both_steps(our_policy, layout_of(our_policy), token_loss=objective, **settings):
        share, results = our_updates(ready, our_reference, rollout, objective, 3)
        if not expected:
            assert (share < 1) == (loss_type != "dapo" or kl == "no KL")
            for _ in results:
                loss, gradients = peer.loss_and_gradients()
                expected.append((loss / share, {k: v / share for k, v in gradients.items()}))
                peer.descend(LEARNING_RATE / share)
            assert 0 < peer.last("clip_ratio/region_mean") < 0.5
        for (our_loss, our_gradients), (loss, gradients) in zip(results, expected, strict=True):
            assert our_loss == pytest.approx(loss, abs=1e-5)
            # Float32 over an update or two; 2e-5 was seen.
            assert max_relative_difference(our_gradients, gradients) <= 1e-4


def test_one_update_needs_no_old_log_probabilities() -> None:
    rollout = make_rollout(3)
    objective = dataclasses.replace(OBJECTIVE, num_iterations=1, **KL["k3 × ratio"])
    policy, reference, our_policy, our_reference = models()
    peer = peer_of(policy, reference, rollout, objective)
    assert "old_per_token_logps" not in peer.inputs
    loss, gradients = peer.loss_and_gradients()
    _, fused = both_steps(our_policy, layout_of(our_policy), token_loss=objective)
    _, [(our_loss, our_gradients)] = our_updates(fused, our_reference, rollout, objective, 1)
    assert our_loss == pytest.approx(loss, abs=1e-5)
    assert max_relative_difference(our_gradients, gradients) <= 1e-4


@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
def test_advantages_equal_trl(scale_rewards: str) -> None:
    """A group of equal rewards among them."""
    rollout = make_rollout(4)
    rollout.rewards[GROUP : 2 * GROUP] = [0.2] * GROUP
    policy, reference, *_ = models()
    peer = PeerTrainer(policy, reference, rollout, scale_rewards=scale_rewards)
    advantages_PG, _ = group_advantages(np.reshape(rollout.rewards, (-1, GROUP)), scale_rewards)
    np.testing.assert_allclose(peer.inputs["advantages"], advantages_PG.reshape(-1), atol=1e-6)


def test_every_option_of_trl_is_answered() -> None:
    own = {field.name for field in dataclasses.fields(trl.GRPOConfig)}
    own -= {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    ours = {"rollout.num_prompts", "eval.temperature", "adam_epsilon", "max_steps"}
    assert [name for name in own if not hint_for(name, ours)] == []
