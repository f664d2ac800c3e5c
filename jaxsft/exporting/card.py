"""The README.md beside an export: a model card as the Hugging Face hub reads it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxsft.config import TrainConfig
from jaxsft.evaluation.heldout import METRICS
from jaxsft.evaluation.table import metric_cell
from jaxsft.json_file import read_json
from jaxsft.metrics import last_step_of
from jaxsft.models import Origin, run_config
from jaxsft.peft_io import AdapterConfig
from jaxsft.presets import GemmaConfig
from jaxsft.text import visible_line

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_LIBRARIES = {"peft": "peft", "merged": "transformers", "flax": "jax"}
_TITLES = {
    "peft": "a LoRA adapter in PEFT's format",
    "merged": "a whole model for transformers",
    "flax": "Flax checkpoints",
}
_LICENSE = (
    "Gemma's terms of use (https://ai.google.dev/gemma/terms) hold for this model as for its base."
)


def model_card(
    origin: Origin,
    config: GemmaConfig,
    adapter: AdapterConfig | None,
    manifest: Mapping[str, Any],
    name: str,
) -> str:
    """The card of the export that `manifest` describes, called `name`."""
    sections = [_front_matter(origin, manifest["format"], has_adapter=adapter is not None)]
    base = origin.name if _is_on_hub(origin) else Path(origin.name).name
    what = f"{_TITLES[manifest['format']]}, made from {_quoted(base)}"
    sections.append(f"# {visible_line(name)}\n\nGemma, {what} with jaxsft {manifest['jaxsft']}.")
    if adapter is not None:
        sections.append(_training(origin.run_dir, adapter))
    if origin.run_dir is not None:
        sections += _results(origin.run_dir)
    if manifest["format"] == "flax":
        sections.append(_use_in_flax(has_adapter=adapter is not None))
    else:
        sections.append(_use_in_torch(manifest, origin, config, name))
    sections.append(_check(manifest))
    sections.append(f"## Licence\n\n{_LICENSE}")
    return "\n\n".join(sections) + "\n"


def _front_matter(origin: Origin, format: str, has_adapter: bool) -> str:
    lines = ["---", "license: gemma", f"library_name: {_LIBRARIES[format]}"]
    if _is_on_hub(origin):
        lines += [f"base_model: {origin.name}"]
    tags = ["gemma", "jax", "jaxsft"] + (["lora", "sft"] if has_adapter else [])
    return "\n".join([*lines, "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}", "---"])


def _is_on_hub(origin: Origin) -> bool:
    return _HUB_NAME.fullmatch(origin.name) is not None and not Path(origin.name).exists()


def _training(run_dir: Path | None, adapter: AdapterConfig) -> str:
    scaling = "alpha / sqrt(r)" if adapter.use_rslora else "alpha / r"
    lines = [
        "## Training",
        "",
        f"- LoRA: rank {adapter.rank}, alpha {adapter.alpha:g} ({scaling}), dropout "
        f"{adapter.dropout:g}, on {', '.join(adapter.targets)}",
    ]
    if run_dir is not None:
        lines += _recipe(run_config(run_dir), last_step_of(run_dir))
        command = _result(run_dir).get("command")
        lines += [f"- trained with {_quoted(str(command))}"] if command else []
    return "\n".join(lines)


def _recipe(config: TrainConfig, num_steps: int) -> list[str]:
    data = config.data
    files = {"training": data.train_files, "held-out": data.eval_files}
    lines = []
    for kind, names in files.items():
        # The directories are those of a machine that the reader does not have.
        names = [Path(name).name for name in ([names] if isinstance(names, str) else names)]
        if names:
            lines.append(f"- {kind} rows: {', '.join(map(_quoted, names))}")
    epochs = "" if config.max_steps else f", {config.num_train_epochs:g} passes over the rows"
    rows = f"{num_steps * config.global_batch_size:,}"
    lines += [
        f"- {num_steps:,} steps of {config.global_batch_size} rows ({rows} in all{epochs}), each "
        f"of at most {data.max_length:,} tokens{', packed' if data.packing else ''}",
        f"- AdamW, learning rate {config.learning_rate:g} ({config.lr_scheduler_type}, "
        f"{config.warmup_steps:,} warm-up steps), weight decay {config.weight_decay:g}, gradients "
        f"clipped at {config.max_grad_norm:g}, seed {config.seed}",
        f"- base weights in {config.model.param_dtype}, activations in {config.model.dtype}, "
        "adapter in float32",
    ]
    if data.system_prompt:
        lines.append(f"- system prompt: {_quoted(data.system_prompt)}")
    return lines


def _result(run_dir: Path) -> dict[str, Any]:
    """What a finished run is known by; {} of one that isn't."""
    path = run_dir / "result.json"
    return read_json(path) if path.exists() else {}


def _results(run_dir: Path) -> list[str]:
    """The run's measurements before and after, if it has them."""
    result, sections = _result(run_dir), []
    if isinstance(data := result.get("data"), dict) and data:
        counts = "\n".join(
            f"- {visible_line(key.replace('_', ' '))}: {visible_line(str(data[key]))}"
            for key in data
        )
        sections.append(f"## Data\n\n{counts}")
    before, after = result.get("before") or {}, result.get("after") or {}
    rows = [
        f"| {metric.label} | {metric_cell(before, metric)} | {metric_cell(after, metric)} |"
        for metric in METRICS
        if metric.name in after
    ]
    if rows:
        table = "\n".join(["| | before | after |", "|---|---|---|", *rows])
        sections.append(
            f"## Results\n\nOn the held-out rows; intervals, in brackets, are of 95%.\n\n{table}"
        )
    return sections


def _use_in_flax(has_adapter: bool) -> str:
    text = (
        "`model/` holds the checkpoint in the layout that Kaggle distributes for Gemma (Orbax), "
        "with `tokenizer.model` beside it."
    )
    if has_adapter:
        text += (
            " `tunix-lora/` holds the LoRA parameters alone, as Tunix restores them; "
            "`tunix-lora.json` says what to give `qwix.LoraProvider`."
        )
    return f"## Use\n\n{text}"


def _use_in_torch(
    manifest: Mapping[str, Any], origin: Origin, config: GemmaConfig, name: str
) -> str:
    base = origin.name if _is_on_hub(origin) else Path(origin.name).name
    code = ["import torch", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    load = "dtype=torch.bfloat16"
    if config.attn_softcap is not None:  # transformers' default implementation leaves it out
        load += ', attn_implementation="eager"'
    if manifest["format"] == "merged":
        code += [
            f'path = "{name}"',
            "tokenizer = AutoTokenizer.from_pretrained(path)",
            f"model = AutoModelForCausalLM.from_pretrained(path, {load})",
        ]
    else:
        code[1:2] = ["from peft import PeftModel", code[1]]
        code += [
            f'base = "{base}"',
            "tokenizer = AutoTokenizer.from_pretrained(base)",
            f"model = AutoModelForCausalLM.from_pretrained(base, {load})",
            f'model = PeftModel.from_pretrained(model, "{name}")',
        ]
    code += [
        'chat = [{"role": "user", "content": "Why is the sky blue?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "output = model.generate(**inputs, max_new_tokens=256)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
    ]
    return "\n".join(["## Use", "", "```python", *code, "```"])


def _check(manifest: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    if manifest["max_abs_logit_difference"] is None:
        found = "Not checked in another library (`--no-verify`)."
    elif manifest["problem"] is not None:
        found = f"DRIFTING, not to be used: {manifest['problem']}."
    else:
        found = (
            f"Loaded again by {manifest['peer']}: over all positions of the test prompts no logit "
            f"was further than {manifest['max_abs_logit_difference']:.1e} from jaxsft's, in "
            f"float32 (allowed: {manifest['bound']:.0e})."
        )
        if manifest["not_checked"] is not None:
            found += f" Not verified: {manifest['not_checked']}."
    return (
        f"## How it was made\n\n    {manifest['command']}\n\n{found} Versions: {versions}; "
        "digests of all files are in `manifest.json`."
    )


def _quoted(text: str) -> str:
    return f"`{visible_line(text).replace('`', chr(39))}`"
