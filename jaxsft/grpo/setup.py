"""The setup of a GRPO run: the model with the objective in its loss head, and its fingerprint."""

import dataclasses
from collections.abc import Sequence

import jax

from jaxsft.config import GrpoConfig
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.grpo.batches import CompletionRows, split_rows
from jaxsft.grpo.objective import Objective
from jaxsft.grpo.prompts import Prompts, prompts_digest
from jaxsft.grpo.rollouts import Rollout
from jaxsft.rewards.scorer import Scorer
from jaxsft.run.identity import run_fingerprint
from jaxsft.run.setup import Setup, check_evaluation, load_run, make_setup
from jaxsft.run.start import Started
from jaxsft.step.train_step import put_batch
from jaxsft.weights.find import check_tokenizer
from jaxsft.weights.load import WeightsInfo


@dataclasses.dataclass
class Steps:
    """The number of a run's updates, and the completions that each is made of at most."""

    num_steps: int
    global_batch_size: int

    def __len__(self) -> int:
        return self.num_steps


def build_grpo(
    started: Started[GrpoConfig], prompts: Prompts, tokenizer: Tokenizer, scorer: Scorer
) -> Setup:
    """The setup of a run on these prompts."""
    config = started.config
    steps, objective, rollout = config.max_steps, config.objective, config.rollout
    assert steps is not None
    longest = max((len(each.ids) for each in prompts.heldout[: config.eval.num_prompts]), default=0)

    def check(info: WeightsInfo) -> None:
        check_tokenizer(tokenizer, info.config)
        check_evaluation(config, info, longest)

    loaded = load_run(
        config,
        started.origin,
        steps,
        check=check,
        say=started.console.print,
        fork=started.fork,
        token_loss=Objective(
            loss_type=objective.loss_type,
            epsilon=objective.epsilon,
            epsilon_high=objective.epsilon_high,
            beta=objective.beta,
            use_bias_correction_kl=objective.use_bias_correction_kl,
            num_iterations=objective.num_iterations,
        ),
    )
    same = run_fingerprint(config, tokenizer, loaded.model_info, steps)
    # A smaller batch of completions is what to take where memory runs out, and changes none.
    drawn = dataclasses.asdict(rollout) | {"batch_size": None}
    found = {"rollout": str(drawn), "data": prompts_digest(prompts.train, prompts.epoch)}
    found["rewards"] = str([*scorer.weights.items(), *scorer.user_files.values()])
    if config.eval_steps:  # the rewards that decide which step is best
        found["data.eval_files"] = prompts_digest(prompts.heldout)
    no_rows = completion_rows(config, loaded.spec.model.mesh.size, [])
    batch = no_rows.rollout_batch(weights=[], advantages=[], old=[], reference=[])
    batch = split_rows(batch, config.gradient_accumulation_steps)
    return make_setup(
        loaded,
        step_batches=Steps(steps, num_completions(config)),
        batch=jax.tree.map(jax.typeof, put_batch(batch, loaded.spec.model.mesh)),
        flops_per_token=0.0,
        fingerprint=same | found,
    )


def completion_rows(
    config: GrpoConfig, num_devices: int, completions: Sequence[Rollout]
) -> CompletionRows:
    """The completions of a rollout with their prompts, packed into its rows: as many as devices and
    micro-batches can share, at least one for each completion that was drawn."""
    most, parts = num_completions(config), num_devices * config.gradient_accumulation_steps
    return CompletionRows(
        [each.prompt_ids for each in completions],
        [each.ids for each in completions],
        row_length=config.data.max_length,
        num_rows=-(-most // parts) * parts,
    )


def num_completions(config: GrpoConfig) -> int:
    """The completions of a rollout."""
    return config.rollout.num_prompts * config.rollout.num_generations
