"""What the benchmarks run beside the library; part of a build from source, not of the wheel."""
from typing import List

class Links:
    """One rank's end of the links between the ranks of a node. `device`: a CUDA device, -1: the CPU.

    `is_heap_on_host`: from and to host memory, as for GPUs that do not reach each other.
    """

    def __init__(self, device: int, rank: int, num_ranks: int, bytes_per_peer: int,
                 is_heap_on_host: bool = False) -> None: ...

    def export_handle(self) -> bytes: ...

    def connect(self, handles: List[bytes]) -> None:
        """The handles of all ranks, in their order."""

    def load(self, source: int) -> None:
        """The address of bytes_per_peer bytes on the host or the device, to be pushed from now on."""

    def push(self, num_sms: int, stream: int) -> None:
        """So many SMs write bytes_per_peer to every peer at once. Stream 0: one of its own."""

    def synchronize(self) -> None:
        """Waits for the stream of its own."""

    def release(self, timeout_s: float) -> None:
        """When no rank pushes any more. Waits at most so many seconds for the peers to unmap what they map."""


class HeldSms:
    """SMs that somebody else has, for tests of co-residency: blocks that fill an SM each. `device`: as above."""

    num_held: int  # blocks of the last hold() that have begun
    num_sms: int  # of the device

    def __init__(self, device: int) -> None: ...

    def hold(self, num_sms: int, timeout_s: float, stream: int) -> None:
        """Launches them, until release() or for timeout_s seconds; one launch at a time. Stream 0: one of its own."""

    def release(self) -> None:
        """They end, and the last of them soon."""

    def synchronize(self) -> None:
        """Waits for the stream of its own."""
