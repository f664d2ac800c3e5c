"""Sets a run up: loads the model, adds the adapter, puts the step's state on the mesh."""

import copy
import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from jaxsft.common.batch import Batch
from jaxsft.config import RunConfig, TrainConfig
from jaxsft.config_check import check_devices
from jaxsft.data.packing import StepBatches
from jaxsft.gemma import lora
from jaxsft.gemma.loss import TokenLoss, cross_entropy
from jaxsft.gemma.model import Gemma
from jaxsft.gemma.sharding import named
from jaxsft.prepare.rows import Data, run_model
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.fork import Fork, add_adapter, with_forked_adapter
from jaxsft.run.identity import fingerprint
from jaxsft.run.program import (
    StepArguments,
    abstract_batch,
    abstract_model,
    check_positions,
    learning_rate_schedule,
    lower_step,
    make_spec,
    mesh_of,
    num_run_steps,
    program_hash,
)
from jaxsft.step.fused_weights import fuse
from jaxsft.step.train_step import StepSpec, TrainState, init_state
from jaxsft.weights.adapter_config import AdapterConfig
from jaxsft.weights.find import Origin, architecture, check_tokenizer
from jaxsft.weights.load import WeightsInfo, load_model


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """The model on the mesh, with its adapter and what updates it.

    `frozen` are the frozen weights as the step takes them, `model_weights` the shapes of the
    model's own.
    """

    model_info: WeightsInfo
    adapter_config: AdapterConfig
    model_weights: nnx.State
    frozen: Any
    spec: StepSpec
    state: TrainState


@dataclasses.dataclass(frozen=True)
class Setup(LoadedRun):
    """Everything that the loop runs on.

    `step_batches` says what each step reads, and its length is the number of steps. `batch` has the
    shapes of a step's batch. `flops_per_token` follows `lora_step_flops`, without padding.
    `program_hash` is the train step's, as `plan` prints it.
    """

    step_batches: Any
    batch: Batch
    flops_per_token: float
    program_hash: str
    fingerprint: dict[str, str]


def check_early(config: RunConfig) -> Origin:
    """The model to train. ValueError for mistakes that show without data and weights."""
    check_devices(config, jax.device_count())
    lora.resolve_targets(config.lora.target_modules)
    return run_model(config.model)


def abstract_state(config: RunConfig, origin: Origin) -> TrainState:
    """The shapes of a run's state with the model of `origin`; reads no weights."""
    model_config, _ = architecture(str(origin.base))
    return abstract_model(config, model_config, jax.devices(), config.warmup_steps + 1)[1]


def build(
    config: TrainConfig,
    data: Data,
    origin: Origin,
    say: Callable[[str], None] = lambda line: None,
    fork: Fork | None = None,
) -> Setup:
    """The setup of a run on rows, with `load_run`'s arguments and errors."""
    rows = data.train.rows
    steps = num_run_steps(config, len(rows))
    asked = data.heldout_samples[: config.eval.num_prompts]
    longest = max((sample.completion_start for sample in asked), default=0)

    def check(info: WeightsInfo) -> None:
        check_tokenizer(data.tokenizer, info.config)
        check_evaluation(config, info, longest)

    loaded = load_run(config, origin, steps, check=check, say=say, fork=fork)
    info = loaded.model_info
    flops = info.config.lora_step_flops(
        num_tokens=rows.num_tokens,
        num_loss_tokens=rows.num_loss_tokens,
        row_length=rows.row_length,
        lora_params=num_adapter_params(loaded.state),
    )
    return make_setup(
        loaded,
        step_batches=StepBatches(
            rows,
            config.global_batch_size,
            config.seed,
            steps,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            epochs=None if config.max_steps else config.num_train_epochs,
        ),
        batch=abstract_batch(config, loaded.spec.model.mesh),
        flops_per_token=flops / rows.num_tokens,
        fingerprint=fingerprint(config, data, info, steps),
    )


def load_run(
    config: RunConfig,
    origin: Origin,
    steps: int,
    *,
    check: Callable[[WeightsInfo], None],
    say: Callable[[str], None] = lambda line: None,
    fork: Fork | None = None,
    token_loss: TokenLoss = cross_entropy,
) -> LoadedRun:
    """Loads the model of `origin`, adds the adapter, puts both on the mesh.

    Args:
      steps: of the schedule.
      check: may raise ValueError for a model that does not fit the rest.
      say: gets warnings.
      fork: with the lora options, those of `with_fork`.

    Raises:
      ValueError: model, tokenizer, adapter, batch, devices or schedule do not fit together.
    """
    mesh = mesh_of(config, jax.devices())
    model, info = load_model(
        origin.base,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        remat=config.model.remat,
        mesh=mesh,
    )
    check(info)
    check_positions(config, info.config)
    adapter_config = add_adapter(config, model, info, origin, fork, say)
    graphdef, adapter, frozen = lora.split(model)
    model_weights = jax.eval_shape(lambda: frozen)
    spec = make_spec(config, info.config, graphdef, mesh, steps, token_loss)
    state = with_forked_adapter(config, init_state(adapter, spec), info, fork, say)
    if spec.model.fused is not None:
        # Once nothing refers to the model's own weights, half of the memory is free again.
        frozen = jax.jit(fuse, static_argnames="layout", out_shardings=named(mesh))(
            frozen, layout=spec.model.fused.layout
        )
        del model
        gc.collect()  # modules refer to each other in cycles: nothing else frees its arrays in time
    return LoadedRun(info, adapter_config, model_weights, frozen, spec, state)


def make_setup(loaded: LoadedRun, *, batch: Batch, **others: Any) -> Setup:
    """The setup of what is loaded; `others` are the rest of its fields but `program_hash`."""
    arguments = StepArguments(loaded.spec, loaded.state, loaded.frozen, batch)
    fields = {field.name: getattr(loaded, field.name) for field in dataclasses.fields(loaded)}
    return Setup(**fields, batch=batch, program_hash=program_hash(lower_step(arguments)), **others)


def trained_model(setup: Setup) -> Gemma:
    """The model with the present adapter; its frozen weights are shapes only."""
    return nnx.merge(setup.spec.model.graphdef, setup.state.adapter, setup.model_weights)


def num_adapter_params(state: TrainState) -> int:
    """Trained parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(state.adapter))


def check_evaluation(config: RunConfig, info: WeightsInfo, longest: int) -> None:
    """ValueError where the model cannot answer a held-out prompt of `longest` tokens as asked."""
    if longest and longest + config.eval.max_new_tokens > info.config.max_positions:
        raise ValueError(
            f"eval.max_new_tokens {config.eval.max_new_tokens} after a prompt of {longest} tokens "
            f"is beyond the model's {info.config.max_positions} positions"
        )
    num_ids = info.config.vocab_size
    if config.eval.top_k > num_ids:
        raise ValueError(f"eval.top_k {config.eval.top_k} is above the {num_ids} tokens there are")


def restore(setup: Setup, checkpoints: Checkpoints, say: Callable[[str], None]) -> Setup:
    """`setup` with the state of the newest good checkpoint, if there is one; `say` is told."""
    restored = checkpoints.restore(
        setup.state, setup.fingerprint, on_event=lambda line: say(f"WARNING: {line}")
    )
    if restored is None:
        return setup
    say(f"Continuing from step {restored.step}.")
    was, now = restored.metadata.get("split"), split_of(setup)
    if was != now:
        say(
            f"A step is split into {now} now, not {was}: losses equal those of an uninterrupted "
            "run within rounding, not bit for bit."
        )
    return dataclasses.replace(setup, state=restored.state)


def checkpoint_metadata(setup: Setup) -> dict[str, Any]:
    """What every checkpoint of the run carries besides its arrays."""
    return {"fingerprint": setup.fingerprint, "split": split_of(setup)}


def split_of(setup: Setup) -> str:
    """How a step's work is divided; it decides the order of the sums."""
    spec = setup.spec
    return f"{spec.model.mesh.size} devices x {spec.update.accumulation_steps} micro-batches"


def with_num_steps(setup: Setup, config: RunConfig, steps: int) -> Setup:
    """`setup` with a schedule of `steps`, decay included, as if max_steps had been `steps`.

    Only for a run that has not begun: its batches stay the same."""
    batches = copy.copy(setup.step_batches)
    batches.num_steps = steps
    update = dataclasses.replace(setup.spec.update, schedule=learning_rate_schedule(config, steps))
    spec = dataclasses.replace(setup.spec, update=update)
    lowered = lower_step(StepArguments(spec, setup.state, setup.frozen, setup.batch))
    return dataclasses.replace(
        setup,
        spec=spec,
        step_batches=batches,
        program_hash=program_hash(lowered),
        fingerprint=setup.fingerprint | {"num_steps": str(steps)},
    )
