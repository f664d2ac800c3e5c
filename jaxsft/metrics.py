"""What a run measures, on disk: metrics.jsonl for programs, TensorBoard events for people.

Also the arithmetic of speed: tokens a second and time left. Nothing here reads a clock or prints.
"""

import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from tensorboardX import SummaryWriter


class MetricsWriter:
    """Writes `run_dir`/metrics.jsonl (one object a line) and `run_dir`/tensorboard/.

    Args:
        run_dir: a local directory; made if missing.
        resume_step: the step that the run goes on from (0: it starts again). Lines of later steps
            are dropped and hidden in TensorBoard, so that each step is there once. None keeps all
            of them, to add to a finished run. A line that a killed process left torn is dropped
            either way.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume_step: int | None = None) -> None:
        run_dir = Path(run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / "metrics.jsonl"
        _drop_lines_after(path, math.inf if resume_step is None else resume_step)
        self._jsonl = path.open("a", encoding="utf-8")
        log_dir = run_dir / "tensorboard"
        num_files = len(list(log_dir.iterdir())) if log_dir.exists() else 0
        self._tensorboard = SummaryWriter(
            str(log_dir),
            # TensorBoard hides what is at purge_step or later.
            purge_step=None if resume_step is None else resume_step + 1,
            # File names have the time in whole seconds: a quick restart would overwrite the last.
            filename_suffix=f".{num_files}",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one line, {"step": step, **metrics}, and flushes it.

        NaN and infinity, which JSON doesn't have, become null; TensorBoard gets no point for them.
        """
        assert "step" not in metrics
        values = {name: float(value) for name, value in metrics.items()}
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step} | {name: finite.get(name) for name in values}
        self._jsonl.write(json.dumps(line, allow_nan=False) + "\n")
        self._jsonl.flush()
        for name, value in finite.items():
            self._tensorboard.add_scalar(name, value, step)

    def text(self, step: int, tag: str, text: str) -> None:
        """Writes a text (a sample, the config) to TensorBoard, literally: not as Markdown."""
        literal = "".join(f"    {line}\n" for line in text.splitlines())  # a Markdown code block
        self._tensorboard.add_text(tag, literal, step)

    def close(self) -> None:
        """Flushes and closes both files. Calling it again does nothing."""
        self._jsonl.close()
        self._tensorboard.close()


def _drop_lines_after(path: Path, last_step: float) -> None:
    """Rewrites the file with its whole lines up to `last_step`, atomically; no file, no work."""
    if not path.exists():
        return
    kept = [
        line
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
        if _step_of(line) <= last_step and _step_of(line) >= 0
    ]
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _step_of(line: str) -> int:
    """The step of a line of metrics.jsonl; -1 if it isn't one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


class Throughput:
    """Speed over the last steps, from clock readings handed in (`time.monotonic()`).

    The first `update` only starts the clock, so the step that compiles is left out.

    Args:
        window_updates: how many updates the means are taken over.
    """

    def __init__(self, window_updates: int = 50) -> None:
        self._window: deque[tuple[float, int, int]] = deque(maxlen=window_updates)
        self._last_s: float | None = None

    def update(self, now_s: float, num_tokens: int, num_steps: int = 1) -> None:
        """Counts the steps that finished, and the tokens in them, since the last reading."""
        if self._last_s is not None:
            self._window.append((now_s - self._last_s, num_tokens, num_steps))
        self._last_s = now_s

    def restart_clock(self, now_s: float) -> None:
        """Leaves out the time since the last reading: an evaluation, say, was not training."""
        if self._last_s is not None:
            self._last_s = now_s

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second; NaN before the second update."""
        seconds = sum(duration_s for duration_s, _, _ in self._window)
        return sum(tokens for _, tokens, _ in self._window) / seconds if seconds > 0 else math.nan

    @property
    def step_s(self) -> float:
        """Mean seconds a step; NaN before the second update."""
        steps = sum(num_steps for _, _, num_steps in self._window)
        return sum(duration_s for duration_s, _, _ in self._window) / steps if steps else math.nan

    def eta_s(self, num_steps_left: int) -> float:
        """Seconds that the remaining steps will take; NaN before the second update."""
        return num_steps_left * self.step_s
