"""`Batch`: the one thing that the data side and the model side share."""

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
Float32Array = npt.NDArray[np.float32]


class Batch(NamedTuple):
    """Packed rows as the model and the loss take them, each [B, T] (one row: [T]).

    `targets_BT[b, t]` is the token after position t in the same segment, 0 at a segment's last
    position and in padding. `loss_weights_BT[b, t]`, never negative, is how much this target's loss
    counts: 1 where it is a label, else 0. `segment_ids_BT` is 0 in padding and 1, 2, … along a row;
    positions restart at 0 in every segment.
    """

    tokens_BT: Int32Array
    targets_BT: Int32Array
    loss_weights_BT: Float32Array
    segment_ids_BT: Int32Array
    positions_BT: Int32Array


def batch_hash(batch: Batch) -> str:
    """16 hex digits that differ between any two different batches of one shape."""
    found = hashlib.blake2b(digest_size=8)
    for array in batch:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
