"""The backbone: a causal Transformer that does not know what its vectors mean.

Pre-norm RMSNorm, SwiGLU, rotary positions, no biases, as published; biases and norms of queries
and keys are there for language models that have them (Qwen2, Qwen3). Notable: residual
out-projections start 1 / sqrt(2 * num_layers) smaller than PyTorch's default (the published code
leaves them), so that deep stacks start with unit-scale streams.

Axes: B rows, L positions, D hidden, H head dim.
"""

from typing import Annotated

from pydantic import Field, model_validator
from torch import Tensor, nn

from latentlm_core.config import Config, Depth, Width
from latentlm_core.layout import AttentionMask
from latentlm_core.nn.attention import Attention, KVCache, Rotary
from latentlm_core.nn.layers import RMSNorm, SwiGLU, rotary_table


class TransformerConfig(Config):
    """Size and flavour of a backbone."""

    hidden_size: Width = Field(ge=2)
    """D."""
    num_layers: Depth
    """Number of blocks."""
    num_heads: Width
    """Query heads; where head_size is none they must divide hidden_size into an even one."""
    num_kv_heads: Width | None = None
    """Key and value heads, a divisor of num_heads; none: as many as num_heads."""
    intermediate_size: Width
    """Width of the gated feed-forward."""
    rope_theta: float = 10_000.0
    """Base wavelength of the rotary positions."""
    rope_end_inclusive: bool = True
    """Exponents spaced over [0, 1] with both ends, as published; false: as in Llama."""
    norm_eps: float = 1e-6
    """Added to the mean square in each norm."""
    norm_affine: bool = False
    """Whether norms carry a weight."""
    head_size: Annotated[int, Field(ge=2, le=2**16, multiple_of=2)] | None = None
    """Width of a head; none: hidden_size over num_heads."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias, as in Qwen2."""
    qk_norm: bool = False
    """Whether queries and keys pass a norm with a weight before they are turned, as in Qwen3."""

    @model_validator(mode="after")
    def _check(self) -> "TransformerConfig":
        if self.head_size is None and self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} over num_heads {self.num_heads} must be even"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} must divide num_heads {self.num_heads}"
            )
        return self

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.head_size or self.hidden_size // self.num_heads


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        norm = (config.hidden_size, config.norm_eps, config.norm_affine)
        self.attention_norm = RMSNorm(*norm)
        self.attention = Attention(
            config.hidden_size,
            config.num_heads,
            config.kv_heads,
            config.head_dim,
            config.qkv_bias,
            config.norm_eps if config.qk_norm else None,
        )
        self.feed_forward_norm = RMSNorm(*norm)
        self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self, x: Tensor, mask: AttentionMask, rotary: Rotary, cache: KVCache | None, layer: int
    ) -> Tensor:
        """(B, L, D) => (B, L, D)."""
        x = x + self.attention(self.attention_norm(x), mask, rotary, cache, layer)
        return x + self.feed_forward(self.feed_forward_norm(x))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A stack of blocks. The final norm belongs to the heads that read the states."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self._scale_residuals()

    def forward(
        self, x: Tensor, position: Tensor, mask: AttentionMask, cache: KVCache | None = None
    ) -> Tensor:
        """Turn embeddings into states.

        Args:
            x: (B, L, D).
            position: (B, L), or (1, L) where all rows agree.
            mask: who sees whom.
            cache: of earlier positions; advanced by L.

        Returns:
            (B, L, D) states, not normalised.
        """
        config = self.config
        cos, sin = rotary_table(
            position, config.head_dim, config.rope_theta, config.rope_end_inclusive
        )
        rotary = (cos.unsqueeze(1), sin.unsqueeze(1))
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, rotary, cache, layer)
        if cache is not None:
            cache.advance(x.shape[1])
        return x

    def new_cache(self, num_rows: int, max_length: int) -> KVCache:
        """An empty cache in the dtype and on the device of the weights."""
        config, weight = self.config, next(self.parameters())
        return KVCache(
            config.num_layers,
            num_rows,
            config.kv_heads,
            max_length,
            config.head_dim,
            weight.dtype,
            weight.device,
        )

    def _scale_residuals(self) -> None:
        factor = (2 * self.config.num_layers) ** -0.5
        for block in self.blocks:
            for layer in (block.attention.out, block.feed_forward.down):  # type: ignore[union-attr]
                layer.weight.data.mul_(factor)  # type: ignore[union-attr, operator]
