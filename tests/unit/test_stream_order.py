"""Which work comes after which: the stream side of calls on a GPU, over a model of one. Runs everywhere."""

import gc
import random
from typing import Any, Callable, Optional

import pytest
import torch
from model_gpu import COMM, MAIN, SIDE, ModelGpu, Tensor, cuda_streams, installed


class Caller:
    """Makes calls of one Buffer on a model GPU."""

    def __init__(self, gpu: ModelGpu) -> None:
        self.gpu = gpu
        self.streams = cuda_streams(gpu)
        self.pool, self.comm_stream = self.streams.events, self.streams.comm_stream
        self.inputs, self.outputs = (Tensor(), ), (Tensor(), )
        self.tensors: Any = (Tensor(), None, Tensor())  # of low-latency calls
        self.before: dict[str, frozenset[str]] = {}  # what comes before each of their phases

    def call(self,
             name: str,
             previous: Any = None,
             is_async: bool = False,
             on_comm_stream: bool = False,
             fails: bool = False) -> tuple[frozenset[str], Any]:
        """Returns (what came before the kernel, the event)."""
        operation: Any = self.streams.operation(previous, is_async, on_comm_stream)
        with operation:
            operation.start(self.inputs, self.outputs)
            before = self.gpu.work(operation.stream, name)
            if fails:
                raise KeyError(before)
            return before, operation.finish()

    def low_latency(self, name: str, is_async: bool = False) -> Any:
        """Both phases; returns the event."""
        operation: Any = self.streams.low_latency_operation(is_async)
        with operation:
            operation.start(self.tensors, ())
            for phase in ("send", "receive"):
                self._launch(operation.stream, f"{name} {phase}")
            return operation.finish()

    def send(self, name: str) -> Callable[[], None]:
        """The send phase; returns the hook."""
        operation: Any = self.streams.low_latency_operation(False)
        with operation:
            operation.start(self.tensors, ())
            self._launch(operation.stream, f"{name} send")
            operation.pause()

        def receive() -> None:
            operation.resume()
            self._launch(operation.stream, f"{name} receive")
            assert operation.finish() is None

        return receive

    def recorded(self) -> list[Any]:
        """Streams on which tensors of low-latency calls were."""
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
def test_every_operation_comes_after_the_one_before_it(gpu: ModelGpu, caller: Caller, seed: int) -> None:
    """Whatever streams, modes, events kept and events dropped; and after the caller's work, and before its later."""
    chance = random.Random(seed)  # noqa: S311 - reproducible
    gpu.ambiguous = {SIDE} if chance.random() < 0.3 else set()
    before_this: set[str] = set()
    kept: list[Any] = []
    for i in range(30):
        gpu.current = chance.choice((MAIN, MAIN, SIDE, COMM))
        gpu.work(gpu.current, f"caller {i}")
        previous = caller.pool.record(gpu.current) if chance.random() < 0.4 else None
        is_async = chance.random() < 0.5
        on_comm_stream = is_async and previous is not None and chance.random() < 0.5
        before, event = caller.call(f"kernel {i}", previous, is_async, on_comm_stream)
        assert before >= before_this | {f"caller {i}"}, i
        assert is_async == (event is not None)
        if not is_async:
            assert f"kernel {i}" in gpu.known[gpu.current]
        elif chance.random() < 0.5:
            waiting = chance.choice((MAIN, SIDE))
            gpu.stream_wait_event(waiting, event.cuda_event)
            assert f"kernel {i}" in gpu.known[waiting]
        if chance.random() < 0.3:
            kept.append(event)
        del event
        before_this.add(f"kernel {i}")


def test_synchronous_calls_on_one_stream_wait_for_nothing(gpu: ModelGpu, caller: Caller) -> None:
    caller.call("first")
    gpu.calls.clear()
    before, event = caller.call("second")
    assert "first" in before and event is None
    assert gpu.calls == {"stream_kind": 1, "record_event": 1}
    assert gpu.known[COMM] == set()


def test_asynchronous_calls_make_no_new_events(gpu: ModelGpu, caller: Caller) -> None:
    for i in range(3):
        caller.call(f"warm-up {i}", is_async=True)
    gc.collect()
    gpu.calls.clear()
    for i in range(5):
        caller.call(f"kernel {i}", is_async=True)
    assert gpu.calls["create_event"] == 0


def test_an_event_that_is_held_stays_what_it_is(gpu: ModelGpu, caller: Caller) -> None:
    _, event = caller.call("held", is_async=True)
    for i in range(5):
        caller.call(f"kernel {i}", is_async=True)
    gpu.stream_wait_event(SIDE, event.cuda_event)
    assert gpu.known[SIDE] == {"held"}


def test_overlap_with_what_the_caller_queued_after_the_event(gpu: ModelGpu, caller: Caller) -> None:
    """Also when the operation before ran on the very stream that is busy now."""
    caller.call("first")
    event = caller.pool.record(MAIN)
    gpu.work(MAIN, "long")
    before, _ = caller.call("second", event, is_async=True, on_comm_stream=True)
    assert "first" in before and "long" not in before


def test_outputs_of_the_current_pool_wait_for_the_current_stream(gpu: ModelGpu, caller: Caller) -> None:
    """The memory may still be in use there (decision D3.5)."""
    event = caller.pool.record(MAIN)
    gpu.work(MAIN, "used the memory")
    before, _ = caller.call("kernel", event, is_async=True)
    assert "used the memory" in before


def test_outputs_made_later_wait_again(gpu: ModelGpu, caller: Caller) -> None:
    operation: Any = caller.streams.operation(None, True, False)
    operation.start(caller.inputs, ())
    gpu.work(MAIN, "filled the new output")
    operation.add(caller.outputs)
    assert "filled the new output" in gpu.work(operation.stream, "kernel")


@pytest.mark.parametrize("is_async", [False, True])
def test_captured_calls_fork_and_join_and_leave_nothing_behind(gpu: ModelGpu, caller: Caller, is_async: bool) -> None:
    caller.call("eager before")
    gpu.captured = {SIDE}
    gpu.current = SIDE
    gpu.work(SIDE, "captured work")
    before, event = caller.call("captured", is_async=is_async)
    assert "captured work" in before and "eager before" not in before
    if is_async:
        gpu.stream_wait_event(SIDE, event.cuda_event)
    assert "captured" in gpu.known[SIDE], "a capture with a stream that was not joined cannot end"
    gpu.captured = set()
    gpu.known[COMM].clear()  # what was captured has not run
    gpu.known[SIDE].clear()
    before, _ = caller.call("eager after")
    assert "eager before" in before and "captured" not in before and not gpu.captured


def test_two_captured_streams_are_ordered_by_the_comm_stream(gpu: ModelGpu, caller: Caller) -> None:
    gpu.captured = {MAIN, SIDE}
    caller.call("first")
    gpu.current = SIDE
    before, _ = caller.call("second")
    assert "first" in before


@pytest.mark.parametrize("is_async", [False, True])
def test_a_call_that_fails_half_way_is_still_waited_for(gpu: ModelGpu, caller: Caller, is_async: bool) -> None:
    with pytest.raises(KeyError):
        caller.call("failed", is_async=is_async, fails=True)
    gpu.current = SIDE
    before, _ = caller.call("next")
    assert "failed" in before
    assert caller.inputs[0].recorded == ([caller.comm_stream] if is_async else [])


@pytest.mark.parametrize("kind", ["captured", "ambiguous"])
def test_streams_that_will_not_do(gpu: ModelGpu, caller: Caller, kind: str) -> None:
    getattr(gpu, kind).add(MAIN)
    operation: Any = caller.streams.operation(None, False, False)
    assert operation.stream == COMM


def test_draining_waits_for_calls_on_other_streams(gpu: ModelGpu, caller: Caller) -> None:
    caller.call("kernel")
    assert "kernel" not in gpu.known[COMM]
    assert caller.streams.drain(0)
    assert "kernel" in gpu.known[COMM]


def test_closing_gives_events_back(gpu: ModelGpu, caller: Caller) -> None:
    created = gpu.calls["create_event"]
    caller.streams.close()
    assert gpu.calls["destroy_event"] == created


@pytest.mark.parametrize(("is_async", "on_comm_stream", "of_inputs", "of_outputs"), [
    (False, False, None, None),
    (True, False, COMM, COMM),
    (True, True, COMM, MAIN),
])
def test_memory_is_kept_for_the_stream_that_uses_it(caller: Caller, is_async: bool, on_comm_stream: bool,
                                                    of_inputs: Optional[int], of_outputs: Optional[int]) -> None:
    """Outputs of the comm stream's pool are used by the caller's stream; all the others by the comm stream."""
    names = {COMM: caller.comm_stream, MAIN: MAIN}
    caller.call("kernel", caller.pool.record(MAIN), is_async, on_comm_stream)
    assert caller.inputs[0].recorded == ([] if of_inputs is None else [names[of_inputs]])
    assert caller.outputs[0].recorded == ([] if of_outputs is None else [names[of_outputs]])


def test_outputs_are_made_on_the_comm_stream_where_that_is_wanted(gpu: ModelGpu, caller: Caller) -> None:
    gpu.current = SIDE
    operation = caller.streams.operation(caller.pool.record(SIDE), True, True)
    with operation.allocation():
        assert gpu.current == COMM
    assert gpu.current == SIDE
    with caller.streams.operation(None, True, False).allocation():
        assert gpu.current == SIDE


def test_from_another_gpu_torch_changes_the_stream(gpu: ModelGpu, caller: Caller,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """It knows how to put both devices back."""
    gpu.device = 1
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: ("torch", stream))
    operation = caller.streams.operation(caller.pool.record(MAIN), True, True)
    assert operation.allocation() == ("torch", caller.comm_stream)  # type: ignore[comparison-overlap]


# Low-latency calls: in phases, on the current stream also where it is captured


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
        elif chance.random() < 0.3:  # the other mode, on the same Buffer
            caller.before[f"call {i}"], _ = caller.call(f"call {i}", is_async=chance.random() < 0.5)
            assert f"caller {i}" in caller.before[f"call {i}"]
        else:
            is_async = chance.random() < 0.5
            event = caller.low_latency(f"call {i}", is_async)
            assert f"caller {i}" in caller.before[f"call {i} send"]
            if is_async:
                gpu.stream_wait_event(SIDE, event.cuda_event)
                assert f"call {i} receive" in gpu.known[SIDE]
            else:
                assert event is None and f"call {i} receive" in gpu.known[gpu.current]
    names = list(caller.before)
    for earlier, later in zip(names, names[1:]):
        assert earlier in caller.before[later]


def test_low_latency_calls_on_one_stream_ask_the_device_for_nothing(gpu: ModelGpu, caller: Caller) -> None:
    caller.low_latency("first")
    gpu.calls.clear()
    caller.low_latency("second")
    caller.send("third")()
    assert not gpu.calls and not caller.recorded()


def test_hooks_on_two_streams_wait_for_no_other_work(gpu: ModelGpu, caller: Caller) -> None:
    """Two micro-batches, each with a stream: a phase of one waits for that of the other, not for its experts."""
    hooks = {}
    for i in range(3):
        for stream in (MAIN, SIDE):
            gpu.current = stream
            hooks[stream] = caller.send(f"call {i} on {stream}")
        for stream, other in ((MAIN, SIDE), (SIDE, MAIN)):
            gpu.current = stream
            hooks[stream]()
            gpu.work(stream, f"experts {i} on {stream}")
            before = caller.before[f"call {i} on {stream} receive"]
            assert f"call {i} on {other} send" in before
            assert f"experts {i} on {other}" not in before


@pytest.mark.parametrize("is_phased", [False, True])
def test_a_call_of_one_mode_does_not_wait_for_work_behind_one_of_the_other(gpu: ModelGpu, caller: Caller,
                                                                           is_phased: bool) -> None:
    for stream in (MAIN, SIDE):  # a second stream has come
        gpu.current = stream
        caller.low_latency(f"first on {stream}")
    if is_phased:
        caller.call("other mode")
    else:
        caller.low_latency("other mode")
    gpu.work(SIDE, "long")
    gpu.current = MAIN
    if is_phased:
        caller.low_latency("call")
        before = caller.before["call send"]
    else:
        before, _ = caller.call("call")
    assert ("other mode" if is_phased else "other mode receive") in before and "long" not in before


def test_phases_leave_events_on_a_stream_that_may_go(gpu: ModelGpu, caller: Caller) -> None:
    """Nobody can record one there later."""
    gpu.current, gpu.external = SIDE, {SIDE}
    caller.low_latency("call")
    del gpu.known[SIDE]
    gpu.current = MAIN
    caller.low_latency("next")
    assert "call receive" in caller.before["next send"]


def test_asynchronous_low_latency_calls_come_after_the_operation_before(gpu: ModelGpu, caller: Caller) -> None:
    """One of the other mode, on another stream; and the next of that mode comes after this call."""
    caller.call("high throughput")
    gpu.current = SIDE
    caller.low_latency("call", is_async=True)
    assert "high throughput" in caller.before["call send"]
    before, _ = caller.call("next")
    assert "call receive" in before


def test_memory_of_asynchronous_low_latency_calls_is_kept_for_the_comm_stream(caller: Caller) -> None:
    caller.low_latency("call", is_async=True)
    assert caller.recorded() == [caller.comm_stream] * 2


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
def test_captured_low_latency_calls_stay_on_their_stream_and_leave_nothing_behind(gpu: ModelGpu, caller: Caller,
                                                                                  is_async: bool,
                                                                                  is_shared: bool) -> None:
    for stream in (SIDE, MAIN) if is_shared else (MAIN, ):
        gpu.current = stream
        caller.low_latency("eager before")
    gpu.known[SIDE].clear()
    gpu.current, gpu.captured = SIDE, {SIDE}
    event = caller.low_latency("captured", is_async)
    assert caller.before["captured send"] == frozenset() and not caller.recorded()
    assert "captured receive" in gpu.known[SIDE] and COMM not in gpu.captured and (event is not None) == is_async
    gpu.captured = set()
    gpu.known[SIDE].clear()  # what was captured has not run
    caller.low_latency("eager after")
    assert "eager before receive" in caller.before["eager after send"]
    assert "captured send" not in caller.before["eager after send"]


def test_a_capture_on_the_stream_of_the_call_before_leaves_nothing_behind(gpu: ModelGpu, caller: Caller) -> None:
    for stream in (SIDE, MAIN):
        gpu.current = stream
        caller.low_latency(f"eager on {stream}")
    gpu.captured = {MAIN}
    caller.send("captured")()
    gpu.captured = set()
    gpu.current = SIDE
    caller.low_latency("eager after")
    assert f"eager on {MAIN} receive" in caller.before["eager after send"]
    assert "captured receive" not in caller.before["eager after send"]


def test_draining_waits_for_the_last_phase(gpu: ModelGpu, caller: Caller) -> None:
    """And for the caller's work behind it once at most: a Buffer that was dropped is looked at again and again."""
    caller.low_latency("call")
    assert "call receive" not in gpu.known[COMM]
    assert caller.streams.drain(0)
    assert "call receive" in gpu.known[COMM]
    gpu.work(MAIN, "later")
    assert caller.streams.drain(0)
    assert "later" not in gpu.known[COMM]


@pytest.mark.parametrize("captured", [COMM, MAIN])
def test_a_buffer_that_goes_while_a_capture_has_its_stream_is_released_later(gpu: ModelGpu, caller: Caller,
                                                                             captured: int) -> None:
    """It must neither join the capture nor break it. A capture elsewhere is no reason to wait."""
    caller.low_latency("call")
    gpu.captured = {captured}
    assert not caller.streams.drain(0)
    assert gpu.captured == {captured}
    gpu.captured = {SIDE}
    assert caller.streams.drain(0)
    assert gpu.captured == {SIDE}
    assert "call receive" in gpu.known[COMM]
