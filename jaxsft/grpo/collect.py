"""One rollout with its rewards, as the batch of its updates."""

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsft.common.batch import Batch
from jaxsft.common.hosts import on_host
from jaxsft.config import GrpoConfig
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.grpo.batches import split_rows
from jaxsft.grpo.objective import RolloutBatch, completion_weights
from jaxsft.grpo.prompts import Prompts, TaskPrompt
from jaxsft.grpo.rewarded_rollout import RewardedRollout, mean_divergence, rewarded
from jaxsft.grpo.rollouts import Rollout, roll_out
from jaxsft.grpo.setup import completion_rows
from jaxsft.rewards.records import Completion
from jaxsft.rewards.scorer import Scorer
from jaxsft.run.preflight import TimedSteps
from jaxsft.run.setup import Setup
from jaxsft.step.score import token_log_probs
from jaxsft.step.train_step import put_batch, train_step

_ROLLOUTS_TO_TIME = 2  # to fit the schedule to a deadline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learner:
    """What a rollout and its update need besides the `Setup`.

    `reference` is the adapter that the run started from; None where no KL asks for it.
    """

    config: GrpoConfig
    prompts: Prompts
    tokenizer: Tokenizer
    scorer: Scorer
    template: AnswerTemplate
    reference: Any

    def of_rollout(self, number: int) -> list[TaskPrompt]:
        """The prompts of a rollout, counted from 0."""
        config = self.config
        return self.prompts.of_rollout(number, config.rollout.num_prompts, config.seed)


def collect(
    learner: Learner,
    setup: Setup,
    number: int,
    thread: ThreadPoolExecutor,
    go_on: Callable[[str], None],
) -> tuple[RewardedRollout, RolloutBatch, dict[str, float]]:
    """Rollout `number` with its rewards, the batch of its updates, and its metrics.

    `go_on` is called with what is being done, and may raise: what was drawn is drawn again then.
    FloatingPointError where the policy gives no numbers any more.
    """
    config, spec = learner.config, setup.spec.model
    rollout, objective = config.rollout, config.objective
    began_s = time.monotonic()
    # ---- Rollout: a group of completions for each prompt ----
    prompts = learner.of_rollout(number)
    completions = roll_out(
        setup.state.adapter,
        setup.frozen,
        [each.ids for each in prompts],
        spec=spec,
        tokenizer=learner.tokenizer,
        group_size=rollout.num_generations,
        batch_size=rollout.batch_size,
        max_new_tokens=rollout.max_new_tokens,
        seed=config.seed,
        rollout=number,
        on_batch=lambda: go_on(f"rollout {number + 1}"),
    )
    if not np.isfinite(np.concatenate([each.log_probs for each in completions])).all():
        raise FloatingPointError(
            f"rollout {number + 1}: the model's log-probabilities are not finite, its adapter is "
            "of no use any more. Begin a new run with a learning_rate below "
            f"{config.learning_rate:g}, and from another adapter if this one was broken from the "
            "start (fork_from)"
        )
    drawn_s = time.monotonic()

    # ---- Rewards, while the device scores the completions under the reference ----
    go_on(f"rewards of rollout {number + 1}")
    tasks = [prompts[each.prompt].task for each in completions]
    scoring = thread.submit(
        learner.scorer, tasks, [Completion(each.text, each.stopped) for each in completions]
    )
    weigh = partial(
        rewarded,
        prompts,
        completions,
        weights=learner.scorer.weights,
        scale_rewards=objective.scale_rewards,
        mask_truncated=objective.mask_truncated_completions,
    )
    scored = list(range(len(completions)))
    if not (learner.scorer.user_files or any(task.tests for task in tasks)):
        scored = weigh(scoring.result()).kept  # these take no time, and only what counts is scored
    old, reference = _log_probs(learner, setup, [completions[i] for i in scored])
    scored_s = time.monotonic()
    found = weigh(scoring.result())
    rewarded_s = time.monotonic()

    # ---- Advantages, and the batch of the completions that count ----
    places = [scored.index(i) for i in found.kept]
    kept = [completions[i] for i in found.kept]
    reference = [reference[place] for place in places]
    rows = completion_rows(config, spec.mesh.size, kept)
    batch = rows.rollout_batch(
        weights=completion_weights(rows.lengths, objective.loss_type, rollout.max_new_tokens),
        advantages=found.advantages_N[found.kept],
        old=[old[place] for place in places],
        reference=reference,
    )
    metrics = found.metrics(learner.template)
    if learner.reference is not None:
        metrics["kl"] = mean_divergence([each.log_probs for each in kept], reference)
    metrics |= {"rollout_s": drawn_s - began_s, "reference_s": scored_s - drawn_s}
    batch = split_rows(batch, config.gradient_accumulation_steps)
    return found, batch, metrics | {"reward_s": rewarded_s - scored_s}


def _log_probs(
    learner: Learner, setup: Setup, completions: list[Rollout]
) -> tuple[list[Any], list[Any]]:
    """The log-probabilities of every token of the completions under the policy that drew them and
    under the reference, each as far as the objective reads it; else 0."""
    config, spec = learner.config, setup.spec.model
    rows = completion_rows(config, spec.mesh.size, completions)
    parts = split_rows(rows.batch, config.gradient_accumulation_steps)
    filled = [
        put_batch(Batch(*arrays), spec.mesh)
        for arrays in zip(*parts, strict=True)
        if arrays[2].any()
    ]

    def under(adapter: Any, is_read: bool) -> list[Any]:
        if not is_read or not completions:
            return [np.float32(0.0)] * len(completions)
        found = [token_log_probs(adapter, setup.frozen, part, spec=spec) for part in filled]
        return rows.read(np.concatenate([on_host(each) for each in found]))

    old = under(setup.state.adapter, config.objective.num_iterations > 1)
    return old, under(learner.reference, learner.reference is not None)


def time_rollouts(
    learner: Learner, go_on: Callable[[str], None], setup: Setup
) -> tuple[Setup, TimedSteps]:
    """Times the run's first rollouts with their updates, after one that compiles, on a copy of the
    state. Returns the new setup and the seconds a step; the given setup is donated."""
    now = dataclasses.replace(setup, state=jax.tree.map(jnp.copy, setup.state))
    num_iterations, seconds = learner.config.objective.num_iterations, []
    with ThreadPoolExecutor(1) as thread:
        for number in range(1 + _ROLLOUTS_TO_TIME):
            began_s = time.monotonic()
            _, batch, _ = collect(learner, now, number, thread, go_on)
            on_device = put_batch(batch, now.spec.model.mesh)
            for _ in range(num_iterations):
                state, frozen, scalars = train_step(now.state, now.frozen, on_device, spec=now.spec)
                now = dataclasses.replace(now, state=state, frozen=frozen)
                jax.device_get(scalars)
            seconds.append((time.monotonic() - began_s) / num_iterations)
    first_s, *others = seconds
    return dataclasses.replace(setup, frozen=now.frozen), TimedSteps(first_s, others)
