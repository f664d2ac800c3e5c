"""TRL's side of `grpo_step`: the methods of its GRPOTrainer, on a PEFT model.

`python -m benchmarks.peer_grpo_trl MODEL_DIR ADAPTER_DIR SETTINGS_FILE`.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import save_file
from trl.trainer.utils import split_tensor_dict

from benchmarks.peer_protocol import peak_rss_bytes, serve


class TrlGrpo:
    """Rollout through transformers' `generate`, reference, loss, gradient and AdamW: what
    `train()` does in a step, without its files. float32, no checkpointing of activations."""

    def __init__(self, model_dir: str, adapter_dir: str, settings_file: str):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        settings = json.loads(Path(settings_file).read_text(encoding="utf-8"))
        base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        base.config.eos_token_id = base.generation_config.eos_token_id = None
        self.model = PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)
        # Prompts are texts there: a word for each id. No logit belongs to the stop token, so every
        # completion has as many tokens as ours.
        num_ids = settings["num_ids"]
        pieces = {f"t{i}": i for i in range(num_ids + 1)}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(pieces, unk_token="t0"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="t0", eos_token=f"t{num_ids}"
        )
        group_size, self.num_pieces = settings["group_size"], settings["micro_batches"]
        self.rows = [
            {"prompt": " ".join(f"t{each}" for each in ids)}
            for ids in settings["prompts"]
            for _ in range(group_size)
        ]
        with tempfile.TemporaryDirectory() as directory:
            arguments = trl.GRPOConfig(
                directory,
                per_device_train_batch_size=len(self.rows) // self.num_pieces,
                gradient_accumulation_steps=self.num_pieces,
                num_generations=group_size,
                max_completion_length=settings["new_tokens"],
                temperature=1.0,
                top_k=0,
                learning_rate=settings["learning_rate"],
                lr_scheduler_type="constant",
                weight_decay=0.01,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                **settings["objective"],
            )
            self.trainer = trl.GRPOTrainer(
                model=self.model,
                reward_funcs=[lambda completions, **_: settings["rewards"]],
                args=arguments,
                train_dataset=Dataset.from_list(self.rows),
                processing_class=tokenizer,
            )
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".ref." in name and "lora_B" in name:
                    parameter *= settings["reference_share"]
        self.trainer.current_gradient_accumulation_steps = self.num_pieces
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.model.train()  # there is no dropout; TRL asks for the mode
        self.optimizer = self.trainer.create_optimizer()
        self.rollout_s = 0.0
        self.trainer._generate = self._timed(self.trainer._generate)

    def _timed(self, generate: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def timed(prompts: Any) -> Any:
            began_s = time.perf_counter()
            found = generate(prompts)
            self.rollout_s = time.perf_counter() - began_s
            return found

        return timed

    def _backward(self, inputs: dict[str, Any]) -> float:
        loss_sum = 0.0
        for piece in split_tensor_dict(inputs, self.num_pieces):
            loss = self.trainer.compute_loss(self.model, piece)
            loss.backward()
            loss_sum += loss.item()
        return loss_sum

    def gradients(self, out: str, completions: str) -> dict[str, Any]:
        """Writes the unclipped gradient of the loss of the given completions to `out`."""
        drawn = json.loads(Path(completions).read_text(encoding="utf-8"))
        output = {
            "prompt_ids": [each["prompt"] for each in drawn],
            "completion_ids": [each["ids"] for each in drawn],
            "logprobs": None,
        }
        self.trainer.rollout_func = lambda prompts, trainer: output
        loss = self._backward(self.trainer._generate_and_score_completions(self.rows))
        self.trainer.rollout_func = None
        gradients: dict[str, Any] = {
            name.replace(".default.", "."): parameter.grad
            for name, parameter in self.trained.items()
        }
        save_file(gradients, out)
        self.optimizer.zero_grad()
        return {"loss": loss}

    def step(self) -> dict[str, Any]:
        """The seconds of one step's parts."""
        began_s = time.perf_counter()
        inputs = self.trainer._generate_and_score_completions(self.rows)
        lengths = inputs["completion_mask"].sum(1)
        assert bool((lengths == self.trainer.max_completion_length).all()), lengths
        collected_s = time.perf_counter()
        self._backward(inputs)
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        ended_s = time.perf_counter()
        return {
            "rollout": self.rollout_s,
            "reference": collected_s - began_s - self.rollout_s,
            "update": ended_s - collected_s,
            "whole": ended_s - began_s,
            "peak_rss_bytes": peak_rss_bytes(),
        }


if __name__ == "__main__":
    serve(lambda: TrlGrpo(*sys.argv[1:]), methods=("gradients", "step"))
