"""What a run measures, on disk: JSON lines for programs, TensorBoard events for people.

Also the arithmetic of speed: tokens a second and time left, from clock readings handed in.
"""

import json
import math
import mmap
import os
import socket
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from jaxsft.common.append_file import AppendFile
from jaxsft.run import events


class MetricsWriter:
    """Writes metrics.jsonl, samples.jsonl, skipped.jsonl, rollouts.jsonl (an object a line) and
    tensorboard/.

    Each call writes at once, in this thread: a killed run keeps its lines. None fails for want of a
    disk: what cannot be written waits (see AppendFile), training goes on and `problem` says so.

    Args:
        run_dir: a local directory; made if missing.
        resume_step: the step that the run goes on from (-1: from before anything was measured).
            Lines of later steps are dropped and hidden in TensorBoard, so that each step is there
            once. None keeps all of them, to add to a finished run. A line that a killed process
            left torn is dropped either way.

    Raises:
        OSError: what lies there cannot be read.
    """

    def __init__(self, run_dir: str | os.PathLike[str], resume_step: int | None = None) -> None:
        run_dir = Path(run_dir)
        last_step = math.inf if resume_step is None else resume_step
        there = {
            name: _lines_up_to(run_dir / f"{name}.jsonl", last_step)
            for name in ("metrics", "samples", "skipped")
        }
        # A measurement is made again where the run was killed before it was kept elsewhere.
        self._kept = {
            line for lines in there.values() for line in lines if _step_of(line) == resume_step
        }
        self._metrics, self._samples, self._skipped = (
            AppendFile(run_dir / f"{name}.jsonl", lines) for name, lines in there.items()
        )
        rollouts = run_dir / "rollouts.jsonl"
        self._rollouts = AppendFile(rollouts, num_bytes=_end_of_step(rollouts, last_step))
        log_dir = run_dir / "tensorboard"
        num_files = len(list(log_dir.iterdir())) if log_dir.exists() else 0
        # The count is there for quick restarts, within a second: they'd overwrite the last file.
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{num_files}"
        self._events = AppendFile(log_dir / name)
        self._events.append(events.file_start(time.time()))
        if resume_step is not None:
            self._events.append(events.session_start(time.time(), resume_step + 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, name: str) -> bool:
        """Has the step that was resumed from this metric already?"""
        return any(name in json.loads(line) for line in self._kept)

    @property
    def problem(self) -> str | None:
        """Which file cannot be written, and why, in one line; None when all is written."""
        files = (self._metrics, self._samples, self._skipped, self._rollouts, self._events)
        return next((file.problem for file in files if file.problem), None)

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Writes one line, {"step": step, **metrics}; not again what the step resumed from has.

        NaN and infinity, which JSON doesn't have, become null; TensorBoard gets no point for them,
        nor for texts.
        """
        assert "step" not in metrics
        texts = {name: value for name, value in metrics.items() if isinstance(value, str)}
        numbers = {name: float(value) for name, value in metrics.items() if name not in texts}
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        known: dict[str, float | str] = texts | finite
        line = _line({"step": step} | {name: known.get(name) for name in metrics})
        if line in self._kept:
            return
        self._metrics.append(line)
        if finite:
            self._events.append(events.scalars(time.time(), step, finite))

    def skip(
        self,
        step: int,
        reason: Literal["not finite", "spike"],
        loss: float,
        grad_norm: float,
        rows: Sequence[str],
    ) -> None:
        """Writes down a step whose update was not applied, in skipped.jsonl.

        Args:
            step: the step, counted from 1.
            reason: why it was skipped.
            loss, grad_norm: as measured; null in the file where not finite.
            rows: the source rows in its batch, each as "file:row 17".
        """
        numbers = {"loss": float(loss), "grad_norm": float(grad_norm)}
        finite = {name: x if math.isfinite(x) else None for name, x in numbers.items()}
        line = {"step": step, "reason": reason, **finite, "rows": list(rows)}
        self._skipped.append(_line(line))

    def sample(self, step: int, number: int, answer: Mapping[str, Any]) -> None:
        """Writes the answer to held-out prompt `number`; not again what the step resumed from has.

        samples.jsonl gets {"step": step, **answer}, TensorBoard the "prompt" and "text" of it,
        literally: not as Markdown.
        """
        line = json.dumps({"step": step, **answer}, ensure_ascii=False).encode() + b"\n"
        if line in self._kept:
            return
        self._samples.append(line)
        texts = [*answer["prompt"].splitlines(), "", *answer["text"].splitlines()]
        literal = "".join(f"    {text}\n" for text in texts)  # a Markdown code block
        self._events.append(events.markdown(time.time(), step, f"sample/{number}", literal))

    def rollout(self, completions: Sequence[Mapping[str, Any]]) -> None:
        """Writes the completions of a rollout, each with its "step", in rollouts.jsonl."""
        lines = (json.dumps(each, ensure_ascii=False, allow_nan=False) for each in completions)
        self._rollouts.append("".join(f"{line}\n" for line in lines).encode())

    def close(self) -> None:
        """Tries once more to write what waits; what is missing then is in `problem`."""
        for file in (self._metrics, self._samples, self._skipped, self._rollouts, self._events):
            file.flush()


def _line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values, allow_nan=False).encode() + b"\n"


def last_step_of(run_dir: Path) -> int:
    """The last step in metrics.jsonl; 0 without one."""
    return max(map(_step_of, _lines_up_to(run_dir / "metrics.jsonl", math.inf)), default=0)


def logged_metrics(run_dir: Path, last_step: float = math.inf) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to a step, in order, without torn ones; none without a file."""
    lines = _lines_up_to(run_dir / "metrics.jsonl", last_step)
    return [json.loads(line) | {"step": _step_of(line)} for line in lines]


def _lines_up_to(path: Path, last_step: float) -> list[bytes]:
    """The file's lines without those of later steps and torn ones."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    return [line + b"\n" for line in lines if 0 <= _step_of(line) <= last_step]


def _end_of_step(path: Path, last_step: float) -> int:
    """The bytes of a file, whose steps only rise, up to those of later steps and torn lines.

    Read from the file's end: it may have gigabytes.
    """
    if not path.exists() or not path.stat().st_size:
        return 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        end = text.rfind(b"\n") + 1
        while end:
            start = text.rfind(b"\n", 0, end - 1) + 1
            if 0 <= _step_of(text[start:end]) <= last_step:
                break
            end = start
    return end


def _step_of(line: bytes) -> int:
    """The step of a line; -1 if it isn't one."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError):
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
