"""A rollout with its rewards: advantages, which completions count, metrics, lines for people."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.evaluate.rewarded import is_right
from jaxsft.grpo.objective import group_advantages
from jaxsft.grpo.prompts import TaskPrompt
from jaxsft.grpo.rollouts import Rollout
from jaxsft.rewards.answer_form import exact_parts
from jaxsft.rewards.records import Reward, total_reward


class RewardedRollout(NamedTuple):
    """The completions of a rollout, N = prompts x generations, group after group.

    Attributes:
      prompts: of each group.
      completions: N of them.
      rewards: of each completion, by name, before their weights.
      totals_N: what each completion earns.
      advantages_N: its reward against its group.
      counts_N: whether it is in the loss: its group has different rewards, and it was not cut off.
      is_live_P: whether a group has different rewards.
    """

    prompts: Sequence[TaskPrompt]
    completions: Sequence[Rollout]
    rewards: Sequence[Mapping[str, Reward]]
    totals_N: npt.NDArray[np.float64]
    advantages_N: npt.NDArray[np.float64]
    counts_N: npt.NDArray[np.bool_]
    is_live_P: npt.NDArray[np.bool_]

    @property
    def kept(self) -> list[int]:
        """Indices of the completions that count."""
        return np.flatnonzero(self.counts_N).tolist()

    def metrics(self, template: AnswerTemplate) -> dict[str, float]:
        """Means over all completions. Entropy is the mean of -log-probability of what was drawn, an
        unbiased estimate in nats a token; words of reasoning are of completions in the format."""
        rights = [right for each in self.rewards if (right := is_right(each)) is not None]
        found = {"reward": float(self.totals_N.mean())}
        for name in sorted({name for each in self.rewards for name in each}):
            values = [each[name].value for each in self.rewards if name in each]
            found[f"reward_{name}"] = float(np.mean(values))
        parts = [exact_parts(each.text, template) for each in self.completions]
        words = [len(part[0].split()) for part in parts if part is not None]
        log_probs = np.concatenate([each.log_probs for each in self.completions])
        return found | {
            "right": float(np.mean(rights)) if rights else math.nan,
            "format": np.mean([part is not None for part in parts]).item(),
            "completion_tokens": np.mean([len(each.ids) for each in self.completions]).item(),
            "reasoning_words": float(np.mean(words)) if words else math.nan,
            "entropy": -float(log_probs.mean()),
            "dead_groups": 1.0 - float(self.is_live_P.mean()),
            "truncated": np.mean([each.truncated for each in self.completions]).item(),
        }

    def lines(self, step: int, weights: Mapping[str, float]) -> list[dict[str, Any]]:
        """What rollouts.jsonl has of each completion; `step` is the rollout's first update."""
        return [
            {
                "step": step,
                "prompt": completion.prompt,
                "member": completion.member,
                "source": self.prompts[completion.prompt].source,
                "kind": self.prompts[completion.prompt].task.kind,
                "question": self.prompts[completion.prompt].task.prompt,
                "text": completion.text,
                "num_tokens": len(completion.ids),
                "ended": _how_ended(completion),
                "log_prob": round(float(np.sum(completion.log_probs)), 4),
                "rewards": {
                    name: {"value": weights[name] * reward.value, "reason": reward.reason}
                    for name, reward in self.rewards[i].items()
                },
                "reward": float(self.totals_N[i]),
                "advantage": float(self.advantages_N[i]),
                "counted": bool(self.counts_N[i]),
            }
            for i, completion in enumerate(self.completions)
        ]


def rewarded(
    prompts: Sequence[TaskPrompt],
    completions: Sequence[Rollout],
    rewards: Sequence[Mapping[str, Reward]],
    *,
    weights: Mapping[str, float],
    scale_rewards: str,
    mask_truncated: bool,
) -> RewardedRollout:
    """The completions of `prompts`, group after group, with their rewards and advantages."""
    totals_N = np.array([total_reward(each, weights) for each in rewards])
    advantages_PG, is_live_P = group_advantages(totals_N.reshape(len(prompts), -1), scale_rewards)
    counts_N = np.repeat(is_live_P, advantages_PG.shape[1])
    if mask_truncated:
        counts_N &= ~np.array([each.truncated for each in completions])
    return RewardedRollout(
        prompts, completions, rewards, totals_N, advantages_PG.reshape(-1), counts_N, is_live_P
    )


def mean_divergence(
    log_probs: Sequence[npt.ArrayLike], reference: Sequence[npt.ArrayLike]
) -> float:
    """The mean of the k3 estimate of KL(policy || reference) over the tokens of all completions, in
    nats; NaN without any."""
    if not log_probs:
        return math.nan
    apart = np.concatenate(reference) - np.concatenate(log_probs)
    return float(np.mean(np.expm1(apart) - apart))


def _how_ended(completion: Rollout) -> str:
    if completion.stopped:
        return "stop"
    return "limit" if completion.truncated else "turn"


def describe(metrics: Mapping[str, float]) -> str:
    """A step's metrics in the progress line."""
    # Without a completion that counts there is none to take its mean over.
    has_kl = math.isfinite(metrics.get("kl", math.nan))
    kl = f"KL {metrics['kl']:.4f}  " if has_kl else ""
    right = "" if math.isnan(metrics["right"]) else f"right {metrics['right']:.0%}  "
    return (
        f"reward {metrics['reward']:.3f}  format {metrics['format']:.0%}  {right}"
        f"{metrics['completion_tokens']:.0f} tokens  {kl}entropy {metrics['entropy']:.2f}  "
        f"dead groups {metrics['dead_groups']:.0%}  truncated {metrics['truncated']:.0%}  "
        f"rollout {metrics['rollout_s']:.1f} s  reward {metrics['reward_s']:.1f} s  "
        f"step {metrics['reference_s'] + metrics['update_s']:.1f} s"
    )
