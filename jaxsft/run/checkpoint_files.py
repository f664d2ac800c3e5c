"""One checkpoint on disk: Orbax's array files, and a sealed record of what they must contain.

Orbax does not notice when a bit of array data flips later, hence a SHA-256 for every array. These
and the caller's metadata are one JSON text in Orbax's custom metadata, which has its own SHA-256.
Process 0 alone writes and reads; with several processes Orbax's newer API (v1) cannot do that.

Orbax writes `<step>.orbax-checkpoint-tmp` and renames it, so a directory whose name is a plain
number was once complete. An object store (gs://) renames by copying file after file; there Orbax
writes under the final name and adds `commit_success.txt` last, and a directory without that file is
not a step. The latter is tested with local files committed in this way, not on Google's servers.
"""

import hashlib
import json
import logging
import math
import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from jaxsft.common.files import array_sha256, write_text
from jaxsft.common.hosts import array_from_first, on_host
from jaxsft.common.listed import shortened
from jaxsft.common.text import visible_line

PyTree = Any
Fingerprint = Mapping[str, str | int | float]

_METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax's own reader opens every array's metadata too
_RECORD, _SEAL = "jaxsft_record", "jaxsft_sha256"  # keys in Orbax's custom metadata
_STATE = "state"  # the arrays' directory in a step
_MAX_RECORD_BYTES = 1 << 26
_DIFFERENCES_WIDTH = 260  # characters
_COMMIT_FILE = "commit_success.txt"
_STEP = re.compile("0|[1-9][0-9]*")
_RETIRED = ".deleted"
_LEFTOVERS = (_RETIRED, ".orbax-checkpoint-tmp")


class DamagedError(Exception):
    """This step cannot be used; the text says why."""


def flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path ("opt/0/mu/q_proj"): readable keys, and Orbax needs no namedtuples."""
    leaves = jax.tree.leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves of the state have the same path"
    return flat


def to_host(state: PyTree, buffers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Copies of the arrays of `state` by path, in the memory of `buffers` where they fit.

    Copies are needed because on a CPU JAX returns views of memory that the next step may donate.
    They go into the last save's buffers: 1 GB takes 0.1 s there, and up to 2.5 s in new pages.

    Raises FloatingPointError for an array that holds NaN or infinity.
    """
    copies = {}
    flat = flatten(state)
    for leaf in flat.values():
        leaf.copy_to_host_async()  # all at once: one after the other they wait for the device
    for key, leaf in flat.items():
        array = on_host(leaf)
        if jnp.issubdtype(array.dtype, jnp.inexact) and not np.isfinite(array).all():
            raise FloatingPointError(f"{key} is not finite; such a state is not saved")
        buffer = buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (array.shape, array.dtype):
            buffer = np.empty(array.shape, array.dtype)
        np.copyto(buffer, array)
        copies[key] = buffer
    return copies


def to_devices(like: PyTree, arrays: dict[str, np.ndarray]) -> PyTree:
    """Process 0's arrays on all processes, placed as in `like`; empties `arrays` on the way."""
    leaves = []
    for key, leaf in flatten(like).items():
        array = array_from_first(arrays.pop(key, None), leaf.shape, leaf.dtype)
        sharding = getattr(leaf, "sharding", None)
        # Not aliased: a jitted step can't donate memory that NumPy owns.
        if sharding is None:
            leaves.append(jax.device_put(array, may_alias=False))
            continue
        shards = [
            jax.device_put(array[index], device, may_alias=False)
            for device, index in sharding.addressable_devices_indices_map(array.shape).items()
        ]
        leaves.append(jax.make_array_from_single_device_arrays(array.shape, sharding, shards))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def state_bytes(state: PyTree) -> int:
    """An upper bound of the bytes of one checkpoint of this state, abstract or not, on disk.

    It assumes metadata of at most 32 KiB.
    """
    leaves = jax.tree.leaves(state)
    data = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    return data + 4096 * len(leaves) + 65536  # names, digests, indices: about 1.5 KB an array


def write_step(
    path: epath.Path,
    arrays: dict[str, np.ndarray],
    metadata: dict[str, Any],
    eval_loss: float | None,
) -> None:
    """Writes a directory that gets the name `path` when it is complete."""
    described = {key: _describe(array) for key, array in arrays.items()}
    record = {
        "step": int(path.name),
        "arrays": described,
        "metadata": metadata,
        "eval_loss": eval_loss,
    }
    text = json.dumps(record)
    with _checkpointer(path) as checkpointer:
        checkpointer.save(
            path,
            args=ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(arrays)}),
            custom_metadata={_RECORD: text, _SEAL: _seal(text)},
        )


def read_record(path: epath.Path) -> dict[str, Any]:
    """The record that `write_step` sealed: {"step", "arrays", "metadata", "eval_loss"}.

    Raises DamagedError.
    """
    try:
        file = path / _METADATA_FILE
        if file.stat().length > _MAX_RECORD_BYTES:
            raise ValueError(f"it has {file.stat().length:,} bytes")
        custom = json.loads(file.read_text())["custom_metadata"]
        text, seal = custom[_RECORD], custom[_SEAL]
        intact = _seal(text) == seal
        record = _checked(json.loads(text)) if intact else {}
    except Exception as error:  # what a damaged file raises is anything
        raise DamagedError(f"its metadata can't be read ({first_cause(error)})") from error
    if not intact:
        raise DamagedError("its metadata differs from its SHA-256")
    if str(record["step"]) != path.name:
        raise DamagedError(f"it holds step {record['step']}")
    return record


def _checked(record: dict[str, Any]) -> dict[str, Any]:
    """The record, if it has the form that `write_step` gives it; ValueError and others if not."""
    loss, fingerprint = record["eval_loss"], record["metadata"]["fingerprint"]
    is_right = type(record["step"]) is int and (loss is None or math.isfinite(loss))
    is_right &= all(isinstance(value, str | int | float) for value in fingerprint.values())
    for dtype, shape, digest in record["arrays"].values():
        is_right &= isinstance(dtype, str) and isinstance(digest, str)
        is_right &= all(type(side) is int and side >= 0 for side in shape)
    if not is_right:
        raise ValueError("it has another form")
    return record


def add_eval_loss(path: epath.Path, eval_loss: float) -> None:
    """Adds the evaluation loss to the record of a step. Raises DamagedError, OSError."""
    record = read_record(path) | {"eval_loss": eval_loss}
    file = path / _METADATA_FILE
    everything = json.loads(file.read_text())
    text = json.dumps(record)
    everything["custom_metadata"] |= {_RECORD: text, _SEAL: _seal(text)}
    if is_object_store(path):
        file.write_text(json.dumps(everything))  # an object appears whole
    else:
        write_text(Path(file), json.dumps(everything))


def read_arrays(path: epath.Path, described: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays `described` of a step on the host, each checked against its digest.

    TensorStore reads them, one zarr array each, and nothing else of the step. What its files
    declare is compared with the record before memory is taken, and only arrays that are stored as
    `write_step` stores them are read: uncompressed, in chunks no larger than the array.

    Raises DamagedError.
    """
    try:
        kvstore = ts.KvStore.open({"driver": "ocdbt", "base": _files_of(path / _STATE)}).result()
        opened = {
            key: ts.open({"driver": "zarr"}, kvstore=kvstore / f"{key}/", open=True, read=True)
            for key in described
        }
        stored = {key: each.result() for key, each in opened.items()}
        for key, array in stored.items():
            _check_stored(key, array, *described[key][:2])
        reads = {key: array.read() for key, array in stored.items()}
        arrays = {key: np.asarray(each.result()) for key, each in reads.items()}
    except (MemoryError, DamagedError):
        raise  # the former says nothing about the step
    except Exception as error:  # what a damaged file raises is anything
        raise DamagedError(f"its arrays can't be read ({first_cause(error)})") from error
    bad = [key for key, array in arrays.items() if _describe(array) != described[key]]
    if bad:
        name = shortened(bad[0], 200)
        raise DamagedError(f"array {name} differs from its SHA-256 ({len(bad)} such arrays)")
    return arrays


def _files_of(directory: epath.Path) -> dict[str, str]:
    """The directory, here or on Google Cloud, as TensorStore names it."""
    bucket, slash, name = str(directory).removeprefix("gs://").partition("/")
    if str(directory).startswith("gs://"):
        return {"driver": "gcs", "bucket": bucket, "path": f"{name}{slash}"}
    return {"driver": "file", "path": f"{directory}/"}


def _check_stored(key: str, array: ts.TensorStore, dtype: str, shape: list[int]) -> None:
    """DamagedError unless the file declares an array as it was written."""
    metadata = array.spec().to_json()["metadata"]
    chunk = metadata["chunks"]
    declared = f"{array.dtype.name}{list(array.shape)} in chunks of {chunk}"
    is_larger = any(side > max(1, dim) for side, dim in zip(chunk, array.shape, strict=True))
    if [array.dtype.name, list(array.shape)] != [dtype, shape] or is_larger:
        raise DamagedError(
            f"array {shortened(key, 150)} declares {shortened(declared, 150)}, and was saved as "
            f"{dtype}{shape}"
        )
    if metadata["compressor"] is not None:
        raise DamagedError(f"array {shortened(key, 150)} is compressed, as no run saves it")


def check_same_run(
    path: epath.Path,
    record: dict[str, Any],
    fingerprint: Fingerprint,
    wanted: dict[str, Any],
    partly: bool,
) -> None:
    """ValueError, with every difference, when an intact record belongs to another run.

    With `partly` only what is in `fingerprint` and `wanted` is compared.
    """
    there = {key: f"{dtype}{shape}" for key, (dtype, shape, _) in record["arrays"].items()}
    here = {key: f"{leaf.dtype.name}{list(leaf.shape)}" for key, leaf in wanted.items()}
    saved = record["metadata"]["fingerprint"]
    if partly:
        there = {key: value for key, value in there.items() if key in here}
        saved = {key: value for key, value in saved.items() if key in fingerprint}
    found = _differences(saved, fingerprint) or _differences(there, here)
    if found and partly:
        raise ValueError(
            f"{path}: does not fit: {_said(found)}; use the model and the lora options that it "
            "was made with"
        )
    if found:
        raise ValueError(
            f"{path}: this checkpoint is of another run: {_said(found)}; use the settings that"
            " it was made with, a new --name, or --fork-from to start a new run from its adapter"
        )


def _said(differences: list[str]) -> str:
    """As many of the differences as have room in a line, and how many more there are."""
    shown: list[str] = []
    for each in differences:
        if shown and sum(map(len, shown)) + len(each) > _DIFFERENCES_WIDTH:
            return f"{'; '.join(shown)} and {len(differences) - len(shown)} more"
        shown.append(shortened(visible_line(each), _DIFFERENCES_WIDTH))
    return "; ".join(shown)


def first_cause(error: BaseException) -> str:
    """The first cause in one line: Orbax wraps errors in others about handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _checkpointer(path: epath.Path) -> ocp.Checkpointer:
    """Orbax for process 0 alone, so that it waits for no other process."""
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    modes = ocp.options.AtomicityMode
    mode = modes.COMMIT_FILE if is_object_store(path) else modes.ATOMIC_RENAME
    _say_errors_once()
    # zstd would take six times as long for 8% fewer bytes of random float32.
    arrays = ocp.PyTreeCheckpointHandler(use_compression=False, multiprocessing_options=alone)
    options = ocp.CompositeOptions(multiprocessing_options=alone)
    return ocp.Checkpointer(
        ocp.CompositeCheckpointHandler(composite_options=options, **{_STATE: arrays}),
        multiprocessing_options=alone,
        atomicity_options=ocp.options.AtomicityOptions(mode=mode),
    )


def _say_errors_once() -> None:
    """Keeps errors that are raised here from being printed by Orbax's threads as well.

    They log them; and when one array cannot be opened, those for the others find a closed event
    loop.
    """
    logging.getLogger("absl").addFilter(_is_not_orbax)  # adds it once
    before = sys.unraisablehook
    if getattr(before, "__name__", "") == "_unless_loop_is_closed":
        return

    def _unless_loop_is_closed(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = _unless_loop_is_closed


def _is_not_orbax(record: logging.LogRecord) -> bool:
    return "/orbax/" not in record.pathname


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(array: np.ndarray) -> list[Any]:
    """[dtype, shape, SHA-256], as JSON gives it back."""
    return [array.dtype.name, list(array.shape), array_sha256(array).hex()]


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Options of the rows that the record's version did not have are none: their digest counts."""
    new = {key for key in here if key not in there and key.startswith("data.")}
    return [
        f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here"
        for key in sorted({*there, *here} - new)
        if key not in there or key not in here or there[key] != here[key]
    ]


def is_object_store(path: epath.Path) -> bool:
    """Is this an address such as gs://, without an atomic rename?"""
    return "://" in str(path)


def list_steps(directory: epath.Path) -> list[int]:
    """The steps in the directory, damaged or not, ascending."""
    return sorted(int(path.name) for path in _entries(directory) if _is_step(path))


def rename(step: epath.Path, suffix: str) -> epath.Path:
    """Renames a step's directory to a free name that begins with its own and `suffix`.

    On an object store this copies: if it breaks off, parts are in both places.
    """
    target, count = step.with_name(step.name + suffix), 1
    while target.exists():
        count += 1
        target = step.with_name(f"{step.name}{suffix}-{count}")
    return step.rename(target)


def retire(step: epath.Path) -> None:
    """Makes a directory no longer a step, in one atomic operation; `clear_leftovers` deletes it.

    A step that cannot be retired stays.
    """
    with suppress(Exception):  # each store has its own; the next save tries again
        if is_object_store(step):
            (step / _COMMIT_FILE).unlink()
        else:
            rename(step, _RETIRED)


def clear_leftovers(directory: epath.Path) -> None:
    """Deletes retired and incomplete steps, as far as that is possible."""
    with suppress(Exception):  # each store has its own; the next save tries again
        for path in _entries(directory):
            is_half = _STEP.fullmatch(path.name) and path.is_dir() and not _is_step(path)
            if is_half or any(suffix in path.name for suffix in _LEFTOVERS):
                with suppress(Exception):
                    path.rmtree()


def _entries(directory: epath.Path) -> list[epath.Path]:
    try:
        return list(directory.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _is_step(path: epath.Path) -> bool:
    if not _STEP.fullmatch(path.name):
        return False
    try:
        # Elsewhere a save ends with a rename: an empty directory or a file was a step, and is lost.
        return not is_object_store(path) or (path / _COMMIT_FILE).exists()
    except OSError:  # whoever reads it will say why
        return True
