"""Runs the rewards of a user's file. A script for a process of its own: nothing imports it.

Arguments: the file, and the descriptor that replies go to. When the file is loaded it writes
{"functions": {name: fault}, "modules": [path]}; a fault is why one cannot be called as (texts,
rows), or ""; the modules are those of the file's own folder that it has imported. A call that
imports another of them fails: the identity of the run would not have it. Then for each request
{"function", "texts", "rows", "seconds"}, a line of stdin, it writes {"values": […]}.
{"error": …} stands in place of either. What the file prints goes to stderr.
"""

import contextlib
import faulthandler
import importlib.util
import inspect
import itertools
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

_GRACE_SECONDS = 2.0  # after which a process whose parent is gone ends itself
_MAX_VALUE = 1e6


def main() -> None:
    """Answers requests until stdin ends."""
    path = Path(sys.argv[1])
    replies = os.fdopen(int(sys.argv[2]), "w", encoding="utf-8")
    os.set_inheritable(replies.fileno(), False)
    # The file's own reads find no request, and its prints are no reply.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    with contextlib.suppress(OSError):  # where memory runs out, this process ends, not the run
        Path("/proc/self/oom_score_adj").write_text("1000")
    module: ModuleType | None = None
    beside: dict[str, str] = {}

    def load() -> dict[str, Any]:
        nonlocal module, beside
        module = load_file(path)
        beside = modules_beside(path)
        found = {name: each for name, each in vars(module).items() if callable(each)}
        faults = {name: call_fault(each) for name, each in found.items()}
        return {"functions": faults, "modules": sorted({*beside.values()})}

    _reply(replies, path, load)
    for line in requests:
        asked = json.loads(line)

        def call(asked: dict[str, Any] = asked) -> dict[str, Any]:
            num_texts = len(asked["texts"])  # the function may change its list
            values = getattr(module, asked["function"])(asked["texts"], asked["rows"])
            plain = plain_values(values, num_texts)  # a generator runs here
            late = modules_beside(path).keys() - beside.keys()
            for name in late:
                del sys.modules[name]
            if late:
                raise ImportError(f"{min(late)} is imported in a call: import it in the file")
            return {"values": plain}

        # From a thread of C, for a call that nobody can interrupt after the run was killed.
        faulthandler.dump_traceback_later(asked["seconds"] + _GRACE_SECONDS, exit=True, file=2)
        _reply(replies, path, call)
        faulthandler.cancel_dump_traceback_later()


def call_fault(function: Callable[..., Any]) -> str:
    """Why a function cannot be called as (texts, rows); "" if it can, or may."""
    try:
        signature = inspect.signature(function)
    except Exception:  # it has none, or is an odd object that nobody asked for
        return ""
    try:
        signature.bind([], [])
    except TypeError as error:
        return str(error)
    return ""


def modules_beside(path: Path) -> dict[str, str]:
    """Name -> file of the loaded modules in the folder of the file, without those of an environment
    there."""
    stdlib = Path(os.__file__).resolve().parent
    found: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        place = Path(file).resolve() if isinstance(file, str) else path
        if place == path or path.parent not in place.parents or stdlib in place.parents:
            continue
        if "site-packages" not in place.relative_to(path.parent).parts:
            found[name] = str(place)
    return found


def load_file(path: Path) -> ModuleType:
    """Runs the file as a module; the modules beside it can be imported."""
    sys.path[0] = str(path.parent)
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_rewards"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def plain_values(values: Any, num_texts: int) -> list[Any]:
    """A number or null for each text; a text in place of a value says what is wrong with it."""
    if isinstance(values, str | bytes | dict):
        raise TypeError(f"returned a {type(values).__name__}, not a list of numbers")
    try:
        found = list(itertools.islice(values, num_texts + 1))
    except TypeError:
        raise TypeError(f"returned a {type(values).__name__}, not a list of numbers") from None
    if len(found) != num_texts:
        many = f"more than {num_texts}" if len(found) > num_texts else len(found)
        raise ValueError(f"returned {many} values for {num_texts} texts")
    return [None if each is None else _plain_value(each) for each in found]


def _plain_value(value: Any) -> float | str:
    if isinstance(value, str | bytes) or not hasattr(type(value), "__float__"):
        return f"returned a {type(value).__name__}, not a number"
    try:
        number = float(value)
    except Exception as error:
        return f"returned what is no number: {error}"
    if not math.isfinite(number):
        return f"returned {number}"
    return number if abs(number) <= _MAX_VALUE else f"returned {number:g}, beyond ±{_MAX_VALUE:g}"


def _reply(replies: TextIO, path: Path, work: Callable[[], dict[str, Any]]) -> None:
    try:
        reply = work()
    except BaseException as error:
        reply = {"error": _described(error, path)}
    sys.stdout.flush()
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _described(error: BaseException, path: Path) -> str:
    """Its kind, its text, and the last line of the user's file that it passed."""
    is_own = isinstance(error, TypeError | ValueError) and str(error).startswith("returned ")
    if is_own:
        return str(error)
    lines = [e.lineno for e in traceback.extract_tb(error.__traceback__) if e.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, text = [error.lineno], error.msg
    else:
        text = str(error)
    where = f" (line {lines[-1]})" if lines else ""
    return f"{type(error).__name__}{text and f': {text}'}{where}"[:400]


if __name__ == "__main__":
    main()
