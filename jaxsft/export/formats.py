"""The source of an export, and the files of each format.

Tensors are copied in blocks of rows, so memory is a few blocks, or one whole tensor if the format
needs it, for a model of any size.
"""

import dataclasses
import json
import math
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from jaxsft.common.files import write_json
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.hostile import check_sentencepiece
from jaxsft.export.options import ExportOptions
from jaxsft.export.peers import Peer
from jaxsft.export.tokenizer import write_tokenizer
from jaxsft.gemma.architecture import PRESETS, GemmaConfig
from jaxsft.gemma.model import Gemma
from jaxsft.weights.adapter_config import AdapterConfig
from jaxsft.weights.find import Origin, Taught, check_tokenizer, open_tokenizer, taught_by
from jaxsft.weights.flax import write_flax
from jaxsft.weights.hf_config import to_hf_config
from jaxsft.weights.load import TensorSource, WeightsInfo, open_weights, without_weights
from jaxsft.weights.merged import DTYPES, MergedWeights
from jaxsft.weights.peft import load_adapter, save_adapter
from jaxsft.weights.tunix import write_tunix_lora

FLAX_MODEL, TUNIX_LORA = "model", "tunix-lora"
_STORED = {"float32": "F32", "bfloat16": "BF16"}  # safetensors' names
WEIGHTS = "model.safetensors"
_HEADER_ALIGNMENT = 8
_NUM_POSITIONS = 256  # about, in all probes; their logits come back in a file


class Export(NamedTuple):
    """The source of an export. `adapter` is None for a base model; `taught` is `taught_by`'s."""

    options: ExportOptions
    origin: Origin
    tokenizer: Tokenizer
    source: TensorSource
    info: WeightsInfo
    weights: MergedWeights
    adapter: AdapterConfig | None
    adapter_only: Gemma | None  # the adapter on `without_weights`
    taught: Taught | None

    @property
    def system_prompt(self) -> str | None:
        """The system text that the model was trained with, '' for none, None if unknown."""
        return None if self.taught is None else self.taught.system_prompt


def open_export(options: ExportOptions, origin: Origin) -> Export:
    """Opens the model and reads its adapter; ValueError for parts that do not fit together."""
    tokenizer = open_tokenizer(origin.tokenizer)
    source, info = open_weights(origin.base)
    check_tokenizer(tokenizer, info.config)
    if options.format == "flax" and tokenizer.bpe is not None:
        check_sentencepiece(tokenizer.bpe, tokenizer)
    weights = MergedWeights(source, info, origin.adapter, origin.adapter_config)
    adapter = model = None
    if origin.adapter is not None:
        model = without_weights(info.config)
        base = None if origin.is_named_base else info
        found = load_adapter(origin.adapter, model, base, config=origin.adapter_config)
        adapter = dataclasses.replace(
            found,
            base_model_name=origin.name,
            base_revision=origin.revision,
            base_digest=info.digest,
        )
    taught = taught_by(origin)
    return Export(options, origin, tokenizer, source, info, weights, adapter, model, taught)


def needed_bytes(made: Export, peer: Peer | None) -> int:
    """About how much space the export and its check take on the disk."""
    options, config = made.options, made.info.config
    adapter = made.adapter
    num_bytes = 4 * config.lora_params(adapter.rank, adapter.targets) if adapter else 0
    if options.format != "peft":
        num_bytes += config.num_params * np.dtype(DTYPES[options.dtype]).itemsize
    if peer is None:
        return num_bytes
    num_bytes += 4 * config.vocab_size * _NUM_POSITIONS
    if adapter is not None and options.format != "merged" and not is_in_peer_format(made):
        num_bytes += 4 * config.num_params  # the copy of the base
    return num_bytes


def write(directory: Path, made: Export) -> None:
    """Writes the model's files into a new directory."""
    options, config = made.options, made.info.config
    if options.format == "peft":
        assert made.adapter is not None and made.adapter_only is not None
        save_adapter(directory, made.adapter_only, made.adapter)
        write_tokenizer(directory, made.tokenizer, config.max_positions, made.taught)
    elif options.format == "merged":
        write_configs(directory, config, made.tokenizer, options.dtype)
        write_tokenizer(directory, made.tokenizer, config.max_positions, made.taught)
        write_weights(
            directory, made.weights, dtype=options.dtype, max_shard_bytes=options.max_shard_bytes
        )
    else:
        write_flax(directory / FLAX_MODEL, made.weights.tensors(options.dtype), config)
        presets = [dataclasses.replace(preset, name=config.name) for preset in PRESETS.values()]
        if config not in presets:  # its shapes do not identify it
            write_json(directory / FLAX_MODEL / "config.json", to_hf_config(config))
        (directory / "tokenizer.model").write_bytes(made.tokenizer.model_bytes)
        if made.adapter is not None and made.adapter_only is not None:
            given = write_tunix_lora(directory / TUNIX_LORA, made.adapter_only, made.adapter)
            write_json(directory / f"{TUNIX_LORA}.json", given)


def write_weights(
    directory: Path, weights: MergedWeights, *, dtype: str, max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or shards of at most `max_shard_bytes` and their index, with the
    names of `save_pretrained`. A larger tensor gets its own shard.

    Format: https://huggingface.co/docs/safetensors. Its library needs a whole file in memory.
    """
    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    sizes = {name: math.prod(shape) * item_bytes for name, shape in weights.shapes.items()}
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    files = [WEIGHTS]
    if len(shards) > 1:
        files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        weight_map = {name: f for f, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / f"{WEIGHTS}.index.json", index)
    for file, names in zip(files, shards, strict=True):
        _write_shard(directory / file, weights, names, dtype)


def _write_shard(path: Path, weights: MergedWeights, names: list[str], dtype: str) -> None:
    item_bytes = np.dtype(DTYPES[dtype]).itemsize
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires it
    end = 0
    for name in names:
        start, end = end, end + math.prod(weights.shapes[name]) * item_bytes
        shape = list(weights.shapes[name])
        header[name] = {"dtype": _STORED[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            for _, block in weights.blocks(name):
                file.write(block.astype(DTYPES[dtype]).tobytes())
        file.flush()
        os.fsync(file.fileno())


def write_configs(directory: Path, config: GemmaConfig, tokenizer: Tokenizer, dtype: str) -> None:
    """Writes `config.json` and `generation_config.json`; generation ends at any stop token."""
    ids = {"bos_token_id": tokenizer.bos_id, "pad_token_id": tokenizer.pad_id}
    values = to_hf_config(config) | ids | {"eos_token_id": tokenizer.eos_id, "dtype": dtype}
    write_json(directory / "config.json", values)
    stops = {"eos_token_id": list(tokenizer.stop_ids)}
    write_json(directory / "generation_config.json", ids | stops)


@contextmanager
def base_for_peer(made: Export, scratch: Path) -> Iterator[Path]:
    """The base as the peer loads it: itself, or a temporary copy in the peer's format."""
    if is_in_peer_format(made):
        yield made.source.path
        return
    with TemporaryDirectory(dir=scratch, prefix="base-") as name:
        path, config = Path(name, FLAX_MODEL), made.info.config
        base = MergedWeights(made.source, made.info, None)
        if made.options.format == "flax":
            write_flax(path, base.tensors("float32"), config)
        else:
            path.mkdir()
            write_configs(path, config, made.tokenizer, "float32")
            write_weights(path, base, dtype="float32", max_shard_bytes=2**30)
        yield path


def is_in_peer_format(made: Export) -> bool:
    """Can the peer load the base as it is?"""
    return made.info.format == ("flax" if made.options.format == "flax" else "safetensors")
