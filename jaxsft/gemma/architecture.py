"""Gemma architectures: constants, Hugging Face `config.json` parsing, formulas of FLOPs.

Constants are those of google-deepmind/gemma and of the Hugging Face configs; a test compares the
parameter counts with transformers' own models.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

LOCAL = "local"
GLOBAL = "global"


@dataclasses.dataclass(frozen=True)
class GemmaConfig:
    """One Gemma text model. Dimensions in elements, `sliding_window` and `max_positions` in tokens.

    `layer_types[i]` is "local" (sliding window, `rope_theta_local`) or "global".
    `post_norms`: RMSNorm after attention and after the MLP as well (Gemma 2 and 3).
    `qk_norm`: RMSNorm on every query and key head before RoPE (Gemma 3).
    """

    name: str
    vocab_size: int
    d_model: int
    d_ff: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    max_positions: int
    query_scale: float
    sliding_window: int | None = None
    attn_softcap: float | None = None
    final_softcap: float | None = None
    rope_theta_local: float = 10_000.0
    rope_theta_global: float = 10_000.0
    post_norms: bool = False
    qk_norm: bool = False
    rms_norm_eps: float = 1e-6

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.layer_types)

    @property
    def layer_pattern(self) -> tuple[str, ...]:
        """The shortest prefix of `layer_types` whose repetition gives all of it (last one cut)."""
        types = self.layer_types
        for period in range(1, len(types) + 1):
            if all(types[i] == types[i % period] for i in range(len(types))):
                return types[:period]
        raise AssertionError("the full list is always a period")

    @property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) features of each of a block's seven linear layers, by Hugging Face name."""
        q_dim, kv_dim = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "q_proj": (self.d_model, q_dim),
            "k_proj": (self.d_model, kv_dim),
            "v_proj": (self.d_model, kv_dim),
            "o_proj": (q_dim, self.d_model),
            "gate_proj": (self.d_model, self.d_ff),
            "up_proj": (self.d_model, self.d_ff),
            "down_proj": (self.d_ff, self.d_model),
        }

    @property
    def num_params(self) -> int:
        """Parameters, the tied embedding counted once."""
        norms = self.d_model * (4 if self.post_norms else 2)
        norms += 2 * self.head_dim if self.qk_norm else 0
        linears = sum(i * o for i, o in self.linear_shapes.values())
        return self.num_layers * (linears + norms) + (self.vocab_size + 1) * self.d_model

    def lora_params(self, rank: int, targets: tuple[str, ...]) -> int:
        """Adapter parameters at `rank` on the linear layers named in `targets`."""
        per_layer = sum(rank * sum(self.linear_shapes[t]) for t in targets)
        return self.num_layers * per_layer

    def lora_step_flops(
        self, *, num_tokens: int, num_loss_tokens: int, row_length: int, lora_params: int
    ) -> float:
        """Model FLOPs of one LoRA step: forward and activation gradients of the frozen weights,
        plus forward, activation and weight gradients of the adapters.

        A matmul of P parameters costs 2P FLOPs a token each way; only `num_loss_tokens` positions
        reach the head. Causal attention looks at half of `row_length` keys on average (a sliding
        window at no more than itself) and its backward costs twice its forward. Recomputation is
        not counted. For Gemma 2 2B at 2048 with every position bearing loss this is 11.1 GFLOP a
        token without adapters, the 4N + attention convention.
        """
        matmul = self.num_layers * sum(i * o for i, o in self.linear_shapes.values())
        flops = 4.0 * matmul * num_tokens + 6.0 * lora_params * num_tokens
        flops += 4.0 * self.vocab_size * self.d_model * num_loss_tokens
        for kind in self.layer_types:
            keys = row_length / 2
            if kind == LOCAL and self.sliding_window is not None:
                keys = min(keys, self.sliding_window)
            flops += 3 * 4.0 * self.num_heads * self.head_dim * keys * num_tokens
        return flops


def _gemma3(name: str, num_layers: int, d_model: int, d_ff: int) -> GemmaConfig:
    pattern = (LOCAL,) * 5 + (GLOBAL,)
    return GemmaConfig(
        name=name,
        vocab_size=262_144,
        d_model=d_model,
        d_ff=d_ff,
        num_heads=4,
        num_kv_heads=1,
        head_dim=256,
        layer_types=tuple(pattern[i % 6] for i in range(num_layers)),
        max_positions=32_768,
        query_scale=256**-0.5,
        sliding_window=512,
        rope_theta_global=1_000_000.0,
        post_norms=True,
        qk_norm=True,
    )


PRESETS = {
    "gemma-2b": GemmaConfig(
        name="gemma-2b",
        vocab_size=256_000,
        d_model=2048,
        d_ff=16_384,
        num_heads=8,
        num_kv_heads=1,
        head_dim=256,
        layer_types=(GLOBAL,) * 18,
        max_positions=8192,
        query_scale=256**-0.5,
    ),
    "gemma-2-2b": GemmaConfig(
        name="gemma-2-2b",
        vocab_size=256_000,
        d_model=2304,
        d_ff=9216,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        layer_types=(LOCAL, GLOBAL) * 13,
        max_positions=8192,
        query_scale=256**-0.5,
        sliding_window=4096,
        attn_softcap=50.0,
        final_softcap=30.0,
        post_norms=True,
    ),
    "gemma-3-270m": _gemma3("gemma-3-270m", num_layers=18, d_model=640, d_ff=2048),
    "gemma-3-1b": _gemma3("gemma-3-1b", num_layers=26, d_model=1152, d_ff=6912),
}

_MAX_LAYERS = 512  # Gemma's deepest has 62; a number alone must not take memory and time
_CAPS = ("attn_softcap", "final_softcap")
_HF_LAYER_TYPES = {"sliding_attention": LOCAL, "full_attention": GLOBAL}


def from_hf_config(source: Path | str | dict[str, Any], where: str = "config") -> GemmaConfig:
    """GemmaConfig from a Hugging Face `config.json` (its path, or the parsed dict of `where`).

    Raises ValueError that names every key and value that this implementation does not support,
    rather than computing something else silently.
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
    """Settings that would change the mathematics, as "key=value" with what is expected."""
    problems = []
    activation = raw.get("hidden_activation") or raw.get("hidden_act", "gelu_pytorch_tanh")
    # Gemma 1's first configs say "gelu" and mean the tanh form; transformers corrects it as well.
    legacy_gelu = model_type == "gemma" and activation == "gelu"
    if activation != "gelu_pytorch_tanh" and not legacy_gelu:
        problems.append(f"hidden_activation={activation!r} (only gelu_pytorch_tanh)")
    for key, wanted in (
        ("attention_bias", False),
        ("tie_word_embeddings", True),
        ("use_bidirectional_attention", False),
        ("quantization_config", None),
        ("rope_scaling", None),
    ):
        value = raw.get(key, wanted)
        if value != wanted and not (value is None and wanted is False):
            problems.append(f"{key}={value!r} (only {wanted!r})")
    for key, parameters in _rope_parameters(raw).items():
        if parameters.get("rope_type", "default") != "default":
            problems.append(f"rope_parameters[{key}].rope_type={parameters['rope_type']!r}")
    for kind in raw.get("layer_types") or ():
        if kind not in _HF_LAYER_TYPES:
            problems.append(f"layer_types entry {kind!r} (only {', '.join(_HF_LAYER_TYPES)})")
    return problems


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
    """transformers 5's `rope_parameters`, one dict a layer type; {} when absent."""
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
    rope = _rope_parameters(raw)
    theta = raw.get("rope_theta", rope.get("all", {}).get("rope_theta"))
    gemma1, gemma3 = model_type == "gemma", model_type == "gemma3_text"
    theta_global = rope.get("full_attention", {}).get("rope_theta", theta)
    theta_local = rope.get("sliding_attention", {}).get("rope_theta", None if gemma3 else theta)
    if gemma3:
        theta_local = raw.get("rope_local_base_freq", theta_local)
        theta_global = 1_000_000.0 if theta_global is None else theta_global
    # What a key left out means in transformers.
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
        rope_theta_local=10_000.0 if theta_local is None else float(theta_local),
        rope_theta_global=10_000.0 if theta_global is None else float(theta_global),
        post_norms=not gemma1,
        qk_norm=gemma3,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
    )
