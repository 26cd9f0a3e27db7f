"""Which phase of a low-latency call comes after which work: on a GPU, over a model of one. Runs everywhere."""

import random
from typing import Any, Callable, Optional

import pytest
from model_gpu import COMM, MAIN, SIDE, ModelGpu, Tensor, cuda_streams, installed

from deep_ep._phases import PhaseOrder, open_phases


class Caller:
    """Makes low-latency calls of one Buffer on a model GPU."""

    def __init__(self, gpu: ModelGpu) -> None:
        self.gpu = gpu
        self.streams = cuda_streams(gpu)
        self.order = PhaseOrder()
        self.tensors: Any = (Tensor(), None, Tensor())
        self.before: dict[str, frozenset[str]] = {}  # what comes before each phase

    def call(self, name: str, is_async: bool = False) -> Any:
        """Both phases; returns the event."""
        phases = open_phases(self.streams, self.order, is_async)
        phases.begin()
        for phase in ("send", "receive"):
            self._launch(phases.stream, f"{name} {phase}")
        return phases.finish(self.tensors)

    def send(self, name: str) -> Callable[[], None]:
        """The send phase; returns the hook."""
        phases = open_phases(self.streams, self.order, is_async=False)
        phases.begin()
        self._launch(phases.stream, f"{name} send")
        phases.pause(self.tensors)

        def receive() -> None:
            phases.resume()
            self._launch(phases.stream, f"{name} receive")
            assert phases.finish(self.tensors) is None

        return receive

    def recorded(self) -> list[Any]:
        return self.tensors[0].recorded + self.tensors[2].recorded

    def _launch(self, stream: int, name: str) -> None:
        self.before[name] = self.gpu.work(stream, name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModelGpu:
    return installed(monkeypatch)


@pytest.fixture
def caller(gpu: ModelGpu) -> Caller:
    return Caller(gpu)


@pytest.mark.parametrize("seed", range(40))
def test_every_phase_comes_after_the_one_before_it(gpu: ModelGpu, caller: Caller, seed: int) -> None:
    """Whatever the streams and modes, hooks called on another stream than the call; and after the caller's work."""
    chance = random.Random(seed)  # noqa: S311 - reproducible
    hook: Optional[Callable[[], None]] = None
    for i in range(30):
        gpu.current = chance.choice((MAIN, MAIN, SIDE, COMM))
        gpu.work(gpu.current, f"caller {i}")
        if hook is not None and chance.random() < 0.5:
            hook, _ = None, hook()
        elif hook is None and chance.random() < 0.4:
            hook = caller.send(f"call {i}")
            assert f"caller {i}" in caller.before[f"call {i} send"]
        else:
            is_async = chance.random() < 0.5
            event = caller.call(f"call {i}", is_async)
            assert f"caller {i}" in caller.before[f"call {i} send"]
            if is_async:
                gpu.stream_wait_event(SIDE, event.cuda_event)
                assert f"call {i} receive" in gpu.known[SIDE]
            else:
                assert event is None and f"call {i} receive" in gpu.known[gpu.current]
    names = list(caller.before)
    for earlier, later in zip(names, names[1:]):
        assert earlier in caller.before[later]


def test_calls_on_one_stream_ask_the_device_for_nothing(gpu: ModelGpu, caller: Caller) -> None:
    caller.call("first")
    gpu.calls.clear()
    caller.call("second")
    caller.send("third")()
    assert not gpu.calls and not caller.recorded()


def test_asynchronous_calls_come_after_the_operation_before(gpu: ModelGpu, caller: Caller) -> None:
    """One of the other mode, on another stream; and the next of that mode comes after this call."""
    operation: Any = caller.streams.operation(None, False, False)
    with operation:
        operation.start((), ())
        gpu.work(operation.stream, "high throughput")
        operation.finish()
    gpu.current = SIDE
    caller.call("call", is_async=True)
    assert "high throughput" in caller.before["call send"]
    caller.streams.follow_last(SIDE)
    assert "call receive" in gpu.known[SIDE]


def test_memory_of_asynchronous_calls_is_kept_for_the_comm_stream(caller: Caller) -> None:
    caller.call("call", is_async=True)
    assert caller.recorded() == [caller.streams.comm_stream] * 2


@pytest.mark.parametrize("is_async", [False, True])
def test_captured_calls_stay_on_their_stream_and_leave_nothing_behind(gpu: ModelGpu, caller: Caller,
                                                                      is_async: bool) -> None:
    caller.call("eager before")
    gpu.current, gpu.captured = SIDE, {SIDE}
    event = caller.call("captured", is_async)
    assert caller.before["captured send"] == frozenset() and not caller.recorded()
    assert "captured receive" in gpu.known[SIDE] and COMM not in gpu.captured and (event is not None) == is_async
    gpu.captured = set()
    gpu.known[SIDE].clear()  # what was captured has not run
    caller.call("eager after")
    assert "eager before receive" in caller.before["eager after send"]
    assert "captured send" not in caller.before["eager after send"]


def test_releasing_waits_for_the_last_phase(gpu: ModelGpu, caller: Caller) -> None:
    caller.call("call")
    assert "call receive" not in gpu.known[COMM]
    caller.order.join(caller.streams)
    assert "call receive" in gpu.known[COMM]
