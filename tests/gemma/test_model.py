"""Tiny twins of the four presets equal transformers and PEFT, and every mechanism is needed."""

import copy
import dataclasses
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers.models.gemma2.modeling_gemma2 as modeling_gemma2
from flax import nnx
from support.lora_twins import (
    ALPHA,
    RANK,
    AdapterTensors,
    clone,
    make_peft,
    max_relative_difference,
    our_tensors,
    peft_tensors,
    random_samples,
    short_twin,
    torch_loss_sum,
    twin,
    with_adapter,
)
from support.twins import TWINS, WINDOW

from jaxsft.common.batch import Batch
from jaxsft.data.packing import PackedRows
from jaxsft.gemma import lora
from jaxsft.gemma.architecture import GLOBAL, LOCAL
from jaxsft.gemma.layers import RMSNorm
from jaxsft.gemma.loss import chunked_loss, cross_entropy
from jaxsft.gemma.model import Gemma

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOGIT_BOUND = 1e-4
ROW_LENGTH = 40
# Row 0: one sample without padding. Row 1: two samples packed. Rows 2 and 3: each of them alone.
SAMPLES = random_samples([ROW_LENGTH, 17, 23], seed=0)
ROWS = PackedRows.from_samples([*SAMPLES, *SAMPLES[1:]], [[0], [1, 2], [3], [4]], ROW_LENGTH)
BATCH = ROWS.batch([0, 1, 2, 3])
# (sample, row, where it begins)
PLACES = [(0, 0, 0), (1, 1, 0), (2, 1, 17), (1, 2, 0), (2, 3, 0)]


@partial(jax.jit, static_argnums=0)
def _logits(graphdef: nnx.GraphDef, state: nnx.State, batch: Batch) -> jax.Array:
    model = nnx.merge(graphdef, state)
    batch = Batch(*map(jnp.asarray, batch))
    return model.logits(model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT))


def our_logits(model: Gemma, batch: Batch = BATCH) -> np.ndarray:
    return np.asarray(_logits(*nnx.split(model), batch))


def reference_logits(hf_model: Any) -> list[np.ndarray]:
    """transformers' logits of every sample alone, [T, V] each."""
    with torch.no_grad():
        return [hf_model(torch.tensor(s.ids)[None]).logits[0].float().numpy() for s in SAMPLES]


@cache
def twin_logits(name: str) -> tuple[np.ndarray, list[np.ndarray]]:
    hf_model, model = twin(name)
    return our_logits(model), reference_logits(hf_model)


def difference(logits_BTV: np.ndarray, reference: list[np.ndarray], rows: set[int]) -> float:
    """Max abs difference over all samples in `rows`."""
    return max(
        float(np.abs(logits_BTV[row, start : start + len(reference[i])] - reference[i]).max())
        for i, row, start in PLACES
        if row in rows
    )


@pytest.mark.parametrize("name", TWINS)
def test_logits_equal_transformers(name: str) -> None:
    assert ROW_LENGTH > WINDOW
    assert difference(*twin_logits(name), rows={0}) <= LOGIT_BOUND


@pytest.mark.parametrize("name", TWINS)
def test_packed_segments_equal_each_alone(name: str) -> None:
    logits, reference = twin_logits(name)
    assert difference(logits, reference, rows={1}) <= LOGIT_BOUND


@pytest.mark.parametrize("name", TWINS)
def test_right_padding_changes_nothing(name: str) -> None:
    logits, reference = twin_logits(name)
    assert difference(logits, reference, rows={2, 3}) <= LOGIT_BOUND
    assert np.isfinite(logits).all()


def test_gemma2_twin_exceeds_both_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    hf_model, model = twin("gemma2")
    eager, largest = modeling_gemma2.eager_attention_forward, []

    def recording(module, query, key, value, attention_mask, *, scaling, **kwargs):
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = query @ keys.transpose(2, 3) * scaling
        seen = torch.broadcast_to(attention_mask == 0, scores.shape)
        largest.append(scores[seen].abs().max().item())
        return eager(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    monkeypatch.setattr(modeling_gemma2, "eager_attention_forward", recording)
    with torch.no_grad():
        hidden = hf_model.model(torch.tensor(SAMPLES[0].ids)[None]).last_hidden_state
        uncapped = (hidden @ hf_model.lm_head.weight.T).abs().max().item()
    assert len(largest) == model.config.num_layers
    assert max(largest) > model.config.attn_softcap == 50.0
    assert uncapped > model.config.final_softcap == 30.0


# ---- every mechanism is needed: without it, the tests above would fail ----


def _config(**changes: Any) -> Callable[[Gemma], None]:
    def mutate(model: Gemma) -> None:
        model.config = dataclasses.replace(model.config, **changes)

    return mutate


def _local_base_as_global(model: Gemma) -> None:
    _config(rope_theta_local=model.config.rope_theta_global)(model)


def _global_base_as_local(model: Gemma) -> None:
    _config(rope_theta_global=model.config.rope_theta_local)(model)


def _default_query_scale(model: Gemma) -> None:
    _config(query_scale=model.config.head_dim**-0.5)(model)


def _swap_layer_types(model: Gemma) -> None:
    swapped = {LOCAL: GLOBAL, GLOBAL: LOCAL}
    _config(layer_types=tuple(swapped[kind] for kind in model.config.layer_types))(model)


def _reverse_layer_types(model: Gemma) -> None:
    period = len(model.config.layer_pattern)
    pattern = model.config.layer_pattern[::-1]
    types = tuple(pattern[i % period] for i in range(model.config.num_layers))
    _config(layer_types=types)(model)


def _no_embedding_scale(model: Gemma) -> None:
    _config(d_model=1)(model)  # nothing but the factor sqrt(d_model) is computed from it


def _no_qk_norm(model: Gemma) -> None:
    for block in [*model.blocks, *model.tail]:
        block.attn.q_norm = block.attn.k_norm = None


def _no_post_norm(name: str) -> Callable[[Gemma], None]:
    def mutate(model: Gemma) -> None:
        for block in [*model.blocks, *model.tail]:
            setattr(block, name, None)

    return mutate


def _scale_without_one(model: Gemma) -> None:
    for _, norm in nnx.iter_modules(model):
        if isinstance(norm, RMSNorm):
            norm.scale[...] = norm.scale[...] - 1.0


GEMMA3 = ("gemma3-270m", "gemma3-1b")
MUTATIONS: list[tuple[str, Callable[[Gemma], None], tuple[str, ...]]] = [
    ("attention cap", _config(attn_softcap=None), ("gemma2",)),
    ("final cap", _config(final_softcap=None), ("gemma2",)),
    ("sliding window", _config(sliding_window=None), ("gemma2", *GEMMA3)),
    ("window one too long", _config(sliding_window=WINDOW + 1), ("gemma2", *GEMMA3)),
    ("q/k norm", _no_qk_norm, GEMMA3),
    ("post-attention norm", _no_post_norm("post_attn_norm"), ("gemma2", *GEMMA3)),
    ("post-MLP norm", _no_post_norm("post_mlp_norm"), ("gemma2", *GEMMA3)),
    ("1 + w", _scale_without_one, TWINS),
    ("local RoPE base", _local_base_as_global, GEMMA3),
    ("global RoPE base", _global_base_as_local, GEMMA3),
    ("query scale", _config(query_scale=1.0), TWINS),
    ("query scale from the config", _default_query_scale, ("gemma2", *GEMMA3)),
    ("embedding scale", _no_embedding_scale, TWINS),
    ("layer types' order", _reverse_layer_types, ("gemma2", *GEMMA3)),
    ("layer types' meaning", _swap_layer_types, GEMMA3),
]


@pytest.mark.parametrize(
    ("mutate", "name"),
    [
        pytest.param(mutate, name, id=f"{mechanism}-{name}")
        for mechanism, mutate, names in MUTATIONS
        for name in names
    ],
)
def test_parity_fails_without(mutate: Callable[[Gemma], None], name: str) -> None:
    mutated = clone(twin(name)[1])
    mutate(mutated)
    _, reference = twin_logits(name)
    with jax.disable_jit():  # no compilation for every mutated config
        assert difference(our_logits(mutated), reference, rows={0}) > 1e-2


@pytest.mark.parametrize("name", TWINS)
def test_parity_without_jit(name: str) -> None:
    """The control of the mutations: unmutated, the same computation equals transformers."""
    with jax.disable_jit():
        logits = our_logits(twin(name)[1])
    assert difference(logits, twin_logits(name)[1], rows={0}) <= LOGIT_BOUND


def test_parity_fails_without_the_segment_mask() -> None:
    _, reference = twin_logits("gemma3-1b")
    one_segment = BATCH._replace(segment_ids_BT=np.minimum(BATCH.segment_ids_BT, 1))
    with jax.disable_jit():
        logits = our_logits(twin("gemma3-1b")[1], one_segment)
    assert difference(logits, reference, rows={1}) > 1e-2
    assert difference(logits, reference, rows={0}) <= LOGIT_BOUND


# ---- LoRA against PEFT ----


@partial(jax.jit, static_argnums=0)
def _loss_and_gradients(
    graphdef: nnx.GraphDef, adapter: nnx.State, frozen: nnx.State, batch: Batch
) -> tuple[tuple[jax.Array, jax.Array], nnx.State]:
    """((mean loss per loss token, logits), gradient of the loss with respect to the adapter)."""

    def mean_loss(adapter: nnx.State) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, adapter, frozen)
        hidden = model(batch.tokens_BT, batch.positions_BT, batch.segment_ids_BT)
        loss_sum = chunked_loss(
            hidden,
            model.embedding[...],
            batch,
            token_loss=cross_entropy,
            logit_cap=model.config.final_softcap,
            chunk_tokens=16,
        )
        return loss_sum / jnp.sum(batch.loss_weights_BT), model.logits(hidden)

    return jax.value_and_grad(mean_loss, has_aux=True)(adapter)


@cache
def adapted(name: str) -> tuple[Any, Gemma]:
    """(PEFT model with random A and B, ours with the same)."""
    hf_model, model = twin(name)
    peft_model = make_peft(hf_model, random_b=True)
    return peft_model, with_adapter(model, peft_model)


@pytest.mark.parametrize("name", TWINS)
def test_lora_logits_and_gradients_equal_peft(name: str) -> None:
    peft_model, model = adapted(name)
    pairs = [torch_loss_sum(peft_model, sample) for sample in SAMPLES]
    expected = sum(loss for loss, _ in pairs) / sum(count for _, count in pairs)
    peft_model.zero_grad()
    expected.backward()
    reference = peft_tensors(peft_model, gradients=True)
    assert len(reference) == model.config.num_layers * 7 * 2
    assert all(np.linalg.norm(gradient) > 0 for gradient in reference.values())

    graphdef, adapter, frozen = lora.split(model)
    batch = ROWS.batch([0, 1, -1, -1])  # every sample once, two of them packed
    (loss, logits), grads = _loss_and_gradients(graphdef, adapter, frozen, batch)
    expected_logits = reference_logits(peft_model)
    assert difference(np.asarray(logits), expected_logits, rows={0, 1}) <= LOGIT_BOUND
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    grads = our_tensors(graphdef, grads, frozen)
    assert max_relative_difference(grads, reference) <= 1e-3

    # Without the scale alpha / r, which a smaller B stands for here, none of this would hold.
    def unscale(path: Any, x: jax.Array) -> jax.Array:
        return x * RANK / ALPHA if "'b'" in jax.tree_util.keystr(path) else x

    mutated = jax.tree_util.tree_map_with_path(unscale, adapter)
    (_, logits), grads = _loss_and_gradients(graphdef, mutated, frozen, batch)
    assert difference(np.asarray(logits), expected_logits, rows={0, 1}) > 1e-2
    grads = our_tensors(graphdef, grads, frozen)
    assert max_relative_difference(grads, reference) > 1e-2


def short_model(remat: str) -> Gemma:
    model = clone(short_twin()[1])
    model.remat = remat
    return model


@cache
def short_gradients(remat: str) -> tuple[float, AdapterTensors]:
    graphdef, adapter, frozen = lora.split(short_model(remat))
    (loss, _), grads = _loss_and_gradients(graphdef, adapter, frozen, BATCH)
    return float(loss), our_tensors(graphdef, grads, frozen)


@pytest.mark.parametrize("remat", ["projections", "full"])
def test_remat_leaves_gradients_unchanged(remat: str) -> None:
    loss, grads = short_gradients(remat)
    plain_loss, plain_grads = short_gradients("none")
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert max_relative_difference(grads, plain_grads) <= 1e-5


def test_remat_keeps_what_its_policy_names() -> None:
    """Bytes that the forward pass leaves for the backward pass, without running either."""

    def kept_bytes(remat: str) -> int:
        graphdef, adapter, frozen = lora.split(short_model(remat))

        def forward(adapter: nnx.State) -> jax.Array:
            model = nnx.merge(graphdef, adapter, frozen)
            return model(BATCH.tokens_BT, BATCH.positions_BT, BATCH.segment_ids_BT)

        residuals = jax.eval_shape(lambda a: jax.vjp(forward, a)[1], adapter)
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))

    config = short_model("none").config
    shapes = config.linear_shapes
    named = sum(shapes[t][1] for t in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    named += shapes["o_proj"][0]  # the attention output
    expected = 4 * BATCH.tokens_BT.size * config.num_layers * named
    assert kept_bytes("projections") - kept_bytes("full") == expected
    assert kept_bytes("none") > kept_bytes("projections")


def test_unknown_remat_policy_is_refused() -> None:
    config = twin("gemma1")[1].config
    with pytest.raises(ValueError, match=r"remat 'some' is not one of none, projections, full"):
        Gemma(config, remat="some", rngs=nnx.Rngs(0))


# ---- bfloat16 ----


@pytest.mark.parametrize("name", ["gemma1", "gemma2", "gemma3-1b"])
def test_bfloat16_is_as_close_to_float32_as_transformers(name: str) -> None:
    """Our mean abs error against the float32 reference is at most twice transformers' own."""
    hf_model, model = twin(name)
    _, reference = twin_logits(name)
    theirs = reference_logits(copy.deepcopy(hf_model).to(torch.bfloat16))

    graphdef, state = nnx.split(model)
    low = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), state))
    low.dtype = jnp.dtype(jnp.bfloat16)
    hidden = jax.eval_shape(lambda: low(BATCH.tokens_BT, BATCH.positions_BT, BATCH.segment_ids_BT))
    assert hidden.dtype == jnp.bfloat16
    ours = our_logits(low)
    assert ours.dtype == np.float32

    def mean_error(logits: list[np.ndarray]) -> float:
        errors = [np.abs(x - y).ravel() for x, y in zip(logits, reference, strict=True)]
        return float(np.concatenate(errors).mean())

    our_rows = [ours[row, : len(reference[i])] for i, row, start in PLACES if row in (0, 2, 3)]
    assert 0 < mean_error(our_rows) <= 2 * mean_error(theirs)
