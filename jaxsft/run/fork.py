"""The adapter a run starts from: a fresh one, another run's, or a PEFT directory's."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from jaxsft.config import TrainConfig
from jaxsft.gemma import lora
from jaxsft.gemma.model import Gemma
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.identity import adapter_fingerprint, model_identity
from jaxsft.run.program import inject_adapter
from jaxsft.step.train_step import TrainState
from jaxsft.weights.find import RUN_ADAPTERS, Origin
from jaxsft.weights.load import WeightsInfo
from jaxsft.weights.peft import CONFIG_NAME, AdapterConfig, load_adapter, read_adapter_config

# In a run's directory. START is a copy of the adapter that the run was forked from.
ADAPTER, BEST_ADAPTER, START = RUN_ADAPTERS
CHECKPOINTS = "checkpoints"


def fork_source(fork_from: str) -> Path:
    """Where the adapter is read: a PEFT directory or, for an unfinished run, its checkpoints, which
    are newer than its adapter/.

    Raises ValueError where there is neither.
    """
    if "://" in fork_from:
        raise ValueError(f"fork_from {fork_from}: copy the run's adapter/ to this machine first")
    path = Path(fork_from)
    adapter, checkpoints = path / ADAPTER, path / CHECKPOINTS
    if (path / CONFIG_NAME).exists():
        return path
    if checkpoints.is_dir() and not (path / "result.json").exists():
        return checkpoints
    if (adapter / CONFIG_NAME).exists():
        return adapter
    if checkpoints.is_dir():
        return checkpoints
    raise ValueError(
        f"fork_from {path}: neither a PEFT adapter ({CONFIG_NAME}) nor the directory of a run "
        f"({ADAPTER}/ or {CHECKPOINTS}/)"
    )


def as_begun(config: TrainConfig, run_dir: Path) -> TrainConfig:
    """`config` with fork_from as it was when the run began, if it has begun."""
    start = run_dir / START
    has_begun = (start / CONFIG_NAME).exists()
    return dataclasses.replace(config, fork_from=str(start)) if has_begun else config


def check_fork(config: TrainConfig) -> None:
    """ValueError for a fork_from that cannot work, as far as that shows without the model."""
    if config.fork_from is None:
        return
    source = fork_source(config.fork_from)
    if source.name != CHECKPOINTS:
        check_adapter(config, source, read_adapter_config(source))


def adapter_config(config: TrainConfig) -> AdapterConfig:
    """The adapter config that the options ask for, without what names the base."""
    options = config.lora
    return AdapterConfig(
        rank=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        use_rslora=options.use_rslora,
        targets=lora.resolve_targets(options.target_modules),
        base_model_name=None,
    )


def check_adapter(config: TrainConfig, source: Path, found: AdapterConfig) -> None:
    """ValueError unless the adapter to start from has the configured shape."""
    wanted = adapter_config(config)
    different = [
        f"{name} is {getattr(found, name)} there and {getattr(wanted, name)} here"
        for name in ("rank", "alpha", "dropout", "use_rslora", "targets")
        if getattr(found, name) != getattr(wanted, name)
    ]
    if different:
        raise ValueError(
            f"fork_from {source}: {'; '.join(different)}; set the lora options to the adapter's"
        )


def add_adapter(
    config: TrainConfig,
    model: Gemma,
    info: WeightsInfo,
    origin: Origin,
    say: Callable[[str], None],
) -> AdapterConfig:
    """Puts a fresh adapter, or the one that fork_from names, into the model of `origin`.

    `say` is told if that adapter was trained on other weights."""
    adapter = dataclasses.replace(
        adapter_config(config),
        base_model_name=origin.name,
        base_digest=info.digest,
        base_revision=origin.revision,
    )
    source = None if config.fork_from is None else fork_source(config.fork_from)
    if source is None or source.name == CHECKPOINTS:
        inject_adapter(config, model)
    else:
        found = load_adapter(source, model)
        check_adapter(config, source, found)
        if found.base_digest not in (None, info.digest):
            say(
                f"WARNING: fork_from {source}: that adapter was trained on other weights than "
                f"{config.model.path}'s; fine if they are the same model in another format"
            )
    return adapter


def with_forked_adapter(
    config: TrainConfig, state: TrainState, info: WeightsInfo, say: Callable[[str], None]
) -> TrainState:
    """`state` with the newest checkpoint's adapter where fork_from is an unfinished run.

    `say` is told of damaged checkpoints."""
    source = None if config.fork_from is None else fork_source(config.fork_from)
    if source is None or source.name != CHECKPOINTS:
        return state
    here = adapter_fingerprint(config) | {"model": model_identity(info)}
    restored = Checkpoints(source, 1).restore(
        {"adapter": state.adapter}, here, on_event=lambda line: say(f"WARNING: {line}"), partly=True
    )
    if restored is None:
        raise ValueError(f"fork_from {config.fork_from}: no step was saved there")
    return state._replace(adapter=restored.state["adapter"])
