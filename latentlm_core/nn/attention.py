"""Self-attention with grouped keys, rotary positions and a static cache.

Axes: B rows, L positions, D hidden, N query heads, K key heads, H head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentlm_core.layout import AttentionMask
from latentlm_core.nn.layers import rotate

Rotary = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of every layer, allocated once.

    All rows advance together; ``length`` is a host number, so no step waits for the device.

    Args:
        num_layers: of the backbone.
        num_rows: B.
        num_kv_heads: K.
        max_length: how many positions fit.
        head_dim: H.
        dtype: of keys and values.
        device: where they live.
    """

    def __init__(
        self,
        num_layers: int,
        num_rows: int,
        num_kv_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, 2, num_rows, num_kv_heads, max_length, head_dim)
        self.length = 0
        self._store = torch.zeros(shape, dtype=dtype, device=device)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, L, H) after what is there; return all keys and values of the layer.

        The position counter moves on ``advance``, once all layers have stored.
        """
        end = self.length + key.shape[2]
        stored = self._store[layer, :, :, :, :end]
        stored[0, :, :, self.length :] = key
        stored[1, :, :, self.length :] = value
        return stored[0], stored[1]

    def advance(self, num_positions: int) -> None:
        """Count the positions that every layer has stored."""
        self.length += num_positions


class Attention(nn.Module):
    """Multi-head self-attention without biases.

    Args:
        hidden_size: D.
        num_heads: N; D must be a multiple.
        num_kv_heads: K; N must be a multiple (grouped-query attention).
    """

    def __init__(self, hidden_size: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.num_kv_heads = num_kv_heads
        self.sizes = [hidden_size, *[num_kv_heads * self.head_dim] * 2]
        self.qkv = nn.Linear(hidden_size, sum(self.sizes), bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        mask: AttentionMask,
        rotary: Rotary | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attend.

        Args:
            x: (B, L, D).
            mask: who sees whom; with a cache that holds positions already, rows are causal.
            rotary: cos and sin (B or 1, 1, L, H / 2).
            cache: keys and values of earlier positions; this call appends its own.
            layer: index of this layer in the cache.

        Returns:
            (B, L, D).
        """
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in self.qkv(x).split(self.sizes, dim=-1)
        )
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            mask = _continued(mask, cache.length, query)
            key, value = cache.append(layer, key, value)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask.allowed,
            is_causal=mask.is_causal,
            enable_gqa=self.num_kv_heads != query.shape[1],
        )
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def _continued(mask: AttentionMask, past: int, query: Tensor) -> AttentionMask:
    """The causal mask of new queries that also see ``past`` positions."""
    if past == 0:
        return mask
    new = query.shape[2]
    if new == 1:
        return AttentionMask()
    allowed = torch.ones(new, past + new, dtype=torch.bool, device=query.device)
    return AttentionMask(allowed=allowed.tril(past))
