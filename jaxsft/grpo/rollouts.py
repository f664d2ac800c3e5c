"""Rollouts: completions drawn from the policy, as training needs them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma.decode import SamplingOptions, generate
from jaxsft.step.score import ModelSpec

# The branch of the seed's key that holds the keys of all rollouts. Neither the rows of an
# evaluation nor the steps of a dropout, which fold their number into the same seed, come this far.
_BRANCH = 2**32 - 1


class Rollout(NamedTuple):
    """One completion of a prompt, as it was drawn.

    Attributes:
      prompt: the prompt's index among those of the call.
      member: the completion's index in the prompt's group.
      prompt_ids: the prompt's tokens, BOS included.
      ids: the drawn tokens, with the one that ended it.
      log_probs: the sampler's log-probability in nats of each of `ids`, under the whole softmax.
      text: of `ids`, without the stop token.
      stopped: a stop token ended it.
      truncated: `max_new_tokens` cut it off. Neither where the model began another turn: this ends
        a completion as well, and its text keeps that token's name.
    """

    prompt: int
    member: int
    prompt_ids: list[int]
    ids: list[int]
    log_probs: list[float]
    text: str
    stopped: bool
    truncated: bool


def roll_out(
    adapter: nnx.State,
    frozen: Any,
    prompts: Sequence[Sequence[int]],
    *,
    spec: ModelSpec,
    tokenizer: Tokenizer,
    group_size: int,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    rollout: int,
    on_batch: Callable[[], None] = lambda: None,
) -> list[Rollout]:
    """Draws `group_size` completions of each prompt at temperature 1, without top-k and top-p.

    The groups stand in the order of the prompts. The noise is a function of (seed, rollout, row,
    token), where a completion's row is prompt · group_size + member; no value of the first two
    compiles anything. Batches, devices, errors and `on_batch`: as `generate`.

    Args:
      batch_size: completions that are drawn at once, over all devices.
      rollout: index of this rollout in the run.
    """
    generations = generate(
        spec.builder,
        adapter,
        frozen,
        prompts,
        options=SamplingOptions(batch_size, max_new_tokens, temperature=1.0),
        # A turn begun is where evaluation cuts an answer. The token is trained on like any other.
        stop_ids=(*tokenizer.stop_ids, tokenizer.start_of_turn_id),
        num_ids=tokenizer.vocab_size,
        group_size=group_size,
        key=rollout_key(seed, rollout),
        on_batch=on_batch,
        mesh=spec.mesh,
    )
    rollouts = []
    for row, (ids, stop_id, log_probs) in enumerate(generations):
        prompt, member = divmod(row, group_size)
        stopped = stop_id in tokenizer.stop_ids
        drawn = ids if stop_id is None else [*ids, stop_id]
        text = tokenizer.decode(ids if stopped else drawn)
        rollouts.append(
            Rollout(
                prompt,
                member,
                list(prompts[prompt]),
                drawn,
                log_probs,
                text,
                stopped=stopped,
                truncated=stop_id is None,
            )
        )
    return rollouts


def rollout_key(seed: int, rollout: int) -> jax.Array:
    """The key of a rollout's draws, for `generate`."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _BRANCH), rollout)
