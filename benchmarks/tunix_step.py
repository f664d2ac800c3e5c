"""Tunix's Gemma 2 2B LoRA step priced like ours: the same compiler, topology and rules.

The step is compiled in Tunix's own virtual environment (`peer_tunix_tpu`), once: the program is
kept beside the environment.
"""

import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from benchmarks import peer_venvs
from jaxsft.plan.chips import CHIPS, TOPOLOGIES
from jaxsft.plan.pricing import Priced, PricedOp, price_program
from jaxsft.plan.tpu_aot import AOT_ENVIRONMENT, ProgramMemory

ROOT = Path(__file__).parents[1]
ACCUMULATION_STEPS = 4  # of 8 sequences, one a chip
# Tunix's scopes -> ours. The adapter's matmuls stay with the projections, which stay in attention.
_SCOPES = {
    "feed_forward": "mlp",
    "rms_norm": "norm",
    "embedder_encode": "embedding",
    "embedder_decode": "loss head",
    "log_softmax": "loss head",
    "branch_0_fun": "optimizer",
}
_SOURCES = tuple(ROOT / "benchmarks" / f"{name}.py" for name in ("peer_tunix_tpu", "peer_tunix"))


class TunixStep(NamedTuple):
    """One optimizer step of 32 × 2048 tokens, and the memory of each chip."""

    priced: Priced
    memory: ProgramMemory


def tunix_prices(topology: str, remat: bool, directory: Path = peer_venvs.DEFAULT_DIR) -> TunixStep:
    """Tunix's own step (mesh fsdp × tp = 8 × 1, batch 8, accumulation 4) on an 8-chip topology.

    `remat` is Tunix's per-layer remat. The first call makes the environment in `directory` and
    compiles, minutes each; later ones read the kept program.

    Raises ValueError for another topology, and when the environment or the program cannot be made.
    """
    if topology not in TOPOLOGIES or not topology.endswith(":2x4"):
        raise ValueError(f"topology {topology!r}: Tunix's step is for 8 chips: v5e:2x4 or v6e:2x4")
    program = _compiled(topology, "remat" if remat else "none", directory)
    chip = CHIPS[topology.split(":")[0]]
    micro_step = price_program((program / "program.hlo").read_text(encoding="utf-8"), chip, {}, {})
    step = Priced([], [], [])
    # optax.MultiSteps: the host runs this one program, masked update included, per micro-batch.
    step.add_loop(micro_step, ACCUMULATION_STEPS)
    priced = step._replace(ops=[op._replace(part=_part(op)) for op in step.ops])
    memory = json.loads((program / "memory.json").read_text(encoding="utf-8"))
    return TunixStep(priced, ProgramMemory(**memory))


def _part(op: PricedOp) -> str:
    """The part of the step that an op belongs to, by Tunix's scopes where ours say nothing."""
    if op.part != "other":
        return op.part
    path = re.split(r"[/()]+", op.op_name)
    return next((_SCOPES[scope] for scope in reversed(path) if scope in _SCOPES), "other")


def _compiled(topology: str, remat: str, directory: Path) -> Path:
    """The directory that holds the compiled program; its name depends on all that went into it."""
    requirements = peer_venvs.REQUIREMENTS["tunix"]
    identity = hashlib.sha256(repr((requirements, ProgramMemory._fields)).encode())
    for source in _SOURCES:
        identity.update(source.read_bytes())
    name = f"tunix-{topology.replace(':', '-')}-{remat}-{identity.hexdigest()[:12]}"
    out = directory / "programs" / name
    if (out / "memory.json").exists():  # written last
        return out
    python = peer_venvs.ensure("tunix", requirements, directory)
    out.mkdir(parents=True, exist_ok=True)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
    }
    environment |= AOT_ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    command = [str(python), "-m", "benchmarks.peer_tunix_tpu", topology, remat, str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        raise ValueError(f"Tunix's step does not compile: {lines[-1] if lines else 'no message'}")
    return out
