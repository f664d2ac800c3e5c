"""Computes an export's logits with transformers and PEFT. A script for a subprocess.

    python transformers_worker.py MODEL PROBES.npz OUT.npz [ADAPTER]

PROBES: `ids_N` (token ids [T]) and `at_N` (positions to compare) of probe N; `settings`, JSON, with
what to try the tokenizer with: `chats`, `texts`, `lookalikes` (texts in which special tokens are
split) and `pieces` (names of tokens). OUT: `logits_N`, float32 [len(at), V], and `text_N`, the ids
of each chat, text and look-alike in turn, and last those of the pieces. Weights are loaded as
stored; everything is computed in float32.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def main(model_dir: str, probes_path: str, out_path: str, adapter_dir: str | None = None) -> None:
    """Loads the model, and the adapter with PEFT, and writes their results for the probes."""
    import torch
    import transformers

    # sdpa leaves Gemma 2's attention soft cap out.
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter_dir is not None:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter_dir)
    model.eval()
    results = {}
    with np.load(probes_path) as probes, torch.no_grad():
        names = [name.removeprefix("ids_") for name in probes.files if name.startswith("ids_")]
        for name in names:
            ids = torch.tensor(probes[f"ids_{name}"][None], dtype=torch.long)
            at = torch.tensor(probes[f"at_{name}"], dtype=torch.long)
            logits = model(ids, logits_to_keep=at, use_cache=False).logits[0]
            results[f"logits_{name}"] = logits.float().numpy()
        settings = json.loads(str(probes["settings"]))
    if settings:
        tokenizer = transformers.AutoTokenizer.from_pretrained(adapter_dir or model_dir)
        for i, found in enumerate(_token_ids(tokenizer, settings)):
            results[f"text_{i}"] = np.asarray(found, np.int64)
    with Path(out_path).open("wb") as file:
        np.savez(file, **results)


def _token_ids(tokenizer: Any, settings: dict[str, Any]) -> Iterator[list[int]]:
    for messages in settings["chats"]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        yield tokenizer(text, add_special_tokens=False)["input_ids"]  # the template has <bos>
    for key in ("texts", "lookalikes"):
        splits = {"split_special_tokens": True} if key == "lookalikes" else {}
        yield from tokenizer(settings[key], add_special_tokens=False, **splits)["input_ids"]
    yield tokenizer.convert_tokens_to_ids(settings["pieces"])


if __name__ == "__main__":
    main(*sys.argv[1:])
