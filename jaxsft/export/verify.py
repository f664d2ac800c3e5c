"""Is an export the model that it was made from? The same prompts through another library.

Both sides compute in float32 with the weights as they are stored. Weights rounded to bfloat16 are
held to the same bound that way; with activations in bfloat16 as well the two libraries, which round
in other places, would be so far apart that a wrong tensor could hide.
"""

import contextlib
import ctypes
import gc
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsft.data.chat import encode_prompt
from jaxsft.data.rows import Turn
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.peers import Probe
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.layers import Linear
from jaxsft.gemma.model import Gemma
from jaxsft.weights.find import Origin, load

# Largest difference of two logits over all probes. Different orders of summation in float32
# gave 4e-4 on Gemma 3 270M, whose largest logit was 98.
LOGIT_BOUND = 2e-3
_PAD = 64  # lengths are rounded up to it, so that few programs are compiled
_MAX_LONG_WINDOW = 1024  # a probe that leaves a longer window would take minutes on a CPU
_NUM_LONG_POSITIONS = 32
CHATS = (
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
    probes = [encode_prompt(tokenizer, chat)[: config.max_positions] for chat in CHATS]
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


def reference_logits(origin: Origin, dtype: str, probes: Sequence[Probe]) -> list[np.ndarray]:
    """`our_logits` of the base with the adapter beside it, in float32.

    Where weights are stored in less than float32, `dtype`, the adapter is merged and all is rounded
    first. The whole model is in memory in float32 before that.
    """
    model = load(origin, dtype="float32", param_dtype="float32").model
    if dtype != "float32":
        merge_and_round(model, dtype)
        give_memory_back()
    return our_logits(model, probes)


def merge_and_round(model: Gemma, dtype: str) -> None:
    """Merges the adapter in float64 and rounds all weights to `dtype`; in place.

    Not `lora.merge`: its float32 sums would be rounded to the other neighbour in bfloat16 here and
    there. What is replaced is deleted at once: garbage collection came after a second copy of all.
    """
    for _, linear in list(nnx.iter_modules(model)):
        if isinstance(linear, Linear) and linear.lora is not None:
            a, b = (np.asarray(leaf[...], np.float64) for leaf in (linear.lora.a, linear.lora.b))
            kernel = np.asarray(linear.kernel[...])
            merged = np.empty(kernel.shape, jnp.dtype(dtype))
            for layer in np.ndindex(kernel.shape[:-2]):  # float64 is twice as large: one at a time
                merged[layer] = kernel[layer] + linear.lora.scale * (a[layer] @ b[layer])
            linear.kernel[...].delete()
            linear.kernel.set_value(jnp.asarray(merged))  # `[...] =` would keep float32
            linear.lora = nnx.data(None)
    for _, variable in nnx.to_flat_state(nnx.state(model)):
        exact = variable[...]
        if exact.dtype != dtype:
            variable.set_value(exact.astype(dtype).block_until_ready())
            exact.delete()


def give_memory_back() -> None:
    """Returns what is freed to the system: glibc keeps 0.7 GB of Gemma 3 270M."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


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
        f"the export drifts: logits of {peer} are {difference:.2e} apart from ours "
        f"(at most {LOGIT_BOUND:.0e})"
    )


def summary(check: Check) -> str:
    """What a person is told of an export that is not refused."""
    gap = f". NOT verified: {check.gap}" if check.gap else ""
    found = f"{check.difference:.1e} (at most {LOGIT_BOUND:.0e})"
    return f"; logits of {check.peer} are the same within {found}{gap}"


def chat_problem(
    tokenizer: Tokenizer, system_prompt: str | None, theirs: Sequence[Sequence[int]]
) -> str | None:
    """What is wrong with the ids of the chats that the export's own tokenizer gave, if anything.

    Chats without a system turn have `system_prompt` for one, if there is any.
    """
    default = [Turn("system", system_prompt)] if system_prompt else []
    chats = ([*(default if chat[0].role != "system" else ()), *chat] for chat in CHATS)
    ours = [encode_prompt(tokenizer, chat) for chat in chats]
    return _ids_problem([chat[-1].content for chat in CHATS], ours, theirs)


def text_problem(
    tokenizer: Tokenizer, texts: Sequence[str], theirs: Sequence[Sequence[int]]
) -> str | None:
    """As `chat_problem`, of plain texts."""
    return _ids_problem(texts, tokenizer.encode_many(texts), theirs)


def _ids_problem(
    texts: Sequence[str], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> str | None:
    for text, expected, ids in zip(texts, ours, theirs, strict=True):
        if list(ids) != list(expected):
            return f"the exported tokenizer has other ids for {text[:40]!r}"
    return None
