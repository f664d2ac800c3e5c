"""Eight simulated devices give the answers of one, greedy and drawn, with the weights split.

The cases run in a process of their own: this file as a script.
"""

import dataclasses
import json
from typing import Any

from support.other_devices import COMPILE_FAST, EIGHT_DEVICES, report_of

CASES = {"one": None, "eight": (4, 2)}


def test_eight_devices_give_the_answers_of_one() -> None:
    report = report_of(__file__, EIGHT_DEVICES | COMPILE_FAST)
    assert report["eight"] == report["one"]
    greedy, drawn, groups = report["one"]
    assert len(greedy) == len(drawn) == 21 and greedy != drawn
    assert len(groups) == 48 and len({*map(tuple, groups)}) > 40  # a few end at once
    assert {len(ids) for ids in greedy} == {12}


def measure() -> dict[str, Any]:
    """(greedy, drawn, groups') answers by case; the drawn ones end at a stop token."""
    import jax
    import numpy as np
    from flax import nnx

    from jaxsft.gemma import decode as sample
    from jaxsft.gemma import lora
    from jaxsft.gemma.architecture import GLOBAL, LOCAL, PRESETS
    from jaxsft.gemma.model import Gemma
    from jaxsft.gemma.sharding import make_mesh, state_shardings

    config = dataclasses.replace(
        PRESETS["gemma-3-1b"],
        vocab_size=96,
        d_model=16,
        d_ff=24,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        layer_types=(LOCAL, GLOBAL, LOCAL),  # a scanned pair and a tail
        max_positions=64,
        sliding_window=6,
    )
    model = Gemma(config, rngs=nnx.Rngs(0))
    lora.inject(model, rank=3, alpha=7.0, rngs=nnx.Rngs(1))
    graphdef, adapter, frozen = lora.split(model)
    rng = np.random.default_rng(0)
    adapter = jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(x.dtype), adapter)
    # 21 prompts in batches of five, which eight devices make sixteen.
    prompts = [rng.integers(4, 96, length).tolist() for length in rng.integers(1, 32, 21)]
    greedy = sample.SamplingOptions(batch_size=5, max_new_tokens=12)
    drawn = dataclasses.replace(greedy, temperature=1.0, top_k=20, top_p=0.9)
    untruncated = dataclasses.replace(drawn, top_k=0, top_p=1.0)
    report = {}
    for case, shape in CASES.items():
        mesh, placed = None, (adapter, frozen)
        if shape is not None:
            mesh = make_mesh(*shape)
            placed = tuple(jax.device_put(x, state_shardings(x, mesh)) for x in placed)
        report[case] = [
            [
                answer.ids
                for answer in sample.generate(
                    *(graphdef, *placed, prompts[:num_prompts]),
                    options=options,
                    stop_ids=stop_ids,
                    group_size=group_size,
                    mesh=mesh,
                )
            ]
            # Eight devices share a group of 16: each prefills its prompt for two rows.
            for options, stop_ids, num_prompts, group_size in (
                (greedy, (96,), 21, 1),
                (drawn, (5, 6, 7), 21, 1),
                (untruncated, (5, 6, 7), 3, 16),
            )
        ]
        if mesh is not None:
            padded, rows = sample._pad(prompts, range(8), jax.random.key(0))
            program = sample._Program(graphdef, greedy, mesh)
            _, cache = sample._prefill(*placed, padded, rows, program)
            (shard, *_), kv = cache.kv_L2BSKH.addressable_shards, cache.kv_L2BSKH
            assert 8 * shard.data.size == kv.size and shard.data.shape[2] == 1
    return report


if __name__ == "__main__":
    print(json.dumps(measure()))
