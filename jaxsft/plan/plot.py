"""Draws a plan: where a step's time and a chip's memory go."""

from pathlib import Path
from typing import Any

from jaxsft.plan.chips import GIB
from jaxsft.plan.run_plan import RunPlan

# Okabe and Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color/
_BLUE, _ORANGE, _GREEN, _PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
_SKY, _RED, _YELLOW, _GREY, _LIGHT = "#56B4E9", "#D55E00", "#F0E442", "#8C8C8C", "#D9D9D9"
_COLOURS = {
    **{"mlp": _BLUE, "attention": _ORANGE, "loss head": _GREEN, "lora": _PINK, "norm": _SKY},
    **{"recomputation": _RED, "copies": _YELLOW, "collectives": _GREY, "optimizer": _LIGHT},
    **{"weights": _BLUE, "adapter + optimizer": _PINK, "activations": _ORANGE},
    **{"temporaries": _YELLOW, "needed": _RED},
}
_MIN_SHARE = 0.015  # what is less has no room for a label


def plot_plan(plan: RunPlan, path: Path) -> None:
    """Writes a picture of two stacked bars: seconds of a step by part, GiB of a chip by kind."""
    from matplotlib.figure import Figure

    estimate = plan.estimate
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    _stack(left, plan.parts, "{:.3f} s")
    title = f"{plan.seconds_per_step:.2f} s a step" if estimate.fits else "no time: it does not fit"
    left.set_title(title, loc="left", fontweight="bold")
    kinds = {kind: num_bytes / GIB for kind, num_bytes in estimate.hbm_bytes.items()}
    _stack(right, kinds, "{:.2f} GiB")
    limit = estimate.hbm_limit_bytes / GIB
    right.plot([0.0, 0.46], [limit, limit], color="black", linewidth=2)
    right.text(0.5, limit, f"limit {limit:.2f} GiB", va="center", fontweight="bold")
    left.set_ylabel("seconds")
    right.set_ylabel("GiB")
    right.set_ylim(0, max(limit, sum(kinds.values())) * 1.04)
    title = f"{estimate.hbm_total_gib:.1f} GiB of HBM a chip"
    if not estimate.hbm_bytes:
        title = "it does not fit the chip's on-chip memory"
    right.set_title(title, loc="left", fontweight="bold")
    config = plan.config
    figure.suptitle(
        f"{config.name}: {plan.model_config.name}, {config.global_batch_size} × "
        f"{config.data.max_length} tokens a step on {estimate.topology} (estimate by "
        f"{estimate.compiler})",
        fontsize=10,
    )
    figure.savefig(path)


def _stack(axes: Any, values: dict[str, float], number: str) -> None:
    """One stacked bar, the largest value at the bottom, each labelled beside it."""
    total = sum(values.values())
    large = {name: value for name, value in values.items() if value >= _MIN_SHARE * total}
    large.pop("other", None)
    rest = total - sum(large.values())
    items = sorted(large.items(), key=lambda item: -item[1])
    items += [("other", rest)] if rest > 0 else []
    axes.set(xlim=(0, 1.25), xticks=[], ylim=(0, total * 1.04 or 1))
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    bottom, lowest_free = 0.0, 0.0
    for name, value in items:
        colour = _COLOURS.get(name, "white")
        axes.bar(0.25, value, 0.4, bottom, color=colour, edgecolor="black", linewidth=0.5)
        # Labels of thin pieces move up, so that none covers another.
        middle = bottom + value / 2
        height = max(middle, lowest_free)
        axes.plot([0.46, 0.49], [middle, height], color="black", linewidth=0.5)
        label = f"{name}  {number.format(value)}  {value / total:.0%}"
        axes.text(0.5, height, label, va="center", fontsize=9)
        bottom, lowest_free = bottom + value, height + 0.045 * total
