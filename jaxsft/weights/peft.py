"""Reads and writes PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. PEFT has lora_A [r, in] and
lora_B [out, r] for each layer; our tree has a [in, r] and b [r, out], stacked over layers.
"""

import dataclasses
import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsft.common.files import whole_file, write_text
from jaxsft.common.hosts import on_host
from jaxsft.formats.safetensors import SafetensorsDirectory, holds_model
from jaxsft.gemma import lora
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.model import Gemma, layer_location
from jaxsft.weights.load import WeightsInfo, fill
from jaxsft.weights.names import LINEAR_TENSORS, check_shapes

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_BASE_DIGEST = "base_digest"  # in the metadata of the weights, which PEFT ignores
# Keys that this module reads, and keys that do not change the computation.
_UNDERSTOOD = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "bias",
    "init_lora_weights", "base_model_name_or_path", "revision",
)  # fmt: skip
_HARMLESS = (
    "task_type", "peft_version", "auto_mapping", "inference_mode", "megatron_core",
    "layers_pattern", "qalora_group_size", "runtime_config",
)  # fmt: skip
# Initialisations that change the base weights too; the adapter alone is then not enough.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The errors that a file which is no config can cause.
_UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError),
)


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter; `targets` are in canonical order.

    `base_digest` identifies the weights that it was trained on (`WeightsInfo.digest`);
    `base_revision` is their commit, branch or tag on the hub. Both are None if not known.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    targets: tuple[str, ...]
    base_model_name: str | None
    base_digest: str | None = None
    base_revision: str | None = None


def save_adapter(directory: Path | str, model: Gemma, config: AdapterConfig) -> None:
    """Writes the adapter of `model` as float32; `config` are the settings it was injected with.

    Each file gets its name only when it is whole, the config last.
    """
    state = nnx.to_flat_state(lora.split(model)[1])
    leaves = {path: on_host(v.get_value()) for path, v in state}
    tensors = {}
    for part in adapter_parts(model.config, config.targets, config.rank):
        leaf = leaves[part.tree_path]
        array = np.asarray(leaf if part.row is None else leaf[part.row])
        assert array.shape == part.shape[::-1], (part.key, array.shape)
        tensors[part.key] = np.ascontiguousarray(array.T, np.float32)
    used = {part.tree_path for part in adapter_parts(model.config, config.targets, config.rank)}
    assert used == leaves.keys(), "targets are not those of the model's adapter"
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name,
        "revision": config.base_revision,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        "target_modules": list(config.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}  # transformers refuses a file without it
    if config.base_digest is not None:
        metadata[_BASE_DIGEST] = config.base_digest
    with whole_file(directory / WEIGHTS_NAME) as path:
        _write_tensors(path, tensors, metadata)
    write_text(directory / CONFIG_NAME, text)


def load_adapter(
    directory: Path | str,
    model: Gemma,
    base: WeightsInfo | None = None,
    *,
    config: AdapterConfig | None = None,
) -> AdapterConfig:
    """Injects the adapter of `directory` into `model`, which has none; returns its config.

    Values are cast to float32. `base` describes the weights of `model`: an adapter that was trained
    on other weights is then refused. `config` is the adapter's, if the caller has read it already.

    Raises ValueError and leaves `model` unchanged for a config that is unreadable or asks for more
    than plain LoRA on Gemma's linear layers (names every such setting), for weights that are
    missing, truncated or not finite, and for missing, extra or misshapen tensors (names them all).
    """
    directory = Path(directory)
    config = config or read_adapter_config(directory)
    if base is not None and config.base_digest not in (None, base.digest):
        raise ValueError(
            f"{directory}: was trained on other weights (SHA-256 {config.base_digest:.12}) than "
            f"{base.name}'s ({base.digest:.12}); give its own as --base_model, or these, if they "
            "are the same model in another format"
        )
    source = SafetensorsDirectory(directory, WEIGHTS_NAME)
    parts = list(adapter_parts(model.config, config.targets, config.rank))
    check_shapes(source.path, source.shapes, {part.key: part.shape for part in parts})
    num_rows: dict[tuple, int] = {}
    for part in parts:
        if part.row is not None:
            num_rows[part.tree_path] = part.row + 1
    arrays: dict[tuple, np.ndarray] = {}
    for part in parts:
        stack = (num_rows[part.tree_path],) if part.tree_path in num_rows else ()
        if part.tree_path not in arrays:
            arrays[part.tree_path] = np.empty((*stack, *part.shape[::-1]), np.float32)
        array = arrays[part.tree_path]
        fill(source, part.key, (array if part.row is None else array[part.row]).T)
    assert not nnx.to_flat_state(lora.split(model)[1]), "the model already has an adapter"
    lora.inject(
        model,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        targets=config.targets,
        rngs=nnx.Rngs(0),
    )
    for path, array in arrays.items():
        node: Any = model
        for key in path:
            node = node[key] if isinstance(key, int) else getattr(node, key)
        node[...] = jnp.asarray(array)
    return config


def holds_adapter(directory: Path) -> bool:
    """Does `directory` hold an adapter? A config alone counts too, but not beside a whole model."""
    has_weights = (directory / WEIGHTS_NAME).is_file() or not holds_model(directory)
    return has_weights and (directory / CONFIG_NAME).is_file()


class AdapterPart(NamedTuple):
    """One PEFT tensor: its key, its shape, and its leaf in the tree (and row in that leaf)."""

    key: str
    shape: tuple[int, int]
    tree_path: tuple
    row: int | None


def adapter_parts(config: GemmaConfig, targets: Sequence[str], rank: int) -> Iterator[AdapterPart]:
    """Yields every tensor of an adapter's file, layer by layer, A before B."""
    for layer in range(config.num_layers):
        group, index, row = layer_location(config, layer)
        for tensor in LINEAR_TENSORS:
            *parents, target, _ = tensor.tree
            if target not in targets:
                continue
            in_dim, out_dim = config.linear_shapes[target]
            key = f"base_model.model.model.layers.{layer}.{tensor.hf}.lora"
            path = (group, index, *parents, target, "lora")
            yield AdapterPart(f"{key}_A.weight", (rank, in_dim), (*path, "a"), row)
            yield AdapterPart(f"{key}_B.weight", (out_dim, rank), (*path, "b"), row)


def read_adapter_config(directory: Path | str) -> AdapterConfig:
    """The settings of a PEFT adapter; ValueError names all unsupported ones.

    If the targets are given as a pattern, they are taken from the names of the tensors.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        rank, alpha, targets = raw["r"], raw["lora_alpha"], raw["target_modules"]
        problems = _unsupported(raw)
        base, use_rslora = raw.get("base_model_name_or_path"), raw.get("use_rslora", False)
        revision = raw.get("revision")
        config = AdapterConfig(
            rank=int(rank),
            alpha=float(alpha),
            dropout=float(raw.get("lora_dropout") or 0.0),
            use_rslora=bool(use_rslora),
            targets=(),
            base_model_name=None if base is None else str(base),
            base_digest=_base_digest(path.with_name(WEIGHTS_NAME)),
            base_revision=revision if isinstance(revision, str) and revision else None,
        )
    except _UNREADABLE as error:
        raise ValueError(f"{path}: not a readable PEFT config: {error!r}") from error
    if config.rank < 1 or config.rank != rank or not 0 <= config.dropout < 1:
        problems.append(f"r={rank!r} with lora_dropout={config.dropout!r}")
    if config.alpha != alpha or not 0 < config.alpha < math.inf:
        problems.append(f"lora_alpha={alpha!r} (only a finite number above 0)")
    if not isinstance(use_rslora, bool | None):
        problems.append(f"use_rslora={use_rslora!r} (only true or false)")
    if isinstance(targets, str) and targets != lora.ALL_LINEAR:
        targets = _targets_in(path.with_name(WEIGHTS_NAME))
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if targets != lora.ALL_LINEAR and not is_list:
        problems.append(f"target_modules={targets!r} (only names, a pattern, or all-linear)")
    if problems:
        raise ValueError(f"{path}: not supported: {'; '.join(problems)}")
    try:
        return dataclasses.replace(config, targets=lora.resolve_targets(targets))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _targets_in(path: Path) -> list[str]:
    """The target modules of a file of weights: matching a foreign pattern could take forever."""
    names = SafetensorsDirectory(path.parent, path.name).shapes
    return sorted({m[1] for name in names if (m := re.search(r"\.(\w+)\.lora_[AB]\.", name))})


def _base_digest(path: Path) -> str | None:
    """The digest of the base in the metadata of the weights; `load_adapter` reports damage."""
    try:
        with safe_open(path, framework="numpy") as file:
            digest = (file.metadata() or {}).get(_BASE_DIGEST, "")
    except (SafetensorError, OSError):
        return None
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None


def _unsupported(raw: dict[str, Any]) -> list[str]:
    problems = []
    if raw.get("peft_type") != "LORA":
        problems.append(f"peft_type={raw.get('peft_type')!r} (only LORA)")
    if raw.get("bias", "none") != "none":
        problems.append(f"bias={raw['bias']!r} (only none)")
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_CHANGES_BASE):
        problems.append(f"init_lora_weights={init!r} (it changes the base weights)")
    # use_dora, modules_to_save, rank_pattern, layers_to_transform, …: future settings of PEFT are
    # refused too, as long as their default is off.
    for key, value in raw.items():
        # Not `value in (None, False, …)`: 0 == False, but layers_to_transform=0 is a layer.
        is_off = value is None or value is False or value in ([], {})
        if key not in _UNDERSTOOD and key not in _HARMLESS and not is_off:
            problems.append(f"{key}={value!r}")
    return problems


def _write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Writes a safetensors file with reproducible bytes: the library shuffles the metadata."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # it wraps the system's error
        raise OSError(f"{path.parent}: can't be written: {error}") from error
    with path.open("r+b") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size)) | {"__metadata__": metadata}
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= size, (len(text), size)
        file.seek(8)
        file.write(text.ljust(size))
