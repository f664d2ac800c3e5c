"""Saves a run's state. If a save fails, it says so and tries again while training goes on."""

import re
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console

from jaxsft.common.hosts import any_of
from jaxsft.run.checkpoints import Checkpoints
from jaxsft.run.run_dir import RunDir
from jaxsft.run.session import Session, duration
from jaxsft.step.train_step import TrainState

RETRY_STEPS = 10  # after a save that failed
_RETRY_S = 5.0  # between tries once training has stopped
_PATIENCE_S = 600.0  # of these tries, after the last step: the result exists nowhere else
_PATIENCE_STOPPED_S = 15.0  # after a signal: its sender waits 30 s or so


class Saver:
    """Saves every `save_steps` steps, and soon again after a save that failed.

    Args:
      checkpoints: where the states go.
      metadata: of every checkpoint.
      save_steps: steps between saves.
      session: learns how long saves take.
      console: is told what went wrong.
      run_dir: is made again when it has vanished; None where nothing local is to be watched.
      on_new_dir: writes the run's other files into a directory made again; may raise OSError.
      push: is called before each save: the files beside a checkpoint must not be older than it.
    """

    def __init__(
        self,
        *,
        checkpoints: Checkpoints,
        metadata: dict[str, Any],
        save_steps: int,
        session: Session,
        console: Console,
        run_dir: RunDir | None,
        on_new_dir: Callable[[], None],
        push: Callable[[], None],
    ):
        self.checkpoints = checkpoints
        self._metadata, self._save_steps = metadata, save_steps
        self._session, self._console = session, console
        self._run_dir, self._on_new_dir, self._push = run_dir, on_new_dir, push
        self._retry_at: int | None = None
        self._begun_step: int | None = None  # of the newest save
        self._problem = ""  # the present one, without its numbers
        self._began_s: float | None = None

    def is_due(self, step: int) -> bool:
        """Is the state after `step` to be saved? Ask after every step: it also notices a save that
        failed in the meantime."""
        self._watch(step)
        is_retry = self._retry_at is not None and step >= self._retry_at
        return step % self._save_steps == 0 or any_of(is_retry)

    def save(self, step: int, state: TrainState, eval_loss: float | None = None) -> None:
        """Begins a save. One that fails is reported and tried again `RETRY_STEPS` later.

        Raises FloatingPointError for a state that is not finite.
        """
        try:
            self._begin(step, state, eval_loss)
        except OSError as error:
            self._failed(step, error)

    def finish(self, step: int, state: TrainState) -> None:
        """Returns when the state after `step`, where training stopped, is on disk.

        Tries for ten minutes, or for 15 seconds when a signal has come. Raises OSError where every
        try failed, FloatingPointError for a state that is not finite.
        """
        began_s = time.monotonic()
        while True:
            self._session.beat(f"saving step {step}")
            try:
                self._watch(step)
                self._begin(step, state, None)
                self.checkpoints.wait()
                self._saved()
                return
            except OSError as error:
                patience_s = _PATIENCE_STOPPED_S if self._session.interrupted() else _PATIENCE_S
                patience_s = min(patience_s, self._session.left_s())
                if any_of(time.monotonic() - began_s + _RETRY_S > patience_s):
                    raise OSError(
                        f"step {step} could not be saved ({error}); {self._newest()}"
                    ) from error
                self._failed(step, error, f"in {_RETRY_S:.0f} s, for {duration(patience_s)} in all")
                time.sleep(_RETRY_S)

    def _newest(self) -> str:
        try:
            steps = self.checkpoints.steps()
        except OSError:
            steps = []
        return f"the newest checkpoint is step {steps[-1]}" if steps else "none is there"

    def _watch(self, step: int) -> None:
        try:
            self.checkpoints.poll()
        except OSError as error:
            self._failed(step, error)
        if self._began_s is not None and not self.checkpoints.is_saving:
            self._saved()
        if self._run_dir is not None and not self._run_dir.is_there():
            self._make_dir_again(self._run_dir, step)

    def _make_dir_again(self, run_dir: RunDir, step: int) -> None:
        try:
            run_dir.make_again()
            self._on_new_dir()
        except OSError as error:
            self._failed(step, OSError(f"{run_dir.path} has vanished: {error}"))
            return
        self._retry_at = step
        self._say(f"{run_dir.path} has vanished", "it was made again, saving there now")

    def _begin(self, step: int, state: TrainState, eval_loss: float | None) -> None:
        self._began_s = time.monotonic()
        self._push()
        self.checkpoints.save(step, state, self._metadata, eval_loss)
        self._begun_step = step

    def _saved(self) -> None:
        if self._began_s is not None:
            self._session.save_s = time.monotonic() - self._began_s
            self._began_s = None
        if self._problem:
            self._console.print(f"Saved again: step {self._begun_step} is on disk.")
        self._problem, self._retry_at = "", None

    def _failed(self, step: int, error: OSError, when: str | None = None) -> None:
        self._began_s = None
        self._retry_at = step + RETRY_STEPS
        self._say(str(error), f"trying again {when or f'at step {self._retry_at}'}")

    def _say(self, problem: str, remedy: str) -> None:
        """Prints a problem once, whatever its numbers: a full disk stays full for many tries."""
        kind = re.sub(r"\d+", "", f"{problem}; {remedy}")
        if kind != self._problem:
            self._console.print(f"WARNING: {problem}; {remedy}", style="bold red")
        self._problem = kind
