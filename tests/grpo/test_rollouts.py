"""Rollouts: what is drawn, how it ends, and that the sampler's numbers are the trainer's."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.lora_twins import clone, inject_random, short_twin

from jaxsft.data.tokenizer import Tokenizer
from jaxsft.gemma import decode, lora
from jaxsft.gemma.model import Gemma
from jaxsft.gemma.sharding import make_mesh
from jaxsft.grpo.batches import CompletionRows
from jaxsft.grpo.rollouts import Rollout, roll_out, rollout_key
from jaxsft.step.fused import FusedSpec
from jaxsft.step.fused_weights import fuse, make_layout
from jaxsft.step.score import ModelSpec, token_log_probs
from jaxsft.step.train_step import put_batch

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESH = make_mesh(1, devices=jax.devices()[:1])
PROMPTS = [np.random.default_rng(n).integers(4, 256, n).tolist() for n in (9, 3, 21, 14)]
DRAWN: dict[str, Any] = {"group_size": 4, "batch_size": 8, "max_new_tokens": 12}
SEEDED = DRAWN | {"seed": 5, "rollout": 2}

# (adapter, frozen weights, spec)
Policy = tuple[Any, Any, ModelSpec]


def vocabulary(*stop_ids: int, turn: int = 9999, size: int = 256) -> Any:
    """What a rollout needs of a tokenizer, for ids without texts."""
    stop_ids = (*stop_ids, 9999, 9999)[:2]
    return SimpleNamespace(
        stop_ids=stop_ids,
        start_of_turn_id=turn,
        vocab_size=size,
        decode=lambda ids: " ".join(map(str, ids)),
    )


@pytest.fixture(scope="module")
def plain() -> Policy:
    model = clone(short_twin()[1])
    model.embedding[...] *= 0.1  # logits of up to 3, so that many tokens are likely
    graphdef, adapter, frozen = lora.split(model)
    return adapter, frozen, ModelSpec(graphdef, MESH, model.config.final_softcap, 16)


@pytest.fixture(scope="module")
def fused(plain: Policy) -> Policy:
    adapter, frozen, spec = plain
    model = short_twin()[1]
    scale = model.blocks[0].attn.q_proj.lora.scale
    layout = make_layout(model.config, row_length=64, rank=3, scale=scale, targets=lora.TARGETS)
    settings = FusedSpec(layout, jnp.dtype("float32"), 16, False, False)
    return adapter, fuse(frozen, layout), dataclasses.replace(spec, fused=settings)


def draw(policy: Policy, prompts: Any = PROMPTS, words: Any = None, **settings: Any) -> Any:
    adapter, frozen, spec = policy
    words = vocabulary() if words is None else words
    arguments = {"spec": spec, "tokenizer": words, **SEEDED, **settings}
    return roll_out(adapter, frozen, prompts, **arguments)


def test_how_a_completion_ends(plain: Policy) -> None:
    whole = draw(plain)
    assert [(each.prompt, each.member) for each in whole] == [divmod(i, 4) for i in range(16)]
    assert all(each.prompt_ids == PROMPTS[each.prompt] for each in whole)
    assert all(each.truncated and not each.stopped and len(each.ids) == 12 for each in whole)
    # Tokens that end the first completion in its middle, the second at once, and that begin a turn
    # in the third.
    stops, turn = (whole[0].ids[6], whole[1].ids[0]), whole[2].ids[3]
    ends = set()
    for ours, every in zip(draw(plain, words=vocabulary(*stops, turn=turn)), whole, strict=True):
        last = next((i for i, token in enumerate(every.ids) if token in (*stops, turn)), 11)
        assert ours.ids == every.ids[: last + 1]  # what it was ended by is trained on
        assert ours.log_probs == pytest.approx(every.log_probs[: last + 1], abs=1e-5)
        assert ours.stopped == (ours.ids[-1] in stops)
        assert ours.truncated == (ours.ids[-1] not in (*stops, turn))
        text = ours.ids[:-1] if ours.stopped else ours.ids
        assert ours.text == " ".join(map(str, text))
        ends.add((ours.stopped, ours.truncated))
    assert ends == {(True, False), (False, True), (False, False)}


def ids_of(rollouts: list[Rollout]) -> list[list[int]]:
    return [each.ids for each in rollouts]


def test_neighbours_change_no_completion(plain: Policy) -> None:
    whole = ids_of(draw(plain))
    assert len({*map(tuple, whole)}) == 16
    assert ids_of(draw(plain, PROMPTS[:1])) == whole[:4]
    # By length, the first shared its batch with the last.
    others = ids_of(draw(plain, [PROMPTS[0], [7] * 30, [8] * 31, [9] * 5]))
    assert others[:4] == whole[:4] and not any(map(whole.__contains__, others[4:]))


def test_no_two_draws_share_noise(
    plain: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of other seeds, rollouts, rows or tokens; nor is a draw's noise that of a step's dropout or
    of an evaluation with the seed. Nothing is compiled for a seed or a rollout."""

    def num_compiled() -> int:
        return sum(record.getMessage().startswith("Compiling") for record in caplog.records)

    def key_bits(logits_BV: jax.Array, keys_B: jax.Array, options: Any) -> jax.Array:
        return (jax.random.key_data(keys_B)[:, 1] >> 1).astype(jnp.int32)

    monkeypatch.setattr(decode, "sample_token", key_bits)
    few = DRAWN | {"max_new_tokens": 6}  # a program of its own
    seen, compiled = [], set()
    with jax.log_compiles():
        for seed, rollout in itertools.product((0, 1, 2**32 - 1), (0, 1, 2, 1500)):
            drawn = draw(plain, PROMPTS[:3], **few | {"seed": seed, "rollout": rollout})
            seen += np.concatenate(ids_of(drawn)).tolist()
            compiled.add(num_compiled())
    assert len(compiled) == 1 and compiled.pop() >= 2  # all at the first
    assert len(seen) == 12 * 12 * 6 == len(set(seen))
    root = jax.random.key(1)
    rows = [jax.random.fold_in(root, n) for n in range(12)]  # or steps
    draws = [jax.random.fold_in(row, n) for row in rows for n in range(6)]
    keys = [root, *rows, *draws, rollout_key(1, 0), rollout_key(1, 1)]
    bits = [int(jax.random.key_data(key)[1] >> 1) for key in keys]
    assert len(set(bits)) == len(bits) and not {*bits} & {*seen}


def errors_of(policy: Policy, rollouts: list[Rollout], row_length: int) -> np.ndarray:
    """|sampler's log-probability - the trainer's|, in nats, of every token that was drawn."""
    adapter, frozen, spec = policy
    prompts, completions = zip(*((each.prompt_ids, each.ids) for each in rollouts), strict=True)
    rows = CompletionRows(prompts, completions, row_length=row_length, num_rows=len(rollouts) // 2)
    batch = put_batch(rows.batch, MESH)
    trained = rows.read(token_log_probs(adapter, frozen, batch, spec=spec))
    drawn = [each.log_probs for each in rollouts]
    return np.abs(np.concatenate(trained) - np.concatenate(drawn))


@pytest.mark.parametrize("form", ["plain", "fused"])
def test_the_sampler_is_the_trainer(form: str, request: pytest.FixtureRequest) -> None:
    policy = request.getfixturevalue(form)
    words = vocabulary(*range(20, 22), turn=30, size=200)  # some ids are never drawn
    rollouts = draw(policy, words=words)
    assert max(map(max, ids_of(rollouts))) < 200
    errors = errors_of(policy, rollouts, row_length=64)
    assert errors.mean() <= 2e-6 and errors.max() <= 2e-5


def test_the_sampler_is_the_trainer_on_the_real_model(
    real_model: Gemma, tokenizer: Tokenizer
) -> None:
    """1,000 tokens of mixed lengths, each completion with what ended it. Float32's rounding is all
    that is seen: at most 2.3e-5 in two trials, 4e-6 on average."""
    model = clone(real_model)
    inject_random(model, size=0.02)
    graphdef, adapter, frozen = lora.split(model)
    policy = adapter, frozen, ModelSpec(graphdef, MESH, model.config.final_softcap, 256)
    texts = ["The capital of France is", "Once upon a time there was a little girl who", "To make"]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    # Sentences end, where this model seldom ends a text.
    ends = {token for text in (".", "\n") for token in tokenizer.encode(text)}
    words = vocabulary(*ends, size=tokenizer.vocab_size)
    settings = {"group_size": 16, "batch_size": 48, "max_new_tokens": 40}
    rollouts = draw(policy, prompts, words, **settings)
    lengths = [len(each.ids) for each in rollouts]
    errors = errors_of(policy, rollouts, row_length=256)
    assert len(errors) == sum(lengths) >= 1000 and len({*lengths}) > 10
    assert sum(each.stopped for each in rollouts) > 10
    assert errors.max() <= 2e-4
