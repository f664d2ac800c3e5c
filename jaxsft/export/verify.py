"""Checks an export: another library must compute the same logits on the same prompts.

Both libraries compute in float32 with the weights as stored, so the same bound holds for weights in
bfloat16. With activations in bfloat16 the libraries would round in different places and differ so
much that a wrong tensor could stay unseen.

The reference does not read the export. It is the base in our model with the adapter injected as in
training; for weights below float32 the adapter is merged in the model's tree. The export is written
by `MergedWeights`, by the names of tensors in files. So the check finds a wrong name, a transposed
or missing update and a wrong scale. Both sides share the readers of base and adapter and the
arithmetic of one merged matrix; tests compare those with PEFT.
"""

import contextlib
import ctypes
import dataclasses
import gc
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import cycle, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from jaxsft.common.files import read_json
from jaxsft.data.chat import encode_prompt
from jaxsft.data.rows import Turn
from jaxsft.data.tokenizer import Tokenizer
from jaxsft.export.formats import (
    FLAX_MODEL,
    TUNIX_LORA,
    Export,
    base_for_peer,
)
from jaxsft.export.hostile import hostile_texts, sentencepiece_texts
from jaxsft.export.options import ExportOptions
from jaxsft.export.peers import TRANSFORMERS, TUNIX, Peer, Probe, ask, find_peer
from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig
from jaxsft.gemma.lora import lora_scale
from jaxsft.gemma.model import Gemma
from jaxsft.weights.adapter_config import AdapterConfig, adapter_tensors
from jaxsft.weights.find import Origin, load
from jaxsft.weights.load import load_model
from jaxsft.weights.merged import merge_in_memory
from jaxsft.weights.names import LINEAR_TENSORS

# Largest allowed difference of two logits. The order of summation in float32 gave 4e-4 on
# Gemma 3 270M, whose largest logit was 98.
LOGIT_BOUND = 2e-3
_PAD = 64  # lengths are rounded up to a multiple of it, so that few programs are compiled
_MAX_LONG_WINDOW = 1024  # a probe beyond a longer window would take minutes on a CPU
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
_TUNIX_TARGETS = {
    "qkv_einsum": ("q_proj", "k_proj", "v_proj"),
    "q_einsum": ("q_proj",),
    "kv_einsum": ("k_proj", "v_proj"),
    "attn_vec_einsum": ("o_proj",),
}


class ExportCheck(NamedTuple):
    """The result of a check: `problem` is an error in the export, `gap` what no other library has
    checked; both are None if there is none."""

    peer: str
    difference: float
    problem: str | None
    gap: str | None


def find_checker(options: ExportOptions, config: GemmaConfig) -> tuple[Peer | None, str | None]:
    """(the library that will check the export; None, or why there is no library).

    Only a flax export can do without: otherwise, or if the options name the library's Python, a
    missing library is a ValueError.
    """
    if options.format != "flax":
        return find_peer(TRANSFORMERS, options.peer_python), None
    if lacks := tunix_lacks(config):
        return None, f"Tunix has no {lacks}"
    try:
        return find_peer(TUNIX, options.peer_python), None
    except ValueError:
        if options.peer_python is not None:
            raise
        return None, "Tunix is not installed here; --peer_python names a Python that has it"


def verify_export(
    directory: Path, made: Export, peer: Peer | None, gap: str | None, scratch: Path
) -> ExportCheck:
    """Compares the export, loaded by another library, with the model that it was made from.

    `peer` and `gap` come from `find_checker`; `scratch` is a directory for temporary files.
    """
    probes = make_probes(made.tokenizer, made.info.config)
    if peer is None:
        return _read_again(directory, made, probes, gap)
    if made.options.format == "flax":
        return _verify_flax(directory, made, probes, peer, scratch)
    dtype = "float32" if made.options.format == "peft" else made.options.dtype
    ours = reference_logits(made.origin, dtype, probes)
    give_memory_back()
    hostile = hostile_texts(made.tokenizer)
    pieces = [made.tokenizer.piece(i) for i in range(made.tokenizer.vocab_size)]
    settings = {
        "chats": [[turn._asdict() for turn in chat] for chat in CHATS],
        "texts": hostile.plain,
        "lookalikes": hostile.lookalikes,
        "pieces": pieces,
    }
    if made.options.format == "merged":
        name = peer.library.name
        found = ask(peer, directory, probes, scratch=scratch, settings=settings)
    else:
        name = f"{peer.library.name} and PEFT"
        with base_for_peer(made, scratch) as base:
            found = ask(peer, base, probes, scratch=scratch, adapter=directory, settings=settings)
    difference = max_difference(ours, found.logits)
    # A chat without a system turn gets the training's, if there was one.
    system = [Turn("system", made.system_prompt)] if made.system_prompt else []
    chats = [[*(system if chat[0].role != "system" else ()), *chat] for chat in CHATS]
    ids = [encode_prompt(made.tokenizer, chat) for chat in chats]
    texts = [*hostile.plain, *hostile.lookalikes]
    ids += made.tokenizer.encode_many(texts)
    shown = [*(chat[-1].content for chat in CHATS), *texts]
    problem = ids_problem(shown, ids, found.ids[:-1]) or pieces_problem(pieces, found.ids[-1])
    return ExportCheck(name, difference, drift(name, difference) or problem, None)


def _verify_flax(
    directory: Path, made: Export, probes: list[Probe], peer: Peer, scratch: Path
) -> ExportCheck:
    """Has Tunix load model/ and then, as its notebooks do, the base with tunix-lora/."""
    name, options = peer.library.name, made.options
    settings = {"config": dataclasses.asdict(made.info.config), "texts": []}
    texts = [turn.content for chat in CHATS for turn in chat]
    texts += sentencepiece_texts(made.tokenizer)
    ours = reference_logits(made.origin, options.dtype, probes)
    give_memory_back()
    model = directory / FLAX_MODEL
    found = ask(peer, model, probes, scratch=scratch, settings=settings | {"texts": texts})
    difference = max_difference(ours, found.logits)
    problem = drift(f"{name}, from {FLAX_MODEL}/,", difference)
    problem = problem or ids_problem(texts, made.tokenizer.encode_many(texts), found.ids)
    if made.adapter is not None and problem is None:
        if options.dtype != "float32":
            ours = reference_logits(made.origin, "float32", probes)
            give_memory_back()
        settings |= {"lora": read_json(directory / f"{TUNIX_LORA}.json")}
        with base_for_peer(made, scratch) as base:
            lora = directory / TUNIX_LORA
            found = ask(peer, base, probes, scratch=scratch, adapter=lora, settings=settings)
        of_lora = max_difference(ours, found.logits)
        problem = drift(f"{name}, from the base and {TUNIX_LORA}/,", of_lora)
        difference = max(difference, of_lora)
    problem = problem or flax_problem(directory, made.tokenizer, made.origin.adapter, made.adapter)
    return ExportCheck(name, difference, problem, None)


def _read_again(directory: Path, made: Export, probes: list[Probe], gap: str | None) -> ExportCheck:
    """Checks a Flax export with jaxsft's own reader, if Tunix cannot check it."""
    ours = reference_logits(made.origin, made.options.dtype, probes)
    give_memory_back()
    model, _ = load_model(directory / FLAX_MODEL, dtype="float32", param_dtype="float32")
    difference = max_difference(ours, our_logits(model, probes))
    name = "jaxsft's own reader"
    problem = drift(name, difference) or flax_problem(
        directory, made.tokenizer, made.origin.adapter, made.adapter
    )
    parts = f"{FLAX_MODEL}/, {TUNIX_LORA}/ and" if made.adapter else f"{FLAX_MODEL}/ and"
    why = f"{parts} tokenizer.model were read by jaxsft alone, not by Tunix: {gap}"
    return ExportCheck(name, difference, problem, why)


def make_probes(tokenizer: Tokenizer, config: GemmaConfig) -> list[Probe]:
    """Three chats at all positions, and a text longer than the sliding window at its last ones.

    The text is this file: English and code. On a repetitive text both sides are so sure of the next
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
    """float32 logits [len(at), V] of each probe."""
    graphdef, state = nnx.split(model)
    results = []
    for ids, at in probes:
        padded = np.zeros((1, -(-len(ids) // _PAD) * _PAD), np.int32)
        padded[0, : len(ids)] = ids  # padding is at the end, where no token attends to it
        hidden_TD = _hidden(graphdef, state, jnp.asarray(padded))[0]
        results.append(np.asarray(model.logits(hidden_TD[np.asarray(at)])))
    return results


@partial(jax.jit, static_argnums=0)
def _hidden(graphdef: nnx.GraphDef, state: nnx.State, tokens_BT: jax.Array) -> jax.Array:
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return nnx.merge(graphdef, state)(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))


def reference_logits(origin: Origin, dtype: str, probes: Sequence[Probe]) -> list[np.ndarray]:
    """`our_logits` in float32 of the base with its adapter.

    If `dtype` is below float32, the adapter is merged and all weights are rounded to it first. The
    whole model is in memory in float32 before that.
    """
    model = load(origin, dtype="float32", param_dtype="float32").model
    if dtype != "float32":
        merge_in_memory(model, dtype)
        give_memory_back()
    return our_logits(model, probes)


def give_memory_back() -> None:
    """Returns freed memory to the system: glibc keeps 0.7 GB of Gemma 3 270M."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def max_difference(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """The largest absolute difference; infinite if shapes differ or a logit is not finite."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
            return float("inf")
        worst = max(worst, float(np.abs(a - b).max()))
    return worst


def drift(peer: str, difference: float) -> str | None:
    """The problem of logits that differ by more than the bound, otherwise None."""
    if difference <= LOGIT_BOUND:
        return None
    return (
        f"the export drifts: logits of {peer} are {difference:.2e} apart from ours "
        f"(at most {LOGIT_BOUND:.0e})"
    )


def summary(check: ExportCheck) -> str:
    """The result of a passed check, for the console."""
    gap = f". NOT verified: {check.gap}" if check.gap else ""
    found = f"{check.difference:.1e} (at most {LOGIT_BOUND:.0e})"
    return f"; logits of {check.peer} are the same within {found}{gap}"


def ids_problem(
    texts: Sequence[str], ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]
) -> str | None:
    """The first text for which the export's own tokenizer gave other ids, as a problem."""
    for text, expected, ids in zip(texts, ours, theirs, strict=True):
        if list(ids) != list(expected):
            pairs = zip_longest(expected, ids)
            at = next(at for at, pair in enumerate(pairs) if pair[0] != pair[1])
            return (
                f"the exported tokenizer has other ids for {text[:40]!r}: at {at} "
                f"{list(ids[at : at + 4])}, and not {list(expected[at : at + 4])}"
            )
    return None


def pieces_problem(pieces: Sequence[str], ids: Sequence[int]) -> str | None:
    """The first token that the export's own tokenizer lacks or has moved, as a problem."""
    for i, (piece, found) in enumerate(zip(pieces, ids, strict=True)):
        if found != i:
            return f"the exported tokenizer has {piece[:40]!r} at {found}, and not at {i}"
    return None


def tunix_lacks(config: GemmaConfig) -> str | None:
    """Settings of `config` that differ from the constants in Tunix's code, None if none does."""
    fixed: dict[str, Any] = {"query_scale": config.head_dim**-0.5, "rms_norm_eps": 1e-6}
    if config.qk_norm:
        pattern = cycle([LOCAL] * 5 + [GLOBAL])
        fixed |= {"layer_types": tuple(islice(pattern, config.num_layers))}
        fixed |= {"attn_softcap": None, "final_softcap": None}
    else:
        fixed |= {"rope_theta_local": 10_000.0, "rope_theta_global": 10_000.0}
    other = {name: value for name, value in fixed.items() if getattr(config, name) != value}
    return ", ".join(f"{name} other than {value}" for name, value in other.items()) or None


def flax_problem(
    directory: Path,
    tokenizer: Tokenizer,
    adapter: Path | None,
    adapter_config: AdapterConfig | None,
) -> str | None:
    """The problem of the files beside the model of a Flax export, None if there is none."""
    written = (directory / "tokenizer.model").read_bytes()
    if hashlib.sha256(written).digest() != hashlib.sha256(tokenizer.model_bytes).digest():
        return "tokenizer.model is not what was written"
    if adapter is None or adapter_config is None:
        return None
    settings = read_json(directory / f"{TUNIX_LORA}.json")
    return _tunix_problem(directory / TUNIX_LORA, settings, adapter, adapter_config)


def _tunix_problem(
    directory: Path, settings: Mapping[str, Any], adapter: Path, config: AdapterConfig
) -> str | None:
    """The problem of a checkpoint of `write_tunix_lora`, read by Orbax; None if there is none.

    `settings` are its `rank` and `alpha`. For random rows x, x·A·B must be that of the PEFT
    directory `adapter`.
    """
    source = adapter_tensors(adapter)
    our_scale = lora_scale(config.rank, config.alpha, config.use_rslora)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        layers = checkpointer.restore((directory / "0" / "model_params").absolute())["layers"]
    rng = np.random.default_rng(0)
    names = {tensor.tree[1]: tensor.hf for tensor in LINEAR_TENSORS}
    compared = 0
    for layer, block in layers.items():
        for module, leaves in {**block.get("attn", {}), **block.get("mlp", {})}.items():
            targets = _TUNIX_TARGETS.get(module, (module,))
            found = {name[-1]: np.asarray(leaf["value"], float) for name, leaf in leaves.items()}
            a = found["a"].reshape(-1, settings["rank"])
            b = found["b"].reshape(settings["rank"], len(targets), -1)
            x = rng.standard_normal((2, len(a)))
            theirs = settings["alpha"] / settings["rank"] * np.einsum("xi,ir,rto->txo", x, a, b)
            for target, each in zip(targets, theirs, strict=True):
                key = f"base_model.model.model.layers.{layer}.{names[target]}.lora_{{}}.weight"
                ours = np.zeros_like(each)
                if target in config.targets:
                    pair = (
                        np.concatenate([rows for _, rows in source.blocks(key.format(ab))])
                        for ab in "AB"
                    )
                    ours = our_scale * np.linalg.multi_dot([x, *(m.T.astype(float) for m in pair)])
                    compared += 1
                if not np.allclose(each, ours, rtol=1e-6, atol=1e-9):
                    return f"{directory.name}/ has another update for {target} of layer {layer}"
    missing = len(source.shapes) // 2 - compared
    return f"{directory.name}/ lacks {missing} of the adapter's matrices" if missing else None
