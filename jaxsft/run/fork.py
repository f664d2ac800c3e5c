"""The adapter a run starts from: a fresh one, another run's, or a PEFT directory's."""

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple, TypeVar

from jaxsft.config import LoraOptions, RunConfig
from jaxsft.gemma import lora
from jaxsft.gemma.model import Gemma
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.identity import adapter_fingerprint, model_identity
from jaxsft.run.program import inject_adapter
from jaxsft.step.train_step import TrainState
from jaxsft.weights.adapter_config import CONFIG_NAME, AdapterConfig, read_adapter_config
from jaxsft.weights.find import (
    RUN_ADAPTERS,
    Origin,
    check_is_whole,
    run_config,
    what_is_there,
)
from jaxsft.weights.load import WeightsInfo
from jaxsft.weights.peft import load_adapter

# In a run's directory. START is a copy of the adapter that the run was forked from.
ADAPTER, BEST_ADAPTER, START = RUN_ADAPTERS
CHECKPOINTS = "checkpoints"


Config = TypeVar("Config", bound=RunConfig)


class Fork(NamedTuple):
    """The adapter to start from: its PEFT directory and settings, or, for an unfinished run, the
    directory of its checkpoints and None."""

    source: Path
    adapter: AdapterConfig | None


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
        check_is_whole(path)
        return path
    if checkpoints.is_dir() and not (path / "result.json").exists():
        return checkpoints
    if (adapter / CONFIG_NAME).exists():
        return adapter
    if checkpoints.is_dir():
        return checkpoints
    if not path.exists():
        raise ValueError(f"fork_from {path}: there is no such directory")
    raise ValueError(
        f"fork_from {path}: neither a PEFT adapter ({CONFIG_NAME}) nor the directory of a run "
        f"({ADAPTER}/ or {CHECKPOINTS}/){what_is_there(path)}"
    )


def as_begun(config: Config, run_dir: Path) -> Config:
    """`config` with fork_from as it was when the run began, if it has begun."""
    start = run_dir / START
    has_begun = (start / CONFIG_NAME).exists()
    return dataclasses.replace(config, fork_from=str(start)) if has_begun else config


def with_fork(config: Config, typed: Collection[str]) -> tuple[Config, Fork | None]:
    """(config with the lora options of the adapter that fork_from names, that adapter).

    Rank, alpha, targets and scaling are the adapter's; dropout, which is no part of it, stays.
    `typed` are the options that the user gave, by dotted name (`cli.typed_options`).

    Raises ValueError where there is no such adapter, where it is not supported, and where an option
    that was typed contradicts it.
    """
    if config.fork_from is None:
        return config, None
    source = fork_source(config.fork_from)
    adapter, here = None, config.lora
    if source.name == CHECKPOINTS:
        there = run_config(source.parent).lora
    else:
        adapter = read_adapter_config(source)
        there = LoraOptions(
            r=adapter.rank,
            alpha=adapter.alpha,
            use_rslora=adapter.use_rslora,
            target_modules=_as_text(adapter.targets),
        )
    there = dataclasses.replace(there, dropout=here.dropout)
    if lora.resolve_targets(here.target_modules) == lora.resolve_targets(there.target_modules):
        there = dataclasses.replace(there, target_modules=here.target_modules)
    options = {
        f"lora.{field.name}": (getattr(there, field.name), getattr(here, field.name))
        for field in dataclasses.fields(LoraOptions)
    }
    wrong = [
        f"{name} is {theirs} there and {ours} here"
        for name, (theirs, ours) in options.items()
        if name in typed and theirs != ours
    ]
    if wrong:
        raise ValueError(
            f"fork_from {source}: {'; '.join(wrong)}; leave the option out: the adapter goes on as "
            "it is"
        )
    return dataclasses.replace(config, lora=there), Fork(source, adapter)


def describe_fork(config: RunConfig) -> str:
    """A line on the adapter that a run of `with_fork`'s options starts from."""
    options = config.lora
    scaling = " with rsLoRA" if options.use_rslora else ""
    return (
        f"Starts from {config.fork_from}: rank {options.r}, alpha {options.alpha:g}{scaling}, on "
        f"{options.target_modules}."
    )


def _as_text(targets: tuple[str, ...]) -> str:
    return lora.ALL_LINEAR if targets == lora.TARGETS else ",".join(targets)


def add_adapter(
    config: RunConfig,
    model: Gemma,
    info: WeightsInfo,
    origin: Origin,
    fork: Fork | None,
    say: Callable[[str], None],
) -> AdapterConfig:
    """Puts a fresh adapter, or that of `fork`, into the model of `origin`.

    `say` is told if that adapter was trained on other weights."""
    options = config.lora
    adapter = AdapterConfig(
        rank=options.r,
        alpha=options.alpha,
        dropout=options.dropout,
        use_rslora=options.use_rslora,
        targets=lora.resolve_targets(options.target_modules),
        base_model_name=origin.name,
        base_digest=info.digest,
        base_revision=origin.revision,
    )
    if fork is None or fork.adapter is None:
        inject_adapter(config, model)
    else:
        found = dataclasses.replace(fork.adapter, dropout=options.dropout)
        load_adapter(fork.source, model, config=found)
        if found.base_digest not in (None, info.digest):
            say(
                f"WARNING: fork_from {fork.source}: that adapter was trained on other weights than "
                f"{config.model.path}'s; fine if they are the same model in another format"
            )
    return adapter


def with_forked_adapter(
    config: RunConfig,
    state: TrainState,
    info: WeightsInfo,
    fork: Fork | None,
    say: Callable[[str], None],
) -> TrainState:
    """`state` with the newest checkpoint's adapter where `fork` is an unfinished run.

    `say` is told of damaged checkpoints."""
    if fork is None or fork.adapter is not None:
        return state
    # Rank and targets show in the arrays; targets may be written in another way.
    names = ("lora.r", "lora.alpha", "lora.use_rslora")
    here = {name: value for name, value in adapter_fingerprint(config).items() if name in names}
    restored = Checkpoints(fork.source, 1).restore(
        {"adapter": state.adapter},
        here | {"model": model_identity(info)},
        on_event=lambda line: say(f"WARNING: {line}"),
        partly=True,
    )
    if restored is None:
        raise ValueError(f"fork_from {config.fork_from}: no step was saved there")
    return state._replace(adapter=restored.state["adapter"])
