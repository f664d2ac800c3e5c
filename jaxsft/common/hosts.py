"""Several processes of one run: joining them, and agreeing on what they do next.

Every function but `join_hosts` is collective where there are several processes: all of them must
call it, in the same order, or the others wait for ever. With one process each is the identity.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

_T = TypeVar("_T")


def join_hosts() -> None:
    """Makes this process one of several, before anything touches its devices.

    JAX then takes SIGTERM for itself (see `reached_preemption`).

    Raises:
        ValueError: there are no others.
    """
    try:
        jax.distributed.initialize()
    except (ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"multihost: no other processes to join ({error}); JAX finds them on the hosts of a "
            "TPU slice and under Slurm or Open MPI, elsewhere leave it out"
        ) from error


def any_of(flag: bool) -> bool:
    """Is `flag` true on any process?"""
    if jax.process_count() == 1:
        return flag
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())


def reached_preemption(step: int) -> bool:
    """Is `step` the one at which all processes stop for a SIGTERM that one of them received?

    JAX's own notice, through its coordination service: the hosts of a spot TPU get theirs at
    different moments. It sees no SIGTERM while a handler of Python's is installed, so it is for
    those that come between `join_hosts` and that: true once, at a step that no process has passed.

    Args:
        step: must rise from call to call, by the same steps on all processes.
    """
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def from_first(make: Callable[[], _T]) -> _T:
    """What `make` returns on process 0, a JSON value, on all; it is called there only.

    A ValueError or OSError is raised on all.
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
    """Process 0's array of that shape and dtype, bit for bit, on all; the others pass None."""
    if jax.process_count() == 1:
        assert array is not None
        return array
    if array is None:
        array = np.zeros(shape, dtype)
    # As bytes: JAX sums over the processes, and -0.0 + 0.0 is 0.0.
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(data)).view(dtype).reshape(shape)


def on_host(array: jax.Array) -> np.ndarray:
    """The whole of a global array, wherever its shards are. May share memory with it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def _text_from_first(text: str) -> str:
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text.encode()))))
    # A power of two: JAX compiles once for each length.
    data = np.zeros(1 << length.bit_length(), np.uint8)
    if jax.process_index() == 0:
        data[:length] = np.frombuffer(text.encode(), np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(data))[:length]).decode()
