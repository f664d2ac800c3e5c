"""The README.md beside an export: a model card as the Hugging Face hub reads it."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxsft.common.files import file_sha256, read_json
from jaxsft.common.text import visible_line
from jaxsft.config import DataOptions, GrpoConfig, TrainConfig, named_files, named_rewards
from jaxsft.data.answer_template import AnswerTemplate
from jaxsft.download.names import parse_hub_name
from jaxsft.evaluate.heldout import METRICS
from jaxsft.evaluate.rewarded import reward_metrics
from jaxsft.evaluate.table import metric_cell
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.run.metrics import last_step_of
from jaxsft.weights.adapter_config import WEIGHTS_NAME, AdapterConfig
from jaxsft.weights.find import RUN_ADAPTERS, Origin, run_config
from jaxsft.weights.flax import is_flax_checkpoint

_EVALUATION = Path("evaluation", "evaluation.json")  # what evaluate writes into a run
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_LIBRARIES = {"peft": "peft", "merged": "transformers", "flax": "jax"}
_TITLES = {
    "peft": "a LoRA adapter in PEFT's format",
    "merged": "a whole model for transformers",
    "flax": "Flax checkpoints",
}
_WITHOUT_THOUGHT = {
    "reject": "left out",
    "keep_plain": "trained with the system prompt",
    "drop_system": "trained without the system prompt",
}
_LICENSE = (
    "Gemma's terms of use (https://ai.google.dev/gemma/terms) hold for this model as for its base."
)


def about_training(origin: Origin, adapter: AdapterConfig | None) -> list[str]:
    """The card's sections on the training of the adapter and on its measurements.

    Raises ValueError if a file of its run cannot be read.
    """
    if adapter is None:
        return []
    run_dir, sections = origin.run_dir, [_training(origin, adapter)]
    if run_dir is not None and origin.adapter is not None:
        which = origin.adapter.name
        sections += _data(run_dir) if which != RUN_ADAPTERS[-1] else []
        results = [*_in_training(run_dir)] if which == RUN_ADAPTERS[0] else []
        results += _evaluation(run_dir, origin.adapter)
        if results:
            lead = "Intervals, in brackets, are of 95%; – where there is no value."
            sections.append("\n\n".join([f"## Results\n\n{lead}", *results]))
    return sections


def model_card(
    origin: Origin,
    config: GemmaConfig,
    training: Sequence[str],
    manifest: Mapping[str, Any],
    name: str,
) -> str:
    """The card of the export `name`, from its manifest and the sections of `about_training`."""
    has_adapter = origin.adapter is not None
    front = _front_matter(origin, manifest["format"], has_adapter=has_adapter)
    base = origin.name if _is_on_hub(origin) else Path(origin.name).absolute().name
    what = f"{_TITLES[manifest['format']]}, made from {_quoted(base)}"
    title = f"# {visible_line(name)}\n\nGemma, {what} with jaxsft {manifest['jaxsft']}."
    if manifest["format"] == "flax":
        use = _use_in_flax(base, name, has_adapter=has_adapter)
    else:
        use = _use_in_torch(origin, manifest["format"], base, config, name)
    licence = f"## Licence\n\n{_LICENSE}"
    answers = _answers(manifest)
    return "\n\n".join([front, title, *training, use, *answers, _check(manifest), licence]) + "\n"


def _front_matter(origin: Origin, format: str, has_adapter: bool) -> str:
    lines = ["---", "license: gemma", f"library_name: {_LIBRARIES[format]}"]
    if _is_on_hub(origin):
        lines += [f"base_model: {origin.name}"]
    tags = ["gemma", "jax", "jaxsft"]
    if has_adapter:
        tags += ["lora", "grpo" if _is_grpo(origin.run_dir) else "sft"]
    return "\n".join([*lines, "pipeline_tag: text-generation", f"tags: {json.dumps(tags)}", "---"])


def _is_grpo(run_dir: Path | None) -> bool:
    return run_dir is not None and isinstance(run_config(run_dir), GrpoConfig)


def _is_on_hub(origin: Origin) -> bool:
    return _HUB_NAME.fullmatch(origin.name) is not None and not Path(origin.name).exists()


def _training(origin: Origin, adapter: AdapterConfig) -> str:
    scaling = "alpha / sqrt(r)" if adapter.use_rslora else "alpha / r"
    lines = [
        "## Training",
        "",
        f"- LoRA: rank {adapter.rank}, alpha {adapter.alpha:g} ({scaling}), dropout "
        f"{adapter.dropout:g}, on {', '.join(adapter.targets)}",
    ]
    run_dir = origin.run_dir
    if run_dir is None or origin.adapter is None:
        return "\n".join(lines)
    config, which = run_config(run_dir), origin.adapter.name
    if which == RUN_ADAPTERS[-1]:
        return "\n".join([*lines, f"- what the run {_quoted(run_dir.name)} began with"])
    if which != RUN_ADAPTERS[0]:
        best = "highest held-out reward" if _is_grpo(run_dir) else "lowest held-out loss"
        lines.append(f"- of the steps below, the one with the {best}")
    if config.fork_from:
        start = Path(config.fork_from)
        start = start.parent if start.name in RUN_ADAPTERS else start
        lines.append(f"- went on from the adapter of {_quoted(start.name)}")
    if origin.is_named_base:
        lines.append(f"- trained on {_quoted(Path(config.model.path).name)}")
    lines += _recipe(config, last_step_of(run_dir))
    command = _result(run_dir).get("command")
    lines += [f"- trained with {_quoted(str(command))}"] if command else []
    return "\n".join(lines)


def _recipe(config: TrainConfig | GrpoConfig, num_steps: int) -> list[str]:
    data = config.data
    files = {"training": data.train_files, "held-out": data.eval_files}
    lines = [f"- {kind} rows: {_file_names(names)}" for kind, names in files.items() if names]
    lines += [
        _steps(config, num_steps),
        f"- AdamW, learning rate {config.learning_rate:g} ({config.lr_scheduler_type}, "
        f"{config.warmup_steps:,} warm-up steps), weight decay {config.weight_decay:g}, gradients "
        f"clipped at {config.max_grad_norm:g}, seed {config.seed}",
        f"- base weights in {config.model.param_dtype}, activations in {config.model.dtype}, "
        "adapter in float32",
    ]
    if isinstance(data, DataOptions):
        without = _WITHOUT_THOUGHT[data.without_thought]
        if data.system_prompt and data.without_thought == "drop_system":
            without += " (in a chat, a system turn without text leaves it out)"
        lines.append(f"- rows whose answer has no reasoning: {without}")
    if data.system_prompt:
        lines.append(
            "- system prompt, in front of the first user turn where a chat had none of its own: "
            f"{_quoted(data.system_prompt)}"
        )
    return lines


def _steps(config: TrainConfig | GrpoConfig, num_steps: int) -> str:
    if isinstance(config, TrainConfig):
        rows = "packed rows" if config.data.packing else "rows"
        return (
            f"- {num_steps:,} steps of batch size {config.global_batch_size:,} ({rows} of at most "
            f"{config.data.max_length:,} tokens)"
        )
    rollout, objective = config.rollout, config.objective
    weights = ", ".join(f"{name} {x:g}" for name, x in named_rewards(config.rewards).items())
    return (
        f"- GRPO: {num_steps:,} steps on rollouts of {rollout.num_prompts:,} prompts x "
        f"{rollout.num_generations:,} completions of at most {rollout.max_new_tokens:,} tokens; "
        f"objective {objective.loss_type}, KL weight {objective.beta:g}; rewards: {weights}"
    )


def _file_names(files: list[str] | str) -> str:
    """The names; of files without their directories, which the reader does not have."""
    names = named_files(files)
    return ", ".join(_quoted(n if parse_hub_name(n) else Path(n).name) for n in names)


def _result(run_dir: Path) -> dict[str, Any]:
    """The result.json of a run; {} if the run is not finished."""
    path = run_dir / "result.json"
    return read_json(path) if path.exists() else {}


def _data(run_dir: Path) -> list[str]:
    """The counts of the run's rows, if it noted them."""
    data = _result(run_dir).get("data")
    if not isinstance(data, dict) or not data:
        return []
    counts = (f"- {visible_line(f'{key}: {data[key]}'.replace('_', ' '))}" for key in data)
    return ["\n".join(["## Data", "", *counts])]


def _in_training(run_dir: Path) -> list[str]:
    """The run's measurements before and after training, if it has them."""
    result = _result(run_dir)
    before, after = result.get("before") or {}, result.get("after") or {}
    if not after:
        return []
    files = _file_names(run_config(run_dir).data.eval_files)
    lead = f"Before and after training, on the held-out rows ({files}"
    lead += f"; {after['num_answers']:,} answers" if after.get("num_answers") else ""
    return [f"{lead}):", _table({"before": before, "after": after})]


def _evaluation(run_dir: Path, adapter: Path) -> list[str]:
    """The run's evaluation, if it measured the adapter as it is now."""
    path = run_dir / _EVALUATION
    if not path.is_file():
        return []
    found = read_json(path)
    digest = file_sha256(adapter / WEIGHTS_NAME)
    try:
        columns: dict[str, dict[str, Any]] = {}
        for i, model in enumerate(found["models"]):
            is_this = found["adapters"][i] == digest
            estimates = {name: each["models"][i] for name, each in found["metrics"].items()}
            label = "this model" if is_this else _quoted(Path(model).name)
            columns[f"{label} ({i + 1})" if label in columns else label] = {
                "intervals": {name: (e["low"], e["high"]) for name, e in estimates.items()}
            } | {name: e["value"] for name, e in estimates.items()}
        if "this model" not in columns:
            return []
        lead = f"`python -m jaxsft.evaluate`, on {visible_line(found['about'])}:"
        return [lead, _table(columns)]
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: is no evaluation ({error!r}); make it again") from None


def _table(columns: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table: a row for each metric that any model has, a column for each model."""
    lines = [
        "".join(f"| {cell} " for cell in ("", *columns)) + "|",
        "|---" * (len(columns) + 1) + "|",
    ]
    names = {name: None for measured in columns.values() for name in measured}
    for metric in (*reward_metrics(names), *METRICS):
        if metric.name in names:
            cells = [metric_cell(measured, metric) for measured in columns.values()]
            lines.append("".join(f"| {cell} " for cell in (metric.label, *cells)) + "|")
    return "\n".join(lines)


def _use_in_flax(base: str, name: str, has_adapter: bool) -> str:
    merged = " with the adapter merged," if has_adapter else ""
    text = (
        f"`model/` holds the whole model,{merged} in the layout that Kaggle distributes for Gemma "
        "(Orbax), with `tokenizer.model` beside it."
    )
    if not has_adapter:
        return f"## Use\n\n{text}"
    directory = _literal(f"/path/to/{name}")
    code = [
        "import json",
        "",
        "import qwix",
        "from tunix.sft.checkpoint_manager import CheckpointManager",
        "",
        f"directory = {directory}",
        'with open(f"{directory}/tunix-lora.json") as file:',
        "    lora = qwix.LoraProvider(**json.load(file))",
        "model = qwix.apply_lora_to_model(model, lora, **model.get_model_input())",
        'manager = CheckpointManager(f"{directory}/tunix-lora")',
        "manager.maybe_restore(model, restore_only_lora_params=True)",
    ]
    lora = (
        "`tunix-lora/` holds the LoRA parameters alone. They go on the base, not on `model/`; with "
        f"`model` being Tunix's of {_quoted(base)}:"
    )
    return "\n".join(["## Use", "", text, "", lora, "", "```python", *code, "```"])


def _use_in_torch(origin: Origin, format: str, base: str, config: GemmaConfig, name: str) -> str:
    options, lead, is_adapter = "dtype=torch.bfloat16", [], format == "peft"
    if config.attn_softcap is not None:  # transformers' default implementation leaves it out
        options += ', attn_implementation="eager"'
    is_foreign = origin.base.suffix == ".gguf" or is_flax_checkpoint(origin.base)
    if is_adapter and is_foreign and not _is_on_hub(origin):
        command = ["python", "-m", "jaxsft.export", f"/path/to/{base}", "--format", "merged"]
        line = visible_line(shlex.join([*command, "--output", f"{base}-merged"]))
        what = f"The base, {_quoted(base)}, is not in transformers' format. First export it with"
        lead, base = [what, "", f"    {line}", "", "and then:", ""], f"{base}-merged"
    weights = _literal(base) if is_adapter else "path"
    code = [
        "import torch",
        *(["from peft import PeftModel"] if is_adapter else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"path = {_literal(name)}",
        "tokenizer = AutoTokenizer.from_pretrained(path)",
        f"model = AutoModelForCausalLM.from_pretrained({weights}, {options})",
        *(["model = PeftModel.from_pretrained(model, path)"] if is_adapter else []),
        'chat = [{"role": "user", "content": "Why is the sky blue?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    chat, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "output = model.generate(**inputs, max_new_tokens=256)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))',
    ]
    return "\n".join(["## Use", "", *lead, "```python", *code, "```"])


def _answers(manifest: Mapping[str, Any]) -> list[str]:
    """How to take an answer apart, and what became of earlier reasoning; [] if unknown."""
    if manifest["answer_template"] is None:
        return []
    template = AnswerTemplate(manifest["answer_template"])
    pattern = _literal(template.pattern("(.+?)", "(.+)"))
    earlier = {
        "keep": "In a chat the reasoning of earlier turns stays in the history, as in training.",
        "strip": "In a chat the reasoning of earlier turns is left out, as in training: all of an "
        f"answer up to {_quoted(template.end_of_reasoning)}. The chat template does so.",
    }
    lines = [
        *("## Answers", "", "The model was trained to answer in this form:", ""),
        *(f"    {visible_line(line)}".rstrip() for line in template.text.splitlines()),
        *("", "To take an answer, `text`, apart:", "", "```python", "import re", ""),
        f"found = re.fullmatch({pattern}, text.strip(), re.DOTALL)",
        "reasoning, answer = map(str.strip, found.groups()) if found else (None, text)",
        *("```", "", earlier[manifest["earlier_reasoning"]]),
    ]
    return ["\n".join(lines)]


def _check(manifest: Mapping[str, Any]) -> str:
    made, checked = (
        ", ".join(f"{name} {version}" for name, version in manifest[key].items())
        for key in ("versions", "peer_versions")
    )
    versions = f"made with {made}" + (f", checked with {checked}" if checked else "")
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
        f"## How it was made\n\n    {manifest['command']}\n\n{found} Versions: {versions}. "
        "Digests of all files are in `manifest.json`."
    )


def _quoted(text: str) -> str:
    return f"`{visible_line(text).replace('`', chr(39))}`"


def _literal(text: str) -> str:
    """A string as Python code."""
    return json.dumps(text, ensure_ascii=False)
