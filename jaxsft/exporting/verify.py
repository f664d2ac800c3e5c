"""Is an export the model that it was made from? The same prompts through another library.

Both sides compute in float32 with the weights as they are stored. Weights rounded to bfloat16 are
held to the same bound that way; with activations in bfloat16 as well the two libraries, which round
in other places, would be so far apart that a wrong tensor could hide.
"""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsft.chat import encode_prompt
from jaxsft.layers import Linear
from jaxsft.model import Gemma
from jaxsft.models import Origin, load
from jaxsft.presets import GemmaConfig
from jaxsft.reasoning import Turn
from jaxsft.tokenizer import Tokenizer

# Largest difference of two logits over all probes. Different orders of summation in float32
# gave 4e-4 on Gemma 3 270M, whose largest logit was 98.
LOGIT_BOUND = 2e-3
PEER_PACKAGES = ("torch", "transformers", "peft")
_WORKER = Path(__file__).with_name("transformers_worker.py")
_PAD = 64  # lengths are rounded up to it, so that few programs are compiled
_MAX_LONG_WINDOW = 1024  # a probe that leaves a longer window would take minutes on a CPU
_NUM_LONG_POSITIONS = 32
_CHATS = (
    [Turn("user", "Why is the sky blue? Answer in one sentence.")],
    [
        Turn("system", "Think step by step, then give the answer."),
        Turn("user", "A box holds 12 pens.\n\n  3 boxes cost $4.50; what does one pen cost?"),
    ],
    [
        Turn("user", "def area(r):\n    return 3.14159 * r ** 2\n\nWhat does this compute?"),
        Turn("assistant", "The area of a circle of radius r."),
        Turn("user", "Und jetzt auf Deutsch, bitte: Größe, 面積, <b>fett</b>."),
    ],
)


class Probe(NamedTuple):
    """Token ids [T], and the positions whose logits are compared."""

    ids: list[int]
    at: list[int]


class Peer(NamedTuple):
    """What another library makes of an export: logits [len(at), V] a probe, token ids a chat."""

    logits: list[np.ndarray]
    chats: list[list[int]]


class Check(NamedTuple):
    """What the peer made of an export; `problem` says what is wrong with it, `gap` what no other
    library has looked at."""

    peer: str
    difference: float
    problem: str | None
    gap: str | None


def make_probes(tokenizer: Tokenizer, config: GemmaConfig) -> list[Probe]:
    """Three chats, all positions, and a text that leaves the sliding window behind, its end.

    That text is this file, English and code. A repetitive one makes both sides so sure of the next
    token that their rounding differs by 1.5e-3.
    """
    probes = [encode_prompt(tokenizer, chat)[: config.max_positions] for chat in _CHATS]
    found = [Probe(ids, list(range(len(ids)))) for ids in probes]
    window = config.sliding_window
    if window is not None and max(map(len, probes)) <= window <= _MAX_LONG_WINDOW:
        length = min(window + 2 * _NUM_LONG_POSITIONS, config.max_positions)
        text = Path(__file__).read_text(encoding="utf-8")
        ids = [tokenizer.bos_id, *tokenizer.encode(text)][:length]
        found.append(Probe(ids, list(range(length - _NUM_LONG_POSITIONS, length))))
    return found


def our_logits(model: Gemma, probes: Sequence[Probe]) -> list[np.ndarray]:
    """float32 [len(at), V] for each probe."""
    graphdef, state = nnx.split(model)
    results = []
    for ids, at in probes:
        padded = np.zeros((1, -(-len(ids) // _PAD) * _PAD), np.int32)
        padded[0, : len(ids)] = ids  # what is padded lies in the future, which no token sees
        hidden_TD = _hidden(graphdef, state, jnp.asarray(padded))[0]
        results.append(np.asarray(model.logits(hidden_TD[np.asarray(at)])))
    return results


@partial(jax.jit, static_argnums=0)
def _hidden(graphdef: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return nnx.merge(graphdef, state)(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))


def without_weights(config: GemmaConfig) -> Gemma:
    """A model to put an adapter into: its own weights are zeros that take no memory."""
    graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Gemma(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)
    model: Any = nnx.merge(graphdef, state)
    return model


def reference_logits(
    origin: Origin, merged_dtype: str, probes: Sequence[Probe]
) -> list[np.ndarray]:
    """`our_logits` of the base with the adapter beside it, in float32.

    Where weights are stored in less than float32, `merged_dtype`, the adapter is merged and all is
    rounded first. The whole model is in memory in float32: with Gemma 3 270M, 1.07 GB, the peak of
    the process went from 0.9 to 3.4 GiB.
    """
    model = load(origin, dtype="float32", param_dtype="float32").model
    if merged_dtype != "float32":
        merge_and_round(model, merged_dtype)
    return our_logits(model, probes)


def merge_and_round(model: Gemma, dtype: str) -> None:
    """Merges the adapter in float64 and rounds all weights to `dtype`, kept in float32; in place.

    Not `lora.merge`: its float32 sums would be rounded to the other neighbour in bfloat16 here and
    there.
    """
    for _, linear in list(nnx.iter_modules(model)):
        if isinstance(linear, Linear) and linear.lora is not None:
            a, b = (np.asarray(leaf[...], np.float64) for leaf in (linear.lora.a, linear.lora.b))
            kernel = np.array(linear.kernel[...])
            for layer in np.ndindex(kernel.shape[:-2]):  # float64 is twice as large: one at a time
                total = kernel[layer] + linear.lora.scale * (a[layer] @ b[layer])
                kernel[layer] = total.astype(jnp.dtype(dtype))
            linear.kernel[...] = jnp.asarray(kernel)
            linear.lora = nnx.data(None)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        variable[...] = variable[...].astype(dtype).astype(jnp.float32)


def peer_versions() -> dict[str, str]:
    """Versions of the libraries that check; ValueError where one is not installed."""
    try:
        return {name: importlib.metadata.version(name) for name in PEER_PACKAGES}
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing(str(error)) from None


def own_versions() -> dict[str, str]:
    """Versions of what made the export."""
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "numpy")}


def peer_logits(
    directory: Path, probes: Sequence[Probe], *, adapter: Path | None, chats: bool
) -> Peer:
    """What transformers computes for the model in `directory`, with PEFT's `adapter` if given.

    Raises ValueError where a library cannot be imported, MemoryError where its process has not
    enough, ChildProcessError, with what it said last, where it cannot load the export.
    """
    with TemporaryDirectory(prefix="jaxsft-export-") as scratch:
        given, result = Path(scratch, "probes.npz"), Path(scratch, "logits.npz")
        arrays: dict[str, Any] = {}
        for i, (ids, at) in enumerate(probes):
            arrays |= {f"ids_{i}": np.asarray(ids), f"at_{i}": np.asarray(at)}
        if chats:
            turns = [[turn._asdict() for turn in chat] for chat in _CHATS]
            arrays["chats"] = np.asarray(json.dumps(turns))
        with given.open("wb") as file:
            np.savez(file, **arrays)
        extra = [] if adapter is None else [str(adapter)]
        _run_worker(str(directory), str(given), str(result), *extra)
        with np.load(result) as found:
            logits = [found[f"logits_{i}"] for i in range(len(probes))]
            num_chats = len(_CHATS) if chats else 0
            return Peer(logits, [found[f"chat_{i}"].tolist() for i in range(num_chats)])


def max_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest absolute difference; infinite where shapes differ or a logit is not finite."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        worst = max(worst, float(np.abs(a - b).max()))
    return worst


def drift(peer: str, difference: float) -> str | None:
    """What is wrong with logits that differ so much, if anything."""
    if difference <= LOGIT_BOUND:
        return None
    return (
        f"the export drifts: {peer} computes logits {difference:.2e} apart from ours "
        f"(at most {LOGIT_BOUND:.0e})"
    )


def summary(check: Check) -> str:
    """What a person is told of an export that is not refused."""
    gap = f". NOT verified: {check.gap}" if check.gap else ""
    found = f"{check.difference:.1e} (at most {LOGIT_BOUND:.0e})"
    return f"; {check.peer} gives the same logits within {found}{gap}"


def chat_problem(tokenizer: Tokenizer, theirs: Sequence[Sequence[int]]) -> str | None:
    """What is wrong with the ids of the chats that the export's own tokenizer gave, if anything."""
    for chat, ids in zip(_CHATS, theirs, strict=True):
        if list(ids) != encode_prompt(tokenizer, chat):
            return f"the exported tokenizer has other ids for {chat[-1].content[:40]!r}"
    return None


def _missing(error: str) -> ValueError:
    return ValueError(
        f"the check of the export needs {', '.join(PEER_PACKAGES)} ({error}): "
        "pip install 'jaxsft[export]', or --no-verify to go without it"
    )


def _run_worker(*arguments: str) -> None:
    """Runs the worker, without a network; errors as in `peer_logits`."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    done = subprocess.run(
        # -P: modules beside the script are not to be found before installed ones.
        [sys.executable, "-P", str(_WORKER), *arguments],
        env=os.environ | offline,
        capture_output=True,
        text=True,
    )
    if done.returncode == -signal.SIGKILL:
        raise MemoryError("the other library's process was killed, as the system does")
    if done.returncode:
        line = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        if line.startswith(("ImportError", "ModuleNotFoundError")):
            raise _missing(line)
        if line.startswith("MemoryError") or "can't allocate memory" in line:  # NumPy's, torch's
            raise MemoryError(line)
        raise ChildProcessError(f"the other library cannot load the export: {line}")
