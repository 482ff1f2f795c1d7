"""Attention of queries to keys, by the way that is fastest where it runs.

That is PyTorch's fused kernel, but for one case: on a CPU in bfloat16 its backward pass takes seven
times as long as plain products where sequences have 16 positions, five times at 64, and no less at
256 (measured, one core with AVX512-BF16); in float32 and for longer sequences the kernel wins.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from latentlm_core.layout import AttentionMask

SHORT = 256
"""Keys of a sequence up to which plain products train as fast."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    """Softmax of scaled products, times the values.

    Args:
        query: (B, N, L, H).
        key: (B, K, M, H); N is a multiple of K.
        value: (B, K, M, H).
        mask: who sees whom.

    Returns:
        (B, N, L, H).
    """
    is_slow = query.device.type == "cpu" and query.dtype is torch.bfloat16
    if is_slow and query.requires_grad and key.shape[2] <= SHORT:
        return _by_products(query, key, value, mask)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask.allowed,
        is_causal=mask.is_causal,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def _by_products(query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask) -> Tensor:
    sharers = query.shape[1] // key.shape[1]
    if sharers > 1:
        key, value = key.repeat_interleave(sharers, 1), value.repeat_interleave(sharers, 1)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    allowed = mask.allowed
    if mask.is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return torch.softmax(scores, -1) @ value
