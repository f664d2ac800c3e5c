"""What an adapter is: its settings, and the names of its tensors; more than plain LoRA is refused.

The tensors say which layers have an adapter, however `target_modules` is written, and the config's
patterns do not matter where they give all layers the same. What computes something else than
W + scale · B A on Gemma's linear layers is refused by name, with what to do instead.
"""

import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from jaxsft.common.listed import error_line, ranges, shortened
from jaxsft.formats.safetensors import SafetensorsDirectory
from jaxsft.gemma import lora
from jaxsft.weights.names import LINEAR_TENSORS, unwrapped

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
BASE_DIGEST = "base_digest"  # in the metadata of the weights, which PEFT ignores
MERGE = (
    "merge it into its base with the library that made it (PEFT: merge_and_unload) and give the "
    "merged model"
)
_CONVERT = (
    "save it again with PEFT's save_pretrained(…, path_initial_model_for_weight_conversion=…), "
    f"which makes it plain LoRA, or {MERGE}"
)
_NO_MERGE = "it cannot be merged: train a LoRA adapter instead"
_MLX = "an MLX adapter: mlx_lm.fuse (--dequantize for a quantised base) makes a model to give here"

# Keys that are read, and keys that change nothing: the tensors show their outcome, or they only
# matter in training, or PEFT ignores them for linear layers (fan_in_fan_out).
_UNDERSTOOD = (
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules"),
    *("bias", "init_lora_weights", "base_model_name_or_path", "revision"),
    *("rank_pattern", "alpha_pattern", "layers_to_transform", "modules_to_save"),
)
_HARMLESS = (
    *("task_type", "peft_version", "auto_mapping", "inference_mode", "megatron_core"),
    *("layers_pattern", "exclude_modules", "qalora_group_size", "runtime_config"),
    *("fan_in_fan_out", "eva_config", "ensure_weight_tying"),
)
# Initialisations that change the base weights too; the adapter alone is then not enough.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NEVER_MERGED = ("PROMPT", "P_TUNING", "PREFIX", "ADAPTION", "CPT", "CARTRIDGE")
_UNREADABLE = (
    *(OSError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RecursionError),
)
_TARGETS = {tensor.hf: tensor.tree[1] for tensor in LINEAR_TENSORS}  # mlp.up_proj -> up_proj
_LORA = re.compile(r"layers\.(\d{1,5})\.(\w+\.\w+)\.lora_([AB])(?:\.(\w+))?\.weight")
# What else adapters hold, by a part of the tensors' names.
_OTHER_TENSORS = {
    r"\.lora_[ab]$": _MLX,
    r"lora_magnitude_vector": f"DoRA; {MERGE}",
    r"lora_[AB].*\.bias$": f"LoRA with a bias (lora_bias); {MERGE}",
    r"lora_embedding_[AB]|(embed_tokens|lm_head)\.lora_": (
        f"an adapter of the embedding or the head, which is not a linear layer of Gemma's blocks; "
        f"{MERGE}"
    ),
    r"(embed_tokens|lm_head)\.(\w+\.)*weight$": (
        "whole embeddings (modules_to_save, save_embedding_layers): save it without them if they "
        f"were not trained, or {MERGE}"
    ),
    r"\.bias$": f"trained biases, which Gemma has not; {MERGE}",
    r"(vision|visual|audio|image)\w*\.": (
        f"adapters of other parts than the text model (a vision tower); train on the text model "
        f"alone, or {MERGE}"
    ),
}


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter; `targets` are in canonical order.

    `base_digest` identifies the weights that it was trained on (`WeightsInfo.digest`);
    `base_revision` is their commit, branch or tag on the hub. Both are None if not known.
    """

    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    targets: tuple[str, ...]
    base_model_name: str | None
    base_digest: str | None = None
    base_revision: str | None = None


class _Half(NamedTuple):
    """One tensor of an adapter: its module ("mlp.up_proj") of a layer, and "A" or "B"."""

    layer: int
    module: str
    half: str
    prefix: tuple[str, ...]
    adapter: str | None


def read_adapter_config(directory: Path | str) -> AdapterConfig:
    """The settings of the PEFT adapter in `directory`, which its tensors' names complete.

    Raises ValueError for a config or weights that are unreadable or missing, and for what is no
    plain LoRA on the linear layers of the text model: names each such setting, with what to do.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        _check_kind(path, raw)
        _check_settings(path, raw)
    except _UNREADABLE as error:
        if isinstance(error, _RefusedError):
            raise
        line = shortened(repr(error), 200)
        raise ValueError(f"{path}: not a readable PEFT config: {line}") from error
    weights = SafetensorsDirectory(path.parent, WEIGHTS_NAME)
    halves = _halves(path.with_name(WEIGHTS_NAME), weights.shapes)
    modules = {f"model.layers.{half.layer}.{half.module}" for half in halves.values()}
    ranks = {(weights.shapes[name] or (0,))[0] for name, half in halves.items() if half.half == "A"}
    rank, alpha = _rank_and_alpha(path, raw, ranks, modules)
    found = {_TARGETS[half.module] for half in halves.values()}
    _check_scope(path, raw, {half.layer for half in halves.values()}, found)
    base, revision = raw.get("base_model_name_or_path"), raw.get("revision")
    return AdapterConfig(
        rank=rank,
        alpha=alpha,
        dropout=float(raw.get("lora_dropout") or 0.0),
        use_rslora=bool(raw.get("use_rslora", False)),
        targets=lora.resolve_targets(sorted(found)),
        base_model_name=None if base is None else str(base),
        base_digest=_base_digest(path.with_name(WEIGHTS_NAME)),
        base_revision=revision if isinstance(revision, str) and revision else None,
    )


def adapter_tensors(directory: Path) -> SafetensorsDirectory:
    """The tensors of the adapter in `directory`, under PEFT's names; ValueError as above."""
    source = SafetensorsDirectory(directory, WEIGHTS_NAME)
    source.rename(_adapter_names(directory / WEIGHTS_NAME, source.shapes))
    return source


def _adapter_names(path: Path, names: Iterable[str]) -> dict[str, str]:
    """Name in an adapter's file -> PEFT's name, whatever wrappers or prefixes the file's have."""
    return {
        name: f"base_model.model.model.layers.{half.layer}.{half.module}.lora_{half.half}.weight"
        for name, half in _halves(path, names).items()
    }


class _RefusedError(ValueError):
    """Readable, and not supported."""


def _refused(path: Path, problems: Sequence[str], advice: str) -> _RefusedError:
    shown = "; ".join(shortened(problem, 130) for problem in problems[:3])
    more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return _RefusedError(f"{shortened(str(path), 200)}: not supported: {shown}{more}; {advice}")


def _check_kind(path: Path, raw: dict[str, Any]) -> None:
    """ValueError for an adapter that is no LoRA of PEFT: its settings are others."""
    if "lora_parameters" in raw or "lora_layers" in raw:
        raise _refused(path, ["lora_parameters"], _MLX)
    kind = raw.get("peft_type")
    if kind is not None and kind != "LORA":
        is_merged = not str(kind).startswith(_NEVER_MERGED)
        line = f"peft_type={kind!r} (only LORA)"
        raise _refused(path, [line], MERGE if is_merged else _NO_MERGE)


def _check_settings(path: Path, raw: dict[str, Any]) -> None:
    """ValueError for settings of more than plain LoRA; the errors of odd types pass."""
    raw["peft_type"], raw["r"], raw["lora_alpha"]  # a KeyError names what is missing
    raw["target_modules"]
    problems, advice = [], MERGE
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        problems.append(f"init_lora_weights={init!r} (it changed the base's weights too)")
        advice = _CONVERT
    bias = raw.get("bias") or "none"
    if bias not in ("none", "all", "lora_only"):
        problems.append(f"bias={bias!r}")
    # use_dora, trainable_token_indices, layer_replication, …: future settings of PEFT are refused
    # too, as long as their default is off.
    for key, value in raw.items():
        # Not `value in (None, False, …)`: 0 == False, but trainable_token_indices=0 is a token.
        is_off = value is None or value is False or value in ([], {})
        if not is_off and (key == "modules_to_save" or key not in (*_UNDERSTOOD, *_HARMLESS)):
            problems.append(f"{key}={value!r}")
    rank, alpha, dropout = raw["r"], raw["lora_alpha"], float(raw.get("lora_dropout") or 0.0)
    is_null = isinstance(rank, bool | None)
    if is_null or int(rank) < 1 or int(rank) != rank or not 0 <= dropout < 1:
        problems.append(f"r={rank!r} with lora_dropout={dropout!r}")
    if isinstance(alpha, bool | None) or not 0 < float(alpha) < math.inf or float(alpha) != alpha:
        problems.append(f"lora_alpha={alpha!r} (only a finite number above 0)")
    if not isinstance(raw.get("use_rslora", False), bool | None):
        problems.append(f"use_rslora={raw['use_rslora']!r} (only true or false)")
    targets = raw["target_modules"]
    is_list = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not (targets is None or isinstance(targets, str) or is_list):
        problems.append(f"target_modules={targets!r} (only names, a pattern, or all-linear)")
    if problems:
        raise _refused(path, problems, advice)


def _rank_and_alpha(
    path: Path, raw: dict[str, Any], ranks: set[int], modules: Iterable[str]
) -> tuple[int, float]:
    """(rank, alpha) of all modules; ValueError where rank_pattern or alpha_pattern tell them apart.

    The tensors' `ranks` show what rank_pattern means; alpha_pattern is looked up.
    """
    by_pattern = _pattern(path, raw, "rank_pattern").values()
    if by_pattern and len(ranks) > 1:
        found = ", ".join(map(str, sorted(ranks)[:3]))
        raise _refused(path, [f"rank_pattern: layers have ranks {found}"], MERGE)
    rank = next((each for each in ranks if each in by_pattern), int(raw["r"]))
    alphas = {_alpha(path, raw, module) for module in modules}
    if len(alphas) > 1:
        found = ", ".join(f"{alpha:g}" for alpha in sorted(alphas)[:3])
        raise _refused(path, [f"alpha_pattern: layers have alpha {found}"], MERGE)
    return rank, alphas.pop()


def _alpha(path: Path, raw: dict[str, Any], module: str) -> float:
    """Alpha of a module, as PEFT looks it up: by the first key that its name ends in.

    Keys are regular expressions to PEFT, for names as the base's class has them. Matching foreign
    ones could take forever, so only names from the layer on are looked up; where all values equal
    lora_alpha none matters.
    """
    pattern = _pattern(path, raw, "alpha_pattern")
    if all(value == raw["lora_alpha"] for value in pattern.values()):
        return float(raw["lora_alpha"])
    keys = {key: key.replace("\\.", ".") for key in pattern}
    if not all(re.fullmatch(r"(layers\.\d+\.)?(\w+\.)?\w+_proj", key) for key in keys.values()):
        raise _refused(path, [f"alpha_pattern={pattern!r}"], MERGE)
    found = (key for key, plain in keys.items() if f".{module}".endswith(f".{plain}"))
    return float(pattern[key] if (key := next(found, None)) else raw["lora_alpha"])


def _pattern(path: Path, raw: dict[str, Any], name: str) -> dict[str, Any]:
    pattern = raw.get(name) or {}
    is_dict = isinstance(pattern, dict)
    if not is_dict or not all(type(x) in (int, float) and 0 < x < 1e9 for x in pattern.values()):
        raise _refused(path, [f"{name}={pattern!r}"], MERGE)
    return pattern


def _check_scope(path: Path, raw: dict[str, Any], layers: set[int], found: set[str]) -> None:
    """ValueError where the config names other layers than those that the file has tensors of.

    PEFT would then leave tensors out, or layers without an adapter."""
    named = raw.get("layers_to_transform")
    listed = named if isinstance(named, list) else [named]
    is_right = all(type(layer) is int for layer in listed) and {*listed} == layers
    if named not in (None, []) and not is_right:
        line = f"layers_to_transform={named!r} with tensors of layers {ranges(layers)}"
        raise _refused(path, [line], MERGE)
    targets = raw["target_modules"]
    ends = {target.rsplit(".", 1)[-1] for target in targets} if isinstance(targets, list) else set()
    if not isinstance(targets, list) or ends & {lora.ALL_LINEAR, "all"}:
        return
    absent = sorted(ends & {*lora.TARGETS, "lm_head", "embed_tokens"} - found)
    if raw.get("exclude_modules"):  # PEFT writes "all-linear" out, and what it excludes too
        absent = []
    if other := [name for name in absent if name not in lora.TARGETS]:
        line = f"target_modules: {other[0]!r} is not a linear layer of Gemma's blocks"
        raise _refused(path, [line], MERGE)
    what = f"names {', '.join(absent)}, without tensors in" if absent else ""
    if not found <= ends:
        what = f"lacks {', '.join(sorted(found - ends))}, which has tensors in"
    if what:
        raise ValueError(
            f"{path}: target_modules {what} {WEIGHTS_NAME}: the two files do not belong together, "
            "or one is not whole; save or download both again"
        )


# Of a model with several parts; alone they would pass for the text model's.
_OTHER_PART = re.compile(r"(vision|visual|audio|image)\w*\.|\.(encoder|decoder)\.")


def _halves(path: Path, names: Iterable[str]) -> dict[str, _Half]:
    """The tensors of one LoRA adapter by the names in the file.

    Raises ValueError where there are others, where they are of several adapters, or none.
    """
    halves: dict[str, _Half] = {}
    others: dict[str, str] = {}
    for name in names:
        each = unwrapped(name)
        match = each and _LORA.fullmatch(each.tail)
        if match and each and match[2] in _TARGETS:
            halves[name] = _Half(int(match[1]), match[2], match[3], each.prefix, match[4])
        else:
            others[name] = ""
    _check_others(path, others)
    _check_others(path, {name: "" for name in halves if _OTHER_PART.search(name)})
    prefixes = Counter(half.prefix for half in halves.values())
    if len(prefixes) > 1:
        usual = max(prefixes, key=lambda prefix: prefixes[prefix])
        _check_others(path, {name: "" for name, half in halves.items() if half.prefix != usual})
    adapters = sorted({half.adapter or "default" for half in halves.values()})
    if len(adapters) > 1:
        raise ValueError(
            f"{path}: holds the adapters {shortened(', '.join(adapters), 200)}; save the one that "
            "is meant with PEFT's save_pretrained(…, selected_adapters=[…])"
        )
    whole = {(half.layer, half.module, half.half) for half in halves.values()}
    if len(whole) < len(halves):
        raise ValueError(f"{path}: the same tensor is there twice under different names")
    if not halves:
        raise ValueError(
            f"{path}: holds no tensors of a LoRA adapter (…layers.N.….lora_A.weight); was it "
            "saved before training, or by a sharded trainer that gathered nothing?"
        )
    return halves


def _check_others(path: Path, others: Mapping[str, str]) -> None:
    """ValueError for tensors that no plain LoRA of a text model has."""
    if not others:
        return
    kinds = {
        pattern: {name: "" for name in others if re.search(pattern, name)}
        for pattern in _OTHER_TENSORS
    }
    pattern = next((pattern for pattern, named in kinds.items() if named), None)
    named, advice = others, f"no tensors of a plain LoRA adapter; {MERGE}"
    if pattern is not None:
        named, advice = kinds[pattern], _OTHER_TENSORS[pattern]
    raise ValueError(error_line(f"{path}: not supported", {"unexpected": named}, advice))


def _base_digest(path: Path) -> str | None:
    """The digest of the base in the metadata of the weights."""
    try:
        with safe_open(path, framework="numpy") as file:
            digest = (file.metadata() or {}).get(BASE_DIGEST, "")
    except (SafetensorError, OSError):
        return None
    return digest if re.fullmatch("[0-9a-f]{64}", digest) else None
