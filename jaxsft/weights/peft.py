"""Reads and writes PEFT adapters: `adapter_config.json` and `adapter_model.safetensors`.

Format: https://huggingface.co/docs/peft/developer_guides/checkpoint. PEFT has lora_A [r, in] and
lora_B [out, r] for each layer; our tree has a [in, r] and b [r, out], stacked over layers.
"""

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError
from safetensors.numpy import save_file

from jaxsft.common.files import whole_file, write_text
from jaxsft.common.hosts import on_host
from jaxsft.common.listed import ranges, shortened
from jaxsft.formats.safetensors import SafetensorsDirectory, holds_model
from jaxsft.gemma import lora
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.model import Gemma, layer_location
from jaxsft.weights.adapter_config import (
    BASE_DIGEST,
    CONFIG_NAME,
    MERGE,
    WEIGHTS_NAME,
    AdapterConfig,
    adapter_tensors,
    read_adapter_config,
)
from jaxsft.weights.load import WeightsInfo, fill
from jaxsft.weights.names import LINEAR_TENSORS, check_shapes


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
        metadata[BASE_DIGEST] = config.base_digest
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

    Raises ValueError and leaves `model` unchanged as `read_adapter_config` and `open_adapter`, and
    for values that are not finite.
    """
    directory = Path(directory)
    config = config or read_adapter_config(directory)
    if base is not None and config.base_digest not in (None, base.digest):
        raise ValueError(
            f"{directory}: was trained on other weights (SHA-256 {config.base_digest:.12}) than "
            f"{base.name}'s ({base.digest:.12}); give its own as --base_model, or these, if they "
            "are the same model in another format"
        )
    source, parts = open_adapter(directory, config, model.config)
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


class AdapterPart(NamedTuple):
    """One PEFT tensor: its key, its shape, and its leaf in the tree (and row in that leaf)."""

    key: str
    shape: tuple[int, int]
    tree_path: tuple
    row: int | None


def open_adapter(
    directory: Path, config: AdapterConfig, model_config: GemmaConfig
) -> tuple[SafetensorsDirectory, list[AdapterPart]]:
    """(tensors of the adapter under PEFT's names, the parts of a model's adapter that they are).

    Raises ValueError for files that are missing or truncated, for an adapter of some layers only,
    and for missing, extra or misshapen tensors.
    """
    source, path = adapter_tensors(directory), directory / WEIGHTS_NAME
    parts = list(adapter_parts(model_config, config.targets, config.rank))
    layers = {int(name.split(".")[4]) for name in source.shapes}
    if layers < {*range(model_config.num_layers)}:
        raise ValueError(
            f"{path}: not supported: it is on layers {shortened(ranges(layers), 60)} only of the "
            f"model's {model_config.num_layers} (layers_to_transform, or a pattern of targets); "
            f"{MERGE}"
        )
    advice = "give the base that it was made for as --base_model"
    check_shapes(path, source.shapes, {part.key: part.shape for part in parts}, advice)
    return source, parts


def holds_adapter(directory: Path) -> bool:
    """Does `directory` hold an adapter? A config alone counts too, but not beside a whole model."""
    has_weights = (directory / WEIGHTS_NAME).is_file() or not holds_model(directory)
    return has_weights and (directory / CONFIG_NAME).is_file()


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
