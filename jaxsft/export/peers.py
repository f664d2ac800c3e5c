"""Runs the libraries that check an export, each in its own process.

A worker is a script with the arguments MODEL PROBES.npz OUT.npz [ADAPTER]: see
transformers_worker.py.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np


class Library(NamedTuple):
    """A library that can check exports; `packages` are the names that pip knows."""

    name: str
    packages: tuple[str, ...]
    worker: str
    install: str


TRANSFORMERS = Library(
    "transformers",
    ("torch", "transformers", "peft"),
    "transformers_worker.py",
    "pip install 'jaxsft[export]'",
)
TUNIX = Library(
    "Tunix", ("google-tunix", "qwix", "jax", "flax"), "tunix_worker.py", "pip install google-tunix"
)
_WORKERS = Path(__file__).parent
_VERSIONS = (
    "import importlib.metadata, json, sys; "
    "print(json.dumps({name: importlib.metadata.version(name) for name in sys.argv[1:]}))"
)
_ERROR = re.compile(r"[\w.]*(Error|Exception|NotFound)\b")


class Peer(NamedTuple):
    """A library, the Python that it is installed for, and the versions of its packages."""

    library: Library
    python: str
    versions: dict[str, str]


class Probe(NamedTuple):
    """Token ids [T], and the positions whose logits are compared."""

    ids: list[int]
    at: list[int]


class Reply(NamedTuple):
    """A peer's results: float32 logits [len(at), V] for each probe, token ids for each text."""

    logits: list[np.ndarray]
    ids: list[list[int]]


def find_peer(library: Library, python: str | None) -> Peer:
    """The library as installed for `python`, None for this Python; imports nothing.

    Raises ValueError, with advice, if a package is not installed or `python` is no Python.
    """
    python = python or sys.executable
    try:
        done = subprocess.run(
            [python, "-c", _VERSIONS, *library.packages],
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise _missing(library, python, _last_error(done))
        return Peer(library, python, json.loads(done.stdout))
    except OSError as error:
        raise ValueError(f"--peer_python {python}: cannot be run: {error.strerror}") from None
    except json.JSONDecodeError:
        raise ValueError(f"--peer_python {python}: is no Python") from None


def ask(
    peer: Peer,
    model: Path,
    probes: Sequence[Probe],
    *,
    scratch: Path,
    adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Reply:
    """Has the peer compute the probes with `model` and `adapter`; `settings` go to its worker.

    Raises ValueError if a library cannot be imported, MemoryError if the process has too little
    memory, ChildProcessError, with its last error, if it cannot load the export.
    """
    with TemporaryDirectory(dir=scratch, prefix="probes-") as name:
        given, result = Path(name, "probes.npz"), Path(name, "logits.npz")
        arrays: dict[str, Any] = {"settings": np.asarray(json.dumps(dict(settings or {})))}
        for i, (ids, at) in enumerate(probes):
            arrays |= {f"ids_{i}": np.asarray(ids), f"at_{i}": np.asarray(at)}
        with given.open("wb") as file:
            np.savez(file, **arrays)
        paths = [model, given, result, *([] if adapter is None else [adapter])]
        _run(peer, [str(path) for path in paths])
        with np.load(result) as found:
            logits = [found[f"logits_{i}"] for i in range(len(probes))]
            num_texts = sum(key.startswith("text_") for key in found.files)
            return Reply(logits, [found[f"text_{i}"].tolist() for i in range(num_texts)])


def _run(peer: Peer, arguments: Sequence[str]) -> None:
    """Runs the worker on the CPU and without a network; errors as in `ask`."""
    done = subprocess.run(
        [peer.python, str(_WORKERS / peer.library.worker), *arguments],
        env=os.environ
        | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
        | {"JAX_PLATFORMS": "cpu"}  # a TPU belongs to this process
        | {"PYTHONSAFEPATH": "1"},  # modules beside the script do not hide installed ones
        capture_output=True,
        text=True,
    )
    if done.returncode == -signal.SIGKILL:
        raise MemoryError(f"{peer.library.name}'s process was killed, as the system does")
    if done.returncode:
        line = _last_error(done)
        if line.startswith(("ImportError", "ModuleNotFoundError")):
            raise _missing(peer.library, peer.python, line)
        # NumPy's, torch's, JAX's
        if line.startswith("MemoryError") or re.search("can't allocate memory|RESOURCE_EX", line):
            raise MemoryError(line)
        raise ChildProcessError(f"{peer.library.name} cannot load the export: {line}")


def _last_error(done: subprocess.CompletedProcess[str]) -> str:
    """The line with the error; other lines may follow it."""
    lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])


def _missing(library: Library, python: str, error: str) -> ValueError:
    return ValueError(
        f"the check of the export needs {', '.join(library.packages)} ({error}): "
        f"{library.install}, or --peer_python PATH of a Python that has them (this is {python}), "
        "or --no-verify to go without it"
    )
