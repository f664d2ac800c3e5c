"""A user's own rewards: functions in a Python file, which run in a process of that file's own.

    def brevity(texts: list[str], rows: list[dict]) -> list[float | None]:
        return [1 - len(text) / 1000 for text in texts]

`texts` are completions without the stop token, `rows` the rows of their prompts, with the values
that JSON has (others as texts). None for a text says that the reward does not apply to it. What
fails scores 0, with the reason in the log, and the run goes on: a call that takes too long, raises,
exits or returns other than a number for each text, and a single value that is no number, NaN or
infinite. After a call that took too long or ended the process a new one is started. What a function
prints goes to the log. Its value must follow from the text and the row alone, or a run that is
continued is no longer the same.

Only a file that is named in the rewards of this run is ever run.
"""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from jaxsft.common.files import file_sha256
from jaxsft.common.text import visible_line
from jaxsft.rewards.records import Reward

_WORKER = Path(__file__).parent / "user_worker.py"
_LOAD_SECONDS = 120.0  # imports of torch and its like included
_LOOK_SECONDS = 0.2  # how often a silent process is looked after
_MAX_PRINTED = 300  # bytes of a call that are shown
_ADVICE = "write a function FUNCTION(texts, rows) that returns a number for each text"


class UserReward(NamedTuple):
    """A reward of a user's own: its name in the recipe, and the function in the file."""

    name: str
    function: str


def find_user_rewards(
    names: Sequence[str], beside: Path | None = None
) -> dict[Path, list[UserReward]]:
    """The rewards of each file that the names (FILE.py:FUNCTION) say.

    A file that is no absolute path is looked for in the working directory, then in `beside`, the
    directory of the recipe. ValueError if there is none, or a name has another form.
    """
    found: dict[Path, list[UserReward]] = {}
    for name in names:
        file, _, function = name.rpartition(":")
        if not file or not function.isidentifier():
            raise ValueError(f"rewards: {name}: must be FILE.py:FUNCTION; {_ADVICE}")
        places = [Path(file).expanduser()]
        places += [beside / places[0]] if beside is not None else []
        path = next((each for each in places if each.is_file()), None)
        if path is None:
            where = " nor ".join(dict.fromkeys(str(each.absolute()) for each in places))
            raise ValueError(f"rewards: {name}: there is no file {where}; check the path")
        found.setdefault(path.resolve(), []).append(UserReward(name, function))
    return found


class UserFile:
    """The process of one file. A context manager: entered, the file has been loaded, and `digests`
    has the SHA-256 (hex) of it and of what it imported from its own folder.

    Args:
      path: of the file.
      rewards: its functions.
      seconds: that a call may take.
      log: takes a line on a call that failed, and on what a call printed.

    Raises:
      ValueError, when entered: the file cannot be loaded, or has no such function.
    """

    def __init__(
        self,
        path: Path,
        rewards: Sequence[UserReward],
        seconds: float,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path = path
        self.digests = {path: file_sha256(path)}
        self._rewards, self._seconds, self._log = rewards, seconds, log
        self._process: subprocess.Popen[bytes] | None = None
        self._replies = -1

    def __enter__(self) -> Self:
        functions, modules = self._start()
        self.digests |= {each: file_sha256(each) for each in modules}
        for name, function in self._rewards:
            if function not in functions:
                self.close()
                own = [each for each in functions if not each.startswith("_")]
                there = f"has {', '.join(own[:8])}" if own else "has none"
                raise ValueError(f"rewards: {name}: no such function: {self.path} {there}")
            if fault := functions[function]:
                self.close()
                raise ValueError(
                    f"rewards: {name}: {fault}; it is called as {function}(texts, rows)"
                )
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process and those that it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not written
                pipe.close()
        self._process.wait()
        os.close(self._replies)
        self._process = None

    def score(
        self, texts: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> dict[str, list[Reward | None]]:
        """The reward of each text by each function; None where it does not apply."""
        return {each.name: self._call(each, texts, rows) for each in self._rewards}

    def _call(
        self, reward: UserReward, texts: Sequence[str], rows: Sequence[dict[str, Any]]
    ) -> list[Reward | None]:
        asked = {"function": reward.function, "texts": texts, "rows": rows}
        try:
            if self._process is None:
                self._start()
            request = json.dumps(asked | {"seconds": self._seconds}, default=str)
            reply = self._ask(request.encode() + b"\n", self._seconds)
            if "error" in reply:
                raise ValueError(reply["error"])
        except ValueError as error:
            why = visible_line(str(error))
            self._log(f"reward {reward.name}: {why}: {len(texts)} completions score 0")
            return [Reward(0.0, why)] * len(texts)
        except BaseException:  # an interrupt: no later call may take its reply
            self.close()
            raise
        faults = [each for each in reply["values"] if isinstance(each, str)]
        if faults:
            why = visible_line(faults[0])
            self._log(f"reward {reward.name}: {why}: {len(faults)} completions score 0")
        return [
            None
            if each is None
            else Reward(0.0, visible_line(each))
            if isinstance(each, str)
            else Reward(float(each), f"{each:g}")
            for each in reply["values"]
        ]

    def _start(self) -> tuple[dict[str, str], list[Path]]:
        """Starts the process; the functions in the file, with why one cannot be called, or ""; and
        the modules beside the file that it has imported."""
        for path, digest in self.digests.items():
            if not path.is_file() or file_sha256(path) != digest:
                raise ValueError(f"{path} was changed during the run")
        self._replies, theirs = os.pipe()
        os.set_blocking(self._replies, False)
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(self.path), str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(theirs,),
            # An accelerator belongs to the run. One order of sets, whenever it is started.
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is the run's; and all its processes can be ended
        )
        os.close(theirs)
        assert self._process.stdin is not None and self._process.stderr is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        os.set_blocking(self._process.stderr.fileno(), False)
        name = self._rewards[0].name
        try:
            reply = self._ask(b"", _LOAD_SECONDS)
        except ValueError as error:
            raise ValueError(f"rewards: {name}: the file did not load: {error}") from None
        if "error" in reply:
            self.close()
            raise ValueError(f"rewards: {name}: {self.path}: {reply['error']}")
        return dict(reply["functions"]), [Path(each) for each in reply["modules"]]

    def _ask(self, request: bytes, seconds: float) -> dict[str, Any]:
        """Writes the request and waits for its reply.

        ValueError if none comes in time, or the process ended; it is then closed.
        """
        assert self._process is not None
        stdin, stderr = self._process.stdin, self._process.stderr
        assert stdin is not None and stderr is not None
        until, reply, printed = time.monotonic() + seconds, b"", b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._replies, selectors.EVENT_READ)
            selector.register(stderr, selectors.EVENT_READ)
            if request:
                selector.register(stdin, selectors.EVENT_WRITE)
            fault = ""
            while not reply.endswith(b"\n") and not fault:
                left = until - time.monotonic()
                ready = [
                    key.fileobj for key, _ in selector.select(max(0.0, min(left, _LOOK_SECONDS)))
                ]
                fault = "" if left > 0 else f"took over {seconds:g} s"
                if not ready and self._process.poll() is not None:
                    fault = "ended its process"  # and a child of it has the pipe
                if stdin in ready:
                    request = _written(stdin.fileno(), request)
                    if not request:
                        selector.unregister(stdin)
                if stderr in ready:
                    found = os.read(stderr.fileno(), 1 << 16)
                    printed = (printed + found)[:_MAX_PRINTED]
                    if not found:
                        selector.unregister(stderr)
                elif self._replies in ready:  # after what was printed before
                    found = os.read(self._replies, 1 << 20)
                    reply += found
                    fault = fault if found else "ended its process"
        if printed.strip():
            self._log(f"{self.path.name} printed: {visible_line(printed.decode(errors='replace'))}")
        if fault:
            process = self._process
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.0 if fault.startswith("took") else 1.0)
                fault += f" (exit code {process.returncode})"
            self.close()
            raise ValueError(fault)
        return dict(json.loads(reply))


def _written(pipe: int, request: bytes) -> bytes:
    """What is left of the request after a write; nothing where the pipe is closed."""
    try:
        return request[os.write(pipe, request[:65536]) :]
    except BrokenPipeError:
        return b""
