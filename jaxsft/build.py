"""A config made real: model loaded and split, adapter added, step and state on the mesh."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxsft import lora
from jaxsft.config import TrainConfig, check_devices
from jaxsft.fused_weights import fuse, unfuse
from jaxsft.model import Gemma
from jaxsft.packing import StepBatches
from jaxsft.peft_io import AdapterConfig, load_adapter, read_adapter_config
from jaxsft.prepare import Data, model_path
from jaxsft.program import (
    StepArguments,
    abstract_batch,
    check_positions,
    inject_adapter,
    lower_step,
    make_spec,
    mesh_of,
    num_run_steps,
    program_hash,
)
from jaxsft.sharding import named, state_shardings
from jaxsft.step import StepSpec, TrainState, init_state
from jaxsft.weights import WeightsInfo, load_model


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that the loop runs on. `flops_per_token` is by lora_step_flops, padding free.

    `frozen` is what the step takes, `model_weights` the shapes of the model's own frozen state.
    `program_hash` is that of the train step, as `plan` prints it.
    """

    model_info: WeightsInfo
    adapter_config: AdapterConfig
    model_weights: nnx.State
    frozen: Any
    spec: StepSpec
    state: TrainState
    step_batches: StepBatches
    flops_per_token: float
    program_hash: str
    fingerprint: dict[str, str | int | float]


def check_early(config: TrainConfig) -> Path:
    """The model's path; ValueError for mistakes that need neither data nor weights to be seen."""
    check_devices(config, jax.device_count())
    lora.resolve_targets(config.lora.target_modules)
    run_dir = Path(config.output_dir) / config.name
    nearest = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ValueError(f"{run_dir} cannot be made: {nearest} is not a writable directory")
    path = model_path(config)
    if config.lora.init_from is not None:
        _check_adapter(config, read_adapter_config(config.lora.init_from))
    return path


def build(config: TrainConfig, data: Data, path: Path) -> Setup:
    """Loads the model at `path`, adds the adapter, and puts both on the mesh.

    Raises:
      ValueError: model, tokenizer, adapter, batch, devices or schedule do not fit together.
    """
    mesh = mesh_of(config, jax.devices())
    rows = data.train.rows
    steps = num_run_steps(config, len(rows))
    model, info = load_model(
        path,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        remat=config.model.remat,
        mesh=mesh,
    )
    _check_fit(config, data, info)
    adapter_config = _add_adapter(config, model)
    graphdef, adapter, frozen = lora.split(model)
    model_weights = jax.eval_shape(lambda: frozen)
    spec = make_spec(config, info.config, graphdef, mesh, steps)
    state = init_state(adapter, spec)
    if spec.fused is not None:
        # The model's own weights are free once nothing names them: half the memory of the pair.
        frozen = jax.jit(fuse, static_argnames="layout", out_shardings=named(mesh))(
            frozen, layout=spec.fused.layout
        )
        del model
    flops = info.config.lora_step_flops(
        num_tokens=rows.num_tokens,
        num_loss_tokens=rows.num_loss_tokens,
        row_length=rows.row_length,
        lora_params=num_adapter_params(state),
    )
    arguments = StepArguments(spec, state, frozen, abstract_batch(config, mesh))
    return Setup(
        model_info=info,
        adapter_config=adapter_config,
        model_weights=model_weights,
        frozen=frozen,
        spec=spec,
        state=state,
        step_batches=StepBatches(
            rows,
            config.global_batch_size,
            config.seed,
            steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            epochs=None if config.max_steps else config.num_train_epochs,
        ),
        flops_per_token=flops / rows.num_tokens,
        program_hash=program_hash(lower_step(arguments)),
        fingerprint=fingerprint(config, data, info.digest, steps),
    )


def plain_weights(setup: Setup) -> nnx.State:
    """The model's own frozen state, for generation."""
    fused = setup.spec.fused
    if fused is None:
        return setup.frozen
    restore = jax.jit(
        lambda weights: unfuse(weights, setup.model_weights, fused.layout),
        out_shardings=state_shardings(setup.model_weights, setup.spec.mesh),
    )
    return restore(setup.frozen)


def num_adapter_params(state: TrainState) -> int:
    """Trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.adapter))


def _check_fit(config: TrainConfig, data: Data, info: WeightsInfo) -> None:
    num_rows = info.config.vocab_size
    # Embeddings may be padded, by some tens of rows; another Gemma's tokenizer is 6,144 ids off.
    if not 0 <= num_rows - data.tokenizer.vocab_size < 1024:
        raise ValueError(
            f"the tokenizer has {data.tokenizer.vocab_size} ids, the model's embedding "
            f"{num_rows} rows; use the tokenizer that belongs to the model"
        )
    longest = max((len(s.ids) for s in data.heldout_samples[: config.eval.num_prompts]), default=0)
    if longest + config.eval.max_new_tokens > info.config.max_positions and longest:
        raise ValueError(
            f"eval.max_new_tokens {config.eval.max_new_tokens} after a prompt is beyond the "
            f"model's {info.config.max_positions} positions"
        )
    if config.eval.top_k > num_rows:
        raise ValueError(f"eval.top_k {config.eval.top_k} is above the {num_rows} tokens there are")
    check_positions(config, info.config)


def _adapter_config(config: TrainConfig) -> AdapterConfig:
    """The adapter that the options ask for."""
    options = config.lora
    is_demo = config.model.path == "demo"
    return AdapterConfig(
        rank=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        use_rslora=options.use_rslora,
        targets=lora.resolve_targets(options.target_modules),
        base_model_name="google/gemma-3-270m" if is_demo else config.model.path,
    )


def _check_adapter(config: TrainConfig, found: AdapterConfig) -> None:
    """ValueError unless the adapter to start from has the configured shape."""
    wanted = _adapter_config(config)
    different = [
        f"{name} is {getattr(found, name)} there and {getattr(wanted, name)} here"
        for name in ("rank", "alpha", "dropout", "use_rslora", "targets")
        if getattr(found, name) != getattr(wanted, name)
    ]
    if different:
        raise ValueError(
            f"{config.lora.init_from}: {'; '.join(different)}; set the lora options to the "
            "adapter's"
        )


def _add_adapter(config: TrainConfig, model: Gemma) -> AdapterConfig:
    """Puts a fresh adapter, or the one in lora.init_from, into the model."""
    adapter = _adapter_config(config)
    if config.lora.init_from is not None:
        _check_adapter(config, load_adapter(config.lora.init_from, model))
        return adapter
    inject_adapter(config, model)
    return adapter


# Options that change no number of the run, or only through a digest that is compared as well.
_NOT_IN_FINGERPRINT = (
    *("name", "output_dir", "model", "data", "eval", "fsdp", "num_workers", "logging_steps"),
    *("eval_steps", "save_steps", "save_total_limit", "max_nonfinite_steps", "budget_hours"),
    "multihost",
)


def fingerprint(
    config: TrainConfig, data: Data, model_digest: str, steps: int
) -> dict[str, str | int | float]:
    """What two runs must share for one to continue the other, by option name."""
    same = dataclasses.asdict(config)
    for name in _NOT_IN_FINGERPRINT:
        del same[name]
    adapter = {f"lora.{name}": value for name, value in same.pop("lora").items()}
    found = {
        "model": model_digest,
        "model.dtype": config.model.dtype,
        "model.param_dtype": config.model.param_dtype,
        "tokenizer": data.tokenizer.digest,
        "data": data.train.rows.digest(),
        "num_steps": steps,
    }
    return {name: str(value) for name, value in (same | adapter | found).items()}
