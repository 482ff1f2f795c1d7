"""Batches made ahead: the same ones, asked for by one thread at a time, errors and ends as ever."""

import threading
import time

import pytest
import torch
from torch import Tensor

from latentlm_core.draws import WHOLE
from latentlm_core.errors import DataError
from latentlm_core.runtime import to_device
from latentlm_core.training import trainer as training
from latentlm_core.training.feed import Feed, made_ahead, steps_ahead
from latentlm_core.training.parallel import StepShare
from tests.tiny_training import Points, Regression, Stream, make, traces

CPU = torch.device("cpu")


def feed(stream, ahead: int = 3, accumulate: int = 1) -> Feed:
    return Feed(stream, StepShare.of(accumulate), CPU, ahead)


def keys(parts) -> list[str]:
    return [part.keys[0] for part in parts]


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("batches")}


@pytest.fixture
def ahead(monkeypatch):
    """Trainers make batches ahead as if they trained on a GPU."""
    made = []

    def make_feed(stream, share, device):
        made.append(Feed(stream, share, device, 3))
        return made[-1]

    monkeypatch.setattr(training, "Feed", make_feed)
    return made


class Careful(Stream):
    """A stream that notices when two threads ask it at once."""

    def __init__(self, **options):
        super().__init__(**options)
        self.is_asked = False
        self.askers: set[str] = set()

    def batches(self, numbers, share=WHOLE):
        for batch in super().batches(numbers, share):
            self._ask()
            yield batch

    def held_out(self):
        for batch in super().held_out():
            self._ask()
            yield batch

    def _ask(self):
        assert not self.is_asked
        self.askers.add(threading.current_thread().name)
        self.is_asked = True
        time.sleep(0.002)
        self.is_asked = False


@pytest.mark.parametrize("ahead", [0, 3])
def test_steps_come_in_order_and_from_where_they_are_sought(ahead):
    one = feed(Stream(), ahead, accumulate=2)
    one.seek(0)
    assert [keys(one.take()) for _ in range(2)] == [["b0-0", "b1-0"], ["b2-0", "b3-0"]]
    assert keys(one.again(0)) == ["b0-0", "b1-0"]
    assert keys(one.take()) == ["b4-0", "b5-0"]
    one.seek(1)
    assert keys(one.take()) == ["b2-0", "b3-0"]
    one.close()


def test_batches_are_made_ahead_and_no_further():
    stream = Stream()
    one = feed(stream)
    one.seek(0)
    assert stream.asked == []
    one.take()
    deadline = time.monotonic() + 5
    while len(stream.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.01)
    assert stream.asked == [0, 1, 2, 3]
    one.close()


def test_an_error_of_the_thread_comes_as_itself_in_its_place():
    error = DataError("batch 2 is broken")
    one = feed(Stream(faults={2: error}))
    one.seek(0)
    assert [keys(one.take()) for _ in range(2)] == [["b0-0"], ["b1-0"]]
    with pytest.raises(DataError) as caught:
        one.take()
    assert caught.value is error
    assert threads() == set()


def test_closing_ends_the_thread_and_begins_nothing_new():
    begun, go_on = [], threading.Event()

    def slow() -> int:
        begun.append(len(begun))
        go_on.wait(5)
        return begun[-1]

    batches = made_ahead(slow, 3)
    taker = threading.Thread(target=lambda: next(batches))
    taker.start()
    while not begun:
        time.sleep(0.001)
    go_on.set()
    taker.join()
    go_on.clear()
    while len(begun) < 2:
        time.sleep(0.001)
    closer = threading.Thread(target=batches.close)
    closer.start()
    time.sleep(0.02)
    go_on.set()
    closer.join(5)
    assert threads() == set()
    assert len(begun) <= 4


def test_a_run_with_batches_made_ahead_is_the_same(tmp_path, ahead):
    stream = Careful()
    options = {"validate_every": 3, "on_bad_numbers": "rollback", "save_every": 3}
    make(tmp_path / "ahead", Regression(), stream, **options).run()
    assert {name.partition("_")[0] for name in stream.askers} == {"MainThread", "batches"}
    assert len(ahead) == 1
    plain = make(tmp_path / "plain", Regression(), Stream(), **options)
    plain._feed._ahead = 0
    plain.run()
    assert traces(tmp_path / "ahead") == traces(tmp_path / "plain")
    assert threads() == set()


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_step_is_looked_at_with_its_own_batch(tmp_path, ahead, policy):
    stream = Careful(spoil={4: float("nan")})
    result = make(
        tmp_path, Regression(), stream, on_bad_numbers=policy, save_every=3, log_every=1
    ).run()
    assert result.step == 13
    assert "b4-0" in (tmp_path / "bad-numbers.json").read_text()
    assert threads() == set()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, DataError])
def test_a_run_that_is_cut_off_leaves_no_thread_and_goes_on_as_if_it_was_not(
    tmp_path, ahead, fault
):
    make(tmp_path / "whole").run()
    with pytest.raises(fault):
        make(tmp_path / "cut", stream=Stream(faults={8: fault("now")})).run()
    assert threads() == set()
    assert make(tmp_path / "cut").run().resumed_from == (8 if fault is KeyboardInterrupt else 5)
    assert traces(tmp_path / "cut") == traces(tmp_path / "whole")


def test_what_goes_to_a_gpu_is_pinned_and_nothing_is_waited_for(monkeypatch):
    heard = []
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: heard.append("pinned") or self)
    monkeypatch.setattr(
        Tensor, "to", lambda self, device, **options: heard.append((device.type, options)) or self
    )
    x, y = torch.zeros(2, 2), torch.zeros(2)
    assert to_device(x, CPU) is x
    assert heard == [("cpu", {})]
    heard.clear()
    for tensor in (x, y):
        to_device(tensor, torch.device("cuda"))
    assert heard == ["pinned", ("cuda", {"non_blocking": True})] * 2


def test_the_thread_moves_batches_to_the_device():
    movers = []

    class Noting(Points):
        def to(self, device):
            movers.append(threading.current_thread().name)
            return self

    class Noted(Stream):
        def batches(self, numbers, share=WHOLE):
            for batch in super().batches(numbers, share):
                yield Noting(batch.x, batch.y, batch.keys)

    one = feed(Noted())
    one.seek(0)
    one.take()
    one.close()
    assert {name.partition("_")[0] for name in movers} == {"batches"}


def test_only_a_gpu_is_worth_a_thread():
    assert (steps_ahead(CPU), steps_ahead(torch.device("cuda", 1))) == (0, 4)
