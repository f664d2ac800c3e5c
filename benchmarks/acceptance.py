"""The recipe's step and what is asked of it on a v5e-8, as numbers."""

from jaxsft.config import TrainConfig
from jaxsft.gemma.lora import resolve_targets
from jaxsft.plan.run_plan import RunPlan
from jaxsft.weights.find import architecture

TOPOLOGY = "v5e:2x4"
# The most that the step may take; shares are 0 to 1.
BOUNDS = (
    (0.85, "{:.3f} s a step"),
    (14.5, "{:.2f} GiB a chip"),
    (0.12, "{:.3f} s of loss head"),
    (0.15, "{:.1%} LoRA overhead"),
    (0.05, "{:.1%} of matmul FLOPs recomputed"),
)


def work_differences(config: TrainConfig, recipe: TrainConfig) -> list[str]:
    """The options by which a step of `config` is other work than one of `recipe`.

    How it is done (micro-batches, rematerialisation, formulation) may differ.
    """

    def work(config: TrainConfig) -> dict[str, object]:
        return {
            "model.path": architecture(config.model.path)[0],
            "model.dtype": config.model.dtype,
            "model.param_dtype": config.model.param_dtype,
            "lora.r": config.lora.r,
            "lora.dropout": config.lora.dropout,
            "lora.target_modules": resolve_targets(config.lora.target_modules),
            "global_batch_size": config.global_batch_size,
            "data.max_length": config.data.max_length,
        }

    wanted = work(recipe)
    return [name for name, value in work(config).items() if value != wanted[name]]


def violations(plan: RunPlan, lora_overhead: float | None, *, is_recipe: bool) -> list[str]:
    """What of the plan is too much, one text each: fit, budget, and BOUNDS of the recipe's work.

    Every position is taken to bear loss, whatever the data is. `lora_overhead`: a share, None where
    it is not known.
    """
    estimate, found = plan.estimate, []
    if not estimate.fits:
        return [f"it does not fit: {estimate.misfit}"]
    if plan.is_over_budget:
        found.append(f"{plan.hours:.2f} h of {plan.config.budget_hours:g}")
    if not is_recipe:
        return found
    recomputed = estimate.recomputed_flops / estimate.matmul_flops
    head = estimate.parts["loss head"]
    values = estimate.seconds, estimate.hbm_total_gib, head, lora_overhead, recomputed
    for value, (bound, text) in zip(values, BOUNDS, strict=True):
        if value is None:
            found.append(f"{text.partition(' ')[2]} is not known")
        elif not value <= bound:
            found.append(f"{text.format(value)}, above {text.format(bound)}")
    return found
