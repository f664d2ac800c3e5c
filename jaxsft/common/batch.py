"""`Batch`: the one thing that the data side and the model side share."""

import hashlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


class Batch(NamedTuple):
    """Packed rows as the model and the loss take them, each [B, T] (one row: [T]).

    `targets_BT[b, t]` is the token after position t in the same segment, 0 at a segment's last
    position and in padding; `loss_mask_BT[b, t]` says that this target exists and is a label;
    `segment_ids_BT` is 0 in padding and 1, 2, … along a row; positions restart in every segment.
    """

    tokens_BT: Int32Array
    targets_BT: Int32Array
    loss_mask_BT: BoolArray
    segment_ids_BT: Int32Array
    positions_BT: Int32Array


def batch_hash(batch: Batch) -> str:
    """16 hex digits that tell apart any two batches of one shape."""
    found = hashlib.blake2b(digest_size=8)
    for array in batch:
        found.update(np.ascontiguousarray(array).data)
    return found.hexdigest()
