"""Events, and a check of the machine that callers may run before building a Buffer."""

from types import TracebackType
from typing import Any, Optional

import torch
import torch.distributed as dist
from typing_extensions import Self

from deep_ep import _env, _streams
from deep_ep._errors import Error
from deep_ep._opaque import opaque

__all__ = ["EventHandle", "EventOverlap", "check_nvlink_connections"]


@opaque
class EventHandle:
    """A point in the work of the current stream.

    On CUDA it is recorded on torch's current stream. On the CPU the host is the current stream, so a fresh handle is
    complete at once; a handle that an asynchronous call returned is complete when the kernels of that call are.
    """

    __slots__ = ("__weakref__", "_recorded")

    def __init__(self) -> None:
        self._recorded: _streams.RecordedEvent = _streams.record_on_current_stream()

    @classmethod
    def _wrap(cls, recorded: _streams.RecordedEvent) -> "EventHandle":
        handle = cls.__new__(cls)
        handle._recorded = recorded
        return handle

    def current_stream_wait(self) -> None:
        """Later work on the current stream waits for this point (on the CPU: blocks).

        Raises deep_ep.TimeoutError on the CPU when the kernels before this point gave up on a peer.
        """
        _streams.wait_on_current_stream(self._recorded)


@opaque
class EventOverlap:
    """An event and, optionally, tensors that must outlive it. Also a context manager:

        with event:
            ...  # work that overlaps with communication
        # here the current stream waits for the event

    Attributes (both may be assigned): `event`, an EventHandle or None; `extra_tensors`, a tuple or None.
    """

    def __init__(self,
                 event: Optional[EventHandle] = None,
                 extra_tensors: Optional[tuple[torch.Tensor, ...]] = None) -> None:
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Later work on the current stream waits for the event (on the CPU: blocks).

        Raises deep_ep.Error when there is no event: a synchronous call returns EventOverlap(None).
        """
        if self.event is None:
            raise Error("EventOverlap.current_stream_wait: there is no event (the call that returned this was "
                        "synchronous, so its results are ready)")
        self.event.current_stream_wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: Optional[type[BaseException]], exc: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        if self.event is not None:
            self.event.current_stream_wait()


def check_nvlink_connections(group: dist.ProcessGroup) -> None:
    """Raises deep_ep.Error when the GPUs of `group` are PCIe cards that no NVLink bridge joins.

    Does nothing on the CPU and on GPUs whose name does not contain 'PCIE'. Collective. Needs `pynvml` on PCIe cards.
    """
    if _streams.device_choice()[0] == "cpu" or "PCIE" not in torch.cuda.get_device_name().upper():
        return
    if group.size() > 2:
        raise Error(f"check_nvlink_connections: a bridge joins two PCIe GPUs, but the group has {group.size()} ranks")
    try:
        import pynvml  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise Error("check_nvlink_connections needs pynvml (pip install nvidia-ml-py)") from error
    physical: list[Any] = [None] * group.size()
    dist.all_gather_object(physical, _physical_gpu(torch.cuda.current_device()), group)
    pynvml.nvmlInit()
    try:
        handles = [_nvml_handle(pynvml, device) for device in physical]
        for i, first in enumerate(handles):
            for j in range(i + 1, len(handles)):
                status = pynvml.nvmlDeviceGetP2PStatus(first, handles[j], pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
                if status != pynvml.NVML_P2P_STATUS_OK:
                    raise Error(f"check_nvlink_connections: GPUs {physical[i]} and {physical[j]} (ranks {i} and {j}) "
                                "have no NVLink between them")
    finally:
        pynvml.nvmlShutdown()


def _physical_gpu(index: int) -> str:
    visible = _env.visible_devices()
    return visible[index] if visible else str(index)


def _nvml_handle(pynvml: Any, device: str) -> Any:
    if device.isdigit():
        return pynvml.nvmlDeviceGetHandleByIndex(int(device))
    return pynvml.nvmlDeviceGetHandleByUUID(device)
