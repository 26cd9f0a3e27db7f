"""Which work comes after which: the stream side of calls on a GPU, over a model of one. Runs everywhere."""

import gc
import random
from typing import Any, Optional

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
    """The memory may still be in use there (decision D25)."""
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
