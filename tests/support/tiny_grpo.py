"""GRPO runs that take seconds, on the tiny model: `TinyRuns` for `jaxsft.grpo`."""

import json
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file, save_file
from support.tiny_runs import TinyRuns

from jaxsft.data.tokenizer import Tokenizer

NUM_TASKS, NUM_HELDOUT = 10, 4
NUM_PROMPTS, GROUP = 2, 4  # of a rollout
REWARD = "rewards.py:vowels"
STOP_SCALE = 8

_REWARDS = """
import math
import time

def vowels(texts, rows):
    return [sum(c in "aeiou" for c in text) % 7 for text in texts]

def slowly(texts, rows):
    time.sleep(0.05)
    return vowels(texts, rows)

def constant(texts, rows):
    return [1.0] * len(texts)

def raises(texts, rows):
    raise RuntimeError("no idea")

def hangs(texts, rows):
    time.sleep(60)

def is_nan(texts, rows):
    return [math.nan] * len(texts)
"""
_CONFIG = {
    "lora": {"r": 8, "alpha": 8},
    "rollout": {
        "num_prompts": NUM_PROMPTS,
        "num_generations": GROUP,
        "max_new_tokens": 8,
        "batch_size": NUM_PROMPTS * GROUP,
    },
    "objective": {"mask_truncated_completions": False},
    "eval": {"num_prompts": 2, "batch_size": 2, "max_new_tokens": 4},
    "max_steps": 6,
    "learning_rate": 1e-3,
    "save_steps": 2,
    "loss_chunk_tokens": 256,
}


class TinyGrpo(TinyRuns):
    """Runs of `grpo`. The model ends some completions and is cut off in others; the reward, a
    function in `directory`/rewards.py, differs within most groups.

    With `slow_reward` a call of it takes as long as a rollout.
    """

    command = "jaxsft.grpo"
    rows_per_step = NUM_PROMPTS
    epoch_line = r"^train: .* ([\d,]+) prompts"

    def __init__(self, directory: Path, *, slow_reward: bool = False) -> None:
        super().__init__(directory)
        self.train_config = self.config.rename(directory / "train.yaml")
        _end_more_often(directory / "model")
        (directory / "rewards.py").write_text(_REWARDS)
        write_tasks(directory / "tasks.jsonl", range(NUM_TASKS))
        write_tasks(directory / "held.jsonl", range(NUM_TASKS, NUM_TASKS + NUM_HELDOUT))
        config = yaml.safe_load(self.train_config.read_text())
        data = {
            "train_files": [str(directory / "tasks.jsonl")],
            "eval_files": [str(directory / "held.jsonl")],
            "max_length": 256,  # all completions of a rollout in one row: one program
            "system_prompt": None,
        }
        places = {name: config[name] for name in ("output_dir", "model")}
        reward = REWARD.replace("vowels", "slowly") if slow_reward else REWARD
        rewards = {"rewards": {str(directory / reward): 1.0}}
        self.config.write_text(yaml.safe_dump(_CONFIG | places | rewards | {"data": data}))

    def rewarded_by(self, function: str) -> tuple[str, str]:
        """The option that takes another function of rewards.py."""
        return "--rewards", json.dumps({f"{self.directory}/rewards.py:{function}": 1.0})


def write_tasks(path: Path, numbers: range) -> None:
    """One task of JSONL for each number, no two alike."""
    tasks = [{"prompt": f"Say {number} and more", "kind": "any"} for number in numbers]
    path.write_text("".join(f"{json.dumps(task)}\n" for task in tasks))


def rollouts(run_dir: Path) -> list[dict]:
    """The lines of rollouts.jsonl."""
    return [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]


def _end_more_often(model: Path) -> None:
    """Makes the logit of the stop token vary more than others: it is drawn now and then."""
    path = model / "model.safetensors"
    tensors = load_file(path)
    stop_id = max(Tokenizer.from_file(model / "tokenizer.model").stop_ids)
    embedding = tensors["model.embed_tokens.weight"]
    embedding[stop_id] *= np.float32(STOP_SCALE)
    save_file(tensors, path)
