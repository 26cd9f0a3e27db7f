"""What the worker processes do in tests/test_lending.py. Every function runs on all ranks of a group."""

import gc
from typing import Any

import torch
from compare import same_bits
from failure_cases import failure_of
from flight import Flight, How
from utils import Worker
from workload import Workload

LEND_BYTES = 1 << 22
MIB = 1 << 20


def lent_region(buffer: Any, num_bytes: int = LEND_BYTES) -> range:
    """The addresses that a Buffer lends, from one that has lent nothing yet: it lends them all at once."""
    begin = buffer.lend((num_bytes, ), torch.uint8).data_ptr()
    return range(begin, begin + num_bytes)


def outputs_are_lent(worker: Worker, work: Workload, how: How) -> list[bool]:
    """Of a fresh dispatch that is right: which outputs lie in lent memory, the handle's indices included."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        region = lent_region(buffer)
        flight = Flight(worker, buffer, work, how).layout().dispatch()
        x, topk_idx, topk_weights = flight.result[:3]
        rows = list(x) if isinstance(x, tuple) else [x]
        found = [tensor.data_ptr() in region for tensor in (*rows, topk_idx, topk_weights, flight.handle[3])]
        flight.combine()
        return found


def freed_rows_are_lent_again(worker: Worker, work: Workload) -> None:
    """Far more dispatches than there is room for, each dropped before the next: all of them are lent."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        region = lent_region(buffer)
        for _ in range(20):
            flight = Flight(worker, buffer, work, How(lends=True)).layout().dispatch()
            assert flight.result[0].data_ptr() in region
            flight.combine()
            del flight
            gc.collect()


def no_room_is_no_error(worker: Worker, work: Workload) -> list[bool]:
    """Dispatches whose rows are all kept: the first are lent, the others are not, and every one is right."""
    with worker.new_buffer(num_lend_bytes=MIB) as buffer:
        region = lent_region(buffer, MIB)
        flights = [Flight(worker, buffer, work).layout().dispatch() for _ in range(6)]
        found = [flight.result[0].data_ptr() in region for flight in flights]
        for flight in reversed(flights):
            flight.check_payload(flight.result[0])
            flight.combine()
        return found


def rows_outlive_the_buffer(worker: Worker, work: Workload) -> None:
    buffer = worker.new_buffer(num_lend_bytes=LEND_BYTES)
    region = lent_region(buffer)
    flight = Flight(worker, buffer, work).layout().dispatch()
    assert flight.result[0].data_ptr() in region
    worker.barrier()
    buffer.destroy()
    flight.check_payload(flight.result[0])
    flight.result[0].zero_()
    del flight
    gc.collect()


def views_hold_the_memory(worker: Worker, work: Workload) -> None:
    """A view of one row keeps the bytes from being lent again."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        flight = Flight(worker, buffer, work).layout().dispatch()
        row = flight.result[0][3:4]
        want = row.cpu()
        flight.result = None
        gc.collect()
        for _ in range(8):
            Flight(worker, buffer, work.next(), How(lends=True)).whole_trip()
        same_bits("a row that somebody holds", row.cpu(), want)


def part_of_a_lent_tensor(worker: Worker, work: Workload) -> None:
    """combine reads a slice of what was lent."""
    with worker.new_buffer(num_lend_bytes=LEND_BYTES) as buffer:
        flight = Flight(worker, buffer, work).layout().dispatch()
        rows = flight.handle[3].shape[0]
        lent = buffer.lend((rows + 7, work.hidden))
        lent.fill_(float("nan"))
        flight.combine_input = lambda given: lent[5:5 + rows].copy_(given)  # type: ignore[method-assign]
        flight.combine(1)


def lend_errors(worker: Worker) -> list[str]:
    with worker.new_buffer(num_lend_bytes=MIB) as buffer, worker.new_buffer(num_lend_bytes=0) as other:
        held = buffer.lend((1000, ), torch.float32)
        assert held.shape == (1000, )
        assert held.dtype == torch.float32
        return [
            failure_of(lambda: buffer.lend((MIB + 1, ), torch.uint8)),
            failure_of(lambda: buffer.lend((-1, 8)), ValueError),
            failure_of(lambda: buffer.lend((2.5, 8)), TypeError),
            failure_of(lambda: other.lend((4, 8))),
            failure_of(lambda: worker.new_buffer(num_lend_bytes=100), ValueError),
        ]
