"""Writes what was trained for other programs: `python -m jaxsft.export RUN --format merged`.

The export loads itself again in the other library, in a process of its own, and has its logits
compared before it gets its name; a Flax one is read by jaxsft alone, and not called verified.
Nothing is left of one that was interrupted. The check holds the whole model in float32, here and
then in the other library; writing holds a tensor.

Exit codes: 0 exported; 1 drifting (kept as NAME.drifting), not written, no memory; 2 bad input.
"""

import dataclasses
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from rich.console import Console

from jaxsft import __version__
from jaxsft.cli import EXIT_BAD_INPUT, EXIT_FAILED, command_line, fail, parse_options
from jaxsft.config import Dtype
from jaxsft.device_errors import check_device
from jaxsft.exporting.card import model_card
from jaxsft.exporting.hf_model import (
    DTYPES,
    MergedWeights,
    base_for_peft,
    to_hf_config,
    write_configs,
    write_weights,
)
from jaxsft.exporting.hf_tokenizer import write_tokenizer
from jaxsft.exporting.output import (
    MANIFEST,
    check_replaceable,
    check_space,
    default_output,
    digests,
    put_in_place,
    scratch_beside,
)
from jaxsft.exporting.verify import (
    LOGIT_BOUND,
    Check,
    chat_problem,
    drift,
    make_probes,
    max_difference,
    our_logits,
    own_versions,
    peer_logits,
    peer_versions,
    reference_logits,
    summary,
    without_weights,
)
from jaxsft.exporting.verify_flax import TUNIX_LORA, flax_problem
from jaxsft.flax_io import write_flax
from jaxsft.jax_settings import configure_jax
from jaxsft.json_file import write_json
from jaxsft.model import Gemma
from jaxsft.models import Origin, check_tokenizer, find_model, open_tokenizer
from jaxsft.out_of_memory import parse_shortage
from jaxsft.peft_io import WEIGHTS_NAME, AdapterConfig, load_adapter, save_adapter
from jaxsft.presets import PRESETS
from jaxsft.terminal import make_console
from jaxsft.tokenizer import Tokenizer
from jaxsft.tunix_io import write_tunix_lora
from jaxsft.weights import TensorSource, WeightsInfo, file_sha256, load_model, open_weights

DESCRIPTION = (
    "Writes a run's model, an adapter or a base model for other programs, with a model card and a "
    "manifest, and has the other library load it and compute the same logits (Flax: jaxsft alone "
    "reads it again, and it is not called verified)."
)
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
FLAX_MODEL = "model"


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """The options of this command."""

    model: str
    """A run's directory, a PEFT adapter, or a base model (to convert it)."""
    format: Literal["peft", "merged", "flax"] = "merged"
    """The adapter for PEFT; a whole model for transformers; or Kaggle's Flax layout, with Tunix's
    LoRA-only one beside it."""
    output: str | None = None
    """New directory to write; by default exports/NAME-FORMAT. An earlier export of the same weights
    in the same format is replaced, nothing else is."""
    dtype: Dtype = "bfloat16"
    """How whole models are stored. An adapter alone is always float32."""
    max_shard_bytes: int = 2**30
    """Largest safetensors file of a merged model."""
    base_model: str | None = None
    """The model that the adapter belongs to, in place of the one that it names."""
    tokenizer: str | None = None
    """tokenizer.model or .gguf file, in place of the model's own."""
    no_verify: bool = False
    """Leave out the check in the other library, and say so in the manifest."""


class Export(NamedTuple):
    """What an export is made from. `adapter` is None for a base model."""

    options: ExportOptions
    origin: Origin
    tokenizer: Tokenizer
    source: TensorSource
    info: WeightsInfo
    weights: MergedWeights
    adapter: AdapterConfig | None
    adapter_only: Gemma | None  # `without_weights`, but for the adapter


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    console = make_console()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parse_options("jaxsft.export", DESCRIPTION, arguments, ExportOptions)
        check_device()
        configure_jax()
        return export(options, command_line("jaxsft.export", arguments), console)
    except ValueError as error:
        return fail(error, EXIT_BAD_INPUT)
    except OSError as error:
        return fail(error, EXIT_FAILED)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and parse_shortage(str(error)) is None:
            raise
        first, _, _ = str(error).partition("\n")
        advice = "the check holds the model in float32, --no-verify goes without it"
        return fail(f"out of memory: {advice} ({first})", EXIT_FAILED)
    except KeyboardInterrupt:
        return fail("interrupted; nothing of the export is left", EXIT_INTERRUPTED)


def export(options: ExportOptions, command: str, console: Console) -> int:
    """Writes, checks and names the export; returns the exit code. Raises ValueError, OSError."""
    if options.max_shard_bytes < 1:
        raise ValueError(f"--max_shard_bytes {options.max_shard_bytes}: must be above 0")
    output = Path(options.output or default_output(options.model, options.format)).resolve()
    if not output.name:
        raise ValueError(f"--output {options.output}: name a directory in it")
    drifting = output.with_name(f"{output.name}.drifting")
    origin = find_model(options.model, options.tokenizer, options.base_model, console.print)
    if origin.adapter is None and options.format == "peft":
        raise ValueError(f"{options.model} has no adapter; --format merged or flax export a base")
    needs_peers = not options.no_verify and options.format != "flax"
    versions = own_versions() | (peer_versions() if needs_peers else {})
    made = open_export(options, origin)
    weights = identity(made)
    check_replaceable(output, weights)
    check_replaceable(drifting, weights)
    check_space(output, needed_bytes(made))
    with scratch_beside(output) as directory:
        console.print(f"Writing {output} ({options.format}) …")
        write(directory, made)
        check = None
        if not options.no_verify:
            console.print("Loading it again …")
            check = verify(directory, made)
        manifest = describe(made, check, versions, command)
        card = model_card(origin, made.info.config, made.adapter, manifest, output.name)
        (directory / "README.md").write_text(card, encoding="utf-8")
        manifest["files"] = digests(directory)
        write_json(directory / MANIFEST, manifest)
        if check is not None and check.problem is not None:
            check_replaceable(drifting, weights)
            put_in_place(directory, drifting)
            return fail(f"{check.problem}; it is kept as {drifting}, for inspection", EXIT_FAILED)
        check_replaceable(output, weights)
        put_in_place(directory, output)
    console.print(f"Exported to {output}{', NOT verified' if check is None else summary(check)}.")
    return 0


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
    return Export(options, origin, tokenizer, source, info, weights, adapter, model)


def write(directory: Path, made: Export) -> None:
    """Writes the model's files into a new directory."""
    options, config = made.options, made.info.config
    if options.format == "peft":
        assert made.adapter is not None and made.adapter_only is not None
        save_adapter(directory, made.adapter_only, made.adapter)
    elif options.format == "merged":
        write_configs(directory, config, made.tokenizer, options.dtype)
        write_tokenizer(directory, made.tokenizer, config.max_positions)
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


def verify(directory: Path, made: Export) -> Check:
    """Compares the export, loaded elsewhere, with the model that it was made from."""
    format, info, adapter = made.options.format, made.info, made.origin.adapter
    probes = make_probes(made.tokenizer, info.config)
    dtype = "float32" if format == "peft" else made.options.dtype
    ours, problem, gap = reference_logits(made.origin, dtype, probes), None, None
    gc.collect()  # the peer needs the memory that the model took
    if format == "flax":
        # `gemma` needs another JAX than this. What Tunix makes of such files the tests say.
        peer, problem = "jaxsft's own reader", flax_problem(directory, made.tokenizer, adapter)
        parts = f"{FLAX_MODEL}/, {TUNIX_LORA}/ and" if adapter else f"{FLAX_MODEL}/ and"
        gap = f"read again by {peer} only; {parts} tokenizer.model not checked by another library"
        model, _ = load_model(directory / FLAX_MODEL, dtype="float32", param_dtype="float32")
        theirs = our_logits(model, probes)
    elif format == "merged":
        peer = "transformers"
        theirs, chats = peer_logits(directory, probes, adapter=None, chats=True)
        problem = chat_problem(made.tokenizer, chats)
    else:
        peer = "transformers and PEFT"
        with base_for_peft(made.source, info, made.tokenizer, directory.parent) as base:
            theirs, _ = peer_logits(base, probes, adapter=directory, chats=False)
    difference = max_difference(ours, theirs)
    return Check(peer, difference, drift(peer, difference) or problem, gap)


def describe(
    made: Export, check: Check | None, versions: dict[str, str], command: str
) -> dict[str, Any]:
    """The manifest, without its files."""
    options, origin = made.options, made.origin
    return identity(made) | {
        "model": options.model,
        "dtype": "float32" if options.format == "peft" else options.dtype,
        "verified": check is not None and check.problem is None and check.gap is None,
        "not_checked": "not checked: --no-verify" if check is None else check.gap,
        "problem": None if check is None else check.problem,
        "max_abs_logit_difference": None if check is None else check.difference,
        "bound": LOGIT_BOUND,
        "peer": None if check is None else check.peer,
        "versions": versions,
        "base_name": origin.name,
        "base_revision": origin.revision,
        "run": None if origin.run_dir is None else origin.run_dir.name,
        "command": command,
        "jaxsft": __version__,
    }


def identity(made: Export) -> dict[str, Any]:
    """What an earlier export must have in common with this one to be replaced."""
    adapter = made.origin.adapter
    return {
        "format": made.options.format,
        "base": {"digest": made.info.digest},
        "adapter": adapter and {"digest": file_sha256(adapter / WEIGHTS_NAME)},
    }


def needed_bytes(made: Export) -> int:
    """What the export and its check take on the disk, about."""
    options, config = made.options, made.info.config
    model_bytes = config.num_params * np.dtype(DTYPES[options.dtype]).itemsize
    adapter = made.adapter
    adapter_bytes = 4 * config.lora_params(adapter.rank, adapter.targets) if adapter else 0
    if options.format == "peft":
        model_bytes = 4 * config.num_params if made.info.format != "safetensors" else 0
    return model_bytes + adapter_bytes


if __name__ == "__main__":
    sys.exit(main())
