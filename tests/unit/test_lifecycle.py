"""Construction, release, and what callers do to the class."""

import contextlib
import copy
import gc
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from single_rank import SingleRankComm, single_rank_buffer, single_rank_dispatch
from torch.testing._internal.distributed.fake_pg import FakeStore
from utils import device

import deep_ep
import deep_ep_cpp
from deep_ep import Buffer, _session
from deep_ep._tensors import RowForm
from deep_ep.utils import HostEvent


def test_attributes() -> None:
    comm = SingleRankComm()
    with Buffer(None, 1 << 12, 256, True, 10, comm=comm, enable_shrink=True) as buffer:
        assert (buffer.rank, buffer.group, buffer.group_size) == (0, None, 1)
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.low_latency_mode) == (1 << 12, 256, True)
        assert (buffer.explicitly_destroy, buffer.enable_shrink, buffer.nvshmem_qp_depth) == (False, True, 1024)
        assert buffer.runtime is not None
    assert buffer.runtime is None


def test_printed_form_has_the_topology() -> None:
    buffer = single_rank_buffer()
    assert "rank 0 of 1 on " in repr(buffer)
    assert "node 0 of 1 with 1 rank(s), num_nvl_bytes=" in repr(buffer)
    buffer.destroy()
    assert repr(buffer) == "<Buffer of rank 0 of 1, destroyed>"


def test_destroy_is_idempotent() -> None:
    buffer = single_rank_buffer(explicitly_destroy=True)
    buffer.destroy()
    buffer.destroy()


@pytest.mark.parametrize("call", [single_rank_dispatch, Buffer.check, Buffer.get_comm_stream])
def test_a_destroyed_buffer_says_so(call: Any) -> None:
    buffer = single_rank_buffer()
    buffer.destroy()
    with pytest.raises(deep_ep.Error, match="this Buffer was destroyed"):
        call(buffer)


def test_destroy_with_work_in_flight() -> None:
    buffer = single_rank_buffer()
    received = single_rank_dispatch(buffer, 200, 1024, async_finish=True)[0]
    buffer.destroy()
    assert torch.equal(received.cpu(), torch.ones((200, 1024), dtype=torch.bfloat16))


def test_weak_references_see_the_last_reference_go() -> None:
    buffers = weakref.WeakValueDictionary({"a": single_rank_buffer()})
    gc.collect()
    assert not buffers


@pytest.mark.skipif(device().type != "cpu", reason="on a GPU the stream itself is asked")
def test_what_a_destructor_could_not_release_the_next_constructor_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers rebuild Buffers without destroy(). An event is never complete at once, so both must ask for the same."""
    asked: list[HostEvent] = []

    def is_complete(self: HostEvent) -> bool:
        is_known = self in asked
        asked.append(self)
        return is_known

    _session.release_lingering(5)  # of other tests
    monkeypatch.setattr(HostEvent, "is_complete", is_complete)
    for _ in range(3):
        buffer = single_rank_buffer()
        del buffer
        gc.collect()
        assert len(_session._LINGERING) == 1
    _session.release_lingering()
    assert not _session._LINGERING


@pytest.mark.parametrize("explicitly", [False, True])
def test_destructor_warns_when_destroy_was_promised(explicitly: bool, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = single_rank_buffer(explicitly_destroy=explicitly)
    del buffer
    gc.collect()
    printed = capsys.readouterr()
    text = "WARNING: destroy() was not called before DeepEP buffer destruction, which can leak resources."
    assert (text in printed.out + printed.err) == explicitly


def test_init_can_be_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """slime and miles put their own function around the constructor."""
    original, seen = Buffer.__init__, []

    def wrapped(self: Buffer, *args: Any, **kwargs: Any) -> None:
        seen.append(kwargs)
        original(self, *args, **kwargs)

    monkeypatch.setattr(Buffer, "__init__", wrapped)
    single_rank_buffer().destroy()
    assert len(seen) == 1


def test_a_failed_constructor_leaves_nothing_to_release() -> None:
    with pytest.raises(ValueError, match="num_nvl_bytes"):
        single_rank_buffer(1)
    gc.collect()


def test_destructor_of_an_object_that_was_never_initialised() -> None:
    buffer = Buffer.__new__(Buffer)
    del buffer
    gc.collect()


def test_building_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_ep._session.is_capturing", lambda: True)
    with pytest.raises(deep_ep.Error, match="before the CUDA graph capture"):
        single_rank_buffer()


def test_fresh_dispatch_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with single_rank_buffer() as buffer:
        handle = single_rank_dispatch(buffer)[4]
        assert buffer._session is not None
        streams = buffer._session.streams
        make_operation = streams.operation

        def captured(*options: Any) -> Any:
            operation = make_operation(*options)
            operation.is_captured = True
            return operation

        monkeypatch.setattr(streams, "operation", captured)
        with pytest.raises(deep_ep.Error, match="num_worst_tokens"):
            single_rank_dispatch(buffer)
        single_rank_dispatch(buffer, num_worst_tokens=5)
        buffer.dispatch(torch.ones((5, 16), dtype=torch.bfloat16, device=device()), handle)


EXIT_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from single_rank import single_rank_buffer, single_rank_dispatch
buffer = single_rank_buffer(explicitly_destroy=sys.argv[2] == "promised")
event = single_rank_dispatch(buffer, async_finish=True)
"""

# Finalizers of a cycle are called from the oldest object on, and what was frozen counts as the youngest: the Buffer.
CYCLE_SCRIPT = """
import gc, sys
sys.path.insert(0, sys.argv[1])
from single_rank import single_rank_buffer, single_rank_dispatch
buffer = single_rank_buffer()
gc.freeze()
event = single_rank_dispatch(buffer, 200, 1024, async_finish=True)
gc.collect()
gc.unfreeze()
buffer.cycle = [buffer, event]
del buffer, event
gc.collect()
single_rank_buffer().destroy()
"""


def run_script(script: str, *arguments: str) -> None:
    folder = __file__.rsplit("/unit/", 1)[0]
    done = subprocess.run([sys.executable, "-c", script, folder, *arguments],
                          capture_output=True,
                          text=True,
                          timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", ["promised", "left"])
def test_exit_without_destroy(how: str) -> None:
    """Globals that nobody released, with work that nobody waited for: a clean exit all the same."""
    run_script(EXIT_SCRIPT, how)


def test_a_cycle_is_collected_with_its_events_before_the_buffer() -> None:
    run_script(CYCLE_SCRIPT)


FORK = """
import os, sys, torch.distributed as dist, deep_ep
def build():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 20)
    idx = deep_ep.buffer.torch.zeros((4, 1), dtype=deep_ep.topk_idx_t)
    _, _, per_expert, _, event = buffer.get_dispatch_layout(idx, 2, async_finish=True)
    event.current_stream_wait()
    assert per_expert.tolist() == [4, 0]
    buffer.destroy()
    dist.destroy_process_group()
build()
child = os.fork()
build()
if child == 0:
    os._exit(0)  # as multiprocessing ends its children
sys.exit(os.waitpid(child, 0)[1] != 0)
"""


@pytest.mark.skipif(device().type != "cpu", reason="CUDA does not survive a fork")
def test_a_forked_child_builds_its_own(tmp_path: Path) -> None:
    """After use in the parent, as multiprocessing does it on Linux before Python 3.14; and the parent goes on."""
    ended = subprocess.run([sys.executable, "-c", FORK], cwd=tmp_path, timeout=120, check=False)
    assert ended.returncode == 0


def test_a_copy_is_the_buffer_itself() -> None:
    with single_rank_buffer() as buffer:
        other = copy.copy(buffer)
        del other
        gc.collect()
        single_rank_dispatch(buffer)


@pytest.mark.parametrize(("make", "sentence"), [(copy.deepcopy, "cannot be copied"),
                                                (pickle.dumps, "cannot be pickled")])
def test_what_cannot_be_copied_says_so(make: Any, sentence: str) -> None:
    with single_rank_buffer() as buffer:
        with pytest.raises(TypeError, match=f"a Buffer {sentence}: it is memory of this process"):
            make({"layer": [buffer]})
        single_rank_dispatch(buffer)


def test_the_event_of_a_dropped_buffer_is_that_of_its_call() -> None:
    """The results are there, and nothing went wrong."""

    def layer() -> Any:
        return single_rank_dispatch(single_rank_buffer(1 << 22), 4000, 512, async_finish=True)

    received = layer()
    gc.collect()
    received[5].current_stream_wait()
    assert (received[0] == 1).all()


@pytest.mark.skipif(device().type != "cpu", reason="events of a GPU report nothing")
def test_the_event_of_a_dropped_buffer_tells_what_failed() -> None:
    event = single_rank_buffer().get_dispatch_layout(torch.full((4, 1), 9), 4, async_finish=True)[4]
    gc.collect()
    with pytest.raises(deep_ep.Error, match="topk_idx of token 0"):
        event.current_stream_wait()


BIG = (1 << 63) - 128


@pytest.mark.parametrize("sizes", [{"num_nvl_bytes": BIG}, {"num_nvl_bytes": BIG, "num_rdma_bytes": BIG},
                                   {"num_rdma_bytes": BIG}, {"num_lend_bytes": BIG},
                                   {"num_nvl_bytes": 1 << 60, "num_lend_bytes": 128}])  # yapf: disable
def test_sizes_do_not_wrap(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"num_nvl_bytes \+ num_rdma_bytes \+ num_lend_bytes must be at most"):
        single_rank_buffer(**{"num_nvl_bytes": 0, **sizes})


def test_an_allocation_that_fails_says_what_was_asked_for() -> None:
    with pytest.raises(deep_ep.Error, match=f"asked for num_nvl_bytes={1 << 58}, num_rdma_bytes=256, num_lend_bytes=0"):
        single_rank_buffer(1 << 58, num_rdma_bytes=256, num_lend_bytes=0)


def test_permissions_are_taken_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="deep_ep"):
        for _ in range(2):
            single_rank_buffer(allow_mnnvl=True, use_fabric=True).destroy()
    sentences = [record.getMessage() for record in caplog.records if "changes nothing" in record.getMessage()]
    assert [sentence.partition("=")[0] for sentence in sentences] == ["allow_mnnvl", "use_fabric"]


def test_a_fake_group_is_refused() -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match='torch\'s "fake" process group reaches no other process'):
            Buffer(dist.group.WORLD, 1 << 20)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(device().type != "cpu", reason="the CPU's memory is reached through process ids")
def test_containers_with_process_ids_of_their_own_are_told() -> None:
    """Each rank may be process 1 of its namespace, and would find a descriptor of its own."""
    sizes = {"num_data_bytes": 1 << 20, "timeout_s": 1.0, "warn_s": 1.0}
    natives = [deep_ep_cpp.Buffer(deep_ep_cpp.Device(-1), rank, 2, **sizes)
               for rank in range(2)]  # type: ignore[arg-type]
    handles = [native.export_handle() for native in natives]
    before, name, after = handles[1].rpartition(b"pid:[")
    handles[1] = before + name + b"1" + after[1:] if not after.startswith(b"1") else before + name + b"2" + after[1:]
    with pytest.raises(deep_ep.TransportError, match="in another pid namespace"):
        natives[0].connect(handles)
    for native in natives:
        native.destroy(0.0)


def test_a_bug_of_ours_is_not_the_callers_argument() -> None:
    with single_rank_buffer() as buffer:
        assert buffer.runtime is not None
        with pytest.raises(deep_ep.InternalError, match="a bug of deep_ep, please report it"):
            buffer.runtime.connect([])
        with pytest.raises(deep_ep.InternalError, match="every size must be positive"):
            buffer.runtime.lend(RowForm([((), torch.uint8)]).native, -1, 0, False)


class Held:
    """What a caller's frame holds, such as a CUDA graph."""


@pytest.mark.parametrize("call", [
    lambda _: single_rank_buffer(100),
    lambda _: single_rank_buffer(timeout_s=0.0),
    lambda buffer: single_rank_dispatch(buffer, num_worst_tokens=-1),
    lambda buffer: buffer.combine(torch.ones(2, 8), ()),
    lambda buffer: buffer.low_latency_dispatch(torch.ones(2, 8), None, 1, 1),
    lambda buffer: buffer.lend((-1, )),
])
def test_an_error_leaves_no_cycle_behind(call: Any) -> None:
    """The collector might break it while a CUDA graph is captured, and end an older graph of the caller's there.

    That voids the capture; the refusal that a capture itself gets left such a cycle.
    """

    def refused(buffer: Buffer) -> Any:
        held = Held()
        with contextlib.suppress(deep_ep.Error, ValueError, TypeError):
            call(buffer)
            pytest.fail("no error")
        return weakref.ref(held)

    with single_rank_buffer() as buffer:
        gc.collect()
        gc.disable()
        try:
            assert refused(buffer)() is None
        finally:
            gc.enable()
