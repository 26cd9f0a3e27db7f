"""Construction, release, and what callers do to the class."""

import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from solo import SoloComm, solo_buffer, solo_dispatch
from utils import device

import deep_ep
from deep_ep import Buffer, _bootstrap
from deep_ep._streams import HostEvent


def test_attributes() -> None:
    comm = SoloComm()
    with Buffer(None, 1 << 12, 256, True, 10, comm=comm, enable_shrink=True) as buffer:
        assert (buffer.rank, buffer.group, buffer.group_size) == (0, None, 1)
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.low_latency_mode) == (1 << 12, 256, True)
        assert (buffer.explicitly_destroy, buffer.enable_shrink, buffer.nvshmem_qp_depth) == (False, True, 1024)
        assert buffer.runtime is not None
    assert buffer.runtime is None


def test_destroy_is_idempotent() -> None:
    buffer = solo_buffer(explicitly_destroy=True)
    buffer.destroy()
    buffer.destroy()


@pytest.mark.parametrize("call", [solo_dispatch, Buffer.check, Buffer.get_comm_stream])
def test_a_destroyed_buffer_says_so(call: Any) -> None:
    buffer = solo_buffer()
    buffer.destroy()
    with pytest.raises(deep_ep.Error, match="this Buffer was destroyed"):
        call(buffer)


def test_destroy_with_work_in_flight() -> None:
    buffer = solo_buffer()
    received = solo_dispatch(buffer, 200, 1024, async_finish=True)[0]
    buffer.destroy()
    assert torch.equal(received.cpu(), torch.ones((200, 1024), dtype=torch.bfloat16))


def test_weak_references_see_the_last_reference_go() -> None:
    buffers = weakref.WeakValueDictionary({"a": solo_buffer()})
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

    _bootstrap.release_lingering(5)  # of other tests
    monkeypatch.setattr(HostEvent, "is_complete", is_complete)
    for _ in range(3):
        buffer = solo_buffer()
        del buffer
        gc.collect()
        assert len(_bootstrap._LINGERING) == 1
    _bootstrap.release_lingering()
    assert not _bootstrap._LINGERING


@pytest.mark.parametrize("explicitly", [False, True])
def test_destructor_warns_when_destroy_was_promised(explicitly: bool, capsys: pytest.CaptureFixture[str]) -> None:
    buffer = solo_buffer(explicitly_destroy=explicitly)
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
    solo_buffer().destroy()
    assert len(seen) == 1


def test_a_failed_constructor_leaves_nothing_to_release() -> None:
    with pytest.raises(ValueError, match="num_nvl_bytes"):
        solo_buffer(1)
    gc.collect()


def test_destructor_of_an_object_that_was_never_initialised() -> None:
    buffer = Buffer.__new__(Buffer)
    del buffer
    gc.collect()


def test_building_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deep_ep._streams.is_capturing", lambda: True)
    with pytest.raises(deep_ep.Error, match="before the CUDA graph capture"):
        solo_buffer()


def test_fresh_dispatch_inside_a_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with solo_buffer() as buffer:
        handle = solo_dispatch(buffer)[4]
        assert buffer._session is not None
        streams = buffer._session.streams
        make_operation = streams.operation

        def captured(*options: Any) -> Any:
            operation = make_operation(*options)
            operation.is_captured = True
            return operation

        monkeypatch.setattr(streams, "operation", captured)
        with pytest.raises(deep_ep.Error, match="num_worst_tokens"):
            solo_dispatch(buffer)
        solo_dispatch(buffer, num_worst_tokens=5)
        buffer.dispatch(torch.ones((5, 16), dtype=torch.bfloat16, device=device()), handle)


EXIT_SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from solo import solo_buffer, solo_dispatch
buffer = solo_buffer(explicitly_destroy=sys.argv[2] == "promised")
event = solo_dispatch(buffer, async_finish=True)
"""

# Finalizers of a cycle are called from the oldest object on, and what was frozen counts as the youngest: the Buffer.
CYCLE_SCRIPT = """
import gc, sys
sys.path.insert(0, sys.argv[1])
from solo import solo_buffer, solo_dispatch
buffer = solo_buffer()
gc.freeze()
event = solo_dispatch(buffer, 200, 1024, async_finish=True)
gc.collect()
gc.unfreeze()
buffer.cycle = [buffer, event]
del buffer, event
gc.collect()
solo_buffer().destroy()
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
