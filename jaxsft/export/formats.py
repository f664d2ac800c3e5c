"""The formats of an export: what each of them writes, and how another library checks it."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from jaxsft.common.files import read_json, write_json
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.hf_directory import base_for_peft, to_hf_config, write_configs, write_weights
from jaxsft.export.options import ExportOptions
from jaxsft.export.peers import TRANSFORMERS, TUNIX, Peer, Probe, ask, find_peer
from jaxsft.export.tokenizer import write_tokenizer
from jaxsft.export.verify import (
    CHATS,
    Check,
    chat_problem,
    drift,
    give_memory_back,
    make_probes,
    max_difference,
    our_logits,
    reference_logits,
    text_problem,
)
from jaxsft.export.verify_flax import TUNIX_LORA, flax_problem, tunix_lacks
from jaxsft.gemma.architecture import PRESETS, GemmaConfig
from jaxsft.gemma.model import Gemma
from jaxsft.weights.find import Origin, check_tokenizer, open_tokenizer, system_text
from jaxsft.weights.flax import write_flax
from jaxsft.weights.load import TensorSource, WeightsInfo, load_model, open_weights, without_weights
from jaxsft.weights.merged import DTYPES, MergedWeights
from jaxsft.weights.peft import AdapterConfig, load_adapter, save_adapter
from jaxsft.weights.tunix import write_tunix_lora

FLAX_MODEL = "model"
_NUM_POSITIONS = 256  # of all probes, about: their logits come back in a file


class Export(NamedTuple):
    """What an export is made from. `adapter` is None for a base model; `system_prompt` is what
    training put in front of rows without a system turn, as `system_text`."""

    options: ExportOptions
    origin: Origin
    tokenizer: Tokenizer
    source: TensorSource
    info: WeightsInfo
    weights: MergedWeights
    adapter: AdapterConfig | None
    adapter_only: Gemma | None  # `without_weights`, but for the adapter
    system_prompt: str | None


def open_export(options: ExportOptions, origin: Origin) -> Export:
    """Opens everything and reads what is small; ValueError for what does not fit together."""
    tokenizer = open_tokenizer(origin.tokenizer)
    source, info = open_weights(origin.base)
    check_tokenizer(tokenizer, info.config)
    weights = MergedWeights(source, info, origin.adapter)
    adapter = model = None
    if origin.adapter is not None:
        model = without_weights(info.config)
        found = load_adapter(origin.adapter, model, None if origin.is_named_base else info)
        adapter = dataclasses.replace(
            found,
            base_model_name=origin.name,
            base_revision=origin.revision,
            base_digest=info.digest,
        )
    text = system_text(origin)
    return Export(options, origin, tokenizer, source, info, weights, adapter, model, text)


def find_checker(options: ExportOptions, config: GemmaConfig) -> tuple[Peer | None, str | None]:
    """(the library that will check the export, or None; why none does).

    Raises ValueError where there is none and there must be: for all formats but flax, and where
    the options name its Python.
    """
    if options.format != "flax":
        return find_peer(TRANSFORMERS, options.peer_python), None
    if lacks := tunix_lacks(config):
        return None, f"Tunix has no {lacks}"
    try:
        return find_peer(TUNIX, options.peer_python), None
    except ValueError:
        if options.peer_python is not None:
            raise
        return None, "Tunix is not installed here; --peer_python names a Python that has it"


def needed_bytes(made: Export, peer: Peer | None) -> int:
    """What the export and its check take on the disk, about."""
    options, config = made.options, made.info.config
    adapter = made.adapter
    num_bytes = 4 * config.lora_params(adapter.rank, adapter.targets) if adapter else 0
    if options.format != "peft":
        num_bytes += config.num_params * np.dtype(DTYPES[options.dtype]).itemsize
    if peer is None:
        return num_bytes
    num_bytes += 4 * config.vocab_size * _NUM_POSITIONS
    is_there = made.info.format == ("flax" if options.format == "flax" else "safetensors")
    if adapter is not None and options.format != "merged" and not is_there:
        num_bytes += 4 * config.num_params  # the base, written anew
    return num_bytes


def write(directory: Path, made: Export) -> None:
    """Writes the model's files into a new directory."""
    options, config = made.options, made.info.config
    if options.format == "peft":
        assert made.adapter is not None and made.adapter_only is not None
        save_adapter(directory, made.adapter_only, made.adapter)
        write_tokenizer(directory, made.tokenizer, config.max_positions, made.system_prompt)
    elif options.format == "merged":
        write_configs(directory, config, made.tokenizer, options.dtype)
        write_tokenizer(directory, made.tokenizer, config.max_positions, made.system_prompt)
        write_weights(
            directory, made.weights, dtype=options.dtype, max_shard_bytes=options.max_shard_bytes
        )
    else:
        write_flax(directory / FLAX_MODEL, made.weights.tensors(options.dtype), config)
        presets = [dataclasses.replace(preset, name=config.name) for preset in PRESETS.values()]
        if config not in presets:  # its shapes don't tell what it is
            write_json(directory / FLAX_MODEL / "config.json", to_hf_config(config))
        (directory / "tokenizer.model").write_bytes(made.tokenizer.model_bytes)
        if made.adapter is not None and made.adapter_only is not None:
            given = write_tunix_lora(directory / TUNIX_LORA, made.adapter_only, made.adapter)
            write_json(directory / f"{TUNIX_LORA}.json", given)


def verify(
    directory: Path, made: Export, peer: Peer | None, gap: str | None, scratch: Path
) -> Check:
    """Compares the export, loaded elsewhere, with the model that it was made from.

    `peer` and `gap` are `find_checker`'s; `scratch` is a directory for what the check writes.
    """
    probes = make_probes(made.tokenizer, made.info.config)
    if peer is None:
        return _read_again(directory, made, probes, gap)
    if made.options.format == "flax":
        return _verify_flax(directory, made, probes, peer, scratch)
    dtype = "float32" if made.options.format == "peft" else made.options.dtype
    ours = reference_logits(made.origin, dtype, probes)
    give_memory_back()
    settings = {"chats": [[turn._asdict() for turn in chat] for chat in CHATS]}
    if made.options.format == "merged":
        name = peer.library.name
        found = ask(peer, directory, probes, scratch=scratch, settings=settings)
    else:
        name = f"{peer.library.name} and PEFT"
        with base_for_peft(made.source, made.info, made.tokenizer, scratch) as base:
            found = ask(peer, base, probes, scratch=scratch, adapter=directory, settings=settings)
    difference = max_difference(ours, found.logits)
    problem = chat_problem(made.tokenizer, made.system_prompt, found.ids)
    return Check(name, difference, drift(name, difference) or problem, None)


def _verify_flax(
    directory: Path, made: Export, probes: list[Probe], peer: Peer, scratch: Path
) -> Check:
    """Has Tunix load model/, and then, as its notebooks do, the base with tunix-lora/ on it."""
    name, options = peer.library.name, made.options
    settings = {"config": dataclasses.asdict(made.info.config), "texts": []}
    texts = [turn.content for chat in CHATS for turn in chat]
    ours = reference_logits(made.origin, options.dtype, probes)
    give_memory_back()
    model = directory / FLAX_MODEL
    found = ask(peer, model, probes, scratch=scratch, settings=settings | {"texts": texts})
    difference = max_difference(ours, found.logits)
    problem = drift(f"{name}, from {FLAX_MODEL}/,", difference)
    problem = problem or text_problem(made.tokenizer, texts, found.ids)
    if made.adapter is not None and problem is None:
        if options.dtype != "float32":
            ours = reference_logits(made.origin, "float32", probes)
            give_memory_back()
        settings |= {"lora": read_json(directory / f"{TUNIX_LORA}.json")}
        with _base_for_tunix(made, scratch) as base:
            lora = directory / TUNIX_LORA
            found = ask(peer, base, probes, scratch=scratch, adapter=lora, settings=settings)
        of_lora = max_difference(ours, found.logits)
        problem = drift(f"{name}, from the base and {TUNIX_LORA}/,", of_lora)
        difference = max(difference, of_lora)
    problem = problem or flax_problem(directory, made.tokenizer, made.origin.adapter)
    return Check(name, difference, problem, None)


@contextmanager
def _base_for_tunix(made: Export, scratch: Path) -> Iterator[Path]:
    """The base in Kaggle's layout: itself, or, of another format, written anew for now."""
    if made.info.format == "flax":
        yield made.source.path
        return
    with TemporaryDirectory(dir=scratch, prefix="base-") as name:
        base = MergedWeights(made.source, made.info, None)
        write_flax(Path(name, FLAX_MODEL), base.tensors("float32"), made.info.config)
        yield Path(name, FLAX_MODEL)


def _read_again(directory: Path, made: Export, probes: list[Probe], gap: str | None) -> Check:
    """A Flax export where Tunix cannot check it."""
    ours = reference_logits(made.origin, made.options.dtype, probes)
    give_memory_back()
    model, _ = load_model(directory / FLAX_MODEL, dtype="float32", param_dtype="float32")
    difference = max_difference(ours, our_logits(model, probes))
    name = "jaxsft's own reader"
    problem = drift(name, difference) or flax_problem(
        directory, made.tokenizer, made.origin.adapter
    )
    parts = f"{FLAX_MODEL}/, {TUNIX_LORA}/ and" if made.adapter else f"{FLAX_MODEL}/ and"
    why = f"{parts} tokenizer.model were read by jaxsft alone, not by Tunix: {gap}"
    return Check(name, difference, problem, why)
