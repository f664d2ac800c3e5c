"""The peer in torch: transformers' Gemma with PEFT's LoRA, trained as their own Trainer does.

Runs in a virtual environment with torch, transformers and peft:
`python -m benchmarks.peer_torch MODEL_DIR ADAPTER_DIR LEARNING_RATE`.
"""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from benchmarks.peer_protocol import serve

IGNORED = -100  # transformers' label for positions without loss


class TorchTrainer:
    """AdamW on a PEFT adapter, float32, gradients clipped to norm 1."""

    def __init__(self, model_dir: str, adapter_dir: str, learning_rate: float):
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, adapter_dir, is_trainable=True)
        self.model.train()
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=learning_rate, weight_decay=0.01
        )

    def _backward(self, rows: Path) -> torch.Tensor:
        with np.load(rows) as arrays:
            tokens, loss_mask = (torch.from_numpy(arrays[k]) for k in ("tokens", "loss_mask"))
        tokens = tokens.long()
        labels = torch.where(loss_mask, tokens, IGNORED)
        loss = self.model(
            input_ids=tokens,
            attention_mask=(tokens != 0).long(),
            labels=labels,
            use_cache=False,
        ).loss
        loss.backward()
        return loss

    def gradients(self, rows: Path, out: Path) -> float:
        """See `peer_protocol.Trainer`."""
        loss = self._backward(rows)
        gradients: dict[str, Any] = {
            name.replace(".default.", "."): parameter.grad
            for name, parameter in self.trained.items()
        }
        save_file(gradients, out)
        self.optimizer.zero_grad()
        return float(loss)

    def step(self, rows: Path) -> float:
        """See `peer_protocol.Trainer`."""
        loss = self._backward(rows)
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss)


if __name__ == "__main__":
    model_dir, adapter_dir, learning_rate = sys.argv[1:]
    serve(lambda: TorchTrainer(model_dir, adapter_dir, float(learning_rate)))
