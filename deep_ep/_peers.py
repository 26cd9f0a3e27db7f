"""The ranks: where each is, what they tell each other past the heap, and which of them were late.

Which ranks share a node is decided here and nowhere else, from what every rank says about its machine; and where the
memory that a node shares lies: with the GPUs, or on the host where these do not reach each other.

Ranks talk while a Buffer is built, and before each call with DEEP_EP_CHECK_CALLS. With that variable they compare what
they are about to call, and with what. Ranks whose arguments differ read each other's messages at wrong places: that
ends in wrong numbers or in a timeout, and neither says why. The comparison takes the slow way of the constructor, so it
is for looking for a mistake.
"""

import functools
import itertools
import logging
import pickle
import platform
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Optional, TypeVar

import torch
import torch.distributed as dist

import deep_ep_cpp
from deep_ep import _env
from deep_ep._tensors import view_memory
from deep_ep.utils import is_capturing
from deep_ep_cpp import Error

T = TypeVar("T")
POLL_S = 0.001
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


# What ranks tell each other.


def describe_differences(values: Sequence[Any]) -> Optional[str]:
    """Which value which ranks have; None: all have the same."""
    ranks_by_value: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks_by_value.setdefault(repr(value), []).append(rank)
    if len(ranks_by_value) <= 1:
        return None
    return "; ".join(f"{value} on rank(s) {', '.join(map(str, ranks))}" for value, ranks in ranks_by_value.items())


class HandlePart(NamedTuple):
    """What one rank knows of a dispatch over several nodes. Nobody has the matrix of all ranks."""

    sent: list[int]  # tokens, by this rank to each rank
    first_rank: int  # of this node
    rank_prefix_matrix: list[list[int]]  # [src][rank of this node]

    @staticmethod
    def describe_contradictions(parts: Sequence["HandlePart"]) -> Optional[str]:
        """Which ranks have received by their handles what the others have not sent by theirs; None: no rank."""
        ranks = [rank for rank, part in enumerate(parts) if part.rank_prefix_matrix != part._sent_here(parts)]
        if not ranks:
            return None
        return f"one by which other rows come to rank(s) {', '.join(map(str, ranks))} than the ranks send by theirs"

    def _sent_here(self, parts: Sequence["HandlePart"]) -> list[list[int]]:
        """The matrix that it should have."""
        here = slice(self.first_rank, self.first_rank + len(self.rank_prefix_matrix[0]))
        columns = zip(*[part.sent[here] for part in parts])
        return [list(row) for row in zip(*map(itertools.accumulate, columns))]


class Exchange:
    """Gathers a value of each rank of a group, and gives up when one does not come in time.

    Serves all Buffers of the group, so that ranks that call different ones meet and can be told.
    """

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self.is_given_up = False
        self.num_buffers = 0

    def gather(self, mine: Any, timeout_s: float) -> Optional[list[Any]]:
        """None: a rank did not come. The call itself, which follows, will say which one."""
        raise NotImplementedError


class _StoreExchange(Exchange):
    """Over the store that torch.distributed started with, which is asked again and again, and never waited in.

    So there is no collective that cannot be given up, no thread that runs on when the interpreter ends (that ends the
    process), and Ctrl-C is heard.
    """

    def __init__(self, rank: int, size: int, name: str, store: Any) -> None:
        super().__init__(rank, size)
        self._store: Any = dist.PrefixStore(f"deep_ep/{name}", store)  # type: ignore[attr-defined,unused-ignore]
        self._round = 0

    def gather(self, mine: Any, timeout_s: float) -> Optional[list[Any]]:
        self._round += 1
        self._store.set(self._key(self._round, self._rank), pickle.dumps(mine).hex())
        keys = [self._key(self._round, rank) for rank in range(self._size)]
        deadline = time.monotonic() + timeout_s
        while not self._store.check(keys):
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL_S)
        # Everybody is in this round, and so has read the one before.
        self._store.delete_key(self._key(self._round - 1, self._rank))
        return [pickle.loads(bytes.fromhex(self._store.get(key).decode())) for key in keys]  # noqa: S301 - our own

    @staticmethod
    def _key(number: int, rank: int) -> str:
        return f"{number}/{rank}"


class _CommExchange(Exchange):
    """Over an mpi4py-like communicator: its collective cannot be given up, but its thread can."""

    def __init__(self, rank: int, size: int, allgather: Callable[[Any], list[Any]]) -> None:
        super().__init__(rank, size)
        self._allgather = allgather

    def gather(self, mine: Any, timeout_s: float) -> Optional[list[Any]]:
        gathered: list[Any] = []
        failure: list[BaseException] = []

        def gather() -> None:
            try:
                gathered.extend(self._allgather(mine))
            except BaseException as error:  # noqa: BLE001 - raised below
                failure.append(error)

        thread = threading.Thread(target=gather, name="deep_ep call check", daemon=True)
        thread.start()
        thread.join(timeout_s)
        if failure:
            raise failure.pop()  # see Peers.all_gather_results
        return gathered or None


_EXCHANGES: weakref.WeakKeyDictionary[Any, Exchange] = weakref.WeakKeyDictionary()  # by group or communicator


def open_exchange(group: Any, rank: int, size: int, all_gather: Callable[[Any], list[Any]]) -> Exchange:
    """That of `group`, a ProcessGroup or a communicator; a new one where a rank has given up the last. Collective."""
    found = _EXCHANGES.get(group)
    states = all_gather((uuid.uuid4().hex, found is None or found.is_given_up))
    if found is None or any(is_missing for _, is_missing in states):
        if isinstance(group, dist.ProcessGroup):
            found = _StoreExchange(rank, size, states[0][0], dist.distributed_c10d._get_default_store())
        else:
            found = _CommExchange(rank, size, all_gather)
        _EXCHANGES[group] = found
    return found


class CallCheck:
    """Compares the calls of one Buffer."""

    def __init__(self, exchange: Exchange, timeout_s: float) -> None:
        self._exchange = exchange
        self._timeout_s = timeout_s
        exchange.num_buffers += 1
        self._number = exchange.num_buffers

    def compare(self, operation: str, facts: dict[str, Any], fault: Optional[str] = None) -> None:
        """Raises ValueError on every rank when they differ in the operation, the Buffer or a fact about its arguments,
        or when one of them found a fault in its own."""
        if self._exchange.is_given_up or is_capturing():
            return
        facts = {"the Buffer, by order of construction on this group,": self._number, **facts}
        calls = self._exchange.gather((operation, facts, fault), self._timeout_s)
        if calls is None:
            self._exchange.is_given_up = True
            logger.warning("DEEP_EP_CHECK_CALLS: %s: not every rank made a call within %.1f s; calls are not compared "
                           "any more", operation, self._timeout_s)  # yapf: disable
            return
        faults = [f"rank {rank}: {text}" for rank, (_, _, text) in enumerate(calls) if text is not None]
        if faults:
            raise ValueError(f"{operation}: " + "; ".join(faults))
        difference = describe_differences([name for name, _, _ in calls])
        if difference is not None:
            raise ValueError(f"{operation}: every rank must make the same sequence of calls, got {difference}")
        for name in facts:
            values = [facts_of_rank[name] for _, facts_of_rank, _ in calls]
            is_part = isinstance(values[0], HandlePart)
            difference = HandlePart.describe_contradictions(values) if is_part else describe_differences(values)
            if difference is not None:
                raise ValueError(f"{operation}: {name} must be the same on every rank, got {difference}")


def _has_methods(value: Any, names: Sequence[str]) -> bool:
    return all(callable(getattr(value, name, None)) for name in names)


def _is_fake(group: dist.ProcessGroup) -> bool:
    """Whether this is the group of torch's tests, whose collectives return at once and gather nothing."""
    try:
        return str(dist.get_backend(group)) == "fake"
    except (ValueError, RuntimeError, AssertionError):  # made by hand: torch does not know it
        return type(group).__name__ == "FakeProcessGroup"


class Peers:
    """The processes that build a Buffer together: a torch ProcessGroup or an mpi4py-like communicator."""

    def __init__(self, group: Optional[dist.ProcessGroup], comm: Any) -> None:
        if group is None and comm is None:
            raise ValueError("Either 'group' or 'comm' must be provided.")
        if isinstance(group, int):  # GroupMember.NON_GROUP_MEMBER: what new_group returns to who is not in it
            raise ValueError("group: this process is not a member of it (dist.new_group returned NON_GROUP_MEMBER)")
        if group is not None and not _has_methods(group, ("rank", "size")):
            raise TypeError(f"group must be a torch.distributed ProcessGroup or None, got {type(group).__name__}")
        if group is None and not _has_methods(comm, ("Get_rank", "Get_size", "allgather")):
            raise TypeError("comm must be an mpi4py communicator, or have its Get_rank, Get_size and allgather, got "
                            f"{type(comm).__name__}")
        if group is not None and _is_fake(group):
            raise ValueError('group: torch\'s "fake" process group reaches no other process; a Buffer needs a real one')
        self._group = group
        self._comm = comm
        self.rank: int = comm.Get_rank() if group is None else group.rank()
        self.size: int = comm.Get_size() if group is None else group.size()
        if not 0 <= self.rank < self.size:
            raise ValueError(f"group: this process is not a member (rank {self.rank} of {self.size})")

    def all_gather(self, mine: Any) -> list[Any]:
        if self._group is None:
            return list(self._comm.allgather(mine))
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, mine, group=self._group)
        return gathered

    def open_exchange(self) -> Exchange:
        group = self._comm if self._group is None else self._group
        return open_exchange(group, self.rank, self.size, self.all_gather)

    def all_gather_results(self, step: str, work: Callable[[], T]) -> list[T]:
        """Runs `work` on every rank and gathers what it returns, or raises on every rank when it failed on one.

        A rank whose own work failed raises that exception; the others raise an Error that names the ranks.
        """
        value: Optional[T] = None
        sentence: Optional[str] = None
        failure: list[Exception] = []
        try:
            value = work()
        except Exception as error:  # noqa: BLE001 - it is raised below, once the peers know
            sentence = f"{type(error).__name__}: {error}"
            failure.append(error)
        outcomes = self.all_gather((sentence, value))
        if failure:
            # Its traceback has this frame, whose variables must not have it: such a cycle keeps what the frames of all
            # callers hold, a CUDA graph perhaps, until the garbage collector comes, perhaps while another is captured.
            raise failure.pop()
        failed = [f"rank {rank}: {text}" for rank, (text, _) in enumerate(outcomes) if text is not None]
        if failed:
            raise Error(f"Buffer: {step} failed on {len(failed)} of {self.size} ranks; " + "; ".join(failed))
        return [result for _, result in outcomes]


# Which rank was late, at which stage, how often: counters that the kernels keep.

# Of a cell: the last call that is counted, calls in which the rank was late, nanoseconds waited.
CELL_WORDS = 3
LATE_US = deep_ep_cpp.Buffer.LATE_NS / 1e3

OPERATIONS, STAGES, AWAITED = deep_ep_cpp.wait_names()


@dataclass(frozen=True)
class WaitCounters:
    """How often, and how long, this rank has waited for each rank; see `Buffer.get_wait_counters`."""

    operations: tuple[str, ...]  # names along the first dimension
    stages: tuple[str, ...]  # along the second; "": nobody waits there
    times_late: torch.Tensor  # int64 [operations, stages, R]: calls in which a wait for the rank lasted 50 us or more
    waited_ns: torch.Tensor  # int64, the same shape: nanoseconds of each of these calls' longest wait, in sum

    def reset(self) -> None:
        """Sets both to zero, on the current stream. Waits of kernels that run meanwhile count before it or after it."""
        self.times_late.zero_()
        self.waited_ns.zero_()


def _cells(flat: torch.Tensor, num_ranks: int) -> torch.Tensor:
    return flat.view(torch.int64).view(len(OPERATIONS), len(STAGES), num_ranks, CELL_WORDS)


def _counters(cells: torch.Tensor) -> WaitCounters:
    return WaitCounters(tuple(OPERATIONS), tuple(STAGES), cells[..., 1], cells[..., 2])


def view_counters(runtime: deep_ep_cpp.Buffer, num_ranks: int, device: torch.device) -> WaitCounters:
    """Views of the memory that the kernels add to."""
    num_bytes = len(OPERATIONS) * len(STAGES) * num_ranks * CELL_WORDS * torch.int64.itemsize
    return _counters(_cells(view_memory(runtime.wait_cells_ptr, num_bytes, device), num_ranks))


def dump_waits(runtime: deep_ep_cpp.Buffer, rank: int, num_ranks: int) -> str:
    """What the counters say, the longest waits first. Waits for no kernel."""
    memory, num_calls, num_low_latency_calls = runtime.read_waits()
    counters = _counters(_cells(torch.frombuffer(memory, dtype=torch.uint8), num_ranks))
    lines = describe_waits(counters)
    calls = f"{num_calls} high-throughput and {num_low_latency_calls} low-latency calls"
    if not lines:
        return f"rank {rank}: no wait for another rank lasted {LATE_US:.0f} us in {calls}"
    return "\n".join([f"rank {rank} has waited, in {calls}, {LATE_US:.0f} us or more:", *lines])


def describe_waits(counters: WaitCounters) -> list[str]:
    """A line for each operation, stage and rank that somebody has waited for, the longest in sum first."""
    times_late, waited_ns = counters.times_late.cpu(), counters.waited_ns.cpu()
    lines = []
    for operation, stage, rank in times_late.nonzero().tolist():
        cell = operation, stage, rank
        lines.append((int(waited_ns[cell]), _line(*cell, int(times_late[cell]), int(waited_ns[cell]))))
    return [line for _, line in sorted(lines, key=lambda one: -one[0])]


def _line(operation: int, stage: int, rank: int, times: int, waited_ns: int) -> str:
    mean_us = waited_ns / times / 1e3
    return (f"  for rank {rank} {AWAITED[operation][stage]} ({OPERATIONS[operation]}): in {times} calls, "
            f"{mean_us:.1f} us each, {waited_ns / 1e9:.3f} s in all")
