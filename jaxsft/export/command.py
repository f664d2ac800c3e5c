"""Writes an export, has another library check it, and gives it its name."""

import importlib.metadata
from pathlib import Path
from typing import Any

from jaxsft import __version__
from jaxsft.cli import EXIT_FAILED, fail
from jaxsft.common.console import make_console
from jaxsft.common.devices import check_device, configure_jax
from jaxsft.common.files import check_free_space, file_sha256, write_json
from jaxsft.export.card import about_training, model_card
from jaxsft.export.formats import Export, needed_bytes, open_export, write
from jaxsft.export.options import ExportOptions
from jaxsft.export.output import (
    check_replaceable,
    default_output,
    digests,
    drifting,
    export_scratch,
    put_in_place,
)
from jaxsft.export.peers import Peer
from jaxsft.export.verify import LOGIT_BOUND, ExportCheck, find_checker, summary, verify_export
from jaxsft.weights.adapter_config import WEIGHTS_NAME
from jaxsft.weights.find import EXPORT_MANIFEST, find_model


def export(options: ExportOptions, command: str) -> int:
    """Writes and checks the export; returns the exit code. Raises ValueError, OSError.

    `command` is the command line, for the manifest.
    """
    check_device()
    configure_jax()
    console = make_console()
    if options.max_shard_bytes < 1:
        raise ValueError(f"--max_shard_bytes {options.max_shard_bytes}: must be above 0")
    output = Path(options.output or default_output(options.model, options.format)).resolve()
    if not output.name:
        raise ValueError(f"--output {options.output}: name a directory in it")
    set_aside = drifting(output)
    origin = find_model(options.model, options.tokenizer, options.base_model, console.print)
    if origin.adapter is None and options.format == "peft":
        raise ValueError(f"{options.model} has no adapter; --format merged or flax export a base")
    made = open_export(options, origin)
    training = about_training(origin, made.adapter)
    peer, gap = (None, None) if options.no_verify else find_checker(options, made.info.config)
    weights = identity(made)
    check_replaceable(output, weights)
    check_replaceable(set_aside, weights)
    check_free_space(
        output, needed_bytes(made, peer), what="the export", advice="choose another --output"
    )
    with export_scratch(output, console.print) as scratch:
        directory = scratch / "new"
        directory.mkdir()
        console.print(f"Writing {output} ({options.format}) …")
        write(directory, made)
        check = None
        if not options.no_verify:
            console.print(f"Loading it again{f' in {peer.library.name}' if peer else ''} …")
            check = verify_export(directory, made, peer, gap, scratch)
        manifest = manifest_of(made, check, peer, command)
        card = model_card(origin, made.info.config, training, manifest, output.name)
        (directory / "README.md").write_text(card, encoding="utf-8")
        manifest["files"] = digests(directory)
        write_json(directory / EXPORT_MANIFEST, manifest)
        if check is not None and check.problem is not None:
            check_replaceable(set_aside, weights)
            put_in_place(directory, set_aside)
            return fail(f"{check.problem}; it is kept as {set_aside}, for inspection", EXIT_FAILED)
        check_replaceable(output, weights)
        put_in_place(directory, output)
    console.print(f"Exported to {output}{', NOT verified' if check is None else summary(check)}.")
    return 0


def manifest_of(
    made: Export, check: ExportCheck | None, peer: Peer | None, command: str
) -> dict[str, Any]:
    """The manifest, without the list of files."""
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
        "peer_versions": {} if peer is None else peer.versions,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")},
        "system_prompt": made.system_prompt,
        "answer_template": made.taught and made.taught.template.text,
        "earlier_reasoning": made.taught and made.taught.earlier_reasoning,
        "base_name": origin.name,
        "base_revision": origin.revision,
        "run": None if origin.run_dir is None else origin.run_dir.name,
        "command": command,
        "jaxsft": __version__,
    }


def identity(made: Export) -> dict[str, Any]:
    """The values that an earlier export must share with this one to be replaced."""
    adapter = made.origin.adapter
    return {
        "format": made.options.format,
        "base": {"digest": made.info.digest},
        "adapter": adapter and {"digest": file_sha256(adapter / WEIGHTS_NAME)},
    }
