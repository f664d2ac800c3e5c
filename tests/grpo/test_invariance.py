"""How completions are arranged changes no gradient: the cases run in a process with two devices."""

import json
from typing import Any

import pytest
from support.other_devices import COMPILE_FAST, report_of

TWO_DEVICES = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
CASES = (
    "one in a row",
    "other order",
    "dead groups kept",
    "two devices, micro-batches",
    "plain step, two devices, micro-batches",
    "empty micro-batches",
    "plain step, empty micro-batches",
)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """(loss, relative difference of the gradient) of each case, from the packed batch's."""
    return report_of(__file__, TWO_DEVICES | COMPILE_FAST)


@pytest.mark.parametrize("case", CASES)
def test_the_same_completions_give_the_same_gradient(report: dict[str, Any], case: str) -> None:
    assert report[case]["loss"] == pytest.approx(report["packed"]["loss"], rel=1e-5)
    assert report[case]["difference"] <= 1e-5


def measure() -> dict[str, Any]:
    """Runs every case; imports are here because pytest imports this file as well."""
    import dataclasses

    import jax
    import numpy as np
    from flax import nnx
    from support.both_steps import ROW_LENGTH, both_steps, layout_of
    from support.plain_loss import OBJECTIVE

    from jaxsft.gemma import lora
    from jaxsft.gemma.architecture import GLOBAL, LOCAL, PRESETS
    from jaxsft.gemma.model import Gemma
    from jaxsft.gemma.sharding import make_mesh
    from jaxsft.grpo.batches import CompletionRows, split_rows
    from jaxsft.grpo.objective import RolloutBatch, completion_weights, group_advantages
    from jaxsft.step.score import token_log_probs
    from jaxsft.step.train_step import put_batch, train_step

    sizes: dict[str, Any] = {"d_model": 16, "d_ff": 24, "num_heads": 4, "num_kv_heads": 2}
    sizes |= {"head_dim": 8, "vocab_size": 96, "max_positions": 64, "sliding_window": 6}
    config = dataclasses.replace(PRESETS["gemma-3-1b"], layer_types=(LOCAL, GLOBAL), **sizes)
    model = Gemma(config, rngs=nnx.Rngs(0))
    lora.inject(model, rank=3, alpha=7.0, rngs=nnx.Rngs(1))
    graphdef, adapter, frozen = lora.split(model)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), adapter)
    model = nnx.merge(graphdef, adapter, frozen)

    # Eight groups of three completions; two teach nothing.
    rewards_PG = rng.permuted(np.tile([0.0, 0.2, 1.2], (8, 1)), axis=1)
    rewards_PG[[2, 5]] = 0.2
    advantages_PG, is_live_P = group_advantages(rewards_PG, "none")
    prompts = [rng.integers(4, 96, n).tolist() for n in np.repeat(rng.integers(2, 9, 8), 3)]
    completions = [rng.integers(4, 96, n).tolist() for n in rng.integers(1, 21, 24)]
    noise = [rng.normal(0, 0.3, (2, len(ids))) for ids in completions]

    def rows_of(chosen: list[int], num_rows: int = 12) -> CompletionRows:
        some_prompts, some = ([of[i] for i in chosen] for of in (prompts, completions))
        return CompletionRows(some_prompts, some, row_length=ROW_LENGTH, num_rows=num_rows)

    def batch_of(rows: CompletionRows, chosen: list[int]) -> RolloutBatch:
        weights = completion_weights(rows.lengths, "grpo", 20)
        return rows.rollout_batch(
            weights=weights * is_live_P[np.array(chosen) // 3],
            advantages=advantages_PG.reshape(-1)[chosen],
            old=[log_probs[i] + noise[i][0] for i in chosen],
            reference=[log_probs[i] + noise[i][1] for i in chosen],
        )

    one, two = (make_mesh(n, devices=jax.devices()[:n]) for n in (1, 2))
    scored = rows_of([*range(24)])
    (_, weights, spec), _ = both_steps(model, layout_of(model))
    batch = put_batch(scored.batch, one)
    log_probs = scored.read(token_log_probs(adapter, weights, batch, spec=spec.model))

    live = [i for i in range(24) if is_live_P[i // 3]]
    packed = batch_of(rows_of(live), live)
    alone = [batch_of(rows_of([i], 1), [i]) for i in live]
    apart = RolloutBatch(*map(np.concatenate, zip(*alone, strict=True)))
    reversed_groups = [3 * group + i for group in range(7, -1, -1) for i in range(3)]
    other = [i for i in reversed_groups if i in live]
    everything = batch_of(scored, [*range(24)])
    assert packed.tokens_BT.shape == everything.tokens_BT.shape != apart.tokens_BT.shape
    roomy = split_rows(batch_of(rows_of(live, 36), live), 9)
    assert sum(part.any() for part in roomy.loss_weights_BT) <= 3  # of 9 micro-batches
    cases = {
        "packed": (1, one, packed),
        "one in a row": (1, one, apart),
        "other order": (1, one, batch_of(rows_of(other), other)),
        "dead groups kept": (1, one, everything),
        "two devices, micro-batches": (1, two, split_rows(packed, 3)),
        "plain step, two devices, micro-batches": (0, two, split_rows(packed, 3)),
        "empty micro-batches": (1, two, roomy),
        "plain step, empty micro-batches": (0, one, roomy),
    }
    objective = dataclasses.replace(OBJECTIVE, loss_type="grpo", use_bias_correction_kl=True)
    report: dict[str, Any] = {}
    specs: dict[Any, Any] = {}  # equal cases share a program
    expected = np.zeros(0)
    for case, (which, mesh, batch) in cases.items():
        steps = both_steps(model, layout_of(model), mesh=mesh, token_loss=objective)
        state, frozen, new = steps[which]
        spec = specs.setdefault((which, mesh), new)
        state, _, metrics = train_step(state, frozen, put_batch(batch, mesh), spec=spec)
        leaves = jax.tree.leaves(state.moments.trace)
        gradient = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])
        expected = expected if len(expected) else gradient
        difference = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        report[case] = {"loss": float(metrics["loss"]), "difference": float(difference)}
    return report


if __name__ == "__main__":
    print(json.dumps(measure()))
