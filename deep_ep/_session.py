"""Building a Buffer together: every step is gathered, so that one rank's failure is an exception on all of them."""

import atexit
import ctypes
import dataclasses
import functools
import logging
import os
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Optional, TypeVar

import torch

import deep_ep_cpp
from deep_ep import _env, _nvshmem, _peers, _streams
from deep_ep._env import __version__, master_address
from deep_ep._peers import CallCheck, Peers, Place, Topology, describe_differences, find_topology, place_of
from deep_ep._tensors import BUFFER_ALIGNMENT_BYTES, MAX_INT64, EmptyTensors, Lender, check_int, check_positive
from deep_ep.utils import is_capturing
from deep_ep_cpp import Error

if TYPE_CHECKING:
    from deep_ep.calibrate import CostModel

T = TypeVar("T")
EXIT_TIMEOUT_S = 2.0
MAX_HEAP_BYTES = 1 << 60  # leaves room in 64 bits for what is added to the caller's sizes
FOREVER_S = 1e9  # in nanoseconds it fits an int64 with room for sums
logger = logging.getLogger("deep_ep")


@dataclass(frozen=True)
class Agreed:
    """Arguments and facts that must be the same on every rank; the names appear in the error."""

    num_nvl_bytes: int
    num_rdma_bytes: int
    num_lend_bytes: Optional[int]
    low_latency_mode: bool
    enable_shrink: bool
    device_kind: str
    ranks_per_node: int
    topk_idx_bits: int
    check_calls: bool
    rail: str  # DEEP_EP_RAIL
    heap: str  # DEEP_EP_HEAP
    deep_ep_version: str = __version__


@dataclass(frozen=True)
class Request:
    """The constructor's arguments that concern the native side."""

    num_nvl_bytes: int
    num_rdma_bytes: int
    num_lend_bytes: Optional[int]  # None: a part of num_nvl_bytes
    low_latency_mode: bool
    num_qps_per_rank: float
    enable_shrink: bool
    timeout_s: Optional[float]
    on_failure: Optional[Callable[[str], Any]]

    @property
    def patience_s(self) -> float:
        """How long a wait for a peer may take."""
        given_s = deep_ep_cpp.get_environment()["timeout_s"] if self.timeout_s is None else self.timeout_s
        return min(float(given_s), FOREVER_S)

    def with_heap(self, heap: str) -> "Request":
        """Of what lies on the host nothing is lent unless the caller wants it: whoever computes with lent rows would
        read them at the rate of PCIe, each time."""
        is_open = heap == _peers.HOST and self.num_lend_bytes is None
        return dataclasses.replace(self, num_lend_bytes=0) if is_open else self

    def lends(self, num_ranks: int) -> bool:
        lent = self.num_lend_bytes
        return num_ranks > 1 and (deep_ep_cpp.part_to_lend(self.num_nvl_bytes, num_ranks) if lent is None else lent) > 0

    def check(self) -> None:
        for name in ("num_nvl_bytes", "num_rdma_bytes", "num_lend_bytes"):
            if name != "num_lend_bytes" or self.num_lend_bytes is not None:
                check_int(name, getattr(self, name), 0, BUFFER_ALIGNMENT_BYTES, MAX_INT64)
        num_bytes = self.num_nvl_bytes + self.num_rdma_bytes + (self.num_lend_bytes or 0)
        if num_bytes > MAX_HEAP_BYTES:
            raise ValueError(f"num_nvl_bytes + num_rdma_bytes + num_lend_bytes must be at most {MAX_HEAP_BYTES}, got "
                             f"{num_bytes}")
        check_positive("num_qps_per_rank", self.num_qps_per_rank)
        if self.timeout_s is not None:
            check_positive("timeout_s", self.timeout_s)
        if self.on_failure is not None and not callable(self.on_failure):
            raise TypeError(f"on_failure must be callable or None, got {type(self.on_failure).__name__}")


class Session:
    """What a constructed Buffer stands on."""

    def __init__(self, runtime: deep_ep_cpp.Buffer, streams: _streams.Streams, topology: Topology, heap: str,
                 cost_model: Optional["CostModel"], on_failure: Optional[Callable[[str], Any]]) -> None:
        self.runtime = runtime
        self._on_failure = on_failure
        self.streams = streams
        self.empty = EmptyTensors(streams.device)
        self.topology = topology
        self.rank, self.num_ranks = topology.rank, topology.num_ranks
        self.heap = heap  # _peers.DEVICE or HOST
        # One rank has nobody to lend to.
        self.lender = Lender(runtime, streams) if runtime.num_lend_bytes > 0 and self.num_ranks > 1 else None
        self.cost_model = cost_model
        self.num_sms_override = int(deep_ep_cpp.get_environment()["num_sms"])
        self.call_check: Optional[CallCheck] = None
        # For calls in one native step; None: where a torch or a Buffer has more to it.
        self.direct: Optional[deep_ep_cpp.DirectCalls] = None
        self._is_closed = False
        if isinstance(streams, _streams.HostStreams):
            streams.check = self._raise_reported
        _LIVE.add(self)

    def raise_failure(self) -> None:
        """Raises the first failure of this Buffer, again and again, if there was one."""
        self._raise_from(self.runtime.check)

    def _raise_reported(self) -> None:
        """The same for whoever waits for an event, which outlives a Buffer that was dropped."""
        if self._is_closed:
            self.runtime.check()
        else:
            self.raise_failure()

    def begin_call(self) -> None:
        """The same, where a call begins that the peers take part in."""
        self._raise_from(self.runtime.begin_call)

    def _raise_from(self, ask: Callable[[], None]) -> None:
        if self._is_closed:
            raise Error("this Buffer was destroyed")
        try:
            ask()
        except Error:
            self._report_failure()
            raise

    def abandon_call(self, name: str, error: BaseException, ticket: int = 0) -> None:
        """The call `name` raises `error`: the peers are told, at once if they know of the call (with a ticket: if its
        receive phase has not begun), else when they ask why nobody came. Raises nothing."""
        if self._is_closed:
            return
        text = f"{name}: {type(error).__name__}: {error}".rstrip(": ")
        if ticket:
            _attempt(lambda: self.runtime.abandon_hook(ticket, text))
        _attempt(lambda: self.runtime.abandon_call(text))
        self._report_failure()

    def abandon_hook(self, name: str, ticket: int) -> None:
        """Nobody can call the hook of the call `name` any more. Raises nothing."""
        if not self._is_closed:
            _attempt(lambda: self.runtime.abandon_hook(ticket, f"{name}: its hook was dropped without being called"))

    def _report_failure(self) -> None:
        """To the caller's function, once."""
        text = self.runtime.failure
        if text and self._on_failure is not None:
            report, self._on_failure = self._on_failure, None
            try:
                report(text)
            except Exception:
                logger.exception("on_failure raised")

    def close(self, timeout_s: float) -> None:
        """Idempotent, bounded by about `timeout_s`, raises nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self.direct = None
        deadline = time.monotonic() + timeout_s
        is_released = False
        try:
            is_released = self._release(timeout_s, deadline)
        finally:  # also when Ctrl-C ends the wait
            # Kernels that still wait for a peer use this memory; they end by their own deadline.
            if not is_released:
                _LINGERING.append(self)

    def _release(self, timeout_s: float, deadline: float) -> bool:
        if not _attempt(lambda: self.streams.drain(timeout_s)):
            return False
        failure = _error_of(self.runtime.check)
        _attempt(lambda: self.runtime.destroy(max(0.0, deadline - time.monotonic())))
        _attempt(self.streams.close)
        if failure is not None and isinstance(self.streams, _streams.HostStreams):
            self.streams.check = functools.partial(_raise, failure)
        return True


# Sessions that somebody uses, and those that were closed while a kernel of theirs still ran.
_LIVE: weakref.WeakSet[Session] = weakref.WeakSet()
_LINGERING: list[Session] = []


def release_lingering(timeout_s: float = 0.0) -> None:
    """Tries again to release destroyed Buffers whose kernels had not ended."""
    deadline = time.monotonic() + timeout_s
    _LINGERING[:] = [session for session in _LINGERING if not session._release(timeout_s, deadline)]


@atexit.register
def _release_at_exit() -> None:
    for session in list(_LIVE):
        # Peers in other nodes may still wait for what this rank has posted.
        session.close(EXIT_TIMEOUT_S if session.topology.num_nodes > 1 else 0.0)
    release_lingering(EXIT_TIMEOUT_S)
    for session in _LINGERING:
        # Its destructor would free memory that a kernel still uses. The system takes the memory back in a moment.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session.runtime))


def _leave_to_parent() -> None:
    """In a forked child: the parent's Buffers are the parent's to release."""
    for session in [*_LIVE, *_LINGERING]:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(session.runtime))
    _LIVE.clear()
    _LINGERING.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _error_of(step: Callable[[], Any]) -> Optional[Error]:
    try:
        step()
    except Error as error:
        return error.with_traceback(None)  # or whoever keeps it keeps the frames of all callers
    return None


def _raise(error: Error) -> None:
    raise type(error)(str(error))


def _attempt(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except Exception as error:  # noqa: BLE001 - nothing can be done about it while releasing, and the rest must follow
        logger.debug("releasing a Buffer: %s", error)
        return None


def _raise_differences(facts: Sequence[Agreed]) -> None:
    for field in dataclasses.fields(Agreed):
        difference = describe_differences([getattr(fact, field.name) for fact in facts])
        if difference is not None:
            raise ValueError(f"Buffer: {field.name} must be the same on every rank, got {difference}")


def find_cost_model(peers: Peers, request: Request, streams: _streams.Streams) -> Optional["CostModel"]:
    """Of rank 0, which speaks for all: other ranks' files may differ."""
    if peers.rank > 0:
        return None
    from deep_ep import calibrate  # here, so that `python -m deep_ep.calibrate` is not loaded twice
    gpu = torch.cuda.get_device_name(streams.device) if streams.kind == "cuda" else ""
    return calibrate.find(gpu, peers.size, "lent" if request.lends(peers.size) else "slots")


def choose_rail(peers: Peers, agreed: Agreed, topology: Topology) -> str:
    """Collective, where there are several nodes: the engine between them."""
    if topology.num_nodes == 1:
        return "host"  # is not made
    obstacles = peers.all_gather_results(
        "looking for the engine between nodes",
        lambda: _nvshmem.obstacle(agreed.rail, agreed.device_kind) or _nvshmem.sharing_obstacle(topology.places))
    engine, reason = _nvshmem.choose_engine(agreed.rail, obstacles)
    if peers.rank == 0:
        _nvshmem.tell_engine(engine, reason, agreed.device_kind)
    return engine


def choose_heap(peers: Peers, agreed: Agreed, topology: Topology) -> str:
    """The same on every rank."""
    heap, reason = _peers.choose_heap(agreed.heap, topology, agreed.device_kind)
    if peers.rank == 0:
        _peers.tell_heap(heap, reason)
    return heap


class _Construction:
    """A Buffer while its ranks build it, all in the same steps."""

    def __init__(self, peers: Peers, prepare: Callable[[], Request]) -> None:
        self._peers, self._prepare = peers, prepare
        # At most one of each: what there is so far.
        self._requests: list[Request] = []
        self._opened: list[_streams.Streams] = []
        self._created: list[deep_ep_cpp.Buffer] = []
        self._sessions: list[Session] = []

    def build(self) -> Session:
        try:
            return self._build()
        except BaseException:
            self._discard()
            for streams in self._opened:
                streams.close()
            raise

    def _build(self) -> Session:
        peers = self._peers
        described = peers.all_gather_results("checking arguments and device", self._describe)
        _raise_differences([facts for facts, *_ in described])
        agreed, _, cost_model = described[0]
        topology = find_topology(peers.rank, [place for _, place, _ in described], agreed.ranks_per_node, agreed.heap)
        heap = choose_heap(peers, agreed, topology)
        rail = choose_rail(peers, agreed, topology)
        cost_model = None if heap == _peers.HOST else cost_model  # models are of heaps in GPU memory
        try:
            self._open(topology, rail, heap, cost_model)
        except Exception as error:
            text = str(error)
            if not _nvshmem.can_do_without(rail, agreed.rail, lambda: peers.all_gather(text)):
                raise
            self._discard()
            if peers.rank == 0:
                _nvshmem.tell_engine("host", f"nvshmem does not begin: {text}", agreed.device_kind)
            self._open(topology, "host", heap, cost_model)
        session = self._sessions[0]
        if agreed.check_calls and peers.size > 1:
            session.call_check = CallCheck(peers.open_exchange(), self._requests[0].patience_s)
        return session

    def _open(self, topology: Topology, rail: str, heap: str, cost_model: Optional["CostModel"]) -> None:
        peers, created = self._peers, self._created
        has_rate = rail == "nvshmem"  # see _nvshmem.rail_rate
        rates = peers.all_gather_results("reading the rates of the NICs", _env.nic_gb_per_s) if has_rate else []
        rate = _nvshmem.rail_rate(rail, rates, topology.ranks_per_node)
        if cost_model is None and rate > 0 and heap != _peers.HOST:
            from deep_ep import model  # here as calibrate is: `python -m` loads neither twice
            cost_model = model.costs_across_nodes(topology.num_nodes, topology.ranks_per_node, rate)
        handles = peers.all_gather_results("allocating the heap", lambda: self._allocate(topology, rail, rate, heap))
        step, connect = "mapping the heaps of the peers", lambda: created[0].connect([heap for heap, _ in handles])
        if topology.num_nodes > 1:  # in two steps: nobody is to wait for a rank that cannot map a heap
            peers.all_gather_results(step, connect)
            step, connect = "connecting the nodes", lambda: created[0].connect_rail([rail for _, rail in handles])
        peers.all_gather_results(step, lambda: self._begin(connect, topology, heap, cost_model))

    def _describe(self) -> tuple[Agreed, Place, Optional["CostModel"]]:
        if is_capturing():
            raise Error("Buffer: it allocates and talks to its peers, so build it before the CUDA graph capture begins")
        environment = deep_ep_cpp.get_environment()
        request = self._prepare()
        request.check()
        self._requests.append(request)
        release_lingering()
        streams = _streams.open_streams()
        self._opened.append(streams)
        facts = Agreed(request.num_nvl_bytes, request.num_rdma_bytes, request.num_lend_bytes, request.low_latency_mode,
                       request.enable_shrink, streams.kind, int(environment["ranks_per_node"]),
                       deep_ep_cpp.topk_idx_bits(), bool(environment["check_calls"]), str(environment["rail"]),
                       str(environment["heap"]))
        cost_model = find_cost_model(self._peers, request, streams)
        return facts, place_of(streams.native, streams.device.index), cost_model

    def _allocate(self, topology: Topology, rail: str, rail_gb_per_s: float, heap: str) -> tuple[bytes, bytes]:
        peers, request = self._peers, self._requests[0].with_heap(heap)
        spans_nodes = topology.num_nodes > 1
        has_low_latency = request.low_latency_mode or not spans_nodes
        warn_s = min(float(deep_ep_cpp.get_environment()["warn_s"]), request.patience_s)
        lent = deep_ep_cpp.Buffer.LEND_PART_OF_DATA if request.num_lend_bytes is None else request.num_lend_bytes
        try:
            runtime = deep_ep_cpp.Buffer(self._opened[0].native,
                                         peers.rank,
                                         peers.size,
                                         num_data_bytes=request.num_nvl_bytes,
                                         timeout_s=request.patience_s,
                                         warn_s=warn_s,
                                         num_low_latency_bytes=request.num_rdma_bytes if has_low_latency else 0,
                                         is_shrinkable=request.enable_shrink,
                                         num_lend_bytes=lent,
                                         ranks_per_node=topology.ranks_per_node,
                                         num_rail_bytes=request.num_rdma_bytes if spans_nodes else 0,
                                         rail=rail,
                                         rail_reach=master_address(),
                                         rail_gb_per_s=rail_gb_per_s,
                                         is_heap_on_host=heap == _peers.HOST)
        except Error as error:
            raise type(error)(f"Buffer: {error}; asked for num_nvl_bytes={request.num_nvl_bytes}, num_rdma_bytes="
                              f"{request.num_rdma_bytes}, num_lend_bytes={request.num_lend_bytes}") from error
        self._created.append(runtime)
        runtime.set_warning_handler(logger.warning)
        return runtime.export_handle(), runtime.rail_address()

    def _begin(self, connect: Callable[[], None], topology: Topology, heap: str,
               cost_model: Optional["CostModel"]) -> None:
        connect()
        runtime, streams = self._created[0], self._opened[0]
        self._sessions.append(Session(runtime, streams, topology, heap, cost_model, self._requests[0].on_failure))
        runtime.start_watching()

    def _discard(self) -> None:
        for runtime in self._created:
            runtime.destroy(0.0)
        self._created.clear()
        self._sessions.clear()


def build_session(peers: Peers, prepare: Callable[[], Request]) -> Session:
    """Collective: allocates and connects the heaps of all ranks. `prepare` may fail on one of them."""
    return _Construction(peers, prepare).build()
