"""Which ranks share a node, found from what every rank says about its machine."""

import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    host: str  # identity of the running kernel: host names may repeat, and containers of one host may differ in name
    host_name: str
    device: str  # identity of the device on that host: ranks may share one
    is_guess: bool = False  # the identity is only a name, since the kernel does not tell its own


@dataclass(frozen=True)
class Topology:
    """Ranks by node, in rank order; nodes in the order of their first rank."""

    nodes: tuple[tuple[int, ...], ...]
    places: tuple[Place, ...]
    is_override: bool

    @property
    def num_nodes(self) -> int:
        return len(self.nodes)

    def __str__(self) -> str:
        origin = "DEEP_EP_RANKS_PER_NODE" if self.is_override else f"found from {BOOT_ID}"
        if not self.is_override and any(place.is_guess for place in self.places):
            origin = f"told apart by host name, because {BOOT_ID} cannot be read on every rank"
        lines = [f"{len(self.places)} ranks on {self.num_nodes} node(s), {origin}"]
        for node in self.nodes:
            ranks = ", ".join(f"{rank} ({self.places[rank].device})" for rank in node)
            names = dict.fromkeys(self.places[rank].host_name for rank in node)  # of containers, perhaps
            lines.append(f"  {', '.join(names)}: ranks {ranks}")
        return "\n".join(lines)


def this_place(device_id: str) -> Place:
    host_name = socket.gethostname()
    try:
        return Place(BOOT_ID.read_text().strip(), host_name, device_id)
    except OSError:
        return Place(f"{host_name}/{platform.machine()}", host_name, device_id, is_guess=True)


def find_topology(places: Sequence[Place], ranks_per_node: int = 0) -> Topology:
    """Groups ranks by host, or in runs of `ranks_per_node` when that is positive (virtual nodes)."""
    if ranks_per_node > 0:
        ranks = range(len(places))
        runs = [tuple(ranks[begin:begin + ranks_per_node]) for begin in range(0, len(places), ranks_per_node)]
        return Topology(tuple(runs), tuple(places), True)
    nodes: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        nodes.setdefault(place.host, []).append(rank)
    return Topology(tuple(tuple(ranks) for ranks in nodes.values()), tuple(places), False)
