"""What the compiler makes of decoding from training's state on a TPU v5e-8: a four-layer twin.

Compiled ahead of time, in a subprocess because libtpu reads its environment once.
"""

import json
from typing import Any

import pytest
from support.other_devices import report_of

from jaxsft.plan.tpu_aot import AOT_ENVIRONMENT

NUM_LAYERS = 4
NUM_PROMPTS, PROMPT_LENGTH = 8, 64


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    return report_of(__file__, AOT_ENVIRONMENT)


def test_nothing_is_gathered_for_a_token(program: dict[str, Any]) -> None:
    """Training keeps a shard of the adapter on every chip; decoding gathers it once, not each
    token. Whether all rows have stopped is asked in the loop's condition."""
    assert program["collectives_in_body"] == []


def test_neither_cache_nor_weights_are_copied_for_a_token(program: dict[str, Any]) -> None:
    """With one row a chip, q_proj of every layer is laid out anew: 9.4 MB. Of two rows, one token's
    keys and values are 16 KiB."""
    assert program["cache_bytes"] > 10e6
    assert 0 < program["largest_copy_in_body_bytes"] <= 16 * 2**10


def test_matmuls_read_bfloat16(program: dict[str, Any]) -> None:
    assert program["matmul_dtypes"] == ["bf16"]


def measure() -> dict[str, Any]:
    """Compiles decoding for `train`'s weights and adapter, and describes the program."""
    import dataclasses
    import math
    from collections.abc import Iterator
    from functools import partial

    import jax
    import jax.numpy as jnp

    from jaxsft.cli import parse_config
    from jaxsft.gemma import decode as sample
    from jaxsft.gemma.architecture import PRESETS
    from jaxsft.gemma.sharding import named
    from jaxsft.plan.hlo import Instruction, parse_program
    from jaxsft.plan.pricing import COLLECTIVES
    from jaxsft.plan.tpu_aot import Compiled, compile_for_tpu, topology_devices
    from jaxsft.run.program import abstract_setup

    config, _ = parse_config("test", "", ["--config", "single_session"])
    preset = PRESETS["gemma-2-2b"]
    layers = preset.layer_types[:NUM_LAYERS]
    twin = dataclasses.replace(preset, layer_types=layers, vocab_size=8192)
    arguments = abstract_setup(config, twin, topology_devices("v5e:2x4"), steps=100)
    mesh, adapter = arguments.spec.model.mesh, arguments.state.adapter
    struct = partial(jax.tree.map, lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s))
    weights, options = arguments.frozen, sample.SamplingOptions(8, 768)
    assert arguments.spec.model.fused is not None
    num_rows = sample.generation_batch_size(options, NUM_PROMPTS, mesh)
    prompts = sample._pad([[0] * PROMPT_LENGTH], [0] * num_rows, jax.random.key(0))
    padded, rows = jax.eval_shape(lambda: prompts)
    program = sample._Program(arguments.spec.model.builder, options, mesh)
    drawn, cache = jax.eval_shape(
        partial(sample._prefill, program=program), adapter, weights, padded, rows
    )
    kv = struct(cache.kv_L2BSKH, named(mesh, None, None, "batch", None, None, None))
    stops = jax.ShapeDtypeStruct((2,), jnp.int32)
    compiled = compile_for_tpu(
        sample._decode.lower(
            adapter, weights, cache._replace(kv_L2BSKH=kv), drawn, rows, stops, program
        )
    )
    assert isinstance(compiled, Compiled)
    hlo = parse_program(compiled.hlo_text)

    def instructions(computation: str) -> Iterator[Instruction]:
        for instruction in hlo.computations[computation].values():
            yield instruction
            if instruction.opcode in ("while", "call"):
                yield from instructions(
                    instruction.called("body") or instruction.called("to_apply")
                )

    (loop,) = (each for each in hlo.computations[hlo.entry].values() if each.opcode == "while")
    body = list(instructions(loop.called("body")))
    return {
        "collectives_in_body": [
            each.name for each in body if each.opcode.removesuffix("-start") in COLLECTIVES
        ],
        "largest_copy_in_body_bytes": max(
            array.num_bytes
            for each in body
            if each.opcode in ("copy", "transpose")  # copy-start fetches ahead, into VMEM
            for array in each.arrays
        ),
        "matmul_dtypes": sorted(
            {
                computation[operand].arrays[0].dtype
                for computation in hlo.computations.values()
                for each in computation.values()
                if each.opcode in ("dot", "convolution")
                for operand in each.operands[:2]
            }
        ),
        "cache_bytes": kv.dtype.itemsize * math.prod(kv.sharding.shard_shape(kv.shape)),
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
