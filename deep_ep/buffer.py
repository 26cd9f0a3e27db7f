"""`Buffer`: the memory that the ranks of a group share, and the operations on it."""
# The signatures are fixed by the callers, also where this version has no use for an argument.
# ruff: noqa: ARG002, ARG004

import bisect
import contextlib
import ctypes
import sys
from types import TracebackType
from typing import Any, Callable, Optional, Union

import torch
import torch.distributed as dist
from typing_extensions import Self

import deep_ep_cpp
from deep_ep import _checks, _env, _high_throughput
from deep_ep._bootstrap import Peers, Request, Session, build_session
from deep_ep._errors import Error
from deep_ep._streams import CudaStreams, is_capturing
from deep_ep.utils import EventHandle, EventOverlap
from deep_ep_cpp import Config

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap"]

Bias = Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]
Hook = Callable[[], None]

DESTROY_TIMEOUT_S = 5.0

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


def _chunks(table: dict[int, tuple[int, int, int, int]], num_ranks: int) -> tuple[int, int, int, int]:
    _checks.check_int("num_ranks", num_ranks, 1)
    listed = sorted(table)
    return table[listed[min(bisect.bisect_left(listed, num_ranks), len(listed) - 1)]]


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
                 timeout_s: Optional[float] = None) -> None:
        """Collective: every rank of the group must call it, with the same sizes and modes.

        group: a ProcessGroup of any backend, or None with `comm`, an mpi4py communicator (or any object with
            `Get_rank`, `Get_size` and `allgather`).
        num_nvl_bytes: bytes for dispatch and combine, a multiple of 128; see `Config.get_nvl_buffer_size_hint`.
        num_rdma_bytes: bytes of the zero-filled RDMA region, a multiple of 128.
        timeout_s: seconds after which a wait for a peer gives up (None: DEEP_EP_TIMEOUT_SECS, see docs/errors.md).

        Raises ValueError or TypeError for a bad argument, and deep_ep.Error when another rank failed: no rank hangs.
        """
        if is_capturing():
            raise Error("Buffer: it allocates and talks to its peers, so build it before the CUDA graph capture begins")
        peers = Peers(group, comm)
        self.rank: int = peers.rank
        self.group = group
        self.group_size: int = peers.size
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        if low_latency_mode:
            self.nvshmem_qp_depth = _env.nvshmem_qp_depth()
        request = Request(num_nvl_bytes, num_rdma_bytes, low_latency_mode, num_qps_per_rank, enable_shrink, timeout_s)
        self._session: Optional[Session] = build_session(peers, request)
        self.runtime: Optional[deep_ep_cpp.Buffer] = self._session.runtime

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
        """Raises the failure that a kernel of this Buffer reported, if any. Does not wait for running kernels."""
        self._require_session().raise_failure()

    # Queries

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether the extension has kernels for SM90 and newer."""
        return bool(deep_ep_cpp.is_sm90_compiled())

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Sets the SM budget, an even number, of configurations made from now on."""
        Buffer.num_sms = _checks.check_int("new_num_sms", new_num_sms, 2, 2)

    @staticmethod
    def capture() -> EventOverlap:
        """An event at this point of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The default configuration of `dispatch` for a group of `num_ranks`."""
        return Config(Buffer.num_sms, *_chunks(DISPATCH_CHUNKS, num_ranks))

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The default configuration of `combine` for a group of `num_ranks`."""
        return Config(Buffer.num_sms, *_chunks(COMBINE_CHUNKS, num_ranks))

    @staticmethod
    def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int,
                                       num_experts: int) -> int:
        """Bytes of RDMA region that low-latency mode needs. Not in this version."""
        raise _no_low_latency("get_low_latency_rdma_size_hint")

    def get_comm_stream(self) -> torch.cuda.Stream:
        """The stream on which the kernels run. On the CPU there is no torch stream, and this raises deep_ep.Error."""
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

        The memory is the Buffer's: the view must not be used after `destroy`. `offset` must be a multiple of the
        element size.
        """
        session = self._require_session()
        item_bytes = torch.empty(0, dtype=dtype).element_size()
        _checks.check_int("offset", offset, 0, item_bytes)
        region = session.rdma_region if use_rdma_buffer else _view_memory(session.runtime, session.streams.device)
        num_elements = (region.numel() - offset) // item_bytes
        wanted = num_elements if size is None else torch.Size(size).numel()
        if offset > region.numel() or wanted > num_elements:
            raise ValueError(f"size must fit into the {region.numel()} bytes of the buffer from byte {offset} on, got "
                             f"{wanted} elements of {item_bytes} bytes")
        flat = region[offset:offset + wanted * item_bytes].view(dtype)
        return flat if size is None else flat.view(size)

    # High throughput

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

        Returns (num_tokens_per_rank int32 [R], num_tokens_per_rdma_rank None within a node, num_tokens_per_expert
        int32 [E], is_token_in_rank bool [N, R], event).
        """
        return _high_throughput.get_dispatch_layout(self._require_session(), topk_idx, num_experts, previous_event,
                                                    async_finish, allocate_on_comm_stream)

    def dispatch(self,
                 x: _high_throughput.Payload,
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
        num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert: from `get_dispatch_layout`.
        topk_idx, topk_weights: [N, K] as in `get_dispatch_layout`, and float32 [N, K]; both or neither.
        expert_alignment: each count in the returned list is rounded up to a multiple of it.
        num_worst_tokens: if positive, the received tensors have that many rows (it must not be less than what may
            arrive), the host does not wait for counts, and the call can be captured in a CUDA graph; needs top-k.

        Returns (recv_x [M, hidden] or (recv_x, recv_scales [M, S]), recv_topk_idx [M, K], recv_topk_weights [M, K],
        rows per local expert as a list, handle, event). Rows are in the order of source rank, then source token.
        recv_topk_idx holds local expert numbers and -1, with weight 0, for experts elsewhere; in unused rows of
        `num_worst_tokens` it is -1, and the list is empty. With `handle`: (recv_x, None, None, None, None, event).
        """
        session = self._require_session()
        num_sms = self._num_sms(config, self.get_dispatch_config)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                raise ValueError("topk_idx and topk_weights must be None when a handle is given")
            return _high_throughput.dispatch_cached(session, x, handle, num_sms, previous_event, async_finish,
                                                    allocate_on_comm_stream)
        routing = _high_throughput.make_routing(num_tokens_per_rank, num_tokens_per_expert, is_token_in_rank, topk_idx,
                                                topk_weights)
        return _high_throughput.dispatch_fresh(session, x, routing, expert_alignment, num_worst_tokens, num_sms,
                                               previous_event, async_finish, allocate_on_comm_stream)

    def combine(self,
                x: torch.Tensor,
                handle: tuple[torch.Tensor, ...],
                topk_weights: Optional[torch.Tensor] = None,
                bias: Optional[Bias] = None,
                config: Optional[Config] = None,
                previous_event: Optional[EventOverlap] = None,
                async_finish: bool = False,
                allocate_on_comm_stream: bool = False) -> tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """Brings the rows of a dispatch back to their tokens and sums them over the ranks. Collective.

        x: bfloat16 [M, hidden], contiguous, rows of a multiple of 16 bytes. handle: that of the dispatch.
        topk_weights: float32 [M, K], summed in the same way. bias: bfloat16 [N, hidden], or a tuple of two, added.
        Sums are float32, in rank order, then bias, rounded once. Weights are not applied to x.

        Returns (combined_x bfloat16 [N, hidden], combined_topk_weights float32 [N, K] or None, event).
        """
        return _high_throughput.combine(self._require_session(), x, handle, topk_weights, bias,
                                        self._num_sms(config, self.get_combine_config), previous_event, async_finish,
                                        allocate_on_comm_stream)

    def _num_sms(self, config: Optional[Config], default: Callable[[int], Config]) -> int:
        if config is None:
            config = default(self.group_size)
        if not isinstance(config, Config):
            raise TypeError(f"config must be a deep_ep.Config, got {type(config).__name__}")
        return self._require_session().num_sms_override or config.num_sms

    def internode_dispatch(self,
                           x: _high_throughput.Payload,
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
        """`dispatch` over several nodes. Not in this version."""
        raise Error("internode_dispatch: this version works within one node; call dispatch")

    def internode_combine(
            self,
            x: torch.Tensor,
            handle: tuple[torch.Tensor, ...],
            topk_weights: Optional[torch.Tensor] = None,
            bias: Optional[Bias] = None,
            config: Optional[Config] = None,
            previous_event: Optional[EventOverlap] = None,
            async_finish: bool = False,
            allocate_on_comm_stream: bool = False) -> tuple[torch.Tensor, Optional[torch.Tensor], EventOverlap]:
        """`combine` over several nodes. Not in this version."""
        raise Error("internode_combine: this version works within one node; call combine")

    # Low latency

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Prepares the RDMA region for low-latency mode after other use. Not in this version."""
        raise _no_low_latency("clean_low_latency_buffer")

    def low_latency_dispatch(
        self,
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
        return_recv_hook: bool = False
    ) -> tuple[_high_throughput.Payload, torch.Tensor, tuple[Any, ...], EventOverlap, Optional[Hook]]:
        """Dispatch without the host for small batches. Not in this version."""
        raise _no_low_latency("low_latency_dispatch")

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: Optional[torch.Tensor] = None,
        combine_wait_recv_cost_stats: Optional[torch.Tensor] = None
    ) -> tuple[torch.Tensor, EventOverlap, Optional[Hook]]:
        """The way back of `low_latency_dispatch`. Not in this version."""
        raise _no_low_latency("low_latency_combine")

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Masks or unmasks a rank. Not in this version."""
        raise _no_low_latency("low_latency_update_mask_buffer")

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Reads which ranks are masked. Not in this version."""
        raise _no_low_latency("low_latency_query_mask_buffer")

    def low_latency_clean_mask_buffer(self) -> None:
        """Unmasks all ranks. Not in this version."""
        raise _no_low_latency("low_latency_clean_mask_buffer")

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        """The memory that the next `low_latency_combine(zero_copy=True)` sends. Not in this version."""
        raise _no_low_latency("get_next_low_latency_combine_buffer")


def _no_low_latency(name: str) -> Error:
    return Error(f"{name}: low-latency mode is not part of this version; use dispatch and combine")


class _CudaBytes:
    """Device memory, as numba's array interface describes it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes, ),
            "typestr": "|u1",
            "data": (address, False),
            "version": 2
        }


def _view_memory(runtime: deep_ep_cpp.Buffer, device: torch.device) -> torch.Tensor:
    """The data region of `runtime` as bytes."""
    if runtime.data_bytes == 0:
        return torch.empty(0, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        return torch.as_tensor(_CudaBytes(runtime.data_ptr, runtime.data_bytes), device=device)
    memory: Any = (ctypes.c_uint8 * runtime.data_bytes).from_address(runtime.data_ptr)
    return torch.frombuffer(memory, dtype=torch.uint8)
