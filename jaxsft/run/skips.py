"""Steps whose update was not applied: written down with their rows, and too many end the run."""

import math
from collections.abc import Mapping

from jaxsft.data.packing import StepBatches
from jaxsft.data.prepared import Prepared, source_of
from jaxsft.run.metrics import MetricsWriter

_ROWS_SHOWN = 8


class SkippedSteps:
    """Looks at every step's metrics.

    Args:
      data: the rows trained on.
      batches: which of them a step has.
      writer: where skipped steps are written down.
      max_nonfinite: so many steps in a row whose loss or gradient is not finite end the run.
    """

    def __init__(
        self, data: Prepared, batches: StepBatches, writer: MetricsWriter, max_nonfinite: int
    ):
        self._data, self._batches, self._writer = data, batches, writer
        self._max_nonfinite = max_nonfinite
        self._nonfinite: list[int] = []  # steps in a row

    def check(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """A line for the user when the update of `step` (from 1) was skipped, else None.

        Raises FloatingPointError at the last of `max_nonfinite` steps in a row that were not
        finite.
        """
        if metrics["num_loss_tokens"] == 0:
            return None  # nothing to learn from is no fault
        if metrics["applied"]:
            self._nonfinite.clear()
            return None
        loss, grad_norm = metrics["loss"], metrics["grad_norm"]
        is_finite = math.isfinite(loss) and math.isfinite(grad_norm)
        rows = self._rows(step)
        self._writer.skip(step, "spike" if is_finite else "not finite", loss, grad_norm, rows)
        if is_finite:
            self._nonfinite.clear()
            return (
                f"step {step}: loss {loss:.4g}, gradient norm {grad_norm:.4g}: a spike, its update "
                f"was skipped; rows: {_shortened(rows)}"
            )
        self._nonfinite.append(step)
        if len(self._nonfinite) < self._max_nonfinite:
            return (
                f"step {step}: loss or gradient not finite, its update was skipped; rows: "
                f"{_shortened(rows)}"
            )
        all_rows = [row for each in self._nonfinite for row in self._rows(each)]
        raise FloatingPointError(
            f"loss or gradient not finite in steps {self._nonfinite[0]} to {step}; no such update "
            f"was applied. Their rows: {_shortened(all_rows)} (all in skipped.jsonl)"
        )

    def _rows(self, step: int) -> list[str]:
        """The source rows of a step's batch, in its order."""
        rows = self._data.rows
        return [
            source_of(self._data, int(sample))
            for row in self._batches.row_indices(step - 1)
            if row >= 0
            for sample in rows.row_samples[rows.row_offsets[row] : rows.row_offsets[row + 1]]
        ]


def _shortened(rows: list[str]) -> str:
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return ", ".join(rows[:_ROWS_SHOWN]) + more
