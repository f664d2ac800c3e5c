"""Checkpoints: one directory a step, written by Orbax, judged by digests of our own.

Orbax writes `<step>.orbax-checkpoint-tmp` and renames it, so a directory whose name is a plain
number was whole once. It does not notice a bit that flips later in array data, hence a SHA-256
for every array. They and the caller's metadata are one JSON text in Orbax's custom metadata,
sealed by a SHA-256 as well. What is restored is what was saved, or it is refused. Nothing is
deleted for being bad: a damaged step is renamed to `<step>.corrupt` once an older one replaced it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

PyTree = Any
Fingerprint = Mapping[str, str | int | float]

_RECORD, _SEAL = "jaxsft_record", "jaxsft_sha256"  # keys in Orbax's custom metadata
_DELETED = ".deleted"  # renamed first, so that a half-deleted step is never taken for one
_LEFTOVERS = (_DELETED, ".orbax-checkpoint-tmp")


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    step: int
    state: PyTree
    metadata: dict[str, Any]


class _DamagedError(Exception):
    """This step can't be used; the text says why."""


class Checkpoints:
    """The checkpoints of one run, in one directory, for one writing process.

    Args:
        directory: where the steps lie; made by the first save.
        save_total_limit: how many steps to keep, the newest; one more lies there from the end of
            a save until the next `save`, `wait` or `close`.

    Raises:
        ValueError: `save_total_limit` below 1, or more than one JAX process.
    """

    def __init__(self, directory: epath.PathLike, save_total_limit: int) -> None:
        if save_total_limit < 1:
            raise ValueError(f"save_total_limit is {save_total_limit}; it must be at least 1")
        if jax.process_count() > 1:
            # The digest needs every byte of every array on the process that writes.
            raise ValueError("checkpoints need all devices in one process; start one process")
        self._directory = epath.Path(directory).expanduser().resolve()  # Orbax needs absolute
        self._save_total_limit = save_total_limit
        self._pending: Any = None  # Orbax's response to the save that is under way

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps that lie there, damaged or not, ascending. Empty directories don't count."""
        if not self._directory.exists():
            return []
        return sorted(
            int(path.name)
            for path in self._directory.iterdir()
            if re.fullmatch("0|[1-9][0-9]*", path.name) and path.is_dir() and any(path.iterdir())
        )

    def save(self, step: int, state: PyTree, metadata: dict[str, Any]) -> None:
        """Waits for the save before, then starts one; returns once the state is on the host.

        Args:
            step: the number of finished optimizer steps.
            state: a pytree of arrays, none of size 0. May be donated or changed after the return.
            metadata: JSON values; must hold the run's "fingerprint" (see `restore`).

        Raises:
            ValueError: the step is there already.
            OSError: the directory can't be written.
        """
        assert "fingerprint" in metadata, "a checkpoint without a fingerprint can't be restored"
        self.wait()
        path = self._directory / str(step)
        if step in self.steps():
            raise ValueError(f"{path}: this step is saved already; choose a new output_dir")
        if path.exists():
            path.rmdir()  # left empty by something else; Orbax would refuse the name
        # Copied, so that the digest and the file come from the same bytes: on a CPU, device_get
        # gives views of buffers that the next step may donate.
        arrays = {key: np.array(leaf) for key, leaf in jax.device_get(_flatten(state)).items()}
        described = {key: _describe(array) for key, array in arrays.items()}
        text = json.dumps({"step": step, "arrays": described, "metadata": metadata})
        custom_metadata = {_RECORD: text, _SEAL: _sha256(text.encode())}
        self._directory.mkdir(parents=True, exist_ok=True)
        # Directories at once, not in the background: when that fails there, Orbax's threads wait
        # 300 s for it and hold up the end of the process.
        context = ocp.Context()
        context.asynchronous.create_directories_asynchronously = False
        with context:
            self._pending = ocp.save_async(path, arrays, custom_metadata=custom_metadata)

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Then deletes the steps over the limit and what killed runs left half-written.

        Raises:
            OSError: the last save failed. Said once.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:  # a full disk, say: TensorStore has its own types
            raise OSError(
                f"{self._directory}: the last checkpoint couldn't be written"
                f" ({_first_cause(error)}); the ones before it are intact"
            ) from error
        for step in self.steps()[: -self._save_total_limit]:
            path = self._directory / str(step)
            path.rename(_free_name(path, _DELETED))
        for path in self._directory.iterdir():
            if any(suffix in path.name for suffix in _LEFTOVERS):
                path.rmtree()

    def close(self) -> None:
        """Like `wait`. Without it, at the end of the process, an unfinished save is lost."""
        self.wait()

    def restore(
        self,
        like: PyTree,
        fingerprint: Fingerprint,
        step: int | None = None,
        on_event: Callable[[str], None] = lambda message: None,
    ) -> Restored | None:
        """Loads the newest good step, bit for bit as it was saved.

        A step that can't be read, or that differs from its digests, is passed over for the one
        before it, and renamed to `<step>.corrupt` when that one is good.

        Args:
            like: a pytree of arrays or `jax.ShapeDtypeStruct`s: the structure, shapes, dtypes and
                shardings (a leaf without one goes to the default device).
            fingerprint: whatever makes two runs the same run (model, rank, targets, data digest,
                batch, seed, ...). Compared before damage is judged.
            step: this step and no other, instead of the newest.
            on_event: is called with one line for each step set aside.

        Returns:
            None if no step was ever saved.

        Raises:
            ValueError: the checkpoint is of another run (the fingerprint or the arrays differ),
                `step` isn't there, or there are steps and none is usable.
        """
        self.wait()
        candidates = self.steps()[::-1]
        if step is not None:
            if step not in candidates:
                there = ", ".join(map(str, self.steps())) or "none"
                raise ValueError(f"{self._directory}: no checkpoint of step {step}; there: {there}")
            candidates = [step]
        wanted = _flatten(like)
        damaged: dict[int, str] = {}
        for candidate in candidates:
            path = self._directory / str(candidate)
            try:
                record = _read_record(path)
                _check_same_run(path, record, fingerprint, wanted)
                arrays = _read_arrays(path, record["arrays"])
            except _DamagedError as error:
                damaged[candidate] = str(error)
                continue
            for bad, reason in damaged.items():
                source = self._directory / str(bad)
                target = source.rename(_free_name(source, ".corrupt"))
                on_event(f"{source}: {reason}; renamed to {target.name}, using step {candidate}")
            return Restored(candidate, _unflatten(like, wanted, arrays), record["metadata"])
        if not damaged:
            return None
        reasons = "; ".join(f"step {bad}: {reason}" for bad, reason in damaged.items())
        raise ValueError(
            f"{self._directory}: no usable checkpoint ({reasons});"
            " choose another step or a new output_dir, or remove the directory to start again"
        )


def _flatten(tree: PyTree) -> dict[str, Any]:
    """Leaves by path ("opt/0/mu/q_proj"): Orbax sees no namedtuple, and the keys are readable."""
    leaves = jax.tree.leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves of the state have the same path"
    return flat


def _unflatten(like: PyTree, wanted: dict[str, Any], arrays: dict[str, np.ndarray]) -> PyTree:
    """Puts the arrays on the devices that `like` says; empties `arrays` on the way."""
    leaves = [
        # Not aliased: a jitted step can't donate memory that NumPy owns.
        jax.device_put(arrays.pop(key), getattr(leaf, "sharding", None), may_alias=False)
        for key, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _describe(array: np.ndarray) -> list[Any]:
    """[dtype, shape, SHA-256], as JSON gives it back."""
    # A byte view first: bfloat16 has no buffer protocol.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return [array.dtype.name, list(array.shape), _sha256(data.data)]


def _free_name(path: epath.Path, suffix: str) -> epath.Path:
    """`path` + suffix, numbered when that name is taken: rename never overwrites."""
    target, count = path.with_name(path.name + suffix), 1
    while target.exists():
        count += 1
        target = path.with_name(f"{path.name}{suffix}-{count}")
    return target


def _first_cause(error: BaseException) -> str:
    """One short line: Orbax wraps every error into one about handlers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def _read_record(path: epath.Path) -> dict[str, Any]:
    """What `save` sealed: {"step", "arrays", "metadata"}. Raises _DamagedError."""
    try:
        custom = ocp.checkpointables_metadata(path).custom_metadata
        text, seal = custom[_RECORD], custom[_SEAL]
        intact = _sha256(text.encode()) == seal
        record = json.loads(text) if intact else {}
    except Exception as error:  # what a damaged file raises is anything
        raise _DamagedError(f"its metadata can't be read ({_first_cause(error)})") from error
    if not intact or str(record["step"]) != path.name:
        raise _DamagedError("its metadata differs from its SHA-256 or its step")
    return record


def _read_arrays(path: epath.Path, described: dict[str, Any]) -> dict[str, np.ndarray]:
    """The arrays of a step on the host, each equal to its digest. Raises _DamagedError."""
    try:
        arrays = dict(ocp.load(path))
    except MemoryError:
        raise  # says nothing about the step
    except Exception as error:  # what a damaged file raises is anything
        raise _DamagedError(f"its arrays can't be read ({_first_cause(error)})") from error
    bad = [key for key in described if key not in arrays]
    bad += [key for key, array in arrays.items() if _describe(array) != described.get(key)]
    if bad:
        raise _DamagedError(f"array {bad[0]} differs from its SHA-256 ({len(bad)} such arrays)")
    return arrays


def _check_same_run(
    path: epath.Path, record: dict[str, Any], fingerprint: Fingerprint, wanted: dict[str, Any]
) -> None:
    """ValueError when an intact record belongs to another run; names each difference."""
    there = {key: f"{dtype}{shape}" for key, (dtype, shape, _) in record["arrays"].items()}
    here = {key: f"{leaf.dtype.name}{list(leaf.shape)}" for key, leaf in wanted.items()}
    saved = record["metadata"]["fingerprint"]
    found = _differences(saved, fingerprint) or _differences(there, here)
    if found:
        raise ValueError(
            f"{path}: this checkpoint is of another run: {'; '.join(found)};"
            " use the settings that it was made with, or a new output_dir"
        )


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {there.get(key, 'absent')} there and {here.get(key, 'absent')} here"
        for key in sorted({*there, *here})
        if key not in there or key not in here or there[key] != here[key]
    ]
