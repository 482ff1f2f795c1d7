"""Self-attention with grouped keys, rotary positions and a static cache.

Axes: B rows, L positions, D hidden, N query heads, K key heads, H head dim.
"""

import torch
from torch import Tensor, nn

from latentlm_core.layout import AttentionMask
from latentlm_core.nn.attend import attend
from latentlm_core.nn.layers import RMSNorm, rotate

Rotary = tuple[Tensor, Tensor]


class KVCache:
    """Keys and values of every layer, allocated once.

    All rows advance together; ``length`` is a host number, so no step waits for the device. Rows
    whose sequences have different lengths end together: shorter ones begin later, behind padding.

    Once ``pin`` was called, the number of stored positions is on the device and each input, one
    position a row, sees all columns through a mask: no shape and no host number changes from step
    to step, so that a step can be compiled or captured once. Whoever runs such a step tells the
    host's number by ``count``. ``unpin`` goes back.

    Attributes:
        length: positions that are stored, padding included.
        place: () int64 the same, of a pinned cache; else None.
        padding: (B,) positions before the first of each row; None where no row has any.
        shift: (B,) what is added to the number of a column to get its rotary position; None for 0.

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
        shape = (num_rows, num_kv_heads, max_length, head_dim)
        self.length = 0
        self.place: Tensor | None = None
        self.padding: Tensor | None = None
        self.shift: Tensor | None = None
        self._max_length = max_length
        self._store = [
            torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * num_layers)
        ]
        self._place = torch.zeros((), dtype=torch.int64, device=device)
        self._padding = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self._shift = torch.zeros(num_rows, device=device)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, K, L, H) after what is there; return all keys and values of the layer.

        The position counter moves on ``advance``, once all layers have stored.
        """
        keys, values = self._store[2 * layer : 2 * layer + 2]
        if self.place is not None:
            where = self.place.view(1)
            return keys.index_copy_(2, where, key), values.index_copy_(2, where, value)
        end = self.length + key.shape[2]
        keys[:, :, self.length : end] = key
        values[:, :, self.length : end] = value
        return keys[:, :, :end], values[:, :, :end]

    def advance(self, num_positions: int) -> None:
        """Count the positions that every layer has stored."""
        if self.place is None:
            self.length += num_positions
        else:
            self.place.add_(num_positions)

    def reset(self) -> None:
        """Forget everything; the memory stays where it is."""
        self.length, self.place, self.padding, self.shift = 0, None, None, None

    def pin(self) -> None:
        """Fix all shapes from now on; inputs are of one position a row, see above."""
        self.place = self._place.fill_(self.length)

    def unpin(self) -> None:
        """End that: the host counted with the device, so nothing is waited for."""
        self.place = None

    def count(self, num_positions: int) -> None:
        """Note how many positions a pinned cache has stored since."""
        self.length += num_positions

    def rewind(self, num_positions: int) -> None:
        """Forget the latest positions: what comes next stands where they stood."""
        self.length -= num_positions

    def positions(self, num_new: int) -> Tensor:
        """Rotary positions of the next L inputs, (1, L) or (B, L)."""
        device = self._place.device
        if self.place is None:
            columns = torch.arange(self.length, self.length + num_new, device=device).unsqueeze(0)
        else:
            columns = self.place.view(1, 1).clone()  # ``advance`` adds to it in place
        return columns if self.shift is None else columns + self.shift.unsqueeze(1)

    def mask(self, num_new: int) -> AttentionMask:
        """Who among the next L inputs sees what: what is stored, itself and those before it."""
        if self.place is not None:
            return self._pinned_mask(self.place)
        if self.padding is None and self.length == 0:
            return AttentionMask(is_causal=True)
        if self.padding is None and num_new == 1:
            return AttentionMask()
        shape, device = (num_new, self.length + num_new), self._place.device
        allowed = torch.ones(shape, dtype=torch.bool, device=device).tril(self.length)
        if self.padding is None:
            return AttentionMask(allowed=allowed)
        columns = torch.arange(shape[1], device=device)
        own = columns == columns[self.length :, None]  # padding sees itself: no empty softmax
        real = columns >= self.padding[:, None, None]
        return AttentionMask(allowed=(allowed & (real | own)).unsqueeze(1))

    def _pinned_mask(self, place: Tensor) -> AttentionMask:
        columns = torch.arange(self._max_length, device=self._place.device)
        allowed = (columns <= place).view(1, 1, 1, -1)
        if self.padding is not None:
            allowed = allowed & (columns >= self.padding[:, None])[:, None, None]
        return AttentionMask(allowed=allowed)

    def free_mask(self, num_new: int) -> AttentionMask:
        """The next L inputs all see what is stored and one another."""
        if self.padding is None:
            return AttentionMask()
        columns = torch.arange(self.length + num_new, device=self._place.device)
        return AttentionMask(allowed=(columns >= self.padding[:, None])[:, None, None])

    def read(self, row: int) -> Tensor:
        """A copy of what one row has stored, (layers, 2, 1, K, length, H)."""
        parts = [part[row : row + 1, :, : self.length] for part in self._store]
        return torch.stack(parts).view(-1, 2, *parts[0].shape)

    def begin(self, rows: Tensor, before: Tensor) -> None:
        """Let some rows begin anew, as if they had read nothing but ``before``.

        Args:
            rows: (B',) indices.
            before: (layers, 2, 1, K, P, H) keys and values that ``read`` copied, of positions 0 to
                P - 1; P is at most ``length``.
        """
        start = self.length - before.shape[4]
        for part, new in zip(self._store, before.flatten(0, 1), strict=True):
            part[rows, :, start : self.length] = new
        padding, shift = self.bounds()
        padding[rows] = start
        shift[rows] = -float(start)

    def refill(self, rows: Tensor, other: "KVCache") -> None:
        """Let some rows go on from what those of another cache hold, their padding included.

        Args:
            rows: (B',) indices.
            other: B' rows; its ``length`` is at most that of this one.
        """
        start = self.length - other.length
        for part, new in zip(self._store, other._store, strict=True):
            part[rows, :, start : self.length] = new[:, :, : other.length]
        (padding, shift), (from_padding, from_shift) = self.bounds(), other.bounds()
        padding[rows] = from_padding + start
        shift[rows] = from_shift - float(start)

    def forget(self, rows: Tensor) -> None:
        """Let some rows be nothing but padding, (B',) indices."""
        self.bounds()[0][rows] = self.length

    @property
    def room(self) -> int:
        """How many more positions fit."""
        return self._max_length - self.length

    def move(self, columns: int) -> None:
        """Let everything stand some columns later, or earlier where these hold nothing but padding.

        Args:
            columns: at most ``room``, at least minus the least ``padding``.
        """
        padding, shift = self.bounds()
        start = max(0, -columns)
        for part in self._store:
            held = part[:, :, start : self.length].clone()
            part[:, :, start + columns : self.length + columns] = held
        self.length += columns
        padding += columns
        shift -= columns
        if self.place is not None:
            self.place.fill_(self.length)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Padding and shift, zero if there are none; a captured step finds them where they were."""
        if self.padding is None:
            self.padding = self._padding.zero_()
        if self.shift is None:
            self.shift = self._shift.zero_()
        return self.padding, self.shift

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows, (B',) indices."""
        self._store = [part[rows] for part in self._store]
        if self.padding is not None:
            self.padding = self.padding[rows]
        if self.shift is not None:
            self.shift = self.shift[rows]


class Attention(nn.Module):
    """Multi-head self-attention; its output has no bias.

    Args:
        hidden_size: D.
        num_heads: N.
        num_kv_heads: K; N must be a multiple (grouped-query attention).
        head_dim: H; none: D / N.
        qkv_bias: whether queries, keys and values have one (Qwen2).
        qk_norm_eps: queries and keys pass a norm over H with a weight before they are turned
            (Qwen3), with this added to the mean square; none: there is no such norm.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        qk_norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim or hidden_size // num_heads
        self.sizes = [num_heads * self.head_dim, *[num_kv_heads * self.head_dim] * 2]
        self.qkv = nn.Linear(hidden_size, sum(self.sizes), bias=qkv_bias)
        self.out = nn.Linear(self.sizes[0], hidden_size, bias=False)
        self.query_norm, self.key_norm = (
            None if qk_norm_eps is None else RMSNorm(self.head_dim, qk_norm_eps, affine=True)
            for _ in range(2)
        )

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
            mask: who sees whom, among all stored positions where there is a cache.
            rotary: cos and sin (B or 1, 1, L, H / 2).
            cache: keys and values of earlier positions; this call appends its own.
            layer: index of this layer in the cache.

        Returns:
            (B, L, D).
        """
        query, key, value = (
            part.view(*x.shape[:2], part.shape[2] // self.head_dim, self.head_dim).transpose(1, 2)
            for part in self.qkv(x).split(self.sizes, dim=-1)
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mixed = attend(query, key, value, mask)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
