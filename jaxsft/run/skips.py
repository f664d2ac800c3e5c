"""Steps whose update was skipped: recorded with their rows; too many in a row end the run."""

import math
from collections.abc import Callable, Mapping

from jaxsft.run.metrics import MetricsWriter

_ROWS_SHOWN = 8


class SkippedSteps:
    """Looks at every step's metrics.

    Args:
      rows_of: the source rows of a step (from 1).
      writer: writes skipped steps down.
      max_nonfinite: so many steps in a row whose loss or gradient is not finite end the run.
    """

    def __init__(
        self, rows_of: Callable[[int], list[str]], writer: MetricsWriter, max_nonfinite: int
    ):
        self._rows_of, self._writer, self._max_nonfinite = rows_of, writer, max_nonfinite
        self._nonfinite: list[int] = []  # the present steps in a row

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
        rows = self._rows_of(step)
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
        all_rows = [row for each in self._nonfinite for row in self._rows_of(each)]
        raise FloatingPointError(
            f"loss or gradient not finite in steps {self._nonfinite[0]} to {step}; no such update "
            f"was applied. Their rows: {_shortened(all_rows)} (all in skipped.jsonl)"
        )


def _shortened(rows: list[str]) -> str:
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return ", ".join(rows[:_ROWS_SHOWN]) + more
