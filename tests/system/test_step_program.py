"""What the compiler makes of the fused step on a TPU v5e-8: a two-layer twin of full width.

Compiled ahead of time, in a subprocess because libtpu reads its environment once.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from jaxsft.planning.tpu_aot import AOT_ENVIRONMENT

NUM_LAYERS = 2
D, F, RANK = 2304, 9216, 64


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    environment = {**os.environ, **AOT_ENVIRONMENT}
    child = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


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
    assert program["matmul_shapes"]
    frozen = {(D, F), (F, D), (D, 4096), (2048, D), (256_000, D), (D, 256_000)}
    frozen |= {(rows + 128, columns) for rows, columns in frozen}
    assert not frozen & {tuple(shape) for shape in program["matmul_shapes"]}


def test_it_recomputes_no_matmul(program: dict[str, Any]) -> None:
    assert program["recomputed_matmul_flops"] <= 0.05 * program["matmul_flops"]


def test_it_fits_and_everything_is_priced(program: dict[str, Any]) -> None:
    assert 0 < program["hbm_gib"] < 14.5
    assert sum(program["unpriced_bytes"]) < 1e6


def measure() -> dict[str, Any]:
    """Compiles the step and describes the program."""
    import dataclasses
    import math
    import re

    import jax

    from jaxsft.cli import parse_config
    from jaxsft.planning.hlo_price import COLLECTIVES
    from jaxsft.planning.hlo_text import parse_program
    from jaxsft.planning.pricing import CHIPS, price_program
    from jaxsft.planning.tpu_aot import Compiled, compile_for_tpu, topology_devices
    from jaxsft.presets import PRESETS
    from jaxsft.program import COMPILER_OPTIONS, abstract_setup, lower_step

    # Rows of 1024: of 2048, the activations would have the shape of o_proj's weight.
    options = ["--config", "single_session", "--data.max_length", "1024"]
    config, _ = parse_config("test", "", options)
    preset = PRESETS["gemma-2-2b"]
    twin = dataclasses.replace(preset, layer_types=preset.layer_types[:NUM_LAYERS])
    arguments = abstract_setup(config, twin, topology_devices("v5e:2x4"), steps=100)
    compiled = compile_for_tpu(lower_step(arguments), dict(COMPILER_OPTIONS))
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
        "hbm_gib": compiled.memory.total / 2**30,
        "unpriced_bytes": [op.num_bytes for op in priced.unpriced],
    }


if __name__ == "__main__":
    print(json.dumps(measure()))
