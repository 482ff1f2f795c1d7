"""The watches over generated speech: bounds, silence, repetition."""

import math

import pytest
import torch
from torch import Tensor

from latentlm_core.artifacts import SpeechBounds
from latentlm_core.runtime import generator
from latentlm_core.workflows.watch import (
    LIKENESS,
    MAX_REPETITIONS,
    is_repeating,
    is_silent,
    max_latents,
)

RATE, FRAME_RATE = 8000, 10.0
BOUNDS = SpeechBounds(latents_per_character=0.8, longest=50)


def noise(seconds: float, dbfs: float, name: str = "noise") -> Tensor:
    """(S,) of a root mean square."""
    samples = torch.randn(round(seconds * RATE), generator=generator(name))
    return samples * 10 ** (dbfs / 20)


def latents(count: int, name: str = "latents", channels: int = 16) -> Tensor:
    """(T, C)."""
    return torch.randn(count, channels, generator=generator(name))


def beside(values: Tensor, cosine: float, name: str = "beside") -> Tensor:
    """Latents whose cosine with ``values`` (T, C) is as given, one by one."""
    other = latents(*values.shape[:1], name=name, channels=values.shape[1])
    unit = values / values.norm(dim=1, keepdim=True)
    other = other - (other * unit).sum(dim=1, keepdim=True) * unit
    other = other / other.norm(dim=1, keepdim=True)
    return cosine * unit + math.sqrt(1 - cosine**2) * other


# --- the bound -------------------------------------------------------------------------------


def test_a_text_may_take_a_quarter_more_than_any_of_the_training_and_a_second() -> None:
    assert max_latents("x" * 40, BOUNDS, FRAME_RATE) == 40 + 10
    assert max_latents(f"  {'x' * 40}\n", BOUNDS, FRAME_RATE) == 50
    assert max_latents("x", BOUNDS, 7.5) == 9  # 1 + 7.5, rounded up


def test_the_bound_grows_with_the_text() -> None:
    bounds = [max_latents("x" * size, BOUNDS, FRAME_RATE) for size in range(1, 200)]
    assert bounds == sorted(bounds)
    assert bounds[0] >= 1


# --- silence ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dbfs", "silent"), [(-53.0, True), (-47.0, False), (-25.0, False)])
def test_silence_lies_below_50_dbfs(dbfs: float, silent: bool) -> None:
    assert is_silent(noise(2.0, dbfs), RATE) is silent


@pytest.mark.parametrize(("seconds", "silent"), [(1.48, False), (1.5, True), (3.0, True)])
def test_silence_lasts_a_second_and_a_half(seconds: float, silent: bool) -> None:
    assert is_silent(torch.zeros(round(seconds * RATE)), RATE) is silent
    before = noise(1.0, -25.0)
    assert is_silent(torch.cat([before, torch.zeros(round(seconds * RATE))]), RATE) is silent


def test_speech_ends_silence_however_short_it_is() -> None:
    quiet = torch.zeros(3 * RATE)
    quiet[-RATE // 2 : -RATE // 2 + 160] = noise(0.02, -45.0)
    assert not is_silent(quiet, RATE)
    assert is_silent(torch.cat([quiet, torch.zeros(round(1.2 * RATE))]), RATE)


def test_rates_that_no_window_divides_are_heard_as_well() -> None:
    assert is_silent(torch.zeros(40_000), 22_050)
    assert not is_silent(noise(5.0, -25.0), 22_050)


# --- repetition ------------------------------------------------------------------------------


@pytest.mark.parametrize("period", [3, 7, 20])
def test_a_period_said_four_times_is_a_repetition(period: int) -> None:
    before, word = latents(11, "before"), latents(period, "word")
    assert is_repeating(torch.cat([before, *[word] * 4]), FRAME_RATE)
    assert is_repeating(torch.cat([before, *[word] * 5]), FRAME_RATE)
    assert not is_repeating(torch.cat([before, *[word] * 3]), FRAME_RATE)


@pytest.mark.parametrize(("period", "repeating"), [(2, True), (20, True), (21, False)])
def test_periods_are_two_seconds_long_at_most(period: int, repeating: bool) -> None:
    """Those shorter than 0.3 s are seen as multiples of themselves."""
    word = latents(period, "word")
    said = torch.cat([latents(5, "before"), *[word] * (12 if period == 2 else 4)])
    assert is_repeating(said, FRAME_RATE) is repeating


@pytest.mark.parametrize(("likeness", "repeating"), [(0.03, True), (-0.03, False)])
def test_a_repetition_is_as_like_as_the_threshold_says(likeness: float, repeating: bool) -> None:
    words = [latents(6, "word")]
    for number in range(MAX_REPETITIONS):
        words.append(beside(words[-1], LIKENESS + likeness, f"beside {number}"))
    assert is_repeating(torch.cat(words), FRAME_RATE) is repeating


def test_speech_goes_on_after_a_repetition_that_is_over() -> None:
    word = latents(6, "word")
    assert not is_repeating(torch.cat([*[word] * 6, latents(4, "after")]), FRAME_RATE)


def test_different_words_are_no_repetition() -> None:
    assert not is_repeating(latents(200), FRAME_RATE)


@pytest.mark.parametrize("cosine", [0.97, 1.0])
def test_a_held_sound_or_silence_is_no_repetition(cosine: float) -> None:
    """One latent over and over, each time a little beside it."""
    centre = latents(1, "centre").expand(60, -1)
    assert not is_repeating(beside(centre, cosine), FRAME_RATE)


def test_two_sounds_in_turn_are_a_repetition() -> None:
    """Each is held, but together they move: the line between the two is drawn there."""
    sounds = torch.cat([latents(1, "one").expand(2, -1), latents(1, "two").expand(2, -1)])
    assert is_repeating(torch.cat([sounds] * 4), FRAME_RATE)


@pytest.mark.parametrize("count", [0, 1, 11])
def test_too_few_latents_repeat_nothing(count: int) -> None:
    assert not is_repeating(torch.ones(count, 4), FRAME_RATE)


def test_low_frame_rates_have_periods_of_two_latents_at_least() -> None:
    word = latents(2, "word")
    assert is_repeating(torch.cat([word] * 4), 3.75)
