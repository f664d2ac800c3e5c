"""The Pallas kernels, interpreted, equal the XLA reference: outputs and gradients, every kind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxsft.common.batch import Batch
from jaxsft.data.packing import PackedRows, Sample
from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig
from jaxsft.step import flash_attention
from jaxsft.step.fused_layer import make_attend
from jaxsft.step.row_kernels import Stacked

ROW_LENGTH, BLOCK = 64, 16


def packed_batch() -> Batch:
    """Two rows: three segments and padding; one segment as long as the row."""
    samples = [Sample(np.zeros(n, np.int32), np.ones(n, np.bool_)) for n in (20, 30, 7, ROW_LENGTH)]
    return PackedRows.from_samples(samples, [[0, 1, 2], [3]], ROW_LENGTH).batch([0, 1])


def config(*, cap: float | None, window: int, qk_norm: bool, num_kv_heads: int) -> GemmaConfig:
    return GemmaConfig(
        name="twin",
        vocab_size=16,
        d_model=8,
        d_ff=8,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        layer_types=(LOCAL, GLOBAL),
        max_positions=ROW_LENGTH,
        query_scale=12**-0.5,  # not head_dim^-0.5
        sliding_window=window,
        attn_softcap=cap,
        qk_norm=qk_norm,
    )


@pytest.mark.parametrize(
    ("kind", "cap", "window", "qk_norm", "num_kv_heads"),
    [
        (LOCAL, 5.0, 9, False, 2),  # Gemma 2, windows shorter and longer than a block of 16
        (LOCAL, 5.0, 33, False, 2),
        (GLOBAL, 5.0, 9, False, 2),
        (GLOBAL, None, 9, False, 1),  # Gemma 1
        (LOCAL, None, 9, True, 1),  # Gemma 3
        (GLOBAL, None, 9, True, 1),
        (LOCAL, 200.0, 33, True, 2),  # a cap too wide to do without the row maximum
    ],
)
def test_kernels_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    cap: float | None,
    window: int,
    qk_norm: bool,
    num_kv_heads: int,
) -> None:
    monkeypatch.setattr(flash_attention, "BLOCK_Q", BLOCK)  # four blocks a row
    settings = config(cap=cap, window=window, qk_norm=qk_norm, num_kv_heads=num_kv_heads)
    batch = packed_batch()
    group_dim = settings.num_heads // num_kv_heads + 2
    keys = jax.random.split(jax.random.key(0), 3)
    columns = num_kv_heads * group_dim * settings.head_dim
    # Scores of up to 40: the cap of 5 acts, and the largest weight of a row is near 1.
    qkv = 2 * jax.random.normal(keys[0], (2, ROW_LENGTH, columns))
    # Padding attends to padding, here and there to different parts of it, and reaches no loss.
    is_real = (batch.segment_ids_BT > 0)[..., None]
    d_out = is_real * jax.random.normal(keys[1], (2, ROW_LENGTH, 4 * settings.head_dim))
    norms = jax.random.normal(keys[2], (2, settings.head_dim))

    reference = make_attend(settings, kind, batch, use_kernel=False)
    kernel = make_attend(settings, kind, batch, use_kernel=True, interpret=True)
    out, expected = kernel.forward(qkv, norms), reference.forward(qkv, norms)
    np.testing.assert_allclose(is_real * out, is_real * expected, rtol=1e-4, atol=1e-5)
    flat = qkv.reshape(2 * ROW_LENGTH, -1)
    stack = jnp.full((3, *flat.shape), jnp.nan).at[1].set(flat)  # read from a stack of layers
    ours = kernel.backward(Stacked(stack, jnp.int32(1)), norms, d_out)
    expected = reference.backward(flat, norms, d_out)
    assert float(jnp.linalg.norm(ours - expected)) <= 1e-5 * float(jnp.linalg.norm(expected))


BF16_BOUND = 0.01


@pytest.mark.parametrize(("cap", "qk_norm"), [(5.0, False), (None, True)])
def test_bfloat16_kernels_are_near_float32(
    monkeypatch: pytest.MonkeyPatch, cap: float | None, qk_norm: bool
) -> None:
    """Within 1% in the Frobenius norm, forward and backward; with scores 5% off they are not."""
    monkeypatch.setattr(flash_attention, "BLOCK_Q", BLOCK)
    settings = config(cap=cap, window=33, qk_norm=qk_norm, num_kv_heads=2)
    batch, keys = packed_batch(), jax.random.split(jax.random.key(0), 3)
    is_real = (batch.segment_ids_BT > 0)[..., None]
    qkv = (2 * jax.random.normal(keys[0], (2, ROW_LENGTH, 128))).astype(jnp.bfloat16)
    d_out = (is_real * jax.random.normal(keys[1], (2, ROW_LENGTH, 64))).astype(jnp.bfloat16)
    norms = jax.random.normal(keys[2], (2, 16)).astype(jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in (qkv, norms, d_out)]

    def both(settings: GemmaConfig, use_kernel: bool, qkv, norms, d_out) -> list[np.ndarray]:
        attend = make_attend(settings, LOCAL, batch, use_kernel=use_kernel, interpret=True)
        flat = qkv.reshape(2 * ROW_LENGTH, -1)
        out = is_real * attend.forward(qkv, norms)
        return [np.asarray(x, np.float32) for x in (out, attend.backward(flat, norms, d_out))]

    wrong = dataclasses.replace(settings, query_scale=1.05 * settings.query_scale)
    reference = both(settings, False, *exact)
    kernels, off = both(settings, True, qkv, norms, d_out), both(wrong, False, *exact)
    for ours, theirs, bad in zip(kernels, reference, off, strict=True):
        allowed = BF16_BOUND * np.linalg.norm(theirs)
        assert np.linalg.norm(ours - theirs) <= allowed < np.linalg.norm(bad - theirs)


def test_the_window_and_the_cap_matter() -> None:
    batch, outputs = packed_batch(), []
    qkv = 2 * jax.random.normal(jax.random.key(0), (2, ROW_LENGTH, 128))
    for kind, cap in ((LOCAL, 5.0), (GLOBAL, 5.0), (GLOBAL, None)):
        settings = config(cap=cap, window=9, qk_norm=False, num_kv_heads=2)
        attend = make_attend(settings, kind, batch, use_kernel=True, interpret=True)
        outputs.append(np.asarray(attend.forward(qkv, jnp.zeros((2, 16)))))
    for other in outputs[1:]:
        assert np.abs(outputs[0] - other).max() > 0.1


@pytest.mark.parametrize(
    ("row_length", "is_supported"),
    [
        (128, True),
        (384, True),
        (512, True),
        (2048, True),
        (4096, True),
        (640, False),
        (1000, False),
        (64, False),
        (8192, False),
    ],
)
def test_supported_row_lengths(row_length: int, is_supported: bool) -> None:
    assert flash_attention.supports_row_length(row_length) is is_supported
