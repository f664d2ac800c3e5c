"""Reads and writes the `config.json` of a Hugging Face Gemma."""

import json
import math
from pathlib import Path
from typing import Any

from jaxsft.gemma.architecture import GLOBAL, LOCAL, GemmaConfig

_MODEL_TYPES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
_MAX_LAYERS = 512  # Gemma's deepest has 62; a huge number must not take memory and time
_CAPS = ("attn_softcap", "final_softcap")
_HF_LAYER_TYPES = {"sliding_attention": LOCAL, "full_attention": GLOBAL}


def from_hf_config(source: Path | str | dict[str, Any], where: str = "config") -> GemmaConfig:
    """GemmaConfig from a Hugging Face `config.json`: its path, or a dict that comes from `where`.

    Raises ValueError that names every unsupported key and value.
    """
    raw: Any = source
    if not isinstance(source, dict):
        where = str(source)
        try:
            raw = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not a readable config.json: {error}") from error
        if not isinstance(raw, dict):
            raise ValueError(f"{where}: not a readable config.json: not an object")
    model_type = raw.get("model_type")
    if model_type not in ("gemma", "gemma2", "gemma3_text"):
        raise ValueError(
            f"{where}: model_type {model_type!r} is not supported; supported are 'gemma' "
            "(Gemma 1), 'gemma2' and 'gemma3_text' (270M, 1B)"
        )
    try:
        problems = _unsupported(raw, model_type)
        config = None if problems else _parse(raw, model_type)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: {model_type} config lacks or garbles {error}") from error
    problems += [] if config is None else _impossible(config)
    if config is None or problems:
        raise ValueError(f"{where}: not supported: " + "; ".join(problems))
    return config


def _unsupported(raw: dict[str, Any], model_type: str) -> list[str]:
    """Settings that would change the computation, as "key=value (only what is supported)"."""
    problems = []
    activation = raw.get("hidden_activation") or raw.get("hidden_act", "gelu_pytorch_tanh")
    # Gemma 1's first configs say "gelu" but mean the tanh form; transformers corrects this too.
    legacy_gelu = model_type == "gemma" and activation == "gelu"
    if activation != "gelu_pytorch_tanh" and not legacy_gelu:
        problems.append(f"hidden_activation={activation!r} (only gelu_pytorch_tanh)")
    for key, wanted in (
        ("attention_bias", False),
        ("tie_word_embeddings", True),
        ("use_bidirectional_attention", False),
        ("quantization_config", None),
    ):
        value = raw.get(key, wanted)
        if value != wanted and not (value is None and wanted is False):
            problems.append(f"{key}={value!r} (only {wanted!r})")
    scaling = raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict) or _is_scaled(scaling):
        return [*problems, f"rope_scaling={scaling!r} (only 'default')"]
    for key, parameters in _rope_parameters(raw).items():
        if _is_scaled(parameters):
            problems.append(f"rope_parameters[{key}].rope_type={_rope_type(parameters)!r}")
    for key, thetas in zip(("rope_theta", "rope_local_base_freq"), _rope_thetas(raw), strict=True):
        if len(set(thetas)) > 1:
            problems.append(f"{key} given as {' and as '.join(map(str, thetas))}")
    for kind in raw.get("layer_types") or ():
        if kind not in _HF_LAYER_TYPES:
            problems.append(f"layer_types entry {kind!r} (only {', '.join(_HF_LAYER_TYPES)})")
    return problems


def _rope_type(parameters: dict[str, Any]) -> Any:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _is_scaled(parameters: dict[str, Any]) -> bool:
    """Do the rotary parameters change positions? "default" and a factor of 1 do not."""
    kind = _rope_type(parameters)
    return kind != "default" and not (kind == "linear" and parameters.get("factor") == 1)


def _rope_thetas(raw: dict[str, Any]) -> tuple[list[float], list[float]]:
    """The rotary base of global and that of local layers, from each place that gives it.

    transformers 4 and 5 have other places.
    """
    rope = {"scaling": raw.get("rope_scaling") or {}} | _rope_parameters(raw)
    globals_ = [raw, *(rope.get(key, {}) for key in ("scaling", "all", "full_attention"))]
    found = [place.get("rope_theta") for place in globals_]
    locals_ = [
        raw.get("rope_local_base_freq"),
        rope.get("sliding_attention", {}).get("rope_theta"),
    ]
    return [theta for theta in found if theta], [theta for theta in locals_ if theta]


def _impossible(config: GemmaConfig) -> list[str]:
    """Dimensions that no model can have."""
    names = ("vocab_size", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim")
    values = {name: getattr(config, name) for name in (*names, "num_layers", "max_positions")}
    if config.sliding_window is not None:
        values["sliding_window"] = config.sliding_window
    problems = [
        f"{name}={value!r} (must be a whole number above 0)"
        for name, value in values.items()
        if type(value) is not int or value < 1
    ]
    for name in ("query_scale", "rope_theta_local", "rope_theta_global", "rms_norm_eps", *_CAPS):
        value = getattr(config, name)
        is_off = value is None and name in _CAPS
        if not is_off and not (type(value) in (int, float) and 0 < value < 1e30):
            problems.append(f"{name}={value!r} (must be a finite number above 0)")
    if not problems and config.num_heads % config.num_kv_heads:
        problems.append(f"{config.num_heads} heads for {config.num_kv_heads} KV heads")
    if not problems and config.head_dim % 2:
        problems.append(f"head_dim={config.head_dim} (rotary positions need an even one)")
    return problems


def _rope_parameters(raw: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """transformers 5's `rope_parameters`, one dict for each layer type; {} if absent."""
    parameters = raw.get("rope_parameters") or {}
    if any(isinstance(v, dict) for v in parameters.values()):
        return {k: v or {} for k, v in parameters.items()}
    return {"all": parameters} if parameters else {}


def _parse(raw: dict[str, Any], model_type: str) -> GemmaConfig:
    num_layers = raw["num_hidden_layers"]
    if num_layers > _MAX_LAYERS:
        raise ValueError(f"num_hidden_layers: {num_layers} are more than {_MAX_LAYERS}")
    if raw.get("layer_types"):
        layer_types = tuple(_HF_LAYER_TYPES[kind] for kind in raw["layer_types"])
        if len(layer_types) != num_layers:
            raise KeyError(f"layer_types: {len(layer_types)} entries for {num_layers} layers")
    elif model_type == "gemma":
        layer_types = (GLOBAL,) * num_layers
    else:
        period = 2 if model_type == "gemma2" else raw.get("sliding_window_pattern", 6)
        layer_types = tuple(LOCAL if (i + 1) % period else GLOBAL for i in range(num_layers))
    gemma1, gemma3 = model_type == "gemma", model_type == "gemma3_text"
    thetas, local_thetas = _rope_thetas(raw)
    theta_global = thetas[0] if thetas else 1e6 if gemma3 else 1e4
    theta_local = local_thetas[0] if local_thetas else 1e4 if gemma3 else theta_global
    # transformers' defaults for missing keys.
    attn_cap, final_cap = (50.0, 30.0) if model_type == "gemma2" else (None, None)
    head_dim = raw["head_dim"]
    query_pre_attn_scalar = head_dim if gemma1 else raw["query_pre_attn_scalar"]
    return GemmaConfig(
        name=str(raw.get("_name_or_path") or model_type),
        vocab_size=raw["vocab_size"],
        d_model=raw["hidden_size"],
        d_ff=raw["intermediate_size"],
        num_heads=raw["num_attention_heads"],
        num_kv_heads=raw["num_key_value_heads"],
        head_dim=head_dim,
        layer_types=layer_types,
        max_positions=raw["max_position_embeddings"],
        query_scale=float(query_pre_attn_scalar) ** -0.5,
        sliding_window=None if gemma1 else raw["sliding_window"],
        attn_softcap=None if gemma1 else raw.get("attn_logit_softcapping", attn_cap),
        final_softcap=None if gemma1 else raw.get("final_logit_softcapping", final_cap),
        rope_theta_local=float(theta_local),
        rope_theta_global=float(theta_global),
        post_norms=not gemma1,
        qk_norm=gemma3,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
    )


def to_hf_config(config: GemmaConfig) -> dict[str, Any]:
    """The `config.json` of a model, which `from_hf_config` reads again; without the name.

    Rotary bases have their names of transformers 4, which version 5 understands too.
    """
    model_type = "gemma3_text" if config.qk_norm else "gemma2" if config.post_norms else "gemma"
    values: dict[str, Any] = {
        "architectures": [_MODEL_TYPES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta_global,
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
    }
    if model_type == "gemma":
        return values | {"hidden_act": "gelu_pytorch_tanh"}
    scalar = config.query_scale**-2
    kinds = ("full_attention" if t == GLOBAL else "sliding_attention" for t in config.layer_types)
    values |= {
        # A whole number in every Gemma; query_scale is its rounded inverse square root.
        "query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar,
        "sliding_window": config.sliding_window,
        "layer_types": list(kinds),
        "attn_logit_softcapping": config.attn_softcap,
        "final_logit_softcapping": config.final_softcap,
    }
    if model_type == "gemma3_text":
        values["rope_local_base_freq"] = config.rope_theta_local
    return values
