"""Which ranks share a node, found from what every rank says about its machine. The one place that decides it.

And where the memory that a node shares lies: with the GPUs, or on the host where these do not reach each other.
"""

import functools
import itertools
import logging
import platform
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import torch

import deep_ep_cpp
from deep_ep import _env
from deep_ep_cpp import Error

logger = logging.getLogger("deep_ep")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
DEVICE, HOST = "device", "host"  # where that memory lies


@dataclass(frozen=True)
class Place:
    """Where one rank runs."""

    host: str  # identity of the running kernel: host names may repeat, and containers of one host may differ in name
    host_name: str
    device: str  # identity of the device on that host: ranks may share one
    is_guess: bool = False  # the identity is only a name, since the kernel does not tell its own
    unreachable: frozenset[str] = frozenset()  # devices of the host whose memory this rank's device cannot reach

    def is_cut_from(self, other: "Place") -> bool:
        """Whether one device does not reach the memory of the other by load and store, as far as both can tell."""
        return other.device in self.unreachable or self.device in other.unreachable


@dataclass(frozen=True)
class Topology:
    """Nodes of equally many ranks, which follow each other, as one rank sees them.

    csrc/layout/rail.h is the same for native code: rank = node * ranks_per_node + index.
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

    def first_cut(self) -> Optional[tuple[int, int]]:
        """Two ranks of one node whose devices do not reach each other's memory; None: there are none."""
        pairs = (pair for node in self.nodes for pair in itertools.combinations(node, 2))
        return next(((i, j) for i, j in pairs if self.places[i].is_cut_from(self.places[j])), None)

    def __str__(self) -> str:
        lines = [f"{_count(self.num_ranks, 'rank')} on {_count(self.num_nodes, 'node')}, {self.origin}"]
        for node in self.nodes:
            ranks = ", ".join(f"{rank} ({self.places[rank].device})" for rank in node)
            lines.append(f"  {_host_names(node, self.places)}: ranks {ranks}")
        return "\n".join(lines)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def this_place(device_id: str, unreachable: frozenset[str] = frozenset()) -> Place:
    host_name = socket.gethostname()
    try:
        return Place(BOOT_ID.read_text().strip(), host_name, device_id, unreachable=unreachable)
    except OSError:
        return Place(f"{host_name}/{platform.machine()}", host_name, device_id, is_guess=True, unreachable=unreachable)


def place_of(native: deep_ep_cpp.Device, cuda_index: Optional[int]) -> Place:
    """Of a rank on that device; None: the CPU."""
    device_id = native.unique_id
    return this_place(device_id, frozenset() if cuda_index is None else unreachable_gpus(cuda_index, device_id))


def unreachable_gpus(index: int, device_id: str) -> frozenset[str]:
    """The GPUs of this machine that GPU `index` cannot reach, by the identity that `device_id` is one of.

    CUDA knows those that this process sees, the driver's management library the others (CUDA_VISIBLE_DEVICES). Empty
    also where that cannot be told: then mapping the memory of a peer fails, and says why.
    """
    identities = {other: _identity(other) for other in range(torch.cuda.device_count())}
    if identities.get(index) != device_id:
        return frozenset()
    seen = frozenset(identities.values())
    cut = frozenset(identity for other, identity in identities.items()
                    if other != index and not torch.cuda.can_device_access_peer(index, other))
    return cut | (_cut_off_from(device_id) - seen)


_cut_off_from = functools.cache(_env.gpus_cut_off_from)


def places_of_this_machine() -> list[Place]:
    """Of a group with one rank on each GPU that this process sees; without any, of one rank."""
    identities = [_identity(index) for index in range(torch.cuda.device_count())]
    places = [this_place(identity, unreachable_gpus(index, identity)) for index, identity in enumerate(identities)]
    return places or [this_place("CPU")]


def _identity(index: int) -> str:
    # Where torch does not tell it, no device has this name.
    return f"GPU-{getattr(torch.cuda.get_device_properties(index), 'uuid', 'unknown')}"


def find_topology(rank: int, places: Sequence[Place], ranks_per_node: int = 0, heap: str = "") -> Topology:
    """Groups ranks by host, or in runs of `ranks_per_node` when that is positive (virtual nodes).

    `heap`: DEEP_EP_HEAP. With "device" the ranks of a host whose devices do not reach each other are several nodes.

    Raises ValueError when that does not divide the ranks, and Error, naming ranks, when nodes are unequal or have ranks
    that do not follow each other.
    """
    if ranks_per_node > 0:
        size = min(ranks_per_node, len(places))
        if len(places) % size != 0:
            raise ValueError(f"Buffer: DEEP_EP_RANKS_PER_NODE must divide the {len(places)} ranks of the group, got "
                             f"{ranks_per_node}")
        return Topology(rank, size, tuple(places), "DEEP_EP_RANKS_PER_NODE")
    is_by_reach = heap == "device"
    nodes = _find_nodes(places, is_by_reach)
    _check_nodes(nodes, places)
    return Topology(rank, len(nodes[0]), tuple(places), _describe_origin(places, is_by_reach))


def _find_nodes(places: Sequence[Place], is_by_reach: bool) -> list[list[int]]:
    """Each rank joins the first node that is on its host and, if that is asked for, reaches it as a whole."""
    nodes: list[list[int]] = []
    for rank, place in enumerate(places):
        for node in nodes:
            is_cut = is_by_reach and any(places[other].is_cut_from(place) for other in node)
            if places[node[0]].host == place.host and not is_cut:
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


def _describe_origin(places: Sequence[Place], is_by_reach: bool) -> str:
    if any(place.is_guess for place in places):
        return f"told apart by host name, because {BOOT_ID} cannot be read on every rank"
    if is_by_reach and any(place.unreachable for place in places):
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


def choose_heap(requested: str, topology: Topology, device_kind: str) -> tuple[str, str]:
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
def tell_heap(placement: str, reason: str) -> None:
    """Once in a process. Where nobody asked for it, the slow way is worth a warning."""
    level = logging.WARNING if placement == HOST and not reason.startswith("DEEP_EP_HEAP") else logging.INFO
    name = "pinned host memory, at the rate of PCIe" if placement == HOST else "GPU memory"
    logger.log(level, "within a node, bytes go through %s: %s", name, reason)
