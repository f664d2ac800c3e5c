"""LoRA on a Gemma: inject by target name, split from the frozen weights."""

import difflib
import math
from collections.abc import Sequence

from flax import nnx

from jaxsft.gemma.layers import Linear, LoRA

ALL_LINEAR = "all-linear"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def resolve_targets(targets: str | Sequence[str]) -> tuple[str, ...]:
    """Target names in canonical order; "all-linear" means all seven. ValueError on unknown ones."""
    wanted = TARGETS if targets == ALL_LINEAR else targets
    wanted = wanted.split(",") if isinstance(wanted, str) else wanted
    for name in wanted:
        if name not in TARGETS:
            nearest = difflib.get_close_matches(name, (*TARGETS, ALL_LINEAR), 1, 0.0)[0]
            raise ValueError(
                f"lora.target_modules: {name!r} is not a linear layer of Gemma; "
                f"did you mean {nearest!r}? Valid: {', '.join(TARGETS)} or {ALL_LINEAR}"
            )
    if not wanted:
        raise ValueError(f"lora.target_modules is empty; name layers or {ALL_LINEAR!r}")
    return tuple(name for name in TARGETS if name in wanted)


def lora_scale(rank: int, alpha: float, use_rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv:2312.03732)."""
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def inject(
    model: nnx.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    use_rslora: bool = False,
    targets: str | Sequence[str] = ALL_LINEAR,
    rngs: nnx.Rngs,
) -> int:
    """Fills the LoRA slot of every Linear named in `targets`, in place; returns how many."""
    names = resolve_targets(targets)
    scale = lora_scale(rank, alpha, use_rslora)
    # A list: injection adds modules, and iter_modules walks the live graph.
    linears = [
        module
        for path, module in list(nnx.iter_modules(model))
        if isinstance(module, Linear) and path[-1] in names
    ]
    for linear in linears:
        shape = linear.kernel[...].shape
        linear.lora = LoRA(shape, rank=rank, scale=scale, dropout=dropout, rngs=rngs)
    return len(linears)


def split(model: nnx.Module) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """(graphdef, adapter, frozen). `nnx.merge(graphdef, adapter, frozen)` gives the model back."""
    # LoRAParam first: the nnx.Param filter would match it too.
    return nnx.split(model, nnx.LoRAParam, ...)  # type: ignore[return-value]


def without_adapter(model: nnx.Module) -> nnx.Module:
    """The same model, sharing its weights, with every LoRA slot empty."""
    graphdef, state = nnx.split(model)
    bare = nnx.merge(graphdef, state)
    for _, linear in list(nnx.iter_modules(bare)):
        if isinstance(linear, Linear):
            linear.lora = nnx.data(None)
    return bare
