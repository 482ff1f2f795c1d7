"""Work that processes share, with threads in their place: the same bits for any number of them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch

from latentlm_core import processes
from latentlm_core.data.audio import write_wav
from latentlm_core.data.base import LEAST_BROKEN
from latentlm_core.errors import ConfigError, DataError
from latentlm_core.evaluation import image_sets, speech_quality, spoken_items
from latentlm_core.evaluation.features import extract_features
from latentlm_core.evaluation.image_sets import image_array, image_folder, image_npz, image_source
from latentlm_core.evaluation.recognition import normaliser
from latentlm_core.evaluation.reconstruction import evaluate_reconstruction
from latentlm_core.evaluation.speech import speaker_similarity, word_errors
from latentlm_core.evaluation.speech_drift import measure_drift
from latentlm_core.evaluation.speech_quality import AudioPair, reconstruction_quality
from latentlm_core.evaluation.spoken_items import SpokenItem
from latentlm_core.processes import ALONE, Processes
from latentlm_core.runtime import resolve_device
from tests.tiny_evaluation import pixels, random_extractor, save_pngs
from tests.tiny_latents import Holed, export_tokenizer

Made = TypeVar("Made")
SIZES = [2, 3, 5]
RATE = 8000


class Meeting:
    """Where threads that stand for processes meet; only one of them works at a time."""

    def __init__(self, size: int) -> None:
        self.here = threading.local()
        self.turn = threading.Lock()
        self._barrier = threading.Barrier(size, timeout=60)
        self._values: list[Any] = [None] * size

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self.turn.release()
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        self.turn.acquire()
        return values


class Together(Processes):
    """A thread among others."""

    meeting: Meeting

    def gather(self, value: Any) -> list[Any]:
        return self.meeting.gather(self.rank, value)


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch):
    """``together(size, work)``: what ``work`` returns, or raises, in each of ``size`` threads."""

    def run(size: int, work: Callable[[], Made]) -> list[Any]:
        meeting, found = Meeting(size), [None] * size

        def one(rank: int) -> None:
            torch.set_num_threads(1)
            meeting.here.processes = Together(rank, size)
            with meeting.turn:
                try:
                    found[rank] = work()
                except DataError as error:
                    found[rank] = error

        Together.meeting = meeting
        for module in (image_sets, speech_quality, spoken_items, processes):
            monkeypatch.setattr(module, "current", lambda: meeting.here.processes)
        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
        return found

    return run


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [0, 1, 4, 6, 7])
@pytest.mark.parametrize("size", [1, *SIZES])
def test_shared_work_comes_back_in_order(together, size, count):
    made: list[int] = []

    def square(item: int) -> int:
        made.append(item)
        return item**2

    def work() -> list[int]:
        return list(processes.current().shared(square, range(count)))

    assert together(size, work) == [[item**2 for item in range(count)]] * size
    assert sorted(made) == list(range(count))


def image_sets_of(folder: Path) -> dict[str, image_sets.ImageSet]:
    images = pixels(11)
    save_pngs(folder / "pngs", images)
    np.savez(folder / "images.npz", arr_0=images)
    return {
        "array": image_array(images, "noise"),
        "folder": image_folder(folder / "pngs"),
        "npz": image_npz(folder / "images.npz"),
        "source": image_source(Holed(broken=(4,), count=12), 16),
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["array", "folder", "npz", "source"])
def test_features_do_not_depend_on_who_extracts_them(together, tmp_path, kind, size):
    images, extractor = image_sets_of(tmp_path)[kind], random_extractor(seed=0)

    def work():
        seen = extract_features(images, extractor, batch_size=2, keep_features=True)
        return seen.sha256, seen.features, seen.moments.mean(), seen.moments.covariance()

    expected = work()
    for found in together(size, work):
        assert found[0] == expected[0]
        assert all(np.array_equal(a, b) for a, b in zip(found[1:], expected[1:], strict=True))


@pytest.mark.parametrize("size", SIZES)
def test_too_many_broken_images_are_found_by_all(together, size):
    """Each process alone would have found them few enough."""
    source = Holed(broken=range(0, 7 * LEAST_BROKEN + 1, 7), count=80)

    def work():
        return extract_features(image_source(source, 16), random_extractor(seed=0), batch_size=1)

    with pytest.raises(DataError, match="too many broken items") as caught:
        work()
    found = together(size, work)
    assert {type(error) for error in found} == {DataError}
    beginning = str(caught.value).partition(";")[0]
    assert all(str(error).startswith(beginning) for error in found)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("draw", [False, True])
def test_reconstruction_does_not_depend_on_who_measures_it(together, tmp_path, size, draw):
    from latentlm_core.tokenizers.base import PosteriorKind

    tokenizer, _ = export_tokenizer(PosteriorKind.LEARNED, tmp_path)
    images, extractor = image_array(pixels(7), "noise"), random_extractor(seed=0)

    def work():
        return evaluate_reconstruction(tokenizer.eval(), images, extractor, draw=draw, batch_size=2)

    assert together(size, work) == [work()] * size


class Scribe:
    """Writes down how loud the beginning is."""

    name = "scribe"

    def transcribe(self, samples, sample_rate) -> str:
        return f"word {round(float(samples[0]) * 9)}"

    def embed(self, samples, sample_rate):
        voice = samples[:4].astype(np.float32)
        return voice / np.linalg.norm(voice)


@pytest.fixture
def items(tmp_path: Path) -> list[SpokenItem]:
    found = []
    for index in range(7):
        files = [tmp_path / f"{index}-{side}.wav" for side in ("said", "prompt", "original")]
        for place, file in enumerate(files):
            noise = np.random.default_rng((index, place)).uniform(-0.5, 0.5, RATE // 4)
            write_wav(file, noise.astype(np.float32), RATE)
        found.append(SpokenItem(files[0], f"word {index}", files[1], files[2], index))
    return found


@pytest.mark.parametrize("size", SIZES)
def test_judges_of_speech_say_the_same_whoever_asks_them(together, items, size):
    pytest.importorskip("jiwer", reason="the extra speech is not installed")
    judge, rule = Scribe(), normaliser("basic")

    def work():
        understood = word_errors(items, judge, rule)
        similar = speaker_similarity(items, judge)
        drift = measure_drift(items, understood, judge, window_seconds=0.1)
        reports = (understood, similar, drift)
        return [(report.to_dict(), report.rows) for report in reports]

    assert together(size, work) == [work()] * size


@pytest.mark.parametrize("size", SIZES)
def test_the_quality_of_recordings_does_not_depend_on_who_compares_them(together, size):
    noise = [np.random.default_rng(n).uniform(-0.5, 0.5, RATE).astype(np.float32) for n in range(8)]
    pairs = [AudioPair(f"{n}.wav", noise[n], noise[n + 1]) for n in range(7)]

    def work():
        own = processes.current().own(pairs)
        report = reconstruction_quality(own, 7, RATE, ["mel_distance"])
        return report.to_dict(), report.rows

    assert together(size, work) == [work()] * size


# --- devices ---------------------------------------------------------------------------------


def test_each_process_has_a_card_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("auto", "cuda"):
        with monkeypatch.context() as patch:
            patch.setattr("latentlm_core.runtime.current", lambda: Processes(5, 8, 1, 4))
            assert resolve_device(name) == torch.device("cuda", 1)
            patch.setattr("latentlm_core.runtime.current", lambda: Processes(5, 8, 1, 8))
            with pytest.raises(ConfigError, match="has 4 cards for 8 processes"):
                resolve_device(name)
            with pytest.raises(ConfigError, match="cuda:1 is one card for 8 processes"):
                resolve_device("cuda:1")
    monkeypatch.setattr("latentlm_core.runtime.current", lambda: ALONE)
    assert resolve_device("auto") == torch.device("cuda")
