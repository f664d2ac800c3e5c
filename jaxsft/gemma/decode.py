"""Generation: jitted prefill, then jitted decoding with a KV cache, over batches of prompts.

Prompts are padded on their left, so that all rows of a batch write their new tokens into the same
slots of the cache, and to few lengths, so that batches share programs.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsft.config import EvalOptions
from jaxsft.gemma.attention import Tokens
from jaxsft.gemma.model import Gemma, KVCache
from jaxsft.gemma.sharding import constrain

MIN_PADDED_LENGTH = 32
# With one row a chip the TPU compiler leaves the matrix unit: by its estimate a token of Gemma 2 2B
# then takes 29 ms on each v5e of eight; for two rows it takes 14 ms, for eight 18 ms. Streamed from
# one v5e it takes 23 ms, and 16 ms beside a second row that nobody reads.
MIN_ROWS_PER_TPU = 2


class Generation(NamedTuple):
    """One answer. `stopped`: it ended by a stop token, which `ids` does not include."""

    ids: list[int]
    stopped: bool


class _Program(NamedTuple):
    """What is compiled in."""

    graphdef: nnx.GraphDef
    options: EvalOptions
    mesh: Mesh | None
    num_ids: int | None = None


class _Rows(NamedTuple):
    """What decoding knows of a batch's prompts, int32: how many tokens they have, and their places
    among all prompts, on which draws depend."""

    lengths_B: jax.Array
    numbers_B: jax.Array


class _Loop(NamedTuple):
    cache: KVCache
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
    num_ids: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
    mesh: Mesh | None = None,
) -> list[Generation]:
    """Answers `prompts` (token ids, BOS included), in their order; calls `on_batch` before each
    batch.

    The rows of a batch, `num_rows` of them, are split over the devices of `mesh`; with several
    processes all must call, and all get all answers. Prefill is compiled for each length that the
    longest prompts of the batches are padded to (32, 48, 64, 96, 128 … tokens), decoding for each
    power of two: 2 programs for prompts of up to 32 tokens, at most 14 for up to 512.

    `num_ids` is the tokenizer's: ids above, of rows that pad the embedding, are not drawn.

    The draw for prompt i depends on (options.seed, i) and the position alone, so neither batch size
    nor the other prompts change it.

    Raises:
      ValueError: a prompt is empty or, with max_new_tokens, beyond the model's positions.
    """
    program = _Program(graphdef, options, mesh, num_ids)
    limit = _max_positions(graphdef, adapter, frozen)
    for i, prompt in enumerate(prompts):
        _check_length(f"prompt {i}", prompt, options, limit)
    # Neighbours in length share a batch, and so little padding. The longest first: where memory
    # does not suffice for them, nothing has been answered in vain.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batch_size = generation_batch_size(options, len(order), mesh)
    stops = np.array(stop_ids, np.int32)
    answers: dict[int, Generation] = {}
    for low in range(0, len(order), batch_size):
        on_batch()
        indices = order[low : low + batch_size]
        # A short last batch is filled up by repeating its first prompt: no other shape to compile.
        padded_BT, rows = _pad(prompts, indices + [indices[0]] * (batch_size - len(indices)))
        token_B, cache = _prefill(adapter, frozen, padded_BT, rows, program)
        end = _decode(adapter, frozen, cache, token_B, rows, stops, program)
        out_BT, done_B = np.asarray(end.out_BT)[:, : int(end.num_drawn)], np.asarray(end.done_B)
        for i, ids, done in zip(indices, out_BT, done_B, strict=False):
            length = int(np.argmax(np.isin(ids, stop_ids))) if done else len(ids)
            answers[i] = Generation(ids[:length].tolist(), stopped=bool(done))
    return [answers[i] for i in range(len(prompts))]


def generation_batch_size(options: EvalOptions, num_prompts: int, mesh: Mesh | None) -> int:
    """Rows of a batch: as many for each device, and at least two for a TPU's."""
    num_devices = 1 if mesh is None else mesh.size
    rows_per_device = -(-min(options.batch_size, max(num_prompts, 1)) // num_devices)
    return num_devices * max(rows_per_device, MIN_ROWS_PER_TPU if _on_tpu(mesh) else 1)


def _on_tpu(mesh: Mesh | None) -> bool:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "tpu"


def stream(
    graphdef: nnx.GraphDef,
    adapter: nnx.State,
    frozen: nnx.State,
    prompt: Sequence[int],
    *,
    options: EvalOptions,
    stop_ids: Sequence[int],
    num_ids: int | None = None,
) -> Iterator[int]:
    """The tokens of `generate`'s answer to this prompt alone, as they come; programs and errors as
    there."""
    limit = _max_positions(graphdef, adapter, frozen)
    _check_length("the prompt", prompt, options, limit)
    program = _Program(graphdef, options, None, num_ids)
    padded_BT, rows = _pad([prompt], [0] * generation_batch_size(options, 1, None))
    token_B, cache = _prefill(adapter, frozen, padded_BT, rows, program)
    for n in range(1, options.max_new_tokens + 1):
        token = int(token_B[0])
        if token in stop_ids:
            return
        yield token
        if n < options.max_new_tokens:
            token_B, cache = _decode_one(adapter, frozen, cache, token_B, rows, n, program)


def _max_positions(graphdef: nnx.GraphDef, adapter: nnx.State, frozen: nnx.State) -> int:
    # Of shapes: modules refer to each other in cycles, and one with the arrays would hold on to
    # them until these are collected, 4.9 GiB of Gemma 2 2B beside the next train step.
    shapes = jax.tree.map(jax.typeof, (adapter, frozen))
    return nnx.merge(graphdef, *shapes).config.max_positions


def _check_length(what: str, prompt: Sequence[int], options: EvalOptions, limit: int) -> None:
    if not prompt or len(prompt) + options.max_new_tokens > limit:
        raise ValueError(
            f"{what} has {len(prompt)} tokens; it needs at least 1 and, with "
            f"max_new_tokens {options.max_new_tokens}, at most {limit}"
        )


def _pad(prompts: Sequence[Sequence[int]], numbers: Sequence[int]) -> tuple[Any, _Rows]:
    """The prompts with these numbers, padded on their left: int32 [B, T]; and their rows."""
    lengths = [len(prompts[i]) for i in numbers]
    length = _padded_length(max(lengths))
    padded = [[0] * (length - len(prompts[i])) + list(prompts[i]) for i in numbers]
    # NumPy's arrays, which are no process's own: several may share a mesh.
    arrays: list[Any] = [np.array(each, np.int32) for each in (padded, lengths, numbers)]
    return arrays[0], _Rows(*arrays[1:])


def _padded_length(length: int) -> int:
    """The next power of two, or three quarters of it: what is more would be computed in vain."""
    power = _power_of_two(length)
    less = power * 3 // 4
    return less if MIN_PADDED_LENGTH < length <= less else power


def _power_of_two(length: int) -> int:
    return max(MIN_PADDED_LENGTH, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnames="program")
def _prefill(
    adapter: nnx.State, frozen: nnx.State, padded_BT: jax.Array, rows: _Rows, program: _Program
) -> tuple[jax.Array, KVCache]:
    """The first token of each row's answer [B], and the cache with the prompts."""
    model = _model(adapter, frozen, program)
    batch, length = padded_BT.shape
    positions_BT = jnp.arange(length) - length + rows.lengths_B[:, None]
    where = Tokens(jnp.maximum(positions_BT, 0), (positions_BT >= 0).astype(jnp.int32))
    # One program decodes after prompts of either length. The last token is drawn, but never read.
    num_slots = _power_of_two(length) + program.options.max_new_tokens - 1
    cache = model.init_cache(batch, num_slots, mesh=program.mesh)
    hidden_BTD, cache = model.with_cache(padded_BT, where, cache, mesh=program.mesh)
    return _draw(model, hidden_BTD[:, -1], rows, 0, program), cache


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _decode(
    adapter: nnx.State,
    frozen: nnx.State,
    cache: KVCache,
    token_B: jax.Array,
    rows: _Rows,
    stop_ids: jax.Array,
    program: _Program,
) -> _Loop:
    """Draws until all rows stop."""
    model = _model(adapter, frozen, program)

    def draw_one(loop: _Loop) -> _Loop:
        n, last_B = loop.num_drawn, loop.out_BT[:, loop.num_drawn - 1]
        token_B, cache = _step(model, loop.cache, last_B, rows, n, program)
        done_B = loop.done_B | jnp.isin(token_B, stop_ids)
        return _Loop(cache, loop.out_BT.at[:, n].set(token_B), n + 1, done_B)

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.num_drawn < program.options.max_new_tokens) & ~jnp.all(loop.done_B)

    out_BT = jnp.zeros((len(token_B), program.options.max_new_tokens), jnp.int32)
    start = _Loop(cache, out_BT.at[:, 0].set(token_B), jnp.int32(1), jnp.isin(token_B, stop_ids))
    end = jax.lax.while_loop(unfinished, draw_one, start)
    # Whole on every device, so on every process.
    return end._replace(
        out_BT=constrain(end.out_BT, program.mesh, None, None),
        done_B=constrain(end.done_B, program.mesh, None),
    )


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _decode_one(
    adapter: nnx.State,
    frozen: nnx.State,
    cache: KVCache,
    token_B: jax.Array,
    rows: _Rows,
    n: int,
    program: _Program,
) -> tuple[jax.Array, KVCache]:
    model = _model(adapter, frozen, program)
    return _step(model, cache, token_B, rows, n, program)


def _model(adapter: nnx.State, frozen: nnx.State, program: _Program) -> Gemma:
    """With the whole adapter on every device: shards, as in training, would be gathered for every
    token, and all that is computed with them exchanged."""
    whole = jax.tree.map(lambda x: constrain(x, program.mesh, *[None] * x.ndim), adapter)
    return nnx.merge(program.graphdef, whole, frozen)


def _step(
    model: Gemma,
    cache: KVCache,
    token_B: jax.Array,
    rows: _Rows,
    n: jax.Array | int,
    program: _Program,
) -> tuple[jax.Array, KVCache]:
    """Token n of each row's answer after token n - 1."""
    where = Tokens((rows.lengths_B + n - 1)[:, None], jnp.ones_like(token_B)[:, None])
    hidden_BTD, cache = model.with_cache(token_B[:, None], where, cache, mesh=program.mesh)
    return _draw(model, hidden_BTD[:, 0], rows, n, program), cache


def _draw(
    model: Gemma, hidden_BD: jax.Array, rows: _Rows, n: jax.Array | int, program: _Program
) -> jax.Array:
    def key(number: jax.Array) -> jax.Array:
        return jax.random.fold_in(
            jax.random.fold_in(jax.random.key(program.options.seed), number), n
        )

    keys_B = jax.vmap(key)(rows.numbers_B)
    logits_BV = model.logits(hidden_BD)[:, : program.num_ids]
    return sample_token(logits_BV, keys_B, program.options)


def sample_token(logits_BV: jax.Array, keys_B: jax.Array, options: EvalOptions) -> jax.Array:
    """int32 [B]: argmax at temperature 0 or top_k 1, else a draw: temperature, top-k, top-p."""
    if options.temperature == 0 or options.top_k == 1:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits = logits_BV / options.temperature
    draw = jax.vmap(jax.random.categorical)
    if not options.top_k and options.top_p >= 1:
        return draw(keys_B, logits).astype(jnp.int32)
    num_tokens = logits.shape[-1]
    best, ids = jax.lax.top_k(logits, min(options.top_k or num_tokens, num_tokens))  # descending
    # Keep a token when the likelier ones alone do not reach top_p yet.
    probs = jax.nn.softmax(best, axis=-1)
    kept = jnp.cumsum(probs, axis=-1) - probs < options.top_p
    drawn = draw(keys_B, jnp.where(kept, best, -jnp.inf))
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]
