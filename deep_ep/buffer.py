"""`Buffer`: the memory that the ranks of a group share, and the operations on it."""
# The signatures are fixed by the callers, also where this version has no use for an argument.
# ruff: noqa: ARG002

import bisect
import contextlib
import functools
import logging
import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Callable, Optional, Union

import torch
import torch.distributed as dist
from typing_extensions import Self

import deep_ep_cpp
from deep_ep import _env, _high_throughput, _low_latency, _peers, _tensors
from deep_ep._peers import Peers, WaitCounters
from deep_ep._session import Request, Session, build_session
from deep_ep._streams import CudaStreams
from deep_ep._tensors import Payload, view_memory
from deep_ep.utils import EventHandle, EventOverlap, opaque, outside_of_modes
from deep_ep_cpp import Config, Error

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "WaitCounters"]

Bias = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]

DESTROY_TIMEOUT_S = 5.0
logger = logging.getLogger("deep_ep")

# Chunk sizes by rank count: (nvl send, nvl recv, rdma send, rdma recv). A count between two entries takes the next one.
DISPATCH_CHUNKS: dict[int, tuple[int, int, int, int]] = {
    2: (24, 256, 6, 128),
    **dict.fromkeys((4, 8), (6, 256, 6, 128)),
    16: (36, 288, 20, 128),
    **dict.fromkeys((24, 32, 48, 64), (32, 288, 8, 128)),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
COMBINE_CHUNKS: dict[int, tuple[int, int, int, int]] = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    **dict.fromkeys((24, 32, 48, 64), (1, 288, 8, 128)),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    **dict.fromkeys((144, 160), (2, 720, 8, 128)),
}

CHUNKS = {"dispatch": DISPATCH_CHUNKS, "combine": COMBINE_CHUNKS}


@functools.cache
def _default_config(operation: str, num_sms: int, num_ranks: int) -> Config:
    """A configuration cannot be changed, so that calls without one can share it."""
    table = CHUNKS[operation]
    listed = sorted(table)
    return Config(num_sms, *table[listed[min(bisect.bisect_left(listed, num_ranks), len(listed) - 1)]])


def _log_unused_permissions(**permissions: bool) -> None:
    for name, is_given in permissions.items():
        if is_given:
            _log_once(f"{name}=True is a permission that changes nothing: within a node peers reach memory without it, "
                      "and this version maps no memory of other hosts (multi-node NVLink)")


@functools.cache
def _log_once(sentence: str) -> None:
    logger.info(sentence)


def _direct_calls(session: Session, config: Any, previous_event: Any, async_finish: Any,
                  allocate_on_comm_stream: Any) -> Optional[deep_ep_cpp.DirectCalls]:
    """Those that a high-throughput call with these arguments may be made by, in one native step. That begins with
    `begin_call`, so that nothing may fail before it."""
    is_usual = (previous_event is None and not async_finish and not allocate_on_comm_stream
                and (config is None or type(config) is Config))
    return session.direct if is_usual else None


@opaque
class Buffer:
    """Memory that every rank of a group can reach, and expert-parallel dispatch and combine on it.

    Words: R ranks in the group, E experts (E / R of them on each rank, in order), N tokens of this rank, K experts per
    token (top-k), M rows received by this rank.

    Attributes: `rank`, `group` (what was passed), `group_size`, `num_nvl_bytes`, `num_rdma_bytes`, `low_latency_mode`,
    `explicitly_destroy`, `enable_shrink`, `runtime` (the native object, None after `destroy`), and the class attribute
    `num_sms`, the SM budget of configurations made later.

    Any operation raises deep_ep.TimeoutError when a peer did not take part in time. After that the Buffer is unusable
    (every call raises the same sentence again); the process may destroy it and build another.
    """

    num_sms: int = 20

    @outside_of_modes
    def __init__(self,
                 group: Optional[dist.ProcessGroup],
                 num_nvl_bytes: int = 0,
                 num_rdma_bytes: int = 0,
                 low_latency_mode: bool = False,
                 num_qps_per_rank: float = 24,
                 allow_nvlink_for_low_latency_mode: bool = True,
                 allow_mnnvl: bool = False,
                 use_fabric: bool = False,
                 explicitly_destroy: bool = False,
                 enable_shrink: bool = False,
                 comm: Any = None,
                 timeout_s: Optional[float] = None,
                 num_lend_bytes: Optional[int] = None,
                 on_failure: Optional[Callable[[str], Any]] = None) -> None:
        """Collective: every rank of the group must call it, with the same sizes and modes.

        group: a ProcessGroup of any backend, or None with `comm`, an mpi4py communicator (or any object with
            `Get_rank`, `Get_size` and `allgather`).
        num_nvl_bytes: bytes for dispatch and combine, a multiple of 128; see `Config.get_nvl_buffer_size_hint`.
        num_rdma_bytes: within a node bytes for the low-latency calls, a multiple of 128, zero-filled; see
            `get_low_latency_rdma_size_hint`. It is memory that peers reach, like the other; the name is the callers'.
            Across nodes: for rows on their way between nodes; see `Config.get_rdma_buffer_size_hint`. 0: as many as
            num_nvl_bytes, and at least 16 MiB for each other node. With low_latency_mode it serves that mode too, which
            then needs its hint.
        low_latency_mode: whether low-latency calls are made. One Buffer may serve both modes in turn.
        allow_mnnvl, use_fabric: permissions, of which this version makes no use; never a reason to fail.
        enable_shrink: low-latency calls go on without a peer that does not come in time, and mask it.
        num_lend_bytes: bytes for tensors that the peers write or read in place, a multiple of 128, beside
            num_nvl_bytes; 0: nothing is lent. None: DEEP_EP_LEND_BYTES, or else a part of num_nvl_bytes (nothing where
            the heap is in host memory, see DEEP_EP_HEAP). With room for
            it, outputs of `dispatch` and inputs of `combine` from `lend` need no slots and no second copy, hence fewer
            SMs; see docs/api.md, "Lending".
        timeout_s: seconds after which a wait for a peer gives up (None: DEEP_EP_TIMEOUT_SECS, see docs/errors.md).
        on_failure: called once with the sentence of the first failure, from the first call (`check` too) that learns of
            it, before that call raises; see docs/errors.md.

        Raises ValueError or TypeError for a bad argument, and deep_ep.Error when another rank failed: no rank hangs.
        """
        peers = Peers(group, comm)
        self.rank: int = peers.rank
        self.group = group
        self.group_size: int = peers.size
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink

        def prepare() -> Request:
            if low_latency_mode:
                self.nvshmem_qp_depth = _env.nvshmem_qp_depth()
            lent = _env.lend_bytes() if num_lend_bytes is None else num_lend_bytes
            return Request(num_nvl_bytes, num_rdma_bytes, lent, low_latency_mode, num_qps_per_rank, enable_shrink,
                           timeout_s, on_failure)

        self._session: Optional[Session] = build_session(peers, prepare)
        self.runtime: Optional[deep_ep_cpp.Buffer] = self._session.runtime
        self.num_lend_bytes: int = self.runtime.num_lend_bytes
        self._high_throughput = _high_throughput.HighThroughput(self._session)
        self._low_latency = _low_latency.LowLatency(self._session, low_latency_mode, enable_shrink)
        self._high_throughput.make_direct()
        _log_unused_permissions(allow_mnnvl=allow_mnnvl, use_fabric=use_fabric)

    # Lifecycle

    def destroy(self) -> None:
        """Releases everything. Idempotent, raises nothing, returns within seconds, and is not collective.

        Tensors from `get_local_buffer_tensor` must not be used afterwards.
        """
        self._release(DESTROY_TIMEOUT_S)

    def _release(self, timeout_s: float) -> None:
        session, self._session, self.runtime = self._session, None, None
        if session is not None:
            session.close(timeout_s)

    def __copy__(self) -> Self:
        """The Buffer itself: two objects over the same memory would each release it."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        raise TypeError(
            "a Buffer cannot be copied: it is memory of this process that peers have mapped. Keep it out of "
            "what is deep-copied, or share it")

    def __reduce__(self) -> Any:
        raise TypeError("a Buffer cannot be pickled: it is memory of this process that peers have mapped. Build one in "
                        "each process, together with the peers")

    def __repr__(self) -> str:
        session = self._session
        if session is None:
            return f"<Buffer of rank {self.rank} of {self.group_size}, destroyed>"
        topology, runtime = session.topology, session.runtime
        rail = f", rail: {runtime.rail_name}, {runtime.num_rail_bytes} bytes" if topology.num_nodes > 1 else ""
        heap = ", heap in host memory" if session.heap == _peers.HOST else ""
        return (
            f"<Buffer of rank {self.rank} of {self.group_size} on {session.streams.device}, node {topology.node} of "
            f"{topology.num_nodes} with {topology.ranks_per_node} rank(s){rail}{heap}, "
            f"num_nvl_bytes={self.num_nvl_bytes}, num_rdma_bytes={self.num_rdma_bytes}, "
            f"num_lend_bytes={self.num_lend_bytes}, low_latency_mode={self.low_latency_mode}>")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: Optional[type[BaseException]], exc: Optional[BaseException],
                 traceback: Optional[TracebackType]) -> None:
        self.destroy()

    def __del__(self) -> None:
        if getattr(self, "_session", None) is None:
            return
        # Peers may be gone and the interpreter may be half torn down: never wait, never raise.
        with contextlib.suppress(Exception):
            if self.explicitly_destroy:
                print("WARNING: destroy() was not called before DeepEP buffer destruction, which can leak resources.",
                      file=sys.stderr,
                      flush=True)
            self._release(0.0)

    def _require_session(self) -> Session:
        if self._session is None:
            raise Error("this Buffer was destroyed")
        return self._session

    def check(self) -> None:
        """Raises the first failure of this Buffer, if there was one: its own, or that of a peer that stops it too.

        Takes less than a microsecond and does not wait for running kernels, so a loop that replays CUDA graphs can call
        it at each step; it learns of a failure a tenth of a second after it at the latest.
        """
        self._require_session().raise_failure()

    # Queries

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the extension was built with CUDA and without DISABLE_SM90_FEATURES. It says nothing about nodes.

        See docs/api.md, "Not in this version", for clients that read it as "has the internode library".
        """
        return bool(deep_ep_cpp.is_sm90_compiled())

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets the SM budget, an even number, of configurations made from now on."""
        Buffer.num_sms = _tensors.check_int("new_num_sms", new_num_sms, 2, 2)

    @staticmethod
    def capture() -> EventOverlap:
        """An event at this point of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The default configuration of `dispatch` for a group of `num_ranks`."""
        return _default_config("dispatch", Buffer.num_sms, _tensors.check_int("num_ranks", num_ranks, 1))

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The default configuration of `combine` for a group of `num_ranks`."""
        return _default_config("combine", Buffer.num_sms, _tensors.check_int("num_ranks", num_ranks, 1))

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int,
                                       num_experts: int) -> int:
        """Bytes of `num_rdma_bytes` that are enough for low-latency calls of these sizes, with up to top-32.

        Calls of several shapes may use one Buffer: take the largest.
        """
        return _low_latency.size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream of asynchronous calls. On the CPU torch has no streams, and this raises deep_ep.Error."""
        streams = self._require_session().streams
        if not isinstance(streams, CudaStreams):
            raise Error("get_comm_stream: this Buffer works on the CPU, where torch has no streams")
        return streams.comm_stream

    def get_local_buffer_tensor(self,
                                dtype: torch.dtype,
                                size: Optional[torch.Size] = None,
                                offset: int = 0,
                                use_rdma_buffer: bool = False) -> torch.Tensor:
        """A view of this rank's buffer from byte `offset` on: 1-D up to the end, or of shape `size`.

        The memory is the Buffer's: the view must not be used after `destroy`, and what is lent (docs/api.md, "Lending")
        may hold tensors. Nothing is shown of the rail's memory, which peers in other nodes write to at any time: there
        `use_rdma_buffer` gives an empty tensor. `offset` must be a multiple of the element size.
        """
        session = self._require_session()
        item_bytes = _tensors.check_dtype("dtype", dtype).itemsize
        runtime = session.runtime
        if use_rdma_buffer:
            num_rdma_bytes = self.num_rdma_bytes if session.topology.num_nodes == 1 else 0
            address, num_bytes = runtime.low_latency_data_ptr, num_rdma_bytes
        else:
            address, num_bytes = runtime.data_ptr, runtime.data_bytes
        _tensors.check_int("offset", offset, 0, item_bytes, num_bytes)
        num_elements = (num_bytes - offset) // item_bytes
        wanted = num_elements if size is None else math.prod(_tensors.check_sizes("size", size))
        if wanted > num_elements:
            raise ValueError(f"size must fit into the {num_bytes} bytes of the buffer from byte {offset} on, got "
                             f"{wanted} elements of {item_bytes} bytes")
        region = view_memory(address, num_bytes, session.streams.device)
        flat = region[offset:offset + wanted * item_bytes].view(dtype)
        return flat if size is None else flat.view(size)

    def get_wait_counters(self) -> WaitCounters:
        """How often, and how long, this rank has waited for each rank, by operation and stage. Not collective.

        The tensors are the memory that kernels count in, in calls and in replays of graphs: they show what is counted
        by the time at which they are read, and must not be used after `destroy`. A wait below 50 us is not counted: it
        may be part of any call. See docs/guides/troubleshooting.md, "It is slow". Two int64 tensors [operations,
        stages, R] on the Buffer's device; raises deep_ep.Error after `destroy`.
        """
        session = self._require_session()
        return _peers.view_counters(session.runtime, session.num_ranks, session.streams.device)

    def dump_waits(self) -> str:
        """The same as text, the longest waits first: which rank was late, at which stage, how often. Not collective.

        Waits for no kernel and no stream, so it also tells what a call that hangs has waited for before.
        """
        session = self._require_session()
        return _peers.dump_waits(session.runtime, session.rank, session.num_ranks)

    # High throughput

    def lend(self, shape: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """An uninitialised tensor in memory that the peers reach. Not collective.

        Given to `combine` as `x` (or any part of it, of whole rows), the peers read the rows where they stand: nothing
        is copied into slots. Outputs of `dispatch` are such tensors as well, as long as there is room. The memory is
        lent anew when the last view of it is gone; `Tensor.record_stream` has no effect on it, see
        docs/api.md, "Lending".

        Raises deep_ep.Error when there is no room, or the Buffer lends nothing.
        """
        self._require_session()
        return self._high_throughput.lend(shape, dtype)

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: Optional[EventOverlap] = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False
    ) -> tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, EventOverlap]:
        """Counts where the tokens of this rank go. Not collective.

        topk_idx: int64 or int32 [N, K], contiguous; -1 selects nothing. num_experts: E, a multiple of R.
        previous_event, async_finish, allocate_on_comm_stream: see docs/api.md, "Streams and events".

        Returns (num_tokens_per_rank int32 [R], num_tokens_per_rdma_rank int32 by node, or None within a node,
        num_tokens_per_expert int32 [E], is_token_in_rank bool [N, R], event).
        """
        self._require_session().begin_call()
        ordering = (previous_event, async_finish, allocate_on_comm_stream)
        return self._high_throughput.get_dispatch_layout(topk_idx, num_experts, ordering)

    def dispatch(self,
                 x: Payload,
                 handle: Optional[tuple[torch.Tensor, ...]] = None,
                 num_tokens_per_rank: Optional[torch.Tensor] = None,
                 num_tokens_per_rdma_rank: Optional[torch.Tensor] = None,
                 is_token_in_rank: Optional[torch.Tensor] = None,
                 num_tokens_per_expert: Optional[torch.Tensor] = None,
                 topk_idx: Optional[torch.Tensor] = None,
                 topk_weights: Optional[torch.Tensor] = None,
                 expert_alignment: int = 1,
                 num_worst_tokens: int = 0,
                 config: Optional[Config] = None,
                 previous_event: Optional[EventOverlap] = None,
                 async_finish: bool = False,
                 allocate_on_comm_stream: bool = False) -> _high_throughput.DispatchResult:
        """Sends every token to each rank that owns one of its experts. Collective.

        x: [N, hidden] of any dtype, contiguous, rows of a multiple of 16 bytes; or (x of a 1-byte dtype, scales), with
            scales float32 or int32 [N, S] of any strides.
        handle: None, or that of an earlier dispatch, whose routing is used again; then no layout and no top-k is given.
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: from `get_dispatch_layout`; so is
            num_tokens_per_rdma_rank, which is needed where the group spans nodes.
        topk_idx, topk_weights: [N, K] as in `get_dispatch_layout`, and float32 [N, K]; both or neither.
        expert_alignment: each count in the returned list is rounded up to a multiple of it.
        num_worst_tokens: if positive, the received tensors have that many rows (it must not be less than what may
            arrive, or what may pass through this rank to its node), the host does not wait for counts, and the call can
            be captured in a CUDA graph; needs top-k.

        Returns (recv_x [M, hidden] or (recv_x, recv_scales [M, S]), recv_topk_idx [M, K], recv_topk_weights [M, K],
        entries per local expert as a list, handle, event). Rows are in the order of source rank, then source token.
        recv_topk_idx holds local expert numbers and -1, with weight 0, for experts elsewhere; in unused rows of
        `num_worst_tokens` it is -1, and the list is empty. With `handle`: (recv_x, None, None, None, None, event).
        """
        session = self._session or self._require_session()
        try:
            direct = _direct_calls(session, config, previous_event, async_finish, allocate_on_comm_stream)
            if direct is not None:
                num_sms, result = self._num_sms(session, config, "dispatch", x, topk_idx), None
                if handle is None and not num_worst_tokens:
                    result = direct.dispatch_fresh(x=x,
                                                   num_tokens_per_rank=num_tokens_per_rank,
                                                   is_token_in_rank=is_token_in_rank,
                                                   num_tokens_per_expert=num_tokens_per_expert,
                                                   topk_idx=topk_idx,
                                                   topk_weights=topk_weights,
                                                   expert_alignment=expert_alignment,
                                                   num_sms=num_sms)
                elif topk_idx is None and topk_weights is None:
                    result = direct.dispatch_cached(x=x, handle=handle, num_sms=num_sms)
                if result is not None:
                    return result
            session.begin_call()
            num_sms = self._num_sms(session, config, "dispatch", x, topk_idx)
            ordering = (previous_event, async_finish, allocate_on_comm_stream)
            if handle is not None:
                if topk_idx is not None or topk_weights is not None:
                    raise ValueError("topk_idx and topk_weights must be None when a handle is given")
                return self._high_throughput.dispatch_cached(x, handle, num_sms, ordering)
            routing = _high_throughput.make_routing(num_tokens_per_rank, num_tokens_per_rdma_rank,
                                                    num_tokens_per_expert, is_token_in_rank, topk_idx, topk_weights,
                                                    session.topology.num_nodes)
            return self._high_throughput.dispatch_fresh(x, routing, expert_alignment, num_worst_tokens, num_sms,
                                                        ordering)
        except BaseException as error:
            session.abandon_call("dispatch", error)
            raise

    def combine(self,
                x: torch.Tensor,
                handle: tuple[torch.Tensor, ...],
                topk_weights: Optional[torch.Tensor] = None,
                bias: Optional[Bias] = None,
                config: Optional[Config] = None,
                previous_event: Optional[EventOverlap] = None,
                async_finish: bool = False,
                allocate_on_comm_stream: bool = False) -> _high_throughput.CombineResult:
        """Brings the rows of a dispatch back to their tokens and sums them over the ranks. Collective.

        x: bfloat16 [M, hidden], contiguous, rows of a multiple of 16 bytes. handle: that of the dispatch.
        topk_weights: float32 [M, K], summed in the same way. bias: bfloat16 [N, hidden], or a tuple of two, added.
        Sums are float32, in rank order, then bias, rounded once. Weights are not applied to x. Across nodes each node
        sums its own rows so; another node's sum is rounded before it is added to that of this node, in node order.

        Returns (combined_x bfloat16 [N, hidden], combined_topk_weights float32 [N, K] or None, event).
        """
        session = self._session or self._require_session()
        try:
            direct = _direct_calls(session, config, previous_event, async_finish, allocate_on_comm_stream)
            if direct is not None and bias is None:
                num_sms = self._num_sms(session, config, "combine", x)
                result = direct.combine(x=x, handle=handle, topk_weights=topk_weights, num_sms=num_sms)
                if result is not None:
                    return result
            session.begin_call()
            num_sms = self._num_sms(session, config, "combine", x)
            ordering = (previous_event, async_finish, allocate_on_comm_stream)
            return self._high_throughput.combine(x, handle, topk_weights, bias, num_sms, ordering)
        except BaseException as error:
            session.abandon_call("combine", error)
            raise

    def _num_sms(self,
                 session: Session,
                 config: Optional[Config],
                 operation: str,
                 rows: Any,
                 topk_idx: Any = None) -> int:
        """The SM budget of a call: the caller's, or where a cost model says that less is enough, that."""
        if config is not None:
            if not isinstance(config, Config):
                raise TypeError(f"config must be a deep_ep.Config, got {type(config).__name__}")
            return session.num_sms_override or config.num_sms
        if session.num_sms_override or session.cost_model is None:
            return session.num_sms_override or Buffer.num_sms
        return session.cost_model.budget(operation, Buffer.num_sms, self._num_bytes(operation, rows, topk_idx),
                                         session.num_ranks)

    def _num_bytes(self, operation: str, rows: Any, topk_idx: Any) -> int:
        """What a call moves, as far as the host knows. The arguments are not checked yet; odd ones move nothing."""
        if isinstance(rows, tuple) and rows:
            rows = rows[0]
        if not isinstance(rows, torch.Tensor):
            return 0
        num_bytes = rows.numel() * rows.element_size()
        if operation == "combine":  # one row for each copy
            return num_bytes
        has_topk = isinstance(topk_idx, torch.Tensor) and topk_idx.dim() == 2
        copies = _high_throughput.copies_per_token(self.group_size, topk_idx.shape[1]) if has_topk else self.group_size
        return round(num_bytes * copies)

    # DeepEP has these names for what the calls above come to where the group spans nodes.
    internode_dispatch = dispatch
    internode_combine = combine

    # Low latency

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """A barrier of the group on the current stream, which every rank must call; on the CPU it blocks.

        Nothing needs clearing: low-latency calls leave nothing behind, nor do calls of the other mode or of other
        shapes, nor the caller who writes to the buffer between calls. With `enable_shrink` a rank that does not come in
        time is masked; without, that is a `deep_ep.TimeoutError`. `deep_ep.Error`: a hook was not called yet.
        """
        session = self._session or self._require_session()
        try:
            self._low_latency.clean(num_max_dispatch_tokens_per_rank, hidden, num_experts)
        except BaseException as error:
            session.abandon_call("clean_low_latency_buffer", error)
            raise

    def low_latency_dispatch(self,
                             x: torch.Tensor,
                             topk_idx: torch.Tensor,
                             num_max_dispatch_tokens_per_rank: int,
                             num_experts: int,
                             cumulative_local_expert_recv_stats: Optional[torch.Tensor] = None,
                             dispatch_wait_recv_cost_stats: Optional[torch.Tensor] = None,
                             use_fp8: bool = True,
                             round_scale: bool = False,
                             use_ue8m0: bool = False,
                             async_finish: bool = False,
                             return_recv_hook: bool = False) -> _low_latency.DispatchResult:
        """Sends every token to its experts, without the host: for small batches, and for CUDA graphs. Collective.

        T: num_max_dispatch_tokens_per_rank, the same on all ranks, as are hidden, top-k and num_experts.
        x: bfloat16 [N, hidden], N <= T, rows of a multiple of 16 bytes (use_fp8: hidden a multiple of 128).
        topk_idx: int64 or int32 [N, K]; -1 selects nothing, and neither does anything else outside 0..E-1.
        cumulative_local_expert_recv_stats: int32 [E / R], to which the received counts are added.
        dispatch_wait_recv_cost_stats: int64 [R], to which the longest wait for each source is added, in nanoseconds.
        use_fp8: cast with one float32 scale per 128 channels. round_scale: scales are powers of two. use_ue8m0 (needs
            round_scale, and hidden a multiple of 512): only their exponents are returned, four in an int32.
        async_finish, return_recv_hook: at most one; see docs/api.md, "Low latency".

        Returns (recv_x, recv_count int32 [E / R], handle, event, hook or None). recv_x: bfloat16
        [E / R, R * T, hidden], or (float8_e4m3fn of that shape, scales [E / R, R * T, hidden / 128 (or / 512)] whose
        last two dimensions are column-major). For each expert the first recv_count rows are set, in the order of
        source rank, then token. handle: (src_info int32 [E / R, R * T], layout_range int64 [E / R, R], T, hidden, E).
        """
        session = self._session or self._require_session()
        try:
            if session.direct is not None and not async_finish:
                result = session.direct.low_latency_dispatch(x=x,
                                                             topk_idx=topk_idx,
                                                             num_max_tokens=num_max_dispatch_tokens_per_rank,
                                                             num_experts=num_experts,
                                                             cumulative_stats=cumulative_local_expert_recv_stats,
                                                             wait_stats=dispatch_wait_recv_cost_stats,
                                                             use_fp8=use_fp8,
                                                             round_scale=round_scale,
                                                             use_ue8m0=use_ue8m0,
                                                             return_recv_hook=return_recv_hook)
                if result is not None:
                    return result
            return self._low_latency.dispatch(x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts,
                                              cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats,
                                              (use_fp8, round_scale, use_ue8m0), async_finish, return_recv_hook)
        except BaseException as error:
            session.abandon_call("low_latency_dispatch", error)
            raise

    def low_latency_combine(self,
                            x: torch.Tensor,
                            topk_idx: torch.Tensor,
                            topk_weights: torch.Tensor,
                            handle: tuple[Any, ...],
                            use_logfmt: bool = False,
                            zero_copy: bool = False,
                            async_finish: bool = False,
                            return_recv_hook: bool = False,
                            out: Optional[torch.Tensor] = None,
                            combine_wait_recv_cost_stats: Optional[torch.Tensor] = None) -> _low_latency.CombineResult:
        """Brings the experts' rows back and sums them, weighted, for each token. Collective.

        x: bfloat16 [E / R, R * T, hidden], the experts' answers in the rows of the dispatch.
        topk_idx, topk_weights: [N, K] as in the dispatch, and float32 [N, K]. handle: that of the dispatch.
        use_logfmt: rows cross the links in a 10-bit logarithmic format; see docs/protocols/low_latency.md.
        zero_copy: sends the tensor of `get_next_low_latency_combine_buffer` instead of x, which gives the shape only.
        out: bfloat16 [N, hidden], contiguous; returned instead of a new tensor.
        combine_wait_recv_cost_stats: int64 [R], to which the longest wait for each rank is added, in nanoseconds.

        An expert's rank sums what its experts have for a token in float32 and rounds once; the owner sums those
        parts in float32, in rank order, and rounds once. Returns (combined_x, event, hook or None).
        """
        session = self._session or self._require_session()
        try:
            if session.direct is not None and not use_logfmt and not zero_copy and not async_finish:
                result = session.direct.low_latency_combine(x=x,
                                                            topk_idx=topk_idx,
                                                            topk_weights=topk_weights,
                                                            handle=handle,
                                                            out=out,
                                                            wait_stats=combine_wait_recv_cost_stats,
                                                            return_recv_hook=return_recv_hook)
                if result is not None:
                    return result
            return self._low_latency.combine(x, topk_idx, topk_weights, handle, use_logfmt, zero_copy, async_finish,
                                             return_recv_hook, out, combine_wait_recv_cost_stats)
        except BaseException as error:
            session.abandon_call("low_latency_combine", error)
            raise

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Leaves a rank out of low-latency calls from now on, or takes it back. Not collective."""
        masked = self._low_latency.masked_ranks("low_latency_update_mask_buffer")
        if _tensors.check_int("rank_to_mask", rank_to_mask, 0) >= self.group_size:
            raise ValueError(f"rank_to_mask must be below {self.group_size}, the size of the group, got {rank_to_mask}")
        masked[rank_to_mask] = int(bool(mask))

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Writes to `mask_status`, int32 [R], which ranks this rank leaves out: 1, the others 0."""
        masked = self._low_latency.masked_ranks("low_latency_query_mask_buffer")
        _tensors.check_tensor("mask_status", mask_status, masked.device, tuple(masked.shape), (masked.dtype, ))
        mask_status.copy_(masked)

    def low_latency_clean_mask_buffer(self) -> None:
        """Takes all ranks back into low-latency calls. Not collective."""
        self._low_latency.masked_ranks("low_latency_clean_mask_buffer").zero_()

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        """A bfloat16 tensor [E / R, R * T, hidden] that the next `low_latency_combine(zero_copy=True)` sends.

        It is the same until that combine. No memory is special: the kernel reads the rows of any tensor from where they
        are, so passing that tensor as `x` is as quick; this is for callers who were written for it.
        """
        return self._low_latency.next_combine_buffer(handle)
