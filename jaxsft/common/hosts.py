"""Joins the processes of one run, and passes values between them.

With several processes, all of them must call these functions, in the same order; else the others
wait for ever. With one process each function returns its own value.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_T = TypeVar("_T")


def join_hosts() -> None:
    """Joins the other processes of the run. Call it before anything uses the devices.

    JAX then handles SIGTERM itself (see `reached_preemption`).

    Raises:
        ValueError: there are no other processes.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"multihost: no other processes to join ({error}); JAX finds them on the hosts of a "
            "TPU slice and under Slurm or Open MPI, elsewhere leave it out"
        ) from error


def any_of(flag: bool) -> bool:
    """Whether `flag` is true on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def reached_preemption(step: int) -> bool:
    """Whether all processes stop at `step`, because one of them received SIGTERM.

    The hosts of a spot TPU get SIGTERM at different times, so JAX's coordination service chooses a
    step that no process has passed. The result is true once, at that step. JAX sees no SIGTERM
    while Python has a handler for it, so this is for signals between `join_hosts` and that handler.

    Args:
        step: rises from call to call, and is the same on all processes.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def from_first(make: Callable[[], _T]) -> _T:
    """Calls `make` on process 0 and returns its result, a JSON value, on all processes.

    A ValueError or OSError of `make` is raised on all.
    """
    if jax.process_count() == 1:
        return make()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": make()}
        except OSError as error:
            outcome = {"os_error": str(error)}
        except ValueError as error:
            outcome = {"value_error": str(error)}
    outcome = json.loads(_text_from_first(json.dumps(outcome)))
    if "os_error" in outcome:
        raise OSError(outcome["os_error"])
    if "value_error" in outcome:
        raise ValueError(outcome["value_error"])
    return outcome["value"]


def array_from_first(array: np.ndarray | None, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The array of process 0, bit for bit, on all processes; the others pass None."""
    if jax.process_count() == 1:
        assert array is not None
        return array
    if array is None:
        array = np.zeros(shape, dtype)
    # As bytes: JAX sums over the processes, and as floats -0.0 + 0.0 would be 0.0.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).view(dtype).reshape(shape)


def on_host(array: jax.Array) -> np.ndarray:
    """All values of a global array, wherever its shards are. May share memory with it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _text_from_first(text: str) -> str:
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    # The length is a power of two, because JAX compiles once for each length.
    data = np.zeros(1 << length.bit_length(), np.uint8)
    if jax.process_index() == 0:
        data[:length] = np.frombuffer(text.encode(), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))[:length]).decode()
