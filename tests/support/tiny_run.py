"""A run as it lies there after training, made without any: its options and a random adapter."""

from pathlib import Path

import jax
from flax import nnx

from jaxsft.cli import config_yaml, parse_options
from jaxsft.config import GrpoConfig, RunConfig, TrainConfig
from jaxsft.gemma import lora
from jaxsft.gemma.layers import LoRA
from jaxsft.weights.adapter_config import AdapterConfig
from jaxsft.weights.load import load_model
from jaxsft.weights.peft import save_adapter

TARGETS = ("o_proj",)


def make_run(
    run_dir: Path, model_dir: Path, kind: type[RunConfig] = TrainConfig, **options: str
) -> Path:
    """config.yaml, adapter/ and adapter-best/ in `run_dir`, which is returned.

    The run is train's, or with `kind` GrpoConfig grpo's. `options` are the config's, dots as two
    underscores. The adapter changes what the model says.
    """
    model, _ = load_model(model_dir, dtype="float32", param_dtype="float32")
    lora.inject(model, rank=2, alpha=4, targets=TARGETS, rngs=nnx.Rngs(0))
    for _, module in list(nnx.iter_modules(model)):
        if isinstance(module, LoRA):  # whose b begins as zero
            module.b[...] = jax.random.normal(jax.random.key(0), module.b[...].shape)
    config = AdapterConfig(2, 4.0, 0.0, False, TARGETS, str(model_dir))
    for name in ("adapter", "adapter-best"):
        save_adapter(run_dir / name, model, config)
    named = {"model.path": model_dir, "data.train_files": "rows.jsonl", "name": run_dir.name}
    named |= {name.replace("__", "."): value for name, value in options.items()}
    arguments = [f"--{name}={value}" for name, value in named.items()]
    if kind is GrpoConfig:
        arguments = ["--config=grpo_gsm8k", *arguments]
    (config,) = parse_options("jaxsft.train", "", arguments, kind)
    (run_dir / "config.yaml").write_text(config_yaml(config))
    return run_dir
