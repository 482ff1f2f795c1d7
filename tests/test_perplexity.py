"""Perplexity and bits per byte in closed form."""

import math
import random

import pytest

from latentlm_core.errors import DataError
from latentlm_core.evaluation.perplexity import TextLoss, score_text


def test_a_uniform_model_has_its_vocabulary_as_perplexity() -> None:
    documents = [TextLoss(tokens * math.log(256), tokens, 2 * tokens) for tokens in (3, 10, 700)]
    score = score_text(documents)
    assert (score.num_documents, score.num_tokens, score.num_bytes) == (3, 713, 1426)
    assert score.perplexity == pytest.approx(256)
    assert score.bits_per_token == pytest.approx(8)
    assert score.bits_per_byte == pytest.approx(4)
    assert score.perplexity_error == pytest.approx(0, abs=1e-9)


def test_tokens_count_alike_whatever_their_document() -> None:
    score = score_text([TextLoss(9 * math.log(2), 9, 3), TextLoss(math.log(16), 1, 10)])
    assert score.bits_per_token == pytest.approx(1.3)
    assert score.bits_per_byte == pytest.approx(1.0)
    assert score.perplexity == pytest.approx(2**1.3)


def test_the_error_in_closed_form() -> None:
    """Two documents of equal size: half the difference of their means."""
    score = score_text([TextLoss(10.0, 10, 20), TextLoss(14.0, 10, 20)])
    assert score.bits_per_token_error == pytest.approx(0.2 / math.log(2))
    assert score.bits_per_byte_error == pytest.approx(0.1 / math.log(2))
    assert score.perplexity_error == pytest.approx(0.2 * math.exp(1.2))


def test_the_error_is_the_spread_of_repeated_measurements() -> None:
    draws = random.Random(0)

    def measure() -> tuple[float, float]:
        sizes = [draws.randint(5, 200) for _ in range(80)]
        losses = [TextLoss(size * draws.gauss(2.0, 0.5), size, 4 * size) for size in sizes]
        score = score_text(losses)
        assert score.bits_per_byte_error is not None
        return score.bits_per_byte, score.bits_per_byte_error

    means, errors = zip(*(measure() for _ in range(400)), strict=True)
    centre = sum(means) / 400
    spread = math.sqrt(sum((mean - centre) ** 2 for mean in means) / 399)
    assert sum(errors) / 400 == pytest.approx(spread, rel=0.1)


def test_one_document_has_no_error() -> None:
    score = score_text([TextLoss(3.0, 2, 5)])
    assert score.perplexity_error is score.bits_per_token_error is score.bits_per_byte_error is None


def test_what_has_no_perplexity_is_refused() -> None:
    for losses in ([], [TextLoss(0.0, 0, 0)]):
        with pytest.raises(DataError, match="no text"):
            score_text(losses)
    with pytest.raises(DataError, match="perplexity of 1000 nats a token"):
        score_text([TextLoss(5000.0, 5, 5)])
    with pytest.raises(DataError, match="document 1 is not finite: nan"):
        score_text([TextLoss(1.0, 1, 1), TextLoss(math.nan, 1, 1)])
