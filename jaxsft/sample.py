"""Generation: jitted prefill, then jitted decoding with a KV cache, over batches of prompts.

Prompts are right-padded to a power of two, so that a shape bucket compiles once; every row decodes
from its own position, and padding is overwritten before any token can see it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsft.config import EvalOptions
from jaxsft.model import KVCache

MIN_PROMPT_BUCKET = 32


class Generation(NamedTuple):
    """One answer. `stopped`: it ended by a stop token, which `ids` does not include."""

    ids: list[int]
    stopped: bool


class _Loop(NamedTuple):
    cache: KVCache
    logits_BV: jax.Array  # of the token to draw next
    out_BT: jax.Array  # int32, the tokens drawn so far
    num_drawn: jax.Array  # int32 scalar
    done_B: jax.Array  # bool


def generate(
    graphdef: nnx.GraphDef,
    adapter: nnx.State,
    frozen: nnx.State,
    prompts: Sequence[Sequence[int]],
    *,
    options: EvalOptions,
    stop_ids: Sequence[int],
    on_batch: Callable[[], None] = lambda: None,
) -> list[Generation]:
    """Answers `prompts` (token ids, BOS included), in their order; calls `on_batch` before each
    batch.

    The draw for prompt i depends on (options.seed, i) and the position alone, so neither batch size
    nor the other prompts change it.

    Raises:
      ValueError: a prompt is empty or, with max_new_tokens, beyond the model's positions.
    """
    model = nnx.merge(graphdef, adapter, frozen)
    limit = model.config.max_positions
    for i, prompt in enumerate(prompts):
        if not prompt or len(prompt) + options.max_new_tokens > limit:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens; it needs at least 1 and, with "
                f"max_new_tokens {options.max_new_tokens}, at most {limit}"
            )
    # Neighbours in length share a batch, and so a small bucket.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Generation] = {}
    for low in range(0, len(order), options.batch_size):
        on_batch()
        indices = order[low : low + options.batch_size]
        # A short last batch is filled up by repeating its first prompt: no other shape to compile.
        rows = indices + [indices[0]] * (options.batch_size - len(indices))
        lengths = np.array([len(prompts[i]) for i in rows], np.int32)
        bucket = max(MIN_PROMPT_BUCKET, 1 << int(lengths.max() - 1).bit_length())
        tokens = np.zeros((len(rows), bucket), np.int32)
        for row, i in enumerate(rows):
            tokens[row, : lengths[row]] = prompts[i]
        num_slots = bucket + options.max_new_tokens
        logits, cache = _prefill(adapter, frozen, tokens, lengths, graphdef, num_slots)
        out, num_drawn, done = _decode(
            adapter,
            frozen,
            cache,
            logits,
            lengths,
            np.array(rows, np.int32),
            graphdef,
            tuple(stop_ids),
            options,
        )
        for row, i in enumerate(indices):
            answers[i] = _finish(np.asarray(out)[row, : int(num_drawn)], bool(done[row]), stop_ids)
    return [answers[i] for i in range(len(prompts))]


def _finish(ids: np.ndarray, done: bool, stop_ids: Sequence[int]) -> Generation:
    if not done:
        return Generation(ids.tolist(), stopped=False)
    end = int(np.argmax(np.isin(ids, stop_ids)))
    return Generation(ids[:end].tolist(), stopped=True)


@partial(jax.jit, static_argnums=(4, 5))
def _prefill(
    adapter: nnx.State,
    frozen: nnx.State,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    graphdef: nnx.GraphDef,
    num_slots: int,
) -> tuple[jax.Array, KVCache]:
    """Logits [B, V] after each row's last prompt token, and the filled cache."""
    model = nnx.merge(graphdef, adapter, frozen)
    batch, length = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    cache = model.init_cache(batch, num_slots)
    hidden_BTD, cache = model.with_cache(tokens_BT, positions_BT, cache)
    last = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return model.logits(last), cache


@partial(jax.jit, static_argnums=(6, 7, 8))
def _decode(
    adapter: nnx.State,
    frozen: nnx.State,
    cache: KVCache,
    logits_BV: jax.Array,
    lengths_B: jax.Array,
    prompt_ids_B: jax.Array,
    graphdef: nnx.GraphDef,
    stop_ids: tuple[int, ...],
    options: EvalOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws until all rows stop: (tokens [B, max_new_tokens], number drawn, stopped [B])."""
    model = nnx.merge(graphdef, adapter, frozen)
    batch = logits_BV.shape[0]
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(options.seed), i))(prompt_ids_B)

    def draw_one(loop: _Loop) -> _Loop:
        n = loop.num_drawn
        step_keys = jax.vmap(lambda key: jax.random.fold_in(key, n))(keys)
        token_B = sample_token(loop.logits_BV, step_keys, options)
        out_BT = loop.out_BT.at[:, n].set(token_B)
        done_B = loop.done_B | jnp.isin(token_B, jnp.array(stop_ids))
        positions_BT = (lengths_B + n)[:, None]
        hidden, cache = model.with_cache(token_B[:, None], positions_BT, loop.cache)
        return _Loop(cache, model.logits(hidden[:, 0]), out_BT, n + 1, done_B)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.num_drawn < options.max_new_tokens) & ~jnp.all(loop.done_B)

    out = jnp.zeros((batch, options.max_new_tokens), jnp.int32)
    start = _Loop(cache, logits_BV, out, jnp.int32(0), jnp.zeros((batch,), bool))
    end = jax.lax.while_loop(unfinished, draw_one, start)
    return end.out_BT, end.num_drawn, end.done_B


def sample_token(logits_BV: jax.Array, keys_B: jax.Array, options: EvalOptions) -> jax.Array:
    """int32 [B]: argmax at temperature 0 or top_k 1, else a draw: temperature, top-k, top-p."""
    if options.temperature == 0 or options.top_k == 1:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits = logits_BV / options.temperature
    if options.top_k:
        kth = jax.lax.top_k(logits, options.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if options.top_p < 1:
        # Keep a token when the likelier ones alone do not reach top_p yet.
        descending = -jnp.sort(-logits, axis=-1)
        probs = jax.nn.softmax(descending, axis=-1)
        kept = jnp.cumsum(probs, axis=-1) - probs < options.top_p
        lowest = jnp.min(jnp.where(kept, descending, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < lowest, -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys_B, logits).astype(jnp.int32)
