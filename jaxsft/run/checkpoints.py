"""Checkpoints: one directory a step, written in the background, checked by digests when read.

What is restored equals what was saved, or it is refused. A damaged step is not deleted: it becomes
`<step>.corrupt` once an older step has been restored in its place.
"""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from etils import epath

from jaxsft.common.hosts import any_of, from_first
from jaxsft.common.listed import shortened
from jaxsft.run.checkpoint_files import (
    DamagedError,
    Fingerprint,
    PyTree,
    add_eval_loss,
    check_same_run,
    clear_leftovers,
    first_cause,
    flatten,
    is_object_store,
    list_steps,
    read_arrays,
    read_record,
    rename,
    retire,
    to_devices,
    to_host,
    write_step,
)


class Restored(NamedTuple):
    """What `Checkpoints.restore` found."""

    step: int
    state: PyTree
    metadata: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run, in a directory that no other run writes to.

    With several JAX processes all of them call every method, in the same order: process 0 writes
    and reads, the others need not see its files, and what it raises is raised on all.

    Args:
        directory: where the steps lie, a path or a gs:// address; made by the first save.
        save_total_limit: how many steps to keep, the newest; the one with the lowest evaluation
            loss stays as well.

    Raises:
        ValueError: `save_total_limit` below 1.
    """

    def __init__(self, directory: epath.PathLike, save_total_limit: int) -> None:
        if save_total_limit < 1:
            raise ValueError(f"save_total_limit is {save_total_limit}; it must be at least 1")
        path = epath.Path(directory)  # Orbax needs absolute ones; resolve would make gs:// local
        self._directory = path if is_object_store(path) else path.expanduser().resolve()
        self._save_total_limit = save_total_limit
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None  # never done but on process 0
        self._host: dict[str, np.ndarray] = {}  # the state that is being written
        self._eval_losses: dict[int, float | None] = {}  # read so far
        self._passed_over: set[int] = set()  # damaged, and could not be renamed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The steps in the directory, damaged or not, ascending."""
        return from_first(lambda: list_steps(self._directory))

    @property
    def best(self) -> tuple[int, float] | None:
        """The step with the lowest evaluation loss, and that loss; None without one."""
        found = from_first(self._find_best)
        return None if found is None else (found[0], found[1])

    @property
    def is_saving(self) -> bool:
        """Was a save still under way at the last `poll`, or begun since?"""
        return self._pending is not None

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: dict[str, Any],
        eval_loss: float | None = None,
    ) -> None:
        """Waits for the save before, then starts one; returns once the state is on the host.

        Args:
            step: the number of finished optimizer steps.
            state: a pytree of JAX arrays, none of size 0. May be donated after the return.
            metadata: JSON values; must hold the run's "fingerprint" (see `restore`).
            eval_loss: held-out loss of this state, nats per token; the lowest one's step is kept.
                One that is not finite counts as none.

        Raises:
            ValueError: the step is there already.
            OSError: the save *before* failed, as in `wait`, and this one was not started; or the
                directory can't be read.
            FloatingPointError: an array, which is named, is not finite; nothing was written.
        """
        assert "fingerprint" in metadata, "a checkpoint without a fingerprint can't be restored"
        self.wait()
        from_first(lambda: self._check_is_new(step))
        self._host = to_host(state, self._host)
        if jax.process_index() == 0:
            is_finite = eval_loss is not None and math.isfinite(eval_loss)
            arguments = step, metadata, eval_loss if is_finite else None
            self._pending = self._writer.submit(self._write, *arguments)
        else:
            self._pending = Future()

    def add_eval_loss(self, step: int, eval_loss: float) -> None:
        """Adds the evaluation loss to a saved `step`; a damaged one is left alone."""
        self._eval_losses.pop(step, None)
        with suppress(DamagedError):
            from_first(lambda: add_eval_loss(self._directory / str(step), eval_loss))

    def poll(self) -> None:
        """Returns at once; raises if the last save has failed.

        Raises:
            OSError: it failed. Said once; the next `save` tries again.
        """
        if self._pending is not None and any_of(self._pending.done()):
            self.wait()

    def wait(self) -> None:
        """Returns when the last save is on disk and the steps over the limit are deleted.

        Raises:
            OSError: the last save failed. Said once; the next `save` tries again.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            from_first(pending.result)

    def close(self) -> None:
        """Like `wait`. Without it an unfinished save may be lost when the process ends."""
        self.wait()

    def restore(
        self,
        like: PyTree,
        fingerprint: Fingerprint,
        step: int | None = None,
        on_event: Callable[[str], None] = lambda message: None,
        partly: bool = False,
    ) -> Restored | None:
        """Loads the newest good step, bit for bit as it was saved.

        A step that can't be read, or that differs from its digests, is passed over for the one
        before it, and renamed to `<step>.corrupt` when that one is good, if it can be renamed.

        Args:
            like: a pytree of arrays or `jax.ShapeDtypeStruct`s: the structure, shapes, dtypes and
                shardings (a leaf without one goes to the default device).
            fingerprint: whatever makes two runs the same run (model, rank, targets, data digest,
                batch, seed, ...). Compared before damage is judged.
            step: this step and no other, instead of the newest.
            on_event: is called on process 0 with one line for each step set aside.
            partly: `fingerprint` and `like` are a part of another run's, which is all that must
                agree; nothing is renamed.

        Returns:
            None if no step was ever saved.

        Raises:
            ValueError: the checkpoint is of another run (the fingerprint or the arrays differ),
                `step` isn't there, or there are steps and none is usable.
            OSError: the directory can't be read.
        """
        self.wait()
        wanted = flatten(like)
        arrays: dict[str, np.ndarray] = {}  # filled on process 0

        def read(path: epath.Path) -> dict[str, Any]:
            """The metadata of a good step of this run; puts the arrays wanted into `arrays`."""
            record = read_record(path)
            check_same_run(path, record, fingerprint, wanted, partly)
            # Only what is wanted: what else a foreign record claims takes no memory.
            arrays.update(read_arrays(path, {key: record["arrays"][key] for key in wanted}))
            return record["metadata"]

        found = from_first(lambda: self._find_good(read, step, on_event, partly))
        if found is None:
            return None
        good_step, metadata = found
        return Restored(good_step, to_devices(like, arrays), metadata)

    def _check_is_new(self, step: int) -> None:
        if step in list_steps(self._directory) and step not in self._passed_over:
            path = self._directory / str(step)
            raise ValueError(f"{path}: this step is saved already; choose a new output_dir")

    def _find_good(
        self,
        read: Callable[[epath.Path], dict[str, Any]],
        step: int | None,
        on_event: Callable[[str], None],
        partly: bool,
    ) -> tuple[int, dict[str, Any]] | None:
        """Step and metadata of the newest step that `read` takes."""
        candidates = list_steps(self._directory)[::-1]
        if step is not None:
            if step not in candidates:
                there = ", ".join(map(str, candidates[::-1])) or "none"
                raise ValueError(f"{self._directory}: no checkpoint of step {step}; there: {there}")
            candidates = [step]
        damaged: dict[int, str] = {}
        for candidate in candidates:
            path = self._directory / str(candidate)
            try:
                metadata = read(path)
            except DamagedError as error:
                damaged[candidate] = str(error)
                continue
            for bad, reason in damaged.items():
                outcome = "passed over" if partly else self._set_aside(bad)
                on_event(
                    f"{self._directory / str(bad)}: {reason}; {outcome}, using step {candidate}"
                )
            return candidate, metadata
        if not damaged:
            return None
        reasons = "; ".join(f"step {bad}: {reason}" for bad, reason in damaged.items())
        raise ValueError(
            f"{self._directory}: no usable checkpoint ({shortened(reasons, 350)}); copy a good "
            "one back, choose another --name, or remove the directory to start again"
        )

    def _set_aside(self, step: int) -> str:
        """Renames a damaged step where that is possible; returns what became of it."""
        path = self._directory / str(step)
        try:
            target = rename(path, ".corrupt")
        except Exception as error:  # read-only, or gone; object stores have their own types
            self._passed_over.add(step)
            return f"passed over, as it can't be renamed ({first_cause(error)})"
        return f"renamed to {target.name}"

    def _find_best(self) -> tuple[int, float] | None:
        found = []
        for step in list_steps(self._directory):
            if step not in self._eval_losses:
                try:
                    record = read_record(self._directory / str(step))
                except DamagedError:
                    continue
                self._eval_losses[step] = record.get("eval_loss")
            loss = self._eval_losses[step]
            if loss is not None:
                found.append((loss, -step))
        return (-min(found)[1], min(found)[0]) if found else None

    def _write(self, step: int, metadata: dict[str, Any], eval_loss: float | None) -> None:
        """Writes `_host` as one step; once it is whole, deletes those over the limit."""
        path = self._directory / str(step)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self._directory)
            if step in self._passed_over and path.exists():
                rename(path, ".corrupt")
                self._passed_over.discard(step)
            write_step(path, self._host, metadata, eval_loss)
        except Exception as error:  # a full disk, say: TensorStore has its own types
            clear_leftovers(self._directory)  # frees the disk; TensorStore may still write a little
            raise OSError(
                f"{self._directory}: the checkpoint of step {step} couldn't be written"
                f" ({first_cause(error)}); the ones before it are intact"
            ) from error
        self._eval_losses[step] = eval_loss
        with suppress(OSError):  # the step is whole; the next save deletes what is over the limit
            self._retain(step)
        clear_leftovers(self._directory)

    def _retain(self, newest: int) -> None:
        # Later ones are damaged, or were left behind on purpose: none of them replaces `newest`.
        steps = [step for step in list_steps(self._directory) if step <= newest]
        best = self._find_best()
        kept = {*steps[-self._save_total_limit :], *([best[0]] if best else [])}
        for step in steps:
            if step not in kept and step in self._eval_losses:  # a damaged one has no record
                retire(self._directory / str(step))
