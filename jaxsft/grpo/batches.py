"""Packs completions with their prompts into rows, and reads values of their tokens back.

A completion is a segment of its row: the prompt, then the completion with its stop token. The loss
is at the positions whose target is a token of the completion.

What a loop does with a rollout of N completions, each a list of token ids:

    rows = CompletionRows(prompts, completions, row_length=512, num_rows=N)
    batch = put_batch(rows.batch, mesh)
    reference = rows.read(token_log_probs(first_adapter, frozen, batch, spec=spec.model))
    old = rows.read(token_log_probs(state.adapter, frozen, batch, spec=spec.model))
    advantages_PG, is_live_P = group_advantages(rewards_PG, "none")
    counts = np.flatnonzero(np.repeat(is_live_P, G) & has_stopped)

    def counting(values):
        return [values[i] for i in counts]

    kept = CompletionRows(counting(prompts), counting(completions), row_length=512, num_rows=N)
    batch = kept.rollout_batch(
        weights=completion_weights(kept.lengths, "dapo", max_completion_length),
        advantages=counting(advantages_PG.reshape(-1)),
        old=counting(old),
        reference=counting(reference),
    )
    batch = put_batch(split_rows(batch, num_parts), mesh)  # parts of padding alone take no time
    for _ in range(num_iterations):  # with UpdateSpec(token_loss=Objective(…))
        state, frozen, metrics = train_step(state, frozen, batch, spec=spec)

Axes: A micro-batches, B rows, T positions of a row.
"""

from collections.abc import Sequence

import jax
import numpy as np
import numpy.typing as npt

from jaxsft.common.batch import Batch, Float32Array
from jaxsft.data.bins import pack
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.grpo.objective import RolloutBatch
from jaxsft.step.train_step import BatchT

Values = Sequence[npt.ArrayLike] | npt.NDArray[np.floating]


class CompletionRows:
    """Completions in as few rows as they need, and behind these rows of padding.

    The same completions give the same rows; none at all give rows of padding, on which a train step
    changes nothing but its count.

    Args:
      prompts: token ids of each completion's prompt, at least one.
      completions: token ids of each completion, at least one; the stop token, if any, is the last.
      row_length: T. ValueError if a prompt with its completion is longer.
      num_rows: B. As many as completions suffice.

    Attributes:
      batch: five arrays [B, T]; the loss weight is 1 at every token of a completion.
      lengths: tokens of each completion.
    """

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        *,
        row_length: int,
        num_rows: int,
    ):
        self.lengths = [len(ids) for ids in completions]
        samples = []
        for prompt, completion in zip(prompts, completions, strict=True):
            assert len(prompt) and len(completion)
            ids = np.concatenate([prompt, completion]).astype(np.int32)
            samples.append(Sample(ids, np.arange(len(ids)) >= len(prompt)))
        bins = pack([len(sample.ids) for sample in samples], row_length)
        assert len(bins) <= num_rows
        if bins:
            rows = PackedRows.from_samples(samples, bins, row_length)
            self.batch = rows.batch([*range(len(bins)), *[-1] * (num_rows - len(bins))])
        else:
            zeros = np.zeros((num_rows, row_length), np.int32)
            self.batch = Batch(zeros, zeros, zeros.astype(np.float32), zeros, zeros)
        # Completions in the order in which their tokens stand in the flat batch, and those places.
        self._order = [index for row in bins for index in row]
        self._places = np.flatnonzero(self.batch.loss_weights_BT)

    def read(self, values_BT: npt.ArrayLike) -> list[Float32Array]:
        """The values at the tokens of each completion, float32 [its tokens]."""
        flat = np.asarray(values_BT, np.float32).reshape(-1)[self._places]
        ends = np.cumsum([self.lengths[index] for index in self._order])
        parts = dict(zip(self._order, np.split(flat, ends[:-1]), strict=False))
        return [parts[index] for index in range(len(self.lengths))]

    def write(self, values: Values) -> Float32Array:
        """float32 [B, T]: for each completion one value, or one for each of its tokens; else 0."""
        flat = np.zeros(self.batch.tokens_BT.size, np.float32)
        if self._order:
            parts = [np.broadcast_to(values[i], self.lengths[i]) for i in self._order]
            flat[self._places] = np.concatenate(parts)
        return flat.reshape(self.batch.tokens_BT.shape)

    def rollout_batch(
        self, *, weights: Values, advantages: Values, old: Values, reference: Values
    ) -> RolloutBatch:
        """The batch of an update; arguments as those of `write`."""
        batch = self.batch._replace(loss_weights_BT=self.write(weights))
        return RolloutBatch(*batch, *map(self.write, (old, reference, advantages)))


def split_rows(batch: BatchT, num_parts: int) -> BatchT:
    """Arrays [A · B, T] as micro-batches [A, B, T], A being `num_parts`."""
    return jax.tree.map(lambda x: x.reshape(num_parts, -1, x.shape[-1]), batch)
