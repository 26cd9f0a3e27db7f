"""Which ranks share a node, found from what every rank says about its machine. The one place that decides it."""

import functools
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from deep_ep_cpp import Error

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    host: str  # identity of the running kernel: host names may repeat, and containers of one host may differ in name
    host_name: str
    device: str  # identity of the device on that host: ranks may share one
    is_guess: bool = False  # the identity is only a name, since the kernel does not tell its own
    unreachable: frozenset[str] = frozenset()  # devices of the host whose memory this rank's device cannot reach

    def reaches(self, other: "Place") -> bool:
        """By load and store, as far as both can tell."""
        is_cut = other.device in self.unreachable or self.device in other.unreachable
        return self.host == other.host and not is_cut


@dataclass(frozen=True)
class Topology:
    """Nodes of equally many ranks, which follow each other, as one rank sees them.

    csrc/layout/topology.h is the same for native code: rank = node * ranks_per_node + index.
    """

    rank: int
    ranks_per_node: int
    places: tuple[Place, ...]  # by rank
    origin: str  # how the nodes were found

    @property
    def num_ranks(self) -> int:
        return len(self.places)

    @functools.cached_property  # each call asks
    def num_nodes(self) -> int:
        return self.num_ranks // self.ranks_per_node

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def index(self) -> int:
        """Of this rank in its node."""
        return self.rank % self.ranks_per_node

    @property
    def nodes(self) -> tuple[tuple[int, ...], ...]:
        """Ranks by node."""
        size = self.ranks_per_node
        return tuple(tuple(range(begin, begin + size)) for begin in range(0, self.num_ranks, size))

    @property
    def neighbours(self) -> tuple[int, ...]:
        """The other ranks of this node."""
        return tuple(rank for rank in self.nodes[self.node] if rank != self.rank)

    @property
    def rail_peers(self) -> tuple[int, ...]:
        """The ranks with this rank's index in the other nodes."""
        return tuple(node[self.index] for node in self.nodes if node[self.index] != self.rank)

    def __str__(self) -> str:
        lines = [f"{self.num_ranks} ranks on {self.num_nodes} node(s), {self.origin}"]
        for node in self.nodes:
            ranks = ", ".join(f"{rank} ({self.places[rank].device})" for rank in node)
            lines.append(f"  {_host_names(node, self.places)}: ranks {ranks}")
        return "\n".join(lines)


def this_place(device_id: str, unreachable: frozenset[str] = frozenset()) -> Place:
    host_name = socket.gethostname()
    try:
        return Place(BOOT_ID.read_text().strip(), host_name, device_id, unreachable=unreachable)
    except OSError:
        return Place(f"{host_name}/{platform.machine()}", host_name, device_id, is_guess=True, unreachable=unreachable)


def unreachable_gpus(index: int, device_id: str) -> frozenset[str]:
    """The GPUs that this process sees and GPU `index` cannot reach, by the identity that `device_id` is one of.

    Empty also where that cannot be told: then mapping the memory of a peer fails, and says why.
    """
    identities = {other: _identity(other) for other in range(torch.cuda.device_count())}
    if identities.get(index) != device_id:
        return frozenset()
    return frozenset(identity for other, identity in identities.items()
                     if other != index and not torch.cuda.can_device_access_peer(index, other))


def places_of_this_machine() -> list[Place]:
    """Of a group with one rank on each GPU that this process sees; without any, of one rank."""
    identities = [_identity(index) for index in range(torch.cuda.device_count())]
    places = [this_place(identity, unreachable_gpus(index, identity)) for index, identity in enumerate(identities)]
    return places or [this_place("CPU")]


def _identity(index: int) -> str:
    # Where torch does not tell it, no device has this name.
    return f"GPU-{getattr(torch.cuda.get_device_properties(index), 'uuid', 'unknown')}"


def find_topology(rank: int, places: Sequence[Place], ranks_per_node: int = 0) -> Topology:
    """Groups ranks by host and reachable memory, or in runs of `ranks_per_node` when that is positive (virtual nodes).

    Raises ValueError when that does not divide the ranks, and Error, naming ranks, when nodes are unequal or have ranks
    that do not follow each other.
    """
    if ranks_per_node > 0:
        size = min(ranks_per_node, len(places))
        if len(places) % size != 0:
            raise ValueError(f"Buffer: DEEP_EP_RANKS_PER_NODE must divide the {len(places)} ranks of the group, got "
                             f"{ranks_per_node}")
        return Topology(rank, size, tuple(places), "DEEP_EP_RANKS_PER_NODE")
    nodes = _find_nodes(places)
    _check_nodes(nodes, places)
    return Topology(rank, len(nodes[0]), tuple(places), _describe_origin(places))


def _find_nodes(places: Sequence[Place]) -> list[list[int]]:
    """Each rank joins the first node whose ranks all reach it."""
    nodes: list[list[int]] = []
    for rank, place in enumerate(places):
        for node in nodes:
            if all(places[other].reaches(place) for other in node):
                node.append(rank)
                break
        else:
            nodes.append([rank])
    return nodes


def _check_nodes(nodes: Sequence[Sequence[int]], places: Sequence[Place]) -> None:
    named = "; ".join(f"{_describe_ranks(node)} on {_host_names(node, places)}" for node in nodes)
    if len({len(node) for node in nodes}) > 1:
        raise Error(f"Buffer: every node must have equally many ranks, got {named}")
    if any(node[-1] - node[0] != len(node) - 1 for node in nodes):
        raise Error(
            "Buffer: the ranks of a node must follow each other (start those of one machine one after another), "
            f"got {named}")


def _describe_origin(places: Sequence[Place]) -> str:
    if any(place.is_guess for place in places):
        return f"told apart by host name, because {BOOT_ID} cannot be read on every rank"
    if any(place.unreachable for place in places):
        return f"found from {BOOT_ID}, and from which GPUs reach each other's memory"
    return f"found from {BOOT_ID}"


def _describe_ranks(ranks: Sequence[int]) -> str:
    """rank 3; ranks 0 to 2; ranks 0, 2"""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks[-1] - ranks[0] == len(ranks) - 1:
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return "ranks " + ", ".join(map(str, ranks))


def _host_names(ranks: Sequence[int], places: Sequence[Place]) -> str:
    """Of containers, perhaps: a host may have several."""
    return ", ".join(dict.fromkeys(places[rank].host_name for rank in ranks))
