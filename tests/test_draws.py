"""Random numbers of a batch, and of some of its rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentlm_core.draws import Draws, Rows
from latentlm_core.errors import ConfigError
from latentlm_core.runtime import generator


def seeded(rows: Rows | None = None) -> Draws:
    return Draws(generator("draws"), rows)


@given(st.integers(1, 12), st.data())
def test_shares_are_consecutive_and_as_equal_as_can_be(count, data):
    total = data.draw(st.integers(count, 60))
    shares = [Rows.of_share(total, index, count) for index in range(count)]
    assert [row for rows in shares for row in range(rows.start, rows.stop)] == list(range(total))
    assert {rows.total for rows in shares} == {total}
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_shares_than_rows_are_refused():
    with pytest.raises(ConfigError, match="A batch of 3 rows cannot be shared by 4 processes"):
        Rows.of_share(3, 0, 4)


@pytest.mark.parametrize("shape", [(5,), (17, 3), (2, 40, 4)])
def test_a_whole_has_the_numbers_of_torch(shape):
    source = generator("draws")
    wanted = torch.randint(1000, shape, generator=source), torch.randn(shape, generator=source)
    for rows in (None, Rows(0, shape[0], shape[0])):
        draws = seeded(rows)
        assert torch.equal(draws.integers(1000, shape), wanted[0])
        assert torch.equal(draws.normal(shape), wanted[1])


@given(st.integers(1, 4), st.integers(0, 2), st.data())
def test_shares_have_the_numbers_of_the_whole(count, dim, data):
    shape = data.draw(st.lists(st.integers(1, 9), min_size=dim + 1, max_size=3))
    shape[dim] = data.draw(st.integers(count, 30))
    whole, dtype = seeded(), data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    shares = [seeded(Rows.of_share(shape[dim], index, count)) for index in range(count)]

    def sizes(draws: Draws) -> list[int]:
        assert draws.rows is not None
        return [*shape[:dim], len(draws.rows), *shape[dim + 1 :]]

    for _ in range(2):  # what is drawn later is the same as well
        normal = [draws.normal(sizes(draws), dim, dtype) for draws in shares]
        assert torch.equal(torch.cat(normal, dim), whole.normal(shape, dim, dtype))
        integers = [draws.integers(7, sizes(draws), dim) for draws in shares]
        assert torch.equal(torch.cat(integers, dim), whole.integers(7, shape, dim))


def test_no_row_draws_as_well():
    draws, whole = seeded(Rows(4, 4, 9)), seeded()
    assert draws.normal((0, 3)).shape == (0, 3)
    whole.normal((9, 3))
    assert torch.equal(draws.generator.get_state(), whole.generator.get_state())


def test_rows_can_be_counted_in_groups():
    assert seeded().groups(4).rows is None
    assert seeded(Rows(8, 12, 20)).groups(4).rows == Rows(2, 3, 5)
