"""How the benchmark talks to a trainer in a process of its own: JSON lines over stdin and stdout.

A worker answers `{"do": name, ...}` with what its function of that name returns, or with
`{"error": text}`. Only the standard library: it also runs in the peers' virtual environments.
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

# Nothing from the outside may speed up or slow down one of the trainers alone.
_OWN_VARIABLES = ("XLA_FLAGS", "LD_PRELOAD", "GLIBC_TUNABLES", "PYTHONPATH")
_OWN_PREFIXES = ("MALLOC_", "JAX_", "OMP_", "MKL_")


class Trainer(Protocol):
    """One trainer of a loaded model with an adapter; rows are files as `peers.py` writes them."""

    def gradients(self, rows: Path, out: Path) -> float:
        """Writes the gradient of the mean loss (nats per loss token), unclipped, as a safetensors
        file with PEFT's names and shapes; returns that loss."""
        ...

    def step(self, rows: Path) -> float:
        """One whole optimizer step, finished on return; returns its loss."""
        ...


class WorkerError(Exception):
    """A worker failed or died; the text says which and how."""


def serve(make_trainer: Callable[[], Any], methods: Sequence[str] = ()) -> None:
    """Answers requests until stdin ends, those of `methods` with what the trainer's method returns.

    stdout belongs to the answers: whatever else is printed goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(function: Callable[[], dict[str, Any]]) -> None:
        try:
            reply = function()
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=answers, flush=True)

    trainers: list[Any] = []

    def load() -> dict[str, Any]:
        trainers.append(make_trainer())
        return {}

    def gradients(rows: str, out: str) -> dict[str, Any]:
        return {"loss": trainers[0].gradients(Path(rows), Path(out))}

    def steps(rows: str, count: int) -> dict[str, Any]:
        seconds, losses = [], []
        for _ in range(count):
            start = time.perf_counter()
            losses.append(trainers[0].step(Path(rows)))
            seconds.append(time.perf_counter() - start)
        return {"seconds": seconds, "losses": losses, "peak_rss_bytes": peak_rss_bytes()}

    def rest() -> dict[str, Any]:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return {}

    functions: dict[str, Callable[..., dict[str, Any]]] = {
        "load": load,
        "gradients": gradients,
        "steps": steps,
        "rest": rest,
    }
    for name in methods:
        functions[name] = lambda name=name, **given: getattr(trainers[0], name)(**given)  # type: ignore[misc]
    for line in sys.stdin:
        request = json.loads(line)
        function = functions[request.pop("do")]
        answer(lambda function=function, request=request: function(**request))  # type: ignore[misc]


def peak_rss_bytes() -> int:
    """The most memory that this process ever held.

    Not getrusage: what its parent held before exec counts there.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class Worker:
    """A trainer in a process of its own, on `threads` cores; its stderr goes to the file `log`."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        threads: int,
        environment: Mapping[str, str],
        log: Path,
    ):
        self.name, self.log = name, log
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in _OWN_VARIABLES and not key.startswith(_OWN_PREFIXES)
        }
        cores = sorted(os.sched_getaffinity(0))[:threads]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=inherited | dict(environment),
            )
        os.sched_setaffinity(self._process.pid, cores)

    def ask(self, request: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer; WorkerError when there is none or it is an error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps({"do": request} | arguments), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait()
            raise WorkerError(f"{self.name}: ended with exit code {code}; {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(f"{self.name}: {reply['error']}")
        return dict(reply)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()
