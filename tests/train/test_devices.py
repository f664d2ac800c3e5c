"""Eight simulated devices equal one: the same losses, gradients and adapter over three steps.

The cases run in a process of their own: this file as a script.
"""

import dataclasses
import json
from typing import Any

import pytest
from support.other_devices import COMPILE_FAST, EIGHT_DEVICES, report_of

CASES = {"one": (1, 1), "data": (8, 1), "data and fsdp": (4, 2), "fsdp": (1, 8)}
FUSED_CASES = {"fused, one": (1, 1), "fused, data": (8, 1)}
NUM_STEPS = 3


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the child process measured, by case."""
    return report_of(__file__, EIGHT_DEVICES | COMPILE_FAST)


@pytest.mark.parametrize("case", ["data", "data and fsdp", "fsdp", "fused, data"])
def test_eight_devices_equal_one(report: dict[str, Any], case: str) -> None:
    one, eight = report["fused, one" if "fused" in case else "one"], report[case]
    assert eight["num_devices"] == 8
    assert eight["num_loss_tokens"] == one["num_loss_tokens"]
    assert len(set(one["num_loss_tokens"])) == NUM_STEPS  # uneven
    assert eight["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert eight["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-5)
    assert len(eight["gradient_differences"]) == NUM_STEPS
    # Summed in another order: 1.02e-4 was seen, of the smallest gradient of the fused step.
    bound = 2e-4 if "fused" in case else 1e-4
    assert max(eight["gradient_differences"]) <= bound
    # Adam's first steps divide by the gradient's own size: 2.3e-4 was seen of a change whose
    # gradient differs by 2.4e-6, with the fused step; on another CPU 1.0e-4.
    assert max(eight["change_differences"]) <= (3e-4 if "fused" in case else bound)


@pytest.mark.parametrize("case", CASES)
def test_frozen_weights_are_split_over_fsdp_alone(report: dict[str, Any], case: str) -> None:
    fsdp = CASES[case][1]
    shapes = report[case]["frozen_shapes"]
    assert len(shapes) > 10
    for name, (shape, shard_shape) in shapes.items():
        if name.endswith("scale"):
            dim = None  # norms are replicated
        elif "o_proj" in name or "down_proj" in name or name == "embedding":
            dim = -1
        else:
            dim = -2
        expected = list(shape)
        if dim is not None:
            expected[dim] //= fsdp
        assert shard_shape == expected, name


@pytest.mark.parametrize("case", CASES)
def test_adapter_comes_back_replicated(report: dict[str, Any], case: str) -> None:
    assert report[case]["adapter_is_replicated"]
    assert report[case]["replicas_are_identical"]
    assert report[case]["num_compilations"] == 1


def test_fused_state_is_split_over_the_devices(report: dict[str, Any]) -> None:
    """An adapter's largest dimension is 48, 32, 16 or 96: all divide by 8."""
    assert report["fused, one"]["adapter_share"] == 1
    assert report["fused, data"]["adapter_share"] == 1 / 8
    assert report["fused, data"]["num_compilations"] == 1


def test_dropout_acts(report: dict[str, Any]) -> None:
    """It is on in all cases, so the tests above show that its masks don't depend on the mesh."""
    assert report["one"]["eval_loss"] != pytest.approx(report["one"]["losses"][0], rel=1e-4)


def measure() -> dict[str, Any]:
    """Runs every case; imports are here because pytest imports this file as well."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from flax import nnx

    from jaxsft.data.bins import best_fit_decreasing
    from jaxsft.data.packing import PackedRows, Sample
    from jaxsft.gemma import lora
    from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig
    from jaxsft.gemma.model import Gemma
    from jaxsft.gemma.sharding import make_mesh, named, state_shardings
    from jaxsft.step import optimizer
    from jaxsft.step import train_step as step
    from jaxsft.step.fused import FusedSpec
    from jaxsft.step.fused_weights import fuse, make_layout
    from jaxsft.step.score import ModelSpec, token_log_probs

    config = GemmaConfig(
        name="tiny",
        vocab_size=96,
        d_model=32,
        d_ff=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layer_types=(LOCAL, GLOBAL, LOCAL),  # a scanned pair and a tail
        max_positions=64,
        query_scale=0.35,
        sliding_window=6,
        attn_softcap=50.0,
        final_softcap=30.0,
        post_norms=True,
    )
    rng = np.random.default_rng(0)
    samples = []
    for length in rng.integers(8, 30, 130):
        # Some samples have a single label, some only labels.
        is_label = np.arange(length) >= rng.choice([1, length // 2, length - 1])
        samples.append(Sample(rng.integers(4, 96, length).astype(np.int32), is_label))
    rows = PackedRows.from_samples(
        samples, best_fit_decreasing([len(s.ids) for s in samples], 32), 32
    )
    # The last batch ends in rows of padding: some devices have no loss token at all.
    batches = [rows.batch(range(16)), rows.batch(range(16, 32)), rows.batch([*range(9), *[-1] * 7])]

    model = Gemma(config, rngs=nnx.Rngs(0))
    lora.inject(model, rank=3, alpha=7.0, dropout=0.5, rngs=nnx.Rngs(1))
    graphdef, adapter, frozen = lora.split(model)
    adapter = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), adapter)
    norms = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), frozen)
    frozen = jax.tree.map(lambda x, norm: x + norm if x.ndim <= 2 else x, frozen, norms)
    # The trace keeps each step's gradient and hands it on.
    transform = optax.chain(
        optax.trace(decay=0.0),
        optimizer.make_transform(
            beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, max_grad_norm=1.0
        ),
    )
    schedule = optimizer.make_schedule("constant", peak=1e-3, end=0.0, warmup_steps=0, num_steps=5)

    def leaves(tree: Any) -> list[np.ndarray]:
        return [np.array(x) for x in jax.tree.leaves(tree)]

    def differences(tensors: list[np.ndarray], reference: list[np.ndarray]) -> list[float]:
        pairs = zip(tensors, reference, strict=True)
        return [float(np.linalg.norm(x - y) / np.linalg.norm(y)) for x, y in pairs]

    initial, reference, report = leaves(adapter), {}, {}
    for case, (data, fsdp) in (CASES | FUSED_CASES).items():
        if case == "fused, one":
            reference = {}  # without dropout, another run
        mesh = make_mesh(data, fsdp, devices=jax.devices()[: data * fsdp])
        copied = jax.tree.map(jnp.copy, frozen)  # the step donates it
        placed = jax.device_put(copied, state_shardings(frozen, mesh))
        of_model = ModelSpec(graphdef, mesh, config.final_softcap, chunk_tokens=8)
        if case in FUSED_CASES:
            layout = make_layout(config, row_length=32, rank=3, scale=7 / 3, targets=lora.TARGETS)
            fused = FusedSpec(layout, jnp.dtype("float32"), 8, False, use_kernel=False)
            of_model = dataclasses.replace(of_model, fused=fused)
            weights = jax.tree.map(jnp.copy, fuse(frozen, layout))
            placed = jax.device_put(weights, named(mesh))
        update = step.UpdateSpec(
            transform, schedule, accumulation_steps=2, use_dropout=case in CASES
        )
        spec = step.StepSpec(of_model, update)
        state = step.init_state(adapter, spec)
        losses_BT = -token_log_probs(
            state.adapter, placed, step.put_batch(batches[0], mesh), spec=of_model
        )
        cache_size, history, gradients, changes = step.train_step._cache_size(), [], [], []
        for batch in batches:
            placed_batch = step.put_batch(batch, mesh)
            state, placed, metrics = step.train_step(state, placed, placed_batch, spec=spec)
            assert bool(metrics["applied"])
            history.append((float(metrics["loss"]), int(metrics["num_loss_tokens"])))
            gradients.append(leaves(state.moments[0].trace))
            changes.append([x - y for x, y in zip(leaves(state.adapter), initial, strict=True)])
        num_compilations = step.train_step._cache_size() - cache_size
        if not reference:
            reference = {"gradients": gradients, "changes": changes}
        arrays = jax.tree.leaves((state.adapter, state.moments))
        report[case] = {
            "adapter_share": max(
                x.addressable_shards[0].data.size / x.size for x in jax.tree.leaves(state.adapter)
            ),
            "num_devices": mesh.size,
            "losses": [loss for loss, _ in history],
            "num_loss_tokens": [count for _, count in history],
            "eval_loss": float(losses_BT.sum()) / int(batches[0].loss_weights_BT.sum()),
            "gradient_differences": [
                max(differences(ours, theirs))
                for ours, theirs in zip(gradients, reference["gradients"], strict=True)
            ],
            "change_differences": [
                max(differences(ours, theirs))
                for ours, theirs in zip(changes, reference["changes"], strict=True)
            ],
            "num_compilations": num_compilations,
            "adapter_is_replicated": all(x.is_fully_replicated for x in arrays),
            "replicas_are_identical": all(
                np.array_equal(shard.data, x) for x in arrays for shard in x.addressable_shards
            ),
            "frozen_shapes": {
                ".".join(map(str, path)): (v[...].shape, v[...].addressable_shards[0].data.shape)
                for path, v in (nnx.to_flat_state(placed) if case in CASES else [])
            },
        }
    return report


if __name__ == "__main__":
    print(json.dumps(measure()))
