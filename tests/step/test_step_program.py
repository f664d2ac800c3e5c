"""What the compiler makes of the fused step on a TPU v5e-8: a two-layer twin of full width.

Compiled ahead of time, in a subprocess because libtpu reads its environment once.
"""

import json
from typing import Any

import pytest
from support.other_devices import report_of

from jaxsft.plan.tpu_aot import AOT_ENVIRONMENT
from jaxsft.step.fused_weights import group_adapter

NUM_LAYERS = 2
D, F, RANK = 2304, 9216, 64


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    return report_of(__file__, AOT_ENVIRONMENT)


def test_collectives_are_outside_all_loops(program: dict[str, Any]) -> None:
    """Each adapter array is gathered once and its gradient reduced once; the rest is scalars."""
    assert not any(program["collective_is_in_loop"])
    numbers = program["numbers_moved"]
    assert numbers["all-gather"] == program["num_adapter_params"]
    # Of what is reduced, the loss, the token count and the gradient's norm are scalars.
    reduced = 8 * numbers["reduce-scatter"] + numbers["all-reduce"]
    assert program["num_adapter_params"] <= reduced <= program["num_adapter_params"] + 8
    assert set(numbers) == {"all-gather", "reduce-scatter", "all-reduce"}


def test_no_frozen_weight_has_a_gradient(program: dict[str, Any]) -> None:
    """A gradient would be an array of a weight's shape that a matmul over the tokens makes."""
    forbidden = {tuple(shape) for shape in program["frozen_shapes"]}
    # Gate with and without the adapter's rows, both orders, of one layer and of both.
    assert {(D, F), (D + 128, F), (F, D + 128), (NUM_LAYERS, D + 128, F)} <= forbidden
    found = {tuple(shape) for shape in program["matmul_shapes"]}
    assert (1024, F) in found  # the gate of a row of tokens
    assert not forbidden & found


def test_it_recomputes_no_matmul(program: dict[str, Any]) -> None:
    """By scope, and by the count of all FLOPs: up again would be 3% more of them."""
    assert program["recomputed_matmul_flops"] == 0
    assert program["matmul_flops"] / program["needed_flops"] == pytest.approx(1, abs=0.005)


def test_it_holds_what_it_must_and_everything_is_priced(program: dict[str, Any]) -> None:
    """Logits of one chunk, or a second copy of the embedding, would be 1 GiB more."""
    assert 0 < program["hbm_bytes"] - program["argument_bytes"] < 0.5 * 2**30  # 0.26
    assert sum(program["unpriced_bytes"]) < 1e6


def frozen_shapes(arguments: Any) -> set[tuple[int, ...]]:
    """Of the frozen matrices: with and without the adapter's rows or columns (128 or 256), one
    layer's or all stacked, both orders."""
    import jax

    found: set[tuple[int, ...]] = set()
    for path, x in jax.tree.leaves_with_path(arguments.frozen):
        if x.ndim < 2 or "norm" in jax.tree_util.keystr(path):
            continue
        rows, columns = x.shape[-2:]
        for pads in (0, 128, 256):
            for shape in ((rows - pads, columns), (rows, columns - pads)):
                for order in (shape, shape[::-1]):
                    found |= {order, (*x.shape[:-2], *order)}
    return found


def needed_flops(arguments: Any) -> float:
    """One chip's matmul FLOPs outside the attention kernels with nothing computed twice: every
    padded matrix forward and by its input, every padded adapter factor by its input, forward and by
    itself, the head's logits and their gradient.

    A factor that rides in a matrix's pads costs nothing more forward and by its input.
    """
    import jax

    spec, batch = arguments.spec, arguments.batch.tokens_BT
    num_tokens = batch.size // spec.model.mesh.size
    layer: dict[str, Any] = arguments.frozen["stacks"][0][0]
    (grouped,) = jax.eval_shape(
        lambda adapter: group_adapter(adapter, spec.model.fused.layout), arguments.state.adapter
    )[0]
    matrices = sum(layer[name].size for name in ("qkv", "o", "gate", "up", "down"))
    inputs = sum(grouped[name].size for name in ("qkv_a", "o_a", "mlp_a", "down_b"))
    factors = sum(x.size for x in jax.tree.leaves(grouped))
    head = arguments.frozen["embedding"].size
    return num_tokens * (4 * matrices + 4 * inputs + 2 * factors + 4 * head)


def measure() -> dict[str, Any]:
    """Compiles the step and describes the program."""
    import dataclasses
    import math
    import re

    import jax

    from jaxsft.cli import parse_config
    from jaxsft.gemma.architecture import PRESETS
    from jaxsft.plan.chips import CHIPS
    from jaxsft.plan.hlo import parse_program
    from jaxsft.plan.pricing import COLLECTIVES, price_program
    from jaxsft.plan.tpu_aot import Compiled, compile_for_tpu, topology_devices
    from jaxsft.run.program import abstract_setup, lower_step, num_bytes_per_device

    # Rows of 1024: of 2048, the activations would have the shape of o_proj's weight.
    options = ["--config", "single_session", "--data.max_length", "1024"]
    config, _ = parse_config("test", "", options)
    preset = PRESETS["gemma-2-2b"]
    twin = dataclasses.replace(preset, layer_types=preset.layer_types[:NUM_LAYERS])
    arguments = abstract_setup(config, twin, topology_devices("v5e:2x4"), steps=100)
    compiled = compile_for_tpu(lower_step(arguments))
    assert isinstance(compiled, Compiled)
    program = parse_program(compiled.hlo_text)
    shapes = {
        tuple(size for size in array.dims if size > 1)
        for computation in program.computations.values()
        for instruction in computation.values()
        if instruction.opcode in ("dot", "convolution")
        for array in instruction.arrays
    }
    # The kernels' own time doesn't matter here.
    kernels = re.findall(r"%(\S+) = .*custom_call_target=\"tpu_custom_call\"", compiled.hlo_text)
    priced = price_program(
        compiled.hlo_text, CHIPS["v5e"], dict.fromkeys(kernels, 0.0), {"loss_head": 1}
    )
    moved: dict[str, int] = {}
    for computation in program.computations.values():
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                numbers = sum(math.prod(array.dims) for array in instruction.arrays)
                moved[kind] = moved.get(kind, 0) + numbers
    adapter = jax.tree.leaves(arguments.state.adapter)
    return {
        "collective_is_in_loop": [op.in_loop for op in priced.collectives],
        "numbers_moved": moved,
        "num_adapter_params": sum(math.prod(x.shape) for x in adapter),
        "matmul_shapes": sorted(shapes),
        "matmul_flops": priced.matmul_flops,
        "recomputed_matmul_flops": priced.recomputed_matmul_flops,
        "needed_flops": needed_flops(arguments),
        "frozen_shapes": sorted(frozen_shapes(arguments)),
        "hbm_bytes": compiled.memory.total,
        "argument_bytes": num_bytes_per_device((arguments.state, arguments.frozen)),
        "unpriced_bytes": [op.num_bytes for op in priced.unpriced],
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
