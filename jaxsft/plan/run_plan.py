"""The plan of a run: the estimate of its step, the number of steps, hours, FLOPs and MFU."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxsft.config import TrainConfig
from jaxsft.data.packing import num_steps
from jaxsft.gemma.architecture import GemmaConfig
from jaxsft.gemma.lora import resolve_targets
from jaxsft.plan.chips import CHIPS, GIB
from jaxsft.plan.estimate import CALIBRATION, StepEstimate, num_loss_chunks
from jaxsft.plan.workload import Workload, count_work, fit_lengths
from jaxsft.run.program import fused_obstacles

PACKED, UNPACKED = "packed", "one sample a row"


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs that the formulas of one step need, over all chips; every position bears loss.

    `base` is the convention of LoRA-MFU: the forward pass and the activation gradients of frozen
    weights and attention (4N + attention; 11.1 GFLOP a token for Gemma 2 2B at 2048). `total` adds
    the adapters: forward pass, activation gradients and weight gradients.
    """

    base: float
    total: float


def model_flops(config: TrainConfig, model_config: GemmaConfig) -> ModelFlops:
    """FLOPs of a step of `config`, by GemmaConfig.lora_step_flops."""
    num_tokens = config.global_batch_size * config.data.max_length
    targets = resolve_targets(config.lora.target_modules)

    def flops(lora_params: int) -> float:
        return model_config.lora_step_flops(
            num_tokens=num_tokens,
            num_loss_tokens=num_tokens,
            row_length=config.data.max_length,
            lora_params=lora_params,
        )

    return ModelFlops(flops(0), flops(model_config.lora_params(config.lora.r, targets)))


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """A config on a TPU slice.

    `steps` is None where it depends on data that is not given. `steps_are_exact` is false where the
    number is guessed from lengths or a range of rows: it decides the schedule, and so the program's
    hash. `workloads` has the keys PACKED and UNPACKED, none without data. `source` says where the
    architecture was read.
    """

    config: TrainConfig
    model_config: GemmaConfig
    source: str
    estimate: StepEstimate
    steps: int | None
    workloads: dict[str, Workload]
    steps_are_exact: bool = True

    @property
    def packing(self) -> str:
        """The workload of this config: PACKED or UNPACKED."""
        return PACKED if self.config.data.packing else UNPACKED

    @property
    def loss_share(self) -> float:
        """Share of all row positions that bear loss, 0 to 1; 1 without data."""
        return self.workloads[self.packing].loss_share if self.workloads else 1.0

    def seconds_at(self, loss_share: float) -> float:
        """Seconds of a step where this share of the positions of each micro-batch bears loss."""
        saved = 1 - self.chunk_share(loss_share)
        return self.estimate.seconds - self.estimate.parts["loss head"] * saved

    def chunk_share(self, loss_share: float) -> float:
        """Share of the loss head's chunks that run, 0 to 1. Chunks are whole: where one chunk holds
        the micro-batch, any position with loss costs the full time."""
        num_chips = self.estimate.num_chips
        num_run = num_loss_chunks(self.config, num_chips, loss_share)
        return num_run / num_loss_chunks(self.config, num_chips)

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part with the run's own share of loss positions."""
        parts, share = self.estimate.parts, self.chunk_share(self.loss_share)
        return parts and parts | {"loss head": parts["loss head"] * share}

    @property
    def seconds_per_step(self) -> float:
        """The sum of `parts`."""
        return self.seconds_at(self.loss_share)

    @property
    def formulation(self) -> str:
        """How the step is computed: fused or plain."""
        is_plain = self.config.step == "plain" or self.fused_obstacles
        return "plain" if is_plain else "fused"

    @property
    def fused_obstacles(self) -> list[str]:
        """Properties of the config and the model that the fused step does not support."""
        return fused_obstacles(self.config, self.model_config, "tpu")

    @property
    def hours(self) -> float | None:
        """Hours of all steps; None where their number is not known or the step does not fit."""
        if self.steps is None or not self.estimate.fits:
            return None
        return self.steps * self.seconds_per_step / 3600

    @property
    def is_over_budget(self) -> bool:
        """Does the run take longer than budget_hours, as far as known?"""
        hours, budget = self.hours, self.config.budget_hours
        return hours is not None and budget is not None and hours > budget

    @property
    def flops(self) -> ModelFlops:
        """FLOPs of one step."""
        return model_flops(self.config, self.model_config)

    @property
    def compiled_ratio(self) -> float:
        """FLOPs of the compiled matmuls over those that the formulas need."""
        return self.estimate.matmul_flops / self.flops.total

    @property
    def lora_mfu(self) -> float:
        """Model FLOPs (`base`) per second over the chips' bf16 peak; every position bears loss."""
        peak = CHIPS[self.estimate.chip].peak_flops * self.estimate.num_chips
        return self.flops.base / (self.estimate.seconds * peak)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON values; units are in the names."""
        estimate, flops = self.estimate, self.flops
        names = "lora_mfu", "compiled_over_model_flops", "recomputed_matmul_share"
        of_time: dict[str, float | None] = dict.fromkeys((*names, "loss_head_seconds"))
        if estimate.fits:
            of_time = {
                "lora_mfu": self.lora_mfu,
                "compiled_over_model_flops": self.compiled_ratio,
                "recomputed_matmul_share": estimate.recomputed_flops / estimate.matmul_flops,
                "loss_head_seconds": estimate.parts["loss head"],
            }
        return {
            "is_estimate": True,
            "calibration": CALIBRATION,
            "topology": estimate.topology,
            "num_chips": estimate.num_chips,
            "formulation": self.formulation,
            "fits": estimate.fits,
            "estimated_seconds_per_step": self.seconds_per_step if estimate.fits else None,
            "hours": self.hours,
            "budget_hours": self.config.budget_hours,
            "steps": self.steps,
            "parts": self.parts,
            "hbm_gib_per_chip": estimate.hbm_total_gib if estimate.hbm_bytes else None,
            "hbm_gib_by_kind": {k: v / GIB for k, v in estimate.hbm_bytes.items()},
            "hbm_gib_limit": estimate.hbm_limit_bytes / GIB,
            "model_flops": flops.total,
            "model_flops_without_adapters": flops.base,
            "compiled_matmul_flops": estimate.matmul_flops,
            **of_time,
            "collectives": estimate.collectives,
            "largest_ops": estimate.largest_ops,
            "unpriced": estimate.unpriced,
            "assumptions": estimate.assumptions,
            "loss_share": self.loss_share,
            "workloads": {name: work._asdict() for name, work in self.workloads.items()},
            "program_hash": estimate.program_hash,
            "steps_are_exact": self.steps_are_exact,
            "compiler_options": estimate.compiler_options,
            "compiler": estimate.compiler,
            "compile_seconds": estimate.compile_seconds,
        }


def count_workloads(
    config: TrainConfig, lengths: Sequence[int], num_loss_tokens: int | None = None
) -> dict[str, Workload]:
    """The run's workload, and that of the same samples with the other choice of packing.

    With `max_steps` both take as many epochs as that number is with the config's own choice.
    """
    options, rows = config.data, config.global_batch_size
    fitting = fit_lengths(lengths, options.max_length, options.overlong)

    def count(packing: bool, epochs: float) -> Workload:
        return count_work(
            fitting,
            row_length=options.max_length,
            packing=packing,
            global_batch_size=rows,
            epochs=epochs,
            num_loss_tokens=num_loss_tokens,
        )

    own = count(options.packing, config.num_train_epochs)
    epochs = config.num_train_epochs
    if config.max_steps:
        epochs = config.max_steps * rows / own.num_rows
        own = own._replace(num_steps=config.max_steps)
    other = count(not options.packing, epochs)
    names = (PACKED, UNPACKED) if options.packing else (UNPACKED, PACKED)
    return dict(zip(names, (own, other), strict=True))


def steps_without_data(config: TrainConfig) -> int | None:
    """Steps by the config alone: its max_steps, or its range of rows without packing; or None."""
    if config.max_steps:
        return config.max_steps
    if config.data.stop is None or config.data.packing:
        return None
    num_rows = config.data.stop - config.data.start
    return num_steps(num_rows, config.num_train_epochs, config.global_batch_size)
