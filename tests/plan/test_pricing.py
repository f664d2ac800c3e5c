"""Prices of compiled TPU programs, on programs small enough to count by hand."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxsft.plan.chips import CHIPS
from jaxsft.plan.hlo import parse_program, parse_shape
from jaxsft.plan.kernels import find_kernels, price_kernels
from jaxsft.plan.llo import schedule
from jaxsft.plan.pricing import Priced, collective_seconds, matmuls, price_program
from jaxsft.plan.tpu_aot import (
    AOT_ENVIRONMENT,
    Compiled,
    OutOfMemory,
    compile_for_tpu,
    parse_out_of_memory,
    topology_devices,
)

V5E = CHIPS["v5e"]  # 1.5 GHz, 819 GB/s of HBM, 50 GB/s a link
HAND_COUNTED = (Path(__file__).parents[1] / "support" / "golden" / "hand_counted.hlo").read_text()


@pytest.fixture
def priced() -> Priced:
    return price_program(HAND_COUNTED, V5E, {"kernel": 1e-6}, {"loss_head": 4})


def test_loops_multiply(priced: Priced):
    # The outer loop runs 3 times, the inner one 5: its limit is a constant carried through the
    # outer one. The third depends on data and runs as often as the caller says.
    trips = {op.name: op.trips for op in priced.ops}
    assert trips["matmul"] == 3 and trips["kernel"] == 15 and trips["tanh"] == 4
    assert priced.parts["attention"] == pytest.approx(15 * 1e-6)
    assert priced.parts["loss head"] == pytest.approx(4 * 750 / 1.5e9)
    assert priced.unknown_loops == []


def test_unknown_loop_counts_once_and_is_listed():
    priced = price_program(HAND_COUNTED, V5E, {}, {"some_other_scope": 9})
    assert priced.parts["loss head"] == pytest.approx(750 / 1.5e9)
    assert priced.unknown_loops == ["data (jit(step)/loss_head/while)"]


def test_matmul_decides_its_fusion_part(priced: Priced):
    # Its own scope is norm's; the matmul in it is recomputed: 3 × 2 × 8 × 128 × 128 FLOPs.
    assert priced.parts["recomputation"] == pytest.approx(3 * 3000 / 1.5e9)
    assert priced.parts["norm"] == 0
    assert priced.matmul_flops == priced.recomputed_matmul_flops == 3 * 2 * 8 * 128 * 128


def test_ops_without_price_are_listed(priced: Priced):
    assert [(op.name, op.opcode, op.trips, op.num_bytes) for op in priced.unpriced] == [
        ("sorted", "sort", 3, 8 * 128 * 4)
    ]
    without_kernel = price_program(HAND_COUNTED, V5E, {}, {})
    assert [(op.name, op.trips) for op in without_kernel.unpriced] == [
        ("kernel", 15),
        ("sorted", 3),
    ]


def test_transfers_hide_behind_what_is_scheduled_beside_them(priced: Priced):
    ops = {op.name: op for op in priced.ops}
    # Gathering 64 × 128 × 4 bytes in a ring of 8: 7/8 of it over two links, 0.28672 µs, of which
    # a fusion of 150 cycles, 0.1 µs, hides a part.
    gather = ops["gather-start"]
    assert gather.seconds == pytest.approx(32768 * 7 / 8 / 100e9)
    assert gather.seconds - gather.exposed_s == pytest.approx(0.1e-6)
    # A copy of 1000 × 1000 bf16, padded to 1000 × 1024, reads HBM only: 2.5006 µs. It started with
    # the gather, which ends after 0.28672 µs; the add hides another 1 µs.
    copy = ops["copy-start"]
    assert copy.seconds == pytest.approx(1000 * 1024 * 2 / 819e9)
    assert copy.seconds - copy.exposed_s == pytest.approx(0.28672e-6 + 1e-6)
    # The sum over 4 of the 8 chips: 2 × 3/4 of 4096 bytes over one link, nothing beside it.
    assert ops["sum"].exposed_s == ops["sum"].seconds == pytest.approx(1.5 * 4096 / 50e9)
    assert [(op.opcode, op.in_loop) for op in priced.collectives] == [
        ("all-gather", False),
        ("all-reduce", False),
    ]


def test_parts_add_up(priced: Priced):
    assert priced.parts["optimizer"] == pytest.approx(1e-6)
    exposed_copy = 1000 * 1024 * 2 / 819e9 - 1.28672e-6
    assert priced.parts["copies"] == pytest.approx(0.1e-6 + exposed_copy)
    assert priced.parts["collectives"] == pytest.approx(0.18672e-6 + 0.12288e-6)
    by_hand = 6e-6 + 15e-6 + 2e-6 + 0.1e-6 + 0.18672e-6 + 1e-6 + exposed_copy + 0.12288e-6
    assert priced.seconds == pytest.approx(by_hand)
    assert sum(priced.parts.values()) == pytest.approx(priced.seconds)


def test_kernel_gets_the_words_of_constant_operands():
    (kernel,) = find_kernels(parse_program(HAND_COUNTED))
    assert [array.dims for array in kernel.operands] == [(2, 2), (8, 128)]
    assert '"operand_index": 1, "color": 0' in kernel.config  # x in HBM, the result in VMEM
    assert '"output_memory_space_colors": [{"color": 1}]' in kernel.config
    # s8 [[1, 2], [3, -1]] in tiles of 4 × 128: the rows of a column share a word.
    assert list(kernel.words) == [0]
    assert kernel.words[0] == [0x0301, 0xFF02] + [0] * 126


def test_bytes_of_shapes():
    (plain, padded, in_vmem, scalar) = parse_shape(
        "(s8[4,3]{1,0}, bf16[3,65]{1,0:T(8,128)(2,1)}, f32[64,8]{0,1:T(8,128)S(1)}, s32[])"
    )
    assert (plain.num_bytes, padded.num_bytes, scalar.num_bytes) == (12, 8 * 128 * 2, 4)
    # Dimension 0 is the minor one here: 64 padded to 128 lanes.
    assert (in_vmem.num_bytes, in_vmem.memory_space) == (8 * 128 * 4, 1)


def test_batched_matmul_flops():
    # XLA writes 4 matmuls of 8 × 32 × 16 as a convolution over a dilated batch dimension: of the
    # 4 × 4 pairs of output and window position 4 meet an input.
    text = """HloModule m

ENTRY %main (a: bf16[4,8,32], b: bf16[4,32,16]) -> bf16[4,8,16] {
  %a = bf16[4,8,32] parameter(0)
  %b = bf16[4,32,16] parameter(1)
  ROOT %c = bf16[4,8,16] convolution(%a, %b), window={size=4 stride=3 lhs_dilate=4},
    dim_labels=0bf_0io->0bf
}
"""
    program = parse_program(text)
    computation = program.computations["main"]
    ((_, flops),) = matmuls(program, computation, computation["c"])
    assert flops == 4 * 2 * 8 * 32 * 16


@pytest.mark.parametrize(
    ("opcode", "group", "crossings"),
    [
        ("all-gather", 8, 7 / 8 / 2),
        ("reduce-scatter", 8, 7 / 8 / 2),
        ("all-reduce", 8, 7 / 4 / 2),
        ("all-to-all", 8, 2 / 2),
        ("collective-permute", 8, 1.0),
        ("all-reduce", 2, 1.0),  # part of the chips: one link
    ],
)
def test_collective_seconds(opcode: str, group: int, crossings: float):
    seconds = collective_seconds(opcode, 50_000_000, group, num_chips=8, chip=V5E)
    assert seconds == pytest.approx(1e-3 * crossings)


# Four iterations; in those whose prefetched word isn't 0, two bf16 `vmatmul`s on one matrix unit
# and a DMA of 4 granules. Branches take effect four bundles later.
BUNDLES = """
   0   :  { %s1_s0 = inlined_call_operand.hbm [shape: s32[4], index: 0, kind: input] }
   0x1   :  { %2 = dma.hbm_to_smem /*hbm=*/%s1_s0, /*size_in_granules=*/1, /*smem=*/[#allocation2],
/*dst_syncflagno=*/[#allocation3]  ;;  %s3_s1 = smov 0 /* copy for cssa */ }
   0x2 LB: > { %s5_s2 = sld [smem:[#allocation2 + %s4_s1]]  ;;
%s4_s1 = sphi %s3_s1, %s9_s1 /* phi copy */ } /* Start region 5 */
   0x3   : > { %p6_p0 = scmp.eq.s32.totalorder %s5_s2, 0 }
   0x4   : > { %s9_s1 = sadd.s32 1, %s4_s1  ;;  %7 = sbr.rel (%p6_p0) target = $region8 }
   0x5   :  {}
   0x6   :  {}
   0x7   :  {}
   0x8   :  {}
   0x9   : > { %10 = vmatmul.bf16.gmra.mxu0 %v1_v0 }
   0xa   : > { %11 = vmatmul.bf16.gmra.mxu0 %v2_v1 }
   0xb PF: > { %p12_p1 = scmp.ge.s32.totalorder %s9_s1, 4  ;;
%13 = dma.vmem_to_hbm [thread:$0]  (!%p6_p0), /*vmem=*/[#allocation4],
/*size_in_granules=*/4, /*hbm=*/%s1_s0 /*
base_bounds: (4) */ } /* Start/End empty region 8 */
   0xc   : > { %14 = sbr.rel (!%p12_p1) target = $region5 }
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
   0x10   :  {}
   0x11   :  {} /* End region 5 */
"""


def test_kernel_schedule_runs_its_scalar_code():
    # Bundles 0-1 once, 2-8 and 0xb-0x10 four times, 0x11 once: 55. The pair of vmatmuls, 16 cycles
    # each after the cycle in which the first starts, 33, where the word isn't 0.
    some = schedule(BUNDLES, 1, {0: [1, 0, 2, 0]})
    assert (some.cycles, some.mxu_rows) == (55 + 2 * 33, 2 * 32)
    assert some.hbm_bytes == 32 + 2 * 4 * 32
    assert some.assumptions == ()


def test_kernel_schedule_assumes_that_unknown_regions_run():
    unknown = schedule(BUNDLES, 1, {})
    assert unknown.cycles == 55 + 4 * 33
    assert unknown.hbm_bytes == 32 + 4 * 4 * 32
    assert unknown.assumptions == (
        "a DMA is always issued",
        "a conditional region always runs (bundle 0x2)",
    )


def test_out_of_memory_messages():
    hbm = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (28.75G) exceeds available HBM (15.75G)."
    )
    assert parse_out_of_memory(hbm) == OutOfMemory("hbm", int(28.75 * 2**30), int(15.75 * 2**30))
    vmem = "RESOURCE_EXHAUSTED: ... in memory space vmem. Used 256.00M of 128.00M vmem. Exceeded"
    assert parse_out_of_memory(vmem) == OutOfMemory("vmem", 256 * 2**20, 128 * 2**20)
    assert parse_out_of_memory("INTERNAL: Mosaic failed to compile") is None


def test_unknown_topology_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'v5e:3x3' is not one of v5e:1x1, v5e:2x2"):
        topology_devices("v5e:3x3")


@pytest.fixture
def tpu_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AOT_ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def lower(function, devices, *shapes: tuple[int, ...]) -> jax.stages.Lowered:
    sharding = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec())
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding) for shape in shapes]
    return jax.jit(function).lower(*arguments)


@pytest.mark.usefixtures("tpu_compiler")
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5e:4x4", "v6e:2x4"])
def test_scan_of_matmuls_compiled_for_a_tpu(topology: str):
    def layers(x_BD, w_LDD):
        with jax.named_scope("mlp"):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0]

    shapes = (1024, 2048), (7, 2048, 2048)
    compiled = compile_for_tpu(lower(layers, topology_devices(topology), *shapes))
    assert isinstance(compiled, Compiled)
    assert compiled.memory.arguments == 2 * (1024 * 2048 + 7 * 2048 * 2048)
    chip = CHIPS[topology.split(":")[0]]
    priced = price_program(compiled.hlo_text, chip, {}, {})
    flops = 7 * 2 * 1024 * 2048 * 2048
    assert priced.matmul_flops == flops
    assert {op.trips for op in priced.ops if op.matmul_flops} == {7}
    assert priced.unpriced == [] and priced.unknown_loops == []
    assert flops / chip.peak_flops < priced.parts["mlp"] < 2 * flops / chip.peak_flops


@pytest.mark.usefixtures("tpu_compiler")
def test_kernel_schedule_of_a_pallas_matmul(tmp_path: Path):
    def kernel(x_ref, w_ref, y_ref):
        y_ref[...] = jnp.dot(x_ref[...], w_ref[...], preferred_element_type=jnp.float32).astype(
            jnp.bfloat16
        )

    def matmul(x_MK, w_KN):
        return pl.pallas_call(
            kernel,
            grid=(2, 2),
            in_specs=[
                pl.BlockSpec((512, 1024), lambda i, j: (i, 0)),
                pl.BlockSpec((1024, 512), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((512, 512), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((1024, 1024), jnp.bfloat16),
        )(x_MK, w_KN)

    device = topology_devices("v5e:2x4")[0]
    compiled = compile_for_tpu(lower(matmul, [device], (1024, 1024), (1024, 1024)))
    assert isinstance(compiled, Compiled)
    arguments = compiled.hlo_text, V5E, "v5e:2x4", tmp_path
    ((name, price),) = price_kernels(*arguments, dict(os.environ)).items()
    # Four 128 × 128 matrix units take 1024³ multiplications in 16,384 cycles; a block of x is
    # fetched once for its two blocks of y, one of w for each: (2 + 2 × 2 + 2) MiB.
    assert price.matmul_flops == 2 * 1024**3
    assert 16_384 < price.cycles < 1.25 * 16_384
    assert price.assumptions == ()
    # The second time nothing is compiled: an environment without libtpu's settings is enough.
    assert price_kernels(*arguments, {})[name] == price
    assert price_program(compiled.hlo_text, V5E, {name: price.seconds}, {}).unpriced == []


@pytest.mark.usefixtures("tpu_compiler")
def test_too_large_a_program_says_how_much_it_needs():
    devices = topology_devices("v5e:2x4")
    too_large = compile_for_tpu(lower(lambda x: x + 1, devices, (65536, 65536)))
    # 8 GiB in and 8 GiB out, on a chip that leaves 15.75 to programs.
    assert too_large == OutOfMemory("hbm", 16 * 2**30, int(15.75 * 2**30))
