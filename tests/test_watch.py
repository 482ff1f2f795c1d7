"""The watches over generated speech: bounds, silence, repetition."""

import math

import pytest
import torch
from torch import Tensor

from latentlm_core.export_config import SpeechBounds
from latentlm_core.runtime import generator
from latentlm_core.workflows.watch import (
    LIKENESS,
    MAX_REPETITIONS,
    is_repeating,
    is_silent,
    longest_silence,
    max_latents,
)

RATE, FRAME_RATE = 8000, 10.0
BOUNDS = SpeechBounds(latents_per_character=0.75, slack=4.0, longest=50, pace=0.75)


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


def test_a_text_may_take_a_quarter_more_than_the_slowest_reading_of_the_training() -> None:
    assert max_latents("x" * 40, BOUNDS) == 43  # 1.25 (30 + 4) = 42.5, rounded up
    assert max_latents(f"  {'x' * 40}\n", BOUNDS) == 43
    assert max_latents("x" * 4, BOUNDS.model_copy(update={"slack": 1.0})) == 5
    assert max_latents("x", BOUNDS.model_copy(update={"slack": 0.0})) == 1


def test_the_bound_grows_with_the_text() -> None:
    bounds = [max_latents("x" * size, BOUNDS) for size in range(1, 200)]
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


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ([], 0.0),
        ([0.01], 0.0),  # less than a window
        ([0.5], 0.0),
        ([0.0, 3.0], 3.0),
        ([0.5, 0.7, 0.1, 0.4, 0.3], 0.7),
        ([0.5, 0.4, 0.02, 0.7], 0.7),
        ([0.0, 0.6, 0.1], 0.6),
        ([0.5, 0.32, 0.1, 0.219], 0.32),  # what fills no window is not heard
    ],
)
def test_the_longest_silence_by_hand(seconds: list[float], wanted: float) -> None:
    """Sound and silence in turn, in seconds, at a rate whose windows divide them."""
    pieces = [
        torch.zeros(round(size * RATE)) if place % 2 else noise(size, -25.0)
        for place, size in enumerate(seconds)
    ]
    audio = torch.cat(pieces) if pieces else torch.zeros(0)
    assert longest_silence(audio, RATE) == pytest.approx(wanted)


@pytest.mark.parametrize(("dbfs", "wanted"), [(-53.0, 2.0), (-47.0, 0.0)])
def test_the_longest_silence_has_the_level_of_the_watch(dbfs: float, wanted: float) -> None:
    assert longest_silence(noise(2.0, dbfs), RATE) == pytest.approx(wanted)
    assert longest_silence(torch.zeros(44_100), 22_050) == pytest.approx(2.0)


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
    assert not is_repeating(torch.cat([*[word] * 6, latents(6, "after")]), FRAME_RATE)


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
