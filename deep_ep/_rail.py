"""What carries bytes between nodes: the choice between the engines of csrc/rail, the same on every rank."""

import functools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Optional

from deep_ep import _nvshmem
from deep_ep._topology import Place
from deep_ep_cpp import Error, InvalidArgument

logger = logging.getLogger("deep_ep")
ENGINES = ("nvshmem", "host")


def obstacle(requested: str, device_kind: str) -> str:
    """Why this rank cannot use the engine nvshmem, or does not look whether it can; empty: it can."""
    if requested == "host":
        return "DEEP_EP_RAIL=host"
    if device_kind != "cuda":
        return "it works on GPUs only"
    try:
        _nvshmem.load()
    except Error as error:
        return str(error)
    return ""


def sharing_obstacle(places: Sequence[Place]) -> str:
    """Why no rank of the group can use the engine nvshmem, where ranks share GPUs; empty: they may."""
    sharing = Counter((place.host, place.device) for place in places)
    if len(set(sharing.values())) <= 1:
        return ""
    counts = sorted(set(sharing.values()))
    return f"NVSHMEM never begins where GPUs have different numbers of ranks, here {counts[0]} to {counts[-1]}"


def choose(requested: str, obstacles: Sequence[str]) -> tuple[str, str]:
    """The engine, and why. `requested`: DEEP_EP_RAIL; `obstacles`: by rank.

    Raises Error where they do not go together.
    """
    if requested not in ("", *ENGINES):
        raise InvalidArgument(f"DEEP_EP_RAIL: expected 'nvshmem', 'host' or nothing (automatic), got {requested!r}")
    hindered = {rank: text for rank, text in enumerate(obstacles) if text}
    if not hindered:
        return "nvshmem", "it is built, and fits the NVSHMEM of every rank"
    if requested == "host":
        return "host", "DEEP_EP_RAIL=host"
    rank, text = next(iter(hindered.items()))
    if requested == "nvshmem":
        raise Error(
            f"DEEP_EP_RAIL=nvshmem: not possible on {len(hindered)} of {len(obstacles)} ranks; rank {rank}: {text}")
    return "host", f"nvshmem is not possible on {len(hindered)} of {len(obstacles)} ranks; rank {rank}: {text}"


def rate(engine: str, nic_rates: Sequence[Optional[float]], ranks_per_node: int) -> float:
    """10^9 bytes a second that the NICs carry for a rank, on the machine where that is least; 0: unknown.

    nic_rates: of each rank's machine. The engine host carries what its threads can, whatever the NIC.
    """
    known = [nic_rate for nic_rate in nic_rates if nic_rate is not None]
    return min(known) / ranks_per_node if engine == "nvshmem" and len(known) == len(nic_rates) else 0.0


def can_do_without(engine: str, requested: str, gather_errors: Callable[[], list[str]]) -> bool:
    """Whether ranks that could not build a Buffer over `engine` are to try another. Collective, where nobody asked for
    it: a rank fails for a reason of its own, or for that of another."""
    return engine == "nvshmem" and not requested and all("NVSHMEM" in error for error in gather_errors())


@functools.cache
def tell(engine: str, reason: str, device_kind: str) -> None:
    """Once in a process. TCP where GPUs may have something faster is worth a warning."""
    level = logging.WARNING if engine == "host" and device_kind == "cuda" else logging.INFO
    logger.log(level, "between nodes, bytes are carried by the engine %s: %s", engine, reason)
