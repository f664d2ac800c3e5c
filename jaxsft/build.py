"""A config made real: data read and packed, model loaded and split, step and state on the mesh."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from jaxsft import lora
from jaxsft.config import TrainConfig, check_devices
from jaxsft.data import DataReport, load_samples
from jaxsft.model import Gemma
from jaxsft.packing import (
    PackedRows,
    Sample,
    StepBatches,
    best_fit_decreasing,
    num_steps,
    one_per_row,
)
from jaxsft.peft_io import AdapterConfig, load_adapter, read_adapter_config
from jaxsft.sharding import make_mesh
from jaxsft.step import StepSpec, TrainState, init_state, make_schedule, make_transform
from jaxsft.tokenizer import Tokenizer
from jaxsft.weights import WeightsInfo, demo_model_path, load_model


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows that the samples of some files are packed into."""

    packed: PackedRows
    report: DataReport


@dataclasses.dataclass(frozen=True)
class Data:
    """Everything on the data side. `heldout` is None, and its samples none, without such files."""

    tokenizer: Tokenizer
    train: Rows
    heldout: Rows | None
    heldout_samples: list[Sample]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that the loop runs on. `flops_per_token` is by lora_step_flops, padding free."""

    model_info: WeightsInfo
    adapter_config: AdapterConfig
    frozen: nnx.State
    spec: StepSpec
    state: TrainState
    step_batches: StepBatches
    flops_per_token: float
    fingerprint: dict[str, str | int | float]


def model_path(config: TrainConfig) -> Path:
    """Where the model's files are; ValueError where nothing is."""
    if config.model.path == "demo":
        return demo_model_path()
    path = Path(config.model.path)
    if not path.exists():
        raise ValueError(
            f"model.path {path} does not exist; give a Hugging Face model directory (hf download "
            "NAME --local-dir DIR makes one) or a .gguf file"
        )
    return path


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


def load_data(config: TrainConfig, path: Path) -> Data:
    """Reads, converts, tokenises and packs all rows; ValueError names the file and line."""
    options = config.data
    source = Path(config.model.tokenizer) if config.model.tokenizer else path
    if source.suffix == ".gguf":
        tokenizer = Tokenizer.from_gguf(source)
    else:
        tokenizer = Tokenizer.from_file(source / "tokenizer.model" if source.is_dir() else source)

    def load(files: Any, **kwargs: Any) -> tuple[Rows, list[Sample]]:
        samples, report = load_samples(
            files, tokenizer, options.max_length, options.overlong, options.system_prompt, **kwargs
        )
        pack = best_fit_decreasing if options.packing else one_per_row
        bins = pack([len(sample.ids) for sample in samples], options.max_length)
        return Rows(PackedRows(samples, bins, options.max_length), report), samples

    # The training samples themselves are dropped: their tokens are in the rows.
    train, _ = load(
        options.train_files,
        loss_on_prompt=options.loss_on_prompt,
        start=options.start,
        stop=options.stop,
    )
    if not options.eval_files:
        return Data(tokenizer, train, None, [])
    return Data(tokenizer, train, *load(options.eval_files))


def build(config: TrainConfig, data: Data, path: Path) -> Setup:
    """Loads the model at `path`, adds the adapter, and puts both on the mesh.

    Raises:
      ValueError: model, tokenizer, adapter, batch, devices or schedule do not fit together.
    """
    mesh = make_mesh(jax.device_count() // config.fsdp, config.fsdp)
    rows = data.train.packed
    steps = config.max_steps or num_steps(
        len(rows), config.num_train_epochs, config.global_batch_size
    )
    if config.warmup_steps >= steps:
        raise ValueError(f"warmup_steps {config.warmup_steps} is not below the run's {steps} steps")
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
    spec = StepSpec(
        graphdef=graphdef,
        transform=make_transform(
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
        ),
        schedule=make_schedule(
            config.lr_scheduler_type,
            peak=config.learning_rate,
            end=config.min_learning_rate,
            warmup_steps=config.warmup_steps,
            num_steps=steps,
        ),
        mesh=mesh,
        logit_cap=info.config.final_softcap,
        chunk_tokens=config.loss_chunk_tokens,
        accumulation_steps=config.gradient_accumulation_steps,
        use_dropout=config.lora.dropout > 0,
        seed=config.seed,
    )
    state = init_state(adapter, spec)
    flops = info.config.lora_step_flops(
        num_tokens=rows.num_tokens,
        num_loss_tokens=rows.num_loss_tokens,
        row_length=rows.row_length,
        lora_params=num_adapter_params(state),
    )
    return Setup(
        model_info=info,
        adapter_config=adapter_config,
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
        fingerprint=fingerprint(config, data, info.digest, steps),
    )


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
    if config.data.max_length > info.config.max_positions:
        raise ValueError(
            f"data.max_length {config.data.max_length} is beyond the model's "
            f"{info.config.max_positions} positions"
        )


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
    lora.inject(
        model,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        use_rslora=adapter.use_rslora,
        targets=adapter.targets,
        rngs=nnx.Rngs(lora=config.seed),
    )
    return adapter


# Options that change no number of the run, or only through a digest that is compared as well.
_NOT_IN_FINGERPRINT = (
    *("name", "output_dir", "model", "data", "eval", "fsdp", "num_workers", "logging_steps"),
    *("eval_steps", "save_steps", "save_total_limit", "max_nonfinite_steps"),
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
        "data": data.train.packed.digest(),
        "num_steps": steps,
    }
    return {name: str(value) for name, value in (same | adapter | found).items()}
