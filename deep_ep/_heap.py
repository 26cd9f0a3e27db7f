"""Where the memory that a node shares lies: with the GPUs, or on the host where these do not reach each other."""

import functools
import logging

from deep_ep._topology import Topology

logger = logging.getLogger("deep_ep")
DEVICE, HOST = "device", "host"


def choose(requested: str, topology: Topology, device_kind: str) -> tuple[str, str]:
    """DEVICE or HOST, and why. `requested`: DEEP_EP_HEAP."""
    if device_kind != "cuda":
        return DEVICE, "ranks of the CPU device share host memory anyway"
    if requested:
        return requested, f"DEEP_EP_HEAP={requested}"
    cut = topology.first_cut()
    if cut is None:
        return DEVICE, "the GPUs of each node reach each other's memory, as far as they can tell"
    first, second = (f"rank {rank} ({topology.places[rank].device})" for rank in cut)
    return HOST, f"{first} and {second} do not reach each other's memory (no NVLink, no peer access over PCIe)"


@functools.cache
def tell(placement: str, reason: str) -> None:
    """Once in a process. Where nobody asked for it, the slow way is worth a warning."""
    level = logging.WARNING if placement == HOST and not reason.startswith("DEEP_EP_HEAP") else logging.INFO
    name = "pinned host memory, at the rate of PCIe" if placement == HOST else "GPU memory"
    logger.log(level, "within a node, bytes go through %s: %s", name, reason)
