"""EventHandle and EventOverlap, on whichever device this machine has."""

import pytest
import torch
from single_rank import single_rank_buffer, single_rank_dispatch
from utils import device

import deep_ep
from deep_ep import Buffer, EventHandle, EventOverlap


def test_fresh_handle_can_be_waited_for_again_and_again() -> None:
    handle = EventHandle()
    handle.current_stream_wait()
    handle.current_stream_wait()


def test_empty_overlap_has_nothing_to_wait_for() -> None:
    assert EventOverlap().event is None
    assert EventOverlap().extra_tensors is None
    with pytest.raises(deep_ep.Error, match="no event"):
        EventOverlap(None).current_stream_wait()


def test_attributes_are_writable() -> None:
    overlap = EventOverlap(None)
    overlap.event = EventHandle()
    overlap.extra_tensors = (torch.ones(1), )
    overlap.current_stream_wait()


def test_context_manager_waits_and_does_not_swallow() -> None:
    overlap = EventOverlap(EventHandle())
    with overlap as entered:
        assert entered is overlap
    with EventOverlap(None):
        pass
    with pytest.raises(KeyError), overlap:
        raise KeyError


def test_capture_on_class_instance_and_as_bound_reference() -> None:
    with single_rank_buffer() as buffer:
        for capture in (Buffer.capture, buffer.capture):
            assert isinstance(capture().event, EventHandle)


def test_synchronous_calls_return_no_event() -> None:
    with single_rank_buffer() as buffer:
        assert single_rank_dispatch(buffer)[5].event is None


def test_asynchronous_calls_return_one() -> None:
    with single_rank_buffer() as buffer:
        result = single_rank_dispatch(buffer, async_finish=True)
        assert isinstance(result[5].event, EventHandle)
        result[5].current_stream_wait()
        assert torch.equal(result[0].cpu(), torch.ones((5, 16), dtype=torch.bfloat16))


def test_event_outlives_its_buffer() -> None:
    buffer = single_rank_buffer()
    event = single_rank_dispatch(buffer, async_finish=True)[5]
    buffer.destroy()
    event.current_stream_wait()


def test_event_of_one_buffer_orders_another() -> None:
    with single_rank_buffer() as first, single_rank_buffer() as second:
        event = single_rank_dispatch(first, async_finish=True)[5]
        result = single_rank_dispatch(second, previous_event=event, async_finish=True, allocate_on_comm_stream=True)
        result[5].current_stream_wait()
        assert torch.equal(result[0].cpu(), torch.ones((5, 16), dtype=torch.bfloat16))


@pytest.mark.parametrize("raw", [EventHandle, lambda: None], ids=["handle", "none"])
def test_previous_event_without_event_attribute_is_none(raw: object) -> None:
    """Only `.event` is looked at, so a raw EventHandle means no event."""
    assert callable(raw)
    with single_rank_buffer() as buffer:
        single_rank_dispatch(buffer, previous_event=raw())
        with pytest.raises(RuntimeError, match="allocate_on_comm_stream"):
            single_rank_dispatch(buffer, previous_event=raw(), async_finish=True, allocate_on_comm_stream=True)


@pytest.mark.skipif(device().type != "cuda", reason="the CPU has one stream")
@pytest.mark.parametrize("of_first", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("of_second", [False, True], ids=["sync", "async"])
def test_calls_on_different_streams_run_one_after_the_other(of_first: bool, of_second: bool) -> None:
    """Though the caller orders the streams in no way. tests/unit/test_stream_order.py has the rest, over a model."""
    with single_rank_buffer() as buffer:
        single_rank_dispatch(buffer)
        torch.cuda.synchronize()
        first, second = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(first):
            torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
            with single_rank_dispatch(buffer, num_worst_tokens=5, async_finish=of_first)[5]:
                pass
            is_done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            is_done.record(first)
            assert not is_done.query(), "the device is faster than this test"
        with torch.cuda.stream(second):
            result = single_rank_dispatch(buffer, num_worst_tokens=5, async_finish=of_second)
            with result[5]:
                pass
            second.synchronize()
        assert is_done.query()
        assert torch.equal(result[0].cpu(), torch.ones((5, 16), dtype=torch.bfloat16))


def test_comm_stream() -> None:
    with single_rank_buffer() as buffer:
        if device().type == "cuda":
            assert isinstance(buffer.get_comm_stream(), torch.cuda.Stream)
        else:
            with pytest.raises(deep_ep.Error, match="CPU"):
                buffer.get_comm_stream()


@pytest.mark.skipif(device().type != "cuda", reason="the CPU has one stream")
def test_a_hook_does_not_wait_for_other_work_of_the_stream_of_the_phase_before() -> None:
    """Two micro-batches, each with a stream: the experts of one overlap with the receive phase of the other."""
    x = torch.ones((8, 1024), dtype=torch.bfloat16, device=device())
    topk_idx = torch.zeros((8, 1), dtype=torch.int64, device=device())
    with single_rank_buffer(0, num_rdma_bytes=1 << 20, low_latency_mode=True) as buffer:
        streams = torch.cuda.Stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for is_warm in (False, True):  # kernels are loaded in the first round
            torch.cuda.synchronize()
            hooks = []
            for stream in streams:
                with torch.cuda.stream(stream):
                    hooks.append(buffer.low_latency_dispatch(x, topk_idx, 8, 1, use_fp8=False, return_recv_hook=True))
            hooks[0][4]()  # type: ignore[misc]
            with torch.cuda.stream(streams[0]):
                torch.cuda._sleep(1_000_000_000 if is_warm else 1)  # type: ignore[no-untyped-call]
                experts = torch.cuda.Event()  # type: ignore[no-untyped-call]
                experts.record(streams[0])
            hooks[1][4]()  # type: ignore[misc]
            streams[1].synchronize()
            is_done = experts.query()
        assert not is_done, "the receive phase waited for the experts of the other micro-batch"
        torch.cuda.synchronize()
        assert torch.equal(hooks[1][0][0, :8], x)
