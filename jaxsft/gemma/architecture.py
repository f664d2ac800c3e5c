"""Gemma architectures: constants, Hugging Face `config.json` parsing, formulas of FLOPs.

Constants are those of google-deepmind/gemma and of the Hugging Face configs; a test compares the
parameter counts with transformers' own models.
"""

import dataclasses

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
