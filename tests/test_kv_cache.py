"""The cache of keys and values: rows that begin at different places, and rows that leave."""

import pytest
import torch
from torch import Tensor

from latentlm_core.layout import AttentionMask
from latentlm_core.models.transformer import Transformer, TransformerConfig
from latentlm_core.nn.attention import KVCache

LENGTHS = (6, 2, 4)
WIDTH = 32


def backbone(num_kv_heads: int | None = None) -> Transformer:
    return Transformer(
        TransformerConfig(
            hidden_size=WIDTH,
            num_layers=2,
            num_heads=4,
            num_kv_heads=num_kv_heads,
            intermediate_size=48,
        )
    )


def padded(rows: list[Tensor]) -> Tensor:
    """Rows (P, D) of different lengths behind noise that nobody may see."""
    longest = max(map(len, rows))
    return torch.stack([torch.cat([9 * torch.randn(longest - len(r), WIDTH), r]) for r in rows])


def cache_of(model: Transformer, lengths: tuple[int, ...], room: int = 12) -> KVCache:
    cache = model.new_cache(len(lengths), room)
    cache.padding = torch.tensor([max(lengths) - length for length in lengths])
    return cache


def feed(model: Transformer, x: Tensor, cache: KVCache) -> Tensor:
    length = x.shape[1]
    return model(x, cache.positions(length), cache.mask(length), cache)


def alone(model: Transformer, x: Tensor) -> Tensor:
    """A whole sequence (P, D) => states (P, D), without a cache."""
    position = torch.arange(len(x)).unsqueeze(0)
    return model(x.unsqueeze(0), position, AttentionMask(is_causal=True))[0]


@pytest.mark.parametrize("pieces", [(3,), (1, 1, 1), (2, 1)])
@pytest.mark.parametrize("num_kv_heads", [None, 2])
def test_rows_of_different_lengths_are_as_each_is_alone(num_kv_heads, pieces):
    model = backbone(num_kv_heads)
    rows = [torch.randn(length + sum(pieces), WIDTH) for length in LENGTHS]
    with torch.no_grad():
        cache = cache_of(model, LENGTHS)
        beginnings = [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]
        found = [feed(model, padded(beginnings), cache)[:, -1:]]
        done = 0
        for size in pieces:
            new = [
                row[length + done : length + done + size]
                for row, length in zip(rows, LENGTHS, strict=True)
            ]
            found.append(feed(model, torch.stack(new), cache))
            done += size
        states = torch.cat(found, dim=1)
        for row, length, ours in zip(rows, LENGTHS, states, strict=True):
            torch.testing.assert_close(ours, alone(model, row)[length - 1 :], rtol=1e-4, atol=1e-5)


def test_rows_of_one_length_need_neither_padding_nor_mask():
    model = backbone()
    x = torch.randn(2, 5, WIDTH)
    cache = model.new_cache(2, 8)
    assert cache.mask(4) == AttentionMask(is_causal=True)
    with torch.no_grad():
        first = feed(model, x[:, :2], cache)
        assert cache.mask(1) == AttentionMask()
        states = torch.cat([first, feed(model, x[:, 2:4], cache), feed(model, x[:, 4:], cache)], 1)
        for row, ours in zip(x, states, strict=True):
            torch.testing.assert_close(ours, alone(model, row), rtol=1e-4, atol=1e-5)


def test_positions_are_columns_and_the_shift_of_the_row():
    cache = cache_of(backbone(), (4, 2, 3))
    assert cache.positions(4).tolist() == [[0, 1, 2, 3]]  # padding is a matter of the mask
    cache.shift = torch.tensor([0.0, -2.0, 1.5])
    assert cache.positions(2).tolist() == [[0, 1], [-2, -1], [1.5, 2.5]]
    cache.advance(4)
    assert cache.positions(2).tolist() == [[4, 5], [2, 3], [5.5, 6.5]]
    cache.keep(torch.tensor([2, 1]))
    assert cache.positions(1).tolist() == [[5.5], [2]]
    plain = backbone().new_cache(3, 8)
    plain.advance(4)
    assert plain.positions(2).tolist() == [[4, 5]]


def test_padding_is_seen_by_itself_alone():
    cache = cache_of(backbone(), (3, 1))
    allowed = cache.mask(3).allowed
    assert allowed is not None
    assert allowed.int().tolist() == [
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
        [[[1, 0, 0], [0, 1, 0], [0, 0, 1]]],
    ]
    cache.advance(3)
    later = cache.mask(2).allowed
    assert later is not None
    assert later.int().tolist() == [
        [[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]],
        [[[0, 0, 1, 1, 0], [0, 0, 1, 1, 1]]],
    ]


def test_rows_that_stay_go_on_as_if_nobody_had_left():
    model = backbone()
    rows = [torch.randn(length + 2, WIDTH) for length in LENGTHS]
    beginnings = [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]
    with torch.no_grad():
        cache = cache_of(model, LENGTHS)
        feed(model, padded(beginnings), cache)
        feed(model, torch.stack([row[-2:-1] for row in rows]), cache)
        cache.keep(torch.tensor([2, 1]))
        states = feed(model, torch.stack([rows[2][-1:], rows[1][-1:]]), cache)[:, -1]
        assert cache.padding is not None
        assert cache.padding.tolist() == [2, 4]
        for row, ours in zip((rows[2], rows[1]), states, strict=True):
            torch.testing.assert_close(ours, alone(model, row)[-1], rtol=1e-4, atol=1e-5)
