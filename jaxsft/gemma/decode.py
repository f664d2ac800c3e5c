"""Generation: jitted prefill, then jitted decoding with a KV cache, over batches of prompts.

Prompts are padded on their left, so that all rows of a batch write their new tokens into the same
slots of the cache. They are padded to few lengths, so that batches share programs.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxsft.gemma.attention import Tokens
from jaxsft.gemma.model import Gemma, KVCache, repeat_rows
from jaxsft.gemma.sharding import constrain

MIN_PADDED_LENGTH = 32
# With one row a chip the TPU compiler does not use the matrix unit: by its estimate a token of
# Gemma 2 2B then takes 29 ms on each v5e of eight; for two rows it takes 14 ms, for eight 18 ms. On
# one v5e a streamed answer takes 23 ms a token, and 16 ms beside a second row that nobody reads.
MIN_ROWS_PER_TPU = 2
_BLOCK_IDS = 512


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """How answers are drawn. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 keep all tokens.

    The fields are those of `config.EvalOptions` of the same names, which has the users' defaults.
    """

    batch_size: int  # over all devices
    max_new_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    @classmethod
    def from_fields(cls, options: Any) -> "SamplingOptions":
        """From any object that has these fields."""
        return cls(
            **{field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}
        )


class Generation(NamedTuple):
    """One answer: its tokens, and the stop token that ended it (None: the length limit did).

    `log_probs` has one value, in nats, for each of `ids` and one more for the stop token. It is the
    log-probability of the token under softmax(logits / temperature) over the whole vocabulary,
    before top-k and top-p; temperature 0 counts as 1. At temperature 1 it is therefore
    what a trainer computes for the same token: its softmax, too, is over all rows of the embedding
    and knows no top-k.
    """

    ids: list[int]
    stop_id: int | None
    log_probs: list[float]

    @property
    def stopped(self) -> bool:
        """Whether the answer ended by a stop token."""
        return self.stop_id is not None


# What makes the model from (adapter, frozen weights): its graphdef. For frozen weights in another
# form it is a function with the model's `config` that returns an object with Gemma's methods
# `init_cache`, `with_cache` and `logits`; hashable, as it is a static argument of the programs.
ModelBuilder = nnx.GraphDef | Any


class _Program(NamedTuple):
    """The static arguments of the compiled programs."""

    builder: ModelBuilder
    options: SamplingOptions
    mesh: Mesh | None = None
    num_ids: int | None = None


class _Rows(NamedTuple):
    """A batch's rows: the lengths of their prompts in tokens, and what their draws depend on."""

    lengths_B: jax.Array  # int32
    numbers_B: jax.Array  # int32, each row's number among all rows
    key_data: jax.Array  # an argument, so that another key compiles nothing


class _Drawn(NamedTuple):
    """A token for each row, and its log-probability."""

    token_B: jax.Array
    log_prob_B: jax.Array


class _Loop(NamedTuple):
    cache: KVCache
    out_BT: jax.Array  # int32, the tokens drawn so far
    log_probs_BT: jax.Array  # float32
    num_drawn: jax.Array  # int32 scalar
    done_B: jax.Array  # bool


def generate(
    builder: ModelBuilder,
    adapter: nnx.State,
    frozen: Any,
    prompts: Sequence[Sequence[int]],
    *,
    options: SamplingOptions,
    stop_ids: Sequence[int],
    num_ids: int | None = None,
    group_size: int = 1,
    key: jax.Array | None = None,
    on_batch: Callable[[], None] = lambda: None,
    mesh: Mesh | None = None,
) -> list[Generation]:
    """Answers `prompts` (token ids, BOS included), in their order, each `group_size` times.

    A prompt's answers share one prefill and stand side by side: answer g of prompt i has the row
    number i · group_size + g. A batch holds whole groups, at least
    one, and its rows are split over the devices of `mesh`. With several processes all must call,
    and all get all answers. Prefill is compiled for each length that the longest prompts of the
    batches are padded to (32, 48, 64, 96, 128 … tokens), decoding for each power of two: 2 programs
    for prompts of up to 32 tokens, at most 14 for up to 512.

    The noise of a draw depends on the key, the row number and the position alone, so neither batch
    size nor the other prompts change it. Batches of other shapes may round logits otherwise: it
    takes two tokens whose scores with the noise are equal to the last bits to make that seen.

    Args:
      builder: the model's graphdef, or as `ModelBuilder` says.
      num_ids: the tokenizer's. Higher ids, whose rows pad the embedding, are not drawn.
      key: of the draws; without it `jax.random.key(options.seed)`. No key compiles anything anew.
      on_batch: is called before each batch and may raise.

    Raises:
      ValueError: a prompt is empty or, with max_new_tokens, beyond the model's positions.
    """
    program = _program(builder, options, mesh, num_ids)
    limit = _max_positions(builder, adapter, frozen)
    for i, prompt in enumerate(prompts):
        _check_length(f"prompt {i}", prompt, options, limit)
    key = jax.random.key(options.seed) if key is None else key
    # Neighbours in length share a batch, which saves padding. The longest come first: if memory
    # does not suffice for them, no work is lost.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batch_size = generation_batch_size(options, len(order), mesh, group_size)
    num_groups = batch_size // group_size
    stops = np.array(stop_ids, np.int32)
    answers: dict[int, Generation] = {}
    for low in range(0, len(order), num_groups):
        on_batch()
        indices = order[low : low + num_groups]
        # A short last batch repeats its first prompt, so that it has the shape of the others.
        filled = indices + [indices[0]] * (num_groups - len(indices))
        padded_PT, rows = _pad(prompts, filled, key, group_size, mesh)
        drawn, cache = _prefill(adapter, frozen, padded_PT, rows, program)
        end = _decode(adapter, frozen, cache, drawn, rows, stops, program)
        num_drawn, done_B = int(end.num_drawn), np.asarray(end.done_B)
        out_BT, log_probs_BT = np.asarray(end.out_BT), np.asarray(end.log_probs_BT)
        for row, number in enumerate(rows.numbers_B[: len(indices) * group_size].tolist()):
            ids, log_probs = out_BT[row, :num_drawn], log_probs_BT[row, :num_drawn]
            stop_id = None
            if done_B[row]:
                length = int(np.argmax(np.isin(ids, stop_ids)))
                stop_id, log_probs, ids = int(ids[length]), log_probs[: length + 1], ids[:length]
            answers[number] = Generation(ids.tolist(), stop_id, log_probs.tolist())
    return [answers[number] for number in range(len(prompts) * group_size)]


def generation_batch_size(
    options: SamplingOptions, num_prompts: int, mesh: Mesh | None, group_size: int = 1
) -> int:
    """Rows of a batch: whole groups, equally many rows for each device, at least two for each TPU.

    `options.batch_size` is exceeded where these ask for more.
    """
    num_devices = 1 if mesh is None else mesh.size
    min_rows = num_devices * (MIN_ROWS_PER_TPU if _on_tpu(mesh) else 1)
    num_groups = min(max(options.batch_size // group_size, 1), max(num_prompts, 1))
    num_groups = max(num_groups, -(-min_rows // group_size))
    multiple = num_devices // math.gcd(num_devices, group_size)
    return -(-num_groups // multiple) * multiple * group_size


def _on_tpu(mesh: Mesh | None) -> bool:
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    return device.platform == "tpu"


def stream(
    builder: ModelBuilder,
    adapter: nnx.State,
    frozen: Any,
    prompt: Sequence[int],
    *,
    options: SamplingOptions,
    stop_ids: Sequence[int],
    num_ids: int | None = None,
) -> Iterator[int]:
    """Yields the tokens of `generate`'s answer to this prompt alone as they are drawn.

    Arguments, programs and errors as there.
    """
    limit = _max_positions(builder, adapter, frozen)
    _check_length("the prompt", prompt, options, limit)
    program = _program(builder, options, None, num_ids)
    indices = [0] * generation_batch_size(options, 1, None)
    padded_PT, rows = _pad([prompt], indices, jax.random.key(options.seed))
    drawn, cache = _prefill(adapter, frozen, padded_PT, rows, program)
    for n in range(1, options.max_new_tokens + 1):
        token = int(drawn.token_B[0])
        if token in stop_ids:
            return
        yield token
        if n < options.max_new_tokens:
            drawn, cache = _decode_one(adapter, frozen, cache, drawn.token_B, rows, n, program)


def _program(
    builder: ModelBuilder,
    options: SamplingOptions,
    mesh: Mesh | None,
    num_ids: int | None,
) -> _Program:
    # Neither the seed nor the batch size is compiled in.
    return _Program(builder, dataclasses.replace(options, seed=0, batch_size=0), mesh, num_ids)


def _max_positions(builder: ModelBuilder, adapter: nnx.State, frozen: Any) -> int:
    if not isinstance(builder, nnx.GraphDef):
        return builder.config.max_positions
    # Of shapes: modules refer to each other in cycles, and one with the arrays would hold on to
    # them until these are collected, 4.9 GiB of Gemma 2 2B beside the next train step.
    shapes = jax.tree.map(jax.typeof, (adapter, frozen))
    return nnx.merge(builder, *shapes).config.max_positions


def _check_length(what: str, prompt: Sequence[int], options: SamplingOptions, limit: int) -> None:
    if not prompt or len(prompt) + options.max_new_tokens > limit:
        raise ValueError(
            f"{what} has {len(prompt)} tokens; it needs at least 1 and, with "
            f"max_new_tokens {options.max_new_tokens}, at most {limit}"
        )


def _pad(
    prompts: Sequence[Sequence[int]],
    indices: Sequence[int],
    key: jax.Array,
    group_size: int = 1,
    mesh: Mesh | None = None,
) -> tuple[Any, _Rows]:
    """(the prompts with these indices, padded on their left: int32 [P, T], the rows of their
    groups).

    A group that several devices share has its prompt once for each of them: every device
    repeats what it has prefilled itself.
    """
    num_copies = 1 if mesh is None else mesh.size // math.gcd(mesh.size, len(indices))
    lengths = [len(prompts[i]) for i in indices]
    length = _padded_length(max(lengths))
    padded = [[0] * (length - len(prompts[i])) + list(prompts[i]) for i in indices]
    numbers = [i * group_size + member for i in indices for member in range(group_size)]
    # NumPy arrays belong to no device, so several processes may share a mesh.
    arrays: list[Any] = [np.repeat(np.array(lengths, np.int32), group_size)]
    arrays += [np.array(numbers, np.int32), np.asarray(jax.random.key_data(key))]
    return np.repeat(np.array(padded, np.int32), num_copies, axis=0), _Rows(*arrays)


def _padded_length(length: int) -> int:
    """The next power of two, or three quarters of it where that suffices."""
    power = _power_of_two(length)
    less = power * 3 // 4
    return less if MIN_PADDED_LENGTH < length <= less else power


def _power_of_two(length: int) -> int:
    return max(MIN_PADDED_LENGTH, 1 << (length - 1).bit_length())


@partial(jax.jit, static_argnames="program")
def _prefill(
    adapter: nnx.State, frozen: nnx.State, padded_PT: jax.Array, rows: _Rows, program: _Program
) -> tuple[_Drawn, KVCache]:
    """The first token of each row's answer, and the cache with the prompts.

    Each of the P prompts is followed by B / P rows.
    """
    model = _model(adapter, frozen, program)
    num_prompts, length = padded_PT.shape
    num_rows = len(rows.numbers_B) // num_prompts
    positions_PT = jnp.arange(length) - length + rows.lengths_B[::num_rows, None]
    where = Tokens(jnp.maximum(positions_PT, 0), (positions_PT >= 0).astype(jnp.int32))
    # A power of two: prompts padded to three quarters of it share the decoding program. The last
    # token is drawn, but never an input: hence - 1.
    num_slots = _power_of_two(length) + program.options.max_new_tokens - 1
    cache = model.init_cache(num_prompts, num_slots, mesh=program.mesh)
    hidden_PTD, cache = model.with_cache(padded_PT, where, cache, mesh=program.mesh)
    hidden_BD = jnp.repeat(hidden_PTD[:, -1], num_rows, axis=0)
    cache = repeat_rows(cache, num_rows, mesh=program.mesh)
    return _draw(model, hidden_BD, rows, 0, program), cache


@partial(jax.jit, static_argnames="program", donate_argnames="cache")
def _decode(
    adapter: nnx.State,
    frozen: nnx.State,
    cache: KVCache,
    first: _Drawn,
    rows: _Rows,
    stop_ids: jax.Array,
    program: _Program,
) -> _Loop:
    """Draws until all rows stop."""
    model = _model(adapter, frozen, program)

    def draw_one(loop: _Loop) -> _Loop:
        n, last_B = loop.num_drawn, loop.out_BT[:, loop.num_drawn - 1]
        drawn, cache = _step(model, loop.cache, last_B, rows, n, program)
        return _Loop(
            cache,
            loop.out_BT.at[:, n].set(drawn.token_B),
            loop.log_probs_BT.at[:, n].set(drawn.log_prob_B),
            n + 1,
            loop.done_B | jnp.isin(drawn.token_B, stop_ids),
        )

    def unfinished(loop: _Loop) -> jax.Array:
        return (loop.num_drawn < program.options.max_new_tokens) & ~jnp.all(loop.done_B)

    shape = len(first.token_B), program.options.max_new_tokens
    start = _Loop(
        cache,
        jnp.zeros(shape, jnp.int32).at[:, 0].set(first.token_B),
        jnp.zeros(shape, jnp.float32).at[:, 0].set(first.log_prob_B),
        jnp.int32(1),
        jnp.isin(first.token_B, stop_ids),
    )
    end = jax.lax.while_loop(unfinished, draw_one, start)
    # Replicated, so that every process has all answers.
    return end._replace(
        out_BT=constrain(end.out_BT, program.mesh, None, None),
        log_probs_BT=constrain(end.log_probs_BT, program.mesh, None, None),
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
) -> tuple[_Drawn, KVCache]:
    model = _model(adapter, frozen, program)
    return _step(model, cache, token_B, rows, n, program)


def _model(adapter: nnx.State, frozen: Any, program: _Program) -> Gemma:
    """The model with the whole adapter on every device: with shards, as in training, every token
    would gather them again."""
    whole = jax.tree.map(lambda x: constrain(x, program.mesh, *[None] * x.ndim), adapter)
    if isinstance(program.builder, nnx.GraphDef):
        return nnx.merge(program.builder, whole, frozen)
    return program.builder(whole, frozen)


def _step(
    model: Gemma,
    cache: KVCache,
    token_B: jax.Array,
    rows: _Rows,
    n: jax.Array | int,
    program: _Program,
) -> tuple[_Drawn, KVCache]:
    """Token n of each row's answer after token n - 1."""
    where = Tokens((rows.lengths_B + n - 1)[:, None], jnp.ones_like(token_B)[:, None])
    hidden_BTD, cache = model.with_cache(token_B[:, None], where, cache, mesh=program.mesh)
    return _draw(model, hidden_BTD[:, 0], rows, n, program), cache


def _draw(
    model: Gemma, hidden_BD: jax.Array, rows: _Rows, n: jax.Array | int, program: _Program
) -> _Drawn:
    def key_of(number: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(rows.key_data)
        return jax.random.fold_in(jax.random.fold_in(key, number), n)

    keys_B = jax.vmap(key_of)(rows.numbers_B)
    logits_BV, options = model.logits(hidden_BD), program.options
    token_B = sample_token(logits_BV[:, : program.num_ids], keys_B, options)
    scaled_BV = logits_BV / (options.temperature or 1.0)
    chosen_B = jnp.take_along_axis(scaled_BV, token_B[:, None], axis=-1)[:, 0]
    return _Drawn(token_B, chosen_B - jax.nn.logsumexp(scaled_BV, axis=-1))


def sample_token(logits_BV: jax.Array, keys_B: jax.Array, options: SamplingOptions) -> jax.Array:
    """int32 [B]: argmax at temperature 0 or top_k 1, else a draw: temperature, top-k, top-p."""
    if options.temperature == 0 or options.top_k == 1:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits = logits_BV / options.temperature
    draw = jax.vmap(jax.random.categorical)
    if not options.top_k and options.top_p >= 1:
        return _draw_of_all(logits, keys_B)
    num_tokens = logits.shape[-1]
    best, ids = jax.lax.top_k(logits, min(options.top_k or num_tokens, num_tokens))  # descending
    # Keep a token when the likelier ones alone do not reach top_p yet.
    probs = jax.nn.softmax(best, axis=-1)
    kept = jnp.cumsum(probs, axis=-1) - probs < options.top_p
    drawn = draw(keys_B, jnp.where(kept, best, -jnp.inf))
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]


def _draw_of_all(logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    """int32 [B]: a draw from softmax(logits): of a block of ids, then of an id in the block.

    `categorical` alone makes a random number for every id: for 48 rows of 262,144 ids that takes a
    CPU twice as long as the head's matmul, and this a tenth.
    """
    num_rows, num_ids = logits_BV.shape
    padding = ((0, 0), (0, -num_ids % _BLOCK_IDS))
    blocks = jnp.pad(logits_BV, padding, constant_values=-jnp.inf)
    blocks = blocks.reshape(num_rows, -1, _BLOCK_IDS)
    draw, keys = jax.vmap(jax.random.categorical), jax.vmap(jax.random.split)(keys_B)
    block_B = draw(keys[:, 0], jax.nn.logsumexp(blocks, axis=-1))
    inside = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    return (block_B * _BLOCK_IDS + draw(keys[:, 1], inside)).astype(jnp.int32)
