"""A rollout with made up completions, and what TRL's GRPOTrainer makes of it."""

import tempfile
import warnings
from typing import Any, NamedTuple

import numpy as np
import peft
import tokenizers
import torch
import transformers
from datasets import Dataset
from support.lora_twins import AdapterTensors, peft_tensors

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import trl

GROUP, MAX_NEW_TOKENS = 4, 12
PAD, STOP, FIRST = 0, 1, 4  # token ids; from FIRST on any


class GivenRollout(NamedTuple):
    """Groups of GROUP completions, one after the other; a list for each completion."""

    prompts: list[list[int]]
    completions: list[list[int]]
    rewards: list[float]

    @property
    def has_stopped(self) -> np.ndarray:
        return np.array([ids[-1] == STOP for ids in self.completions])


def make_rollout(num_groups: int, *, seed: int = 0) -> GivenRollout:
    """Prompts and completions of random lengths; some completions are cut off at the limit."""
    rng = np.random.default_rng(seed)

    def draw(length: int) -> list[int]:
        return rng.integers(FIRST, 256, length).tolist()

    prompts, completions = [], []
    for _ in range(num_groups):
        prompts += [draw(rng.integers(2, 9))] * GROUP
        for _ in range(GROUP):
            is_cut_off = rng.random() < 0.25
            length = MAX_NEW_TOKENS if is_cut_off else rng.integers(1, MAX_NEW_TOKENS)
            completions.append(draw(length)[: length - 1 + is_cut_off] + [STOP] * (not is_cut_off))
    rewards = rng.permuted(np.tile([0.0, 0.2, 1.2, 1.2], (num_groups, 1)), axis=1)
    return GivenRollout(prompts, completions, rewards.reshape(-1).tolist())


class PeerTrainer:
    """TRL's GRPOTrainer on a PEFT model, up to the loss: rollout, rewards and updates are given.

    `inputs` has TRL's advantages, masks and the log-probabilities of the rollout's start and of the
    reference, which is the adapter "ref". Gradients and updates are of the adapter "default".
    """

    def __init__(
        self,
        model: peft.PeftModel,
        reference: peft.PeftModel,
        rollout: GivenRollout,
        **settings: Any,
    ):
        pieces = tokenizers.models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t3")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizers.Tokenizer(pieces), pad_token="t0", eos_token="t1"
        )
        row, count = {"prompt": "t4"}, len(rollout.prompts)
        drawn = {"prompt_ids": rollout.prompts, "completion_ids": rollout.completions}
        with tempfile.TemporaryDirectory() as directory, warnings.catch_warnings():
            # What TRL, PEFT and transformers deprecate of each other, and that rollouts are given.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "You are using 'rollout_func'", UserWarning)
            arguments = trl.GRPOConfig(
                directory,
                per_device_train_batch_size=count,
                num_generations=GROUP,
                max_completion_length=MAX_NEW_TOKENS,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                **settings,
            )
            self.trainer = trl.GRPOTrainer(
                model=model,
                reward_funcs=[lambda completions, **_: rollout.rewards],
                args=arguments,
                train_dataset=Dataset.from_list([row] * count),
                processing_class=tokenizer,
                rollout_func=lambda prompts, trainer: drawn | {"logprobs": None},
            )
            self.model = model
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if ".ref." in name:
                        parameter.copy_(reference.get_parameter(name.replace(".ref.", ".default.")))
            model.train()  # there is no dropout; TRL asks for the mode
            self.inputs = self.trainer._generate_and_score_completions([row] * count)
        self.trainer.current_gradient_accumulation_steps = 1

    def loss_and_gradients(self) -> tuple[float, AdapterTensors]:
        self.model.zero_grad()
        loss = self.trainer.compute_loss(self.model, self.inputs)
        loss.backward()
        return loss.item(), peft_tensors(self.model, gradients=True)

    def descend(self, learning_rate: float) -> None:
        """Plain gradient descent with the gradients of the last loss."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter -= learning_rate * parameter.grad

    def last(self, metric: str) -> float:
        return self.trainer._metrics["train"][metric][-1]
