"""The native extension. Addresses and streams are plain integers; 0 means "none". Nothing here knows torch.

Callers use `deep_ep.Buffer`; this is the seam below it. Python has validated every argument before a call arrives here;
the native code repeats the checks that guard memory only. Methods that wait for a device or for peers release the GIL
(connect, destroy, wait_counts, synchronize_*; lend for a graph). A launch takes microseconds and does not; where a
GPU's launch queue is full it holds the GIL until there is room. So does check(), which is in every call: it takes less
than a microsecond, and up to 0.3 s once, where it finds a failure whose reason another rank has yet to tell.
"""
from typing import Any, Callable, Iterable, List, Optional, Tuple, TypedDict

from typing_extensions import Unpack

class Error(RuntimeError):
    """Base of everything the native code raises."""

class InvalidArgument(Error, ValueError): ...
class CudaError(Error): ...
class TransportError(Error): ...

class InternalError(Error):
    """A mistake of this library, which no argument and no machine can bring about: please report it."""

class TimeoutError(Error):
    """A peer did not arrive in time, or a peer reported a failure. The message names operation, stage and peer."""

class Config:
    def __init__(self, num_sms: int = 20, num_max_nvl_chunked_send_tokens: int = 6,
                 num_max_nvl_chunked_recv_tokens: int = 256, num_max_rdma_chunked_send_tokens: int = 6,
                 num_max_rdma_chunked_recv_tokens: int = 256) -> None: ...
    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int: ...
    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int: ...
    @property
    def num_sms(self) -> int: ...

EventHandle: Any  # lazily forwarded to deep_ep.utils.EventHandle (callers import it from here)
topk_idx_t: Any  # torch.int64 or torch.int32, lazily resolved

def get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int,
                                   num_experts: int) -> int: ...
def shape_in_memory(tensor: Any, device: Any, dtypes: Tuple[Any, ...], is_contiguous: bool) -> Any:
    """The shape of a tensor of torch that is on `device`, of one of `dtypes` (empty: any), contiguous if that is asked
    for, and whose values are in the memory that data_ptr() names; else None."""

def matrix_shape(tensor: Any, device: Any, dtypes: Tuple[Any, ...], num_rows: Optional[int]) -> Any:
    """The same of a contiguous matrix of `num_rows` (None: any number)."""

def has_tensor_exchange() -> bool:
    """Whether native code can read that class's tensors by itself (DLPack's C exchange, torch 2.10). Then `DirectCalls`
    may be made."""

def use_tensor_class(tensor_class: type, is_plain: Callable[[Any], bool]) -> None:
    """torch.Tensor, and which of its subclasses name the memory that holds their values."""

def make_tensor(address: int, num_bytes: int, cuda_index: int) -> Any:
    """A DLPack capsule over bytes (cuda_index < 0: of the host), for torch.from_dlpack; their owner outlives it."""

def wire_sizes(*, row_bytes: int, num_topk: int, num_scales: int, ranks_per_node: int, num_local_experts: int,
               is_combine: bool) -> Tuple[int, int, int]:
    """Bytes of a token on the rail, of a row over NVLink, and of the counts that go to a forwarder before them."""

def plan_chunk_bytes(engine_bytes: int, rail_gb_per_s: float) -> int:
    """What a put between nodes has, where the engine likes `engine_bytes` best on a NIC of 50 GB/s."""

def wait_names() -> Tuple[list[str], list[str], list[list[str]]]:
    """Operations; stages of a wait, "": nobody waits there; for each operation and stage what a rank does there that
    others wait for."""

def get_build() -> dict[str, Any]:
    """What the build variables have set: {'cuda': bool, 'architectures': '90-real 100', 'sm90_features': bool,
    'cache_hints': bool, 'topk_idx_bits': 32 or 64}. Features are of the CUDA half: False where there is none."""

def use_torch(current_stream: Callable[[int], int], from_capsule: Callable[[Any], Any]) -> None:
    """The handle of the stream that is current in the calling thread, on a numbered GPU; and torch.from_dlpack."""

def is_cuda_built() -> bool: ...
def is_sm90_compiled() -> bool: ...
def topk_idx_bits() -> int: ...
def cuda_versions() -> tuple[int, int]:
    """The CUDA runtime that is compiled in, and the newest that this machine's driver serves, as CUDA counts (12040 is
    12.4). 0: built without CUDA; no driver."""

def describe_old_driver(runtime: int, driver: int) -> str:
    """Says that a driver is too old for a runtime, and what to do. Empty where it suffices. Versions as above."""

def part_to_lend(num_data_bytes: int, num_ranks: int) -> int:
    """Bytes of a data region that Buffer.LEND_PART_OF_DATA lends."""

def load_nvshmem(host_library: str, engines: list[str], remote_transport: str, is_ibgda_enabled: bool) -> str:
    """Brings NVSHMEM (that of the process, else `host_library`) and the first of `engines` that fits into this process;
    says which. Once. The transport decides the size of chunks. Raises TransportError with what to do."""
def get_environment() -> dict[str, Any]:
    """What csrc/core/env.cc read: {'timeout_s': float, 'warn_s': float, 'ranks_per_node': int (0: found), ...}."""

class Device:
    """A device of this process: the CPU executor (index -1) or a GPU."""

    def __init__(self, index: int) -> None: ...
    @property
    def kind(self) -> str:
        """'cpu' or 'cuda'."""
    @property
    def num_sms(self) -> int: ...
    @property
    def unique_id(self) -> str: ...
    def create_stream(self) -> int: ...
    def destroy_stream(self, stream: int) -> None: ...
    def synchronize_stream(self, stream: int) -> None: ...
    def stream_kind(self, stream: int) -> str:
        """'captured': work goes into a graph. 'ambiguous': in another thread or on another device the handle means
        another stream. 'plain': neither."""
    def join_streams(self, waiting: int, waited_for: int, event: int) -> None:
        """Later work on one comes after what the other has so far; records `event`, which may be used again at once."""
    def create_event(self) -> int: ...
    def destroy_event(self, event: int) -> None: ...
    def record_event(self, event: int, stream: int) -> None: ...
    def stream_wait_event(self, stream: int, event: int) -> None: ...
    def synchronize_event(self, event: int) -> None: ...
    def query_event(self, event: int) -> bool: ...

class RowForm:
    """What a row is in each of several tensors."""

    def __init__(self, parts: Iterable[Optional[Tuple[Tuple[int, ...], int, int, object]]]) -> None:
        """Of each its shape, DLPack's code and bits of its type, and torch's dtype where DLPack has no name for it, so
        that it is made as bytes and viewed, or None. None in the place of all that: there is no such tensor."""

class LentRows:
    """Rows in memory of a heap, in use; they keep the heap beyond `destroy`. Dropping this gives them back."""

    @property
    def num_rows(self) -> int: ...
    def addresses(self) -> Tuple[int, ...]:
        """Of the tensors; 0: there is none."""
    def tensors(self, num_rows: int, cuda_index: int) -> Tuple[Any, ...]:
        """Over the first rows (cuda_index < 0: in memory of the host); once. The memory of the other rows, which nobody
        has used, is free at once; that of a tensor when the last one over it goes."""

class StreamOrder:
    """What a Buffer knows of the operation before; see CudaStreams in deep_ep/_streams.py."""

    last_stream: Any  # a number, or None
    last_event: Any
    is_marked: bool
    is_shared: bool

class TensorMaker:
    """`maker(n, m)` is torch.empty(n, m, dtype=..., device=...) with the example's type, on its device.
    `empty_strided`: torch's function of (shape, strides, dtype) for the current device, or None; `current_device`:
    its index, or None: there is one device. Only where has_tensor_exchange()."""

    def __init__(self, example: Any, empty_strided: Optional[Callable[..., Any]],
                 current_device: Optional[Callable[[], int]]) -> None: ...
    def __call__(self, *extents: int) -> Any: ...
    def strided(self, shape: Any, strides: Any) -> Any: ...

class DirectCalls:
    """The usual calls of a Buffer in one step: checked, allocated for, launched and answered. Each function returns
    what the call of that name does, or None: it has done nothing, and the call is to be made the other way, which also
    says what is wrong with its arguments.
    """

    def __init__(self, session: Any, options: Any) -> None: ...
    def combine(self, *, x: Any, handle: Any, topk_weights: Any, num_sms: Any) -> Optional[Tuple[Any, ...]]: ...
    def dispatch_cached(self, *, x: Any, handle: Any, num_sms: Any) -> Optional[Tuple[Any, ...]]: ...
    def dispatch_fresh(self, *, x: Any, num_tokens_per_rank: Any, is_token_in_rank: Any,
                       num_tokens_per_expert: Any, topk_idx: Any, topk_weights: Any, expert_alignment: Any, num_sms:
                       Any) -> Optional[Tuple[Any, ...]]: ...
    def low_latency_dispatch(self, *, x: Any, topk_idx: Any, num_max_tokens: Any, num_experts:
                             Any, cumulative_stats: Any, wait_stats: Any, use_fp8: Any, round_scale: Any, use_ue8m0:
                             Any, return_recv_hook: Any) -> Optional[Tuple[Any, ...]]: ...
    def low_latency_combine(self, *, x: Any, topk_idx: Any, topk_weights: Any, handle: Any,
                            out: Any, wait_stats: Any, return_recv_hook: Any) -> Optional[Tuple[Any, ...]]: ...
    def add_low_latency_plan(self, *, plan: Any) -> None:
        """From now on calls of its kind are made here."""
    def add_low_latency_handle(self, *, src_info: Any, plan: Any) -> None:
        """That of a handle which such a call left."""

class Hook:
    """What a direct low-latency call returns where it is asked for: see Hook in deep_ep/_low_latency.py."""

    def __call__(self) -> None: ...

# A record of arguments is made of keywords, and never changed: `replace` makes another. What has no value is 0, and an
# operation takes a record only when every field has been given. Addresses are of row-major memory on the device. Fields
# may be read as attributes.
#
Address = Any  # a number, the tensor that is there, or None: 0

# -- Records of arguments: written by tools/render_stub.py from csrc/kernels/params.h

class _LayoutArgs(TypedDict, total=False):
    topk_idx: Address  # [num_tokens, num_topk], -1: none
    idx_bytes: int  # int32; 4 or 8
    num_tokens: int  # int32
    num_topk: int  # int32
    num_experts: int  # int32; of all ranks
    num_nodes: int  # int32; that the ranks are divided into, evenly
    num_tokens_per_rank: Address  # output, [num_ranks]
    num_tokens_per_node: Address  # output, [num_nodes]; or none
    num_tokens_per_expert: Address  # output, [num_experts]
    is_token_in_rank: Address  # output, bool [num_tokens, num_ranks]

class LayoutArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, **fields: Unpack[_LayoutArgs]) -> None: ...
    def replace(self, **fields: Unpack[_LayoutArgs]) -> LayoutArgs: ...

class _NotifyArgs(TypedDict, total=False):
    num_tokens_per_rank: Address  # [num_ranks]
    num_tokens_per_expert: Address  # [num_experts]
    num_experts: int  # int32; of all ranks
    expert_alignment: int  # int32; of the counts that the host learns; 0 (across nodes only): it waits for none
    rank_prefix_matrix: Address  # output, [num_ranks, num_ranks], [src][dst], inclusive over src
    num_tokens: int  # int32; of the dispatch that follows, which must not be refused once its counts are out
    row_bytes: int  # uint32; likewise
    num_topk: int  # int32; likewise
    num_scales: int  # int32; likewise

class NotifyArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, **fields: Unpack[_NotifyArgs]) -> None: ...
    def replace(self, **fields: Unpack[_NotifyArgs]) -> NotifyArgs: ...

class _DispatchArgs(TypedDict, total=False):
    x: Address  # [num_tokens, row_bytes]
    num_tokens: int  # int32
    row_bytes: int  # uint32; a multiple of 16, below 2 GiB
    scales: Address  # any 4-byte type
    num_scales: int  # int32; of a token; 0: none
    scale_stride_token: int  # int64; in elements
    scale_stride_scale: int  # int64; in elements
    topk_idx: Address  # [num_tokens, num_topk]
    topk_weights: Address  # [num_tokens, num_topk]
    num_topk: int  # int32; 0: none
    idx_bytes: int  # int32; 4 or 8
    num_experts: int  # int32; of all ranks
    is_cached: bool  # the routing is that of an earlier call: the next three are none
    num_tokens_per_rank: Address  # none: notify_dispatch has exchanged the counts; else this call does
    num_tokens_per_expert: Address  # likewise
    is_token_in_rank: Address  # bool [num_tokens, num_ranks]
    rank_prefix_matrix: Address  # [num_ranks, num_ranks]; output where this call exchanges the counts
    send_head: Address  # [num_tokens, num_ranks]: place among those sent there, -1: not sent; output unless cached
    recv_x: Address  # output, [num_recv_rows, row_bytes]
    recv_scales: Address  # output, [num_recv_rows, num_scales]
    recv_topk_idx: Address  # output, [num_recv_rows, num_topk]
    recv_topk_weights: Address  # output, [num_recv_rows, num_topk]
    recv_src_idx: Address  # output, [num_recv_rows]; none: the caller has it already
    num_recv_rows: int  # int32; that the outputs hold
    is_worst_case: bool  # fewer rows may arrive: the rest of recv_topk_idx is -1, of recv_topk_weights 0
    expert_alignment: int  # int32; > 0: this call exchanges counts, num_recv_rows is a guess, wait_counts follows

class DispatchArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, **fields: Unpack[_DispatchArgs]) -> None: ...
    def replace(self, **fields: Unpack[_DispatchArgs]) -> DispatchArgs: ...

class _CombineArgs(TypedDict, total=False):
    x: Address  # bfloat16 [num_rows, hidden]
    num_rows: int  # int32
    hidden: int  # int32
    topk_weights: Address  # [num_rows, num_topk]
    num_topk: int  # int32; 0: no weights
    bias: tuple[Address, Address]  # bfloat16 [num_tokens, hidden] each, or none
    rank_prefix_matrix: Address  # of the dispatch
    send_head: Address  # of the dispatch
    src_idx: Address  # of the dispatch, [num_rows]
    num_tokens: int  # int32
    combined_x: Address  # output, bfloat16 [num_tokens, hidden]
    combined_topk_weights: Address  # output, [num_tokens, num_topk]

class CombineArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, **fields: Unpack[_CombineArgs]) -> None: ...
    def replace(self, **fields: Unpack[_CombineArgs]) -> CombineArgs: ...

class _InternodeNotifyArgs(_NotifyArgs, total=False):
    num_tokens_per_node: Address  # [N], the own node's is not used
    recv_rank_prefix: Address  # output, [R]: rows that come here, inclusive over the sources
    rail_prefix: Address  # output, [N]: tokens to forward for the rail peers, inclusive; the own node adds 0

class InternodeNotifyArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, base: NotifyArgs = ..., /, **fields: Unpack[_InternodeNotifyArgs]) -> None: ...
    def replace(self, **fields: Unpack[_InternodeNotifyArgs]) -> InternodeNotifyArgs: ...

class _InternodeDispatchArgs(_DispatchArgs, total=False):
    rail_prefix: Address  # [N], of the count exchange
    send_rail_head: Address  # [num_tokens, N]: place in that stream, -1: none or own node; output unless cached
    rail_head: Address  # [num_rail_rows, L]: place of a forwarded token at each rank, or -1; output unless cached
    num_rail_rows: int  # int32; that rail_head holds

class InternodeDispatchArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, base: DispatchArgs = ..., /, **fields: Unpack[_InternodeDispatchArgs]) -> None: ...
    def replace(self, **fields: Unpack[_InternodeDispatchArgs]) -> InternodeDispatchArgs: ...

class _InternodeCombineArgs(_CombineArgs, total=False):
    rail_prefix: Address  # [N], of the count exchange
    send_rail_head: Address  # [num_tokens, N], of the dispatch
    rail_head: Address  # [num_rail_tokens, L], of the dispatch
    num_rail_tokens: int  # int32; that rail_head holds

class InternodeCombineArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, base: CombineArgs = ..., /, **fields: Unpack[_InternodeCombineArgs]) -> None: ...
    def replace(self, **fields: Unpack[_InternodeCombineArgs]) -> InternodeCombineArgs: ...

class _LowLatencyDispatchArgs(TypedDict, total=False):
    num_max_tokens: int  # int32; T, of any rank
    num_topk: int  # int32; K
    num_experts: int  # int32; of all ranks
    hidden: int  # int32
    wait_stats: Address  # [R], the longest wait for each source is added, in ns; or none
    number: Address  # on the device: what a send phase of its own leaves for the receive phase
    is_fp8: bool  # rows travel as FP8
    rounds_scales: bool  # to powers of two
    packs_scales: bool  # four exponents (UE8M0) in a word
    x: Address  # bfloat16 [num_tokens, hidden]
    topk_idx: Address  # [num_tokens, K]
    idx_bytes: int  # int32; 4 or 8
    num_tokens: int  # int32
    recv_x: Address  # output, [El, R * T, hidden] bfloat16 or FP8
    recv_scales: Address  # output, memory order [El, hidden/128 (/512 packed), R * T]
    recv_count: Address  # output, [El]
    src_info: Address  # output, [El, R * T]: index of the token at its source
    layout_range: Address  # output, [El, R]: first row << 32 | number of rows, of local expert e from source s
    row_of_entry: Address  # output, [R, T, K]: row of (source, token, k), -1: not here; for combine
    cumulative_stats: Address  # [El], counts are added; or none

class LowLatencyDispatchArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, **fields: Unpack[_LowLatencyDispatchArgs]) -> None: ...
    def replace(self, **fields: Unpack[_LowLatencyDispatchArgs]) -> LowLatencyDispatchArgs: ...

class _LowLatencyCombineArgs(TypedDict, total=False):
    num_max_tokens: int  # int32; T, of any rank
    num_topk: int  # int32; K
    num_experts: int  # int32; of all ranks
    hidden: int  # int32
    wait_stats: Address  # [R], the longest wait for each source is added, in ns; or none
    number: Address  # on the device: what a send phase of its own leaves for the receive phase
    uses_logfmt: bool  # on the wire; see device/algo/formats.h
    x: Address  # bfloat16 [El, R * T, hidden]
    topk_idx: Address  # [num_tokens, K]
    idx_bytes: int  # int32; 4 or 8
    topk_weights: Address  # [num_tokens, K]
    num_tokens: int  # int32
    row_of_entry: Address  # of the dispatch
    combined_x: Address  # output, bfloat16 [num_tokens, hidden]

class LowLatencyCombineArgs:
    FIELDS: Tuple[Tuple[str, str, str], ...]
    def __init__(self, **fields: Unpack[_LowLatencyCombineArgs]) -> None: ...
    def replace(self, **fields: Unpack[_LowLatencyCombineArgs]) -> LowLatencyCombineArgs: ...

# -- End of the records

class Buffer:
    LATE_NS: int  # a wait that lasts so long is counted
    LEND_PART_OF_DATA: int

    def __init__(self, device: Device, rank: int, num_ranks: int, *, num_data_bytes: int, timeout_s: float,
                 warn_s: float, num_low_latency_bytes: int = 0, is_shrinkable: bool = False,
                 num_lend_bytes: int = 0, ranks_per_node: int = 0, num_rail_bytes: int = 0,
                 rail: str = "host", rail_reach: str = "", rail_gb_per_s: float = 0.0,
                 is_heap_on_host: bool = False) -> None:
        """Allocates the local part of the symmetric heap: control words, `num_data_bytes` of data for the
        high-throughput mode, `num_low_latency_bytes` for the low-latency mode, and `num_lend_bytes` for tensors that
        peers reach in place (with a 64th more for copies of weights). LEND_PART_OF_DATA: these are a part
        of the data. `is_heap_on_host`: in pinned host memory, for GPUs that do not reach each other.

        With several nodes of `ranks_per_node` (0: there is one node) also the rail window, with `num_rail_bytes` of
        data (0: as many as num_data_bytes, and 16 MiB for each other node at least). The engine `rail` carries them;
        `host` listens on DEEP_EP_RAIL_INTERFACE, or else on the interface that reaches the host `rail_reach`.
        `rail_gb_per_s`: 10^9 bytes a second that a rank's NICs carry, for the size of chunks; 0: unknown."""

    def export_handle(self) -> bytes: ...
    def connect(self, handles: List[bytes]) -> None:
        """Maps the heap of every peer of this node; `handles` are those of all ranks."""

    def rail_address(self) -> bytes:
        """Where the rail peers of this rank find it; empty within a node."""
    def connect_rail(self, addresses: List[bytes]) -> None:
        """Together with the rail peers, after `connect`; `addresses` are those of all ranks. Nothing within a node."""
    @property
    def num_rail_bytes(self) -> int:
        """Of data in the rail window; 0 within a node."""
    @property
    def rail_name(self) -> str:
        """The engine and where it listens; empty within a node."""

    @property
    def data_ptr(self) -> int: ...
    @property
    def data_bytes(self) -> int: ...

    def destroy(self, timeout_s: float) -> None:
        """Idempotent, bounded in time, not collective: memory that peers still map is kept until they let go."""

    def check(self) -> None:
        """Raises when a kernel of this buffer reported a failure, or a peer did (also: every later operation)."""

    @property
    def failure(self) -> str:
        """The sentence of the first failure that anybody has noticed, or ''."""

    def begin_call(self) -> None:
        """check(), at the beginning of a call that peers take part in."""

    def abandon_call(self, text: str) -> None:
        """The call ends here, for that reason. If peers know of it, this Buffer and theirs fail; else the reason stands
        in the mailbox of this rank, for peers that wait in vain."""

    def abandon_hook(self, ticket: int, text: str) -> None:
        """The receive phase of an open low-latency call will never come: this Buffer and those of the peers fail."""

    def start_watching(self) -> None:
        """A thread of the process looks at this Buffer ten times a second, and says on stderr when it fails."""

    def set_warning_handler(self, handler: Callable[[str], None]) -> None:
        """Called with a sentence, from within the call that notices, when a wait has passed the warning threshold."""

    def get_dispatch_layout(self, args: LayoutArgs, stream: int) -> None: ...
    def notify_dispatch(self, args: NotifyArgs, stream: int) -> None:
        """Exchanges counts."""

    def wait_counts(self) -> Tuple[int, List[int], int]:
        """After a count exchange: (received rows, aligned counts of the local experts, tokens that this rank forwards
        for its rail peers)."""

    def dispatch(self, args: DispatchArgs, num_sms: int, stream: int) -> None:
        """Moves the tokens to their rows.

        With an `expert_alignment`, where wait_counts returns more rows than `num_recv_rows`, nothing has moved: the
        same call again, as after notify_dispatch."""

    def combine(self, args: CombineArgs, num_sms: int, stream: int) -> None: ...

    # Of a group that spans nodes, in the place of the three above. Every dispatch that is not cached begins with
    # internode_notify; wait_counts follows it where an expert_alignment is given.
    def internode_notify(self, args: InternodeNotifyArgs, stream: int) -> None: ...
    def internode_dispatch(self, args: InternodeDispatchArgs, num_sms: int, stream: int) -> None: ...
    def internode_combine(self, args: InternodeCombineArgs, num_sms: int, stream: int) -> None: ...
    def lend(self, form: RowForm, num_rows: int, stream: int, is_captured: bool) -> Optional[LentRows]:
        """Memory for outputs of dispatch or inputs of combine that peers write or read in place, for later work on that
        stream; None: there is no room for all. The address tells the operations; all
        outputs of a dispatch are lent, or none. Work of one taker must come after that of the one before it.
        `is_captured`: the rows belong to the graph."""
    def note_stream(self, stream: int, is_ours: bool) -> None:
        """What is lent may be in use on that stream when it comes back. `is_ours`: by kernels of this Buffer alone."""

    @property
    def num_lend_bytes(self) -> int: ...
    @property
    def lend_address(self) -> int:
        """Where what can be lent begins."""

    # Low latency. ticket=BOTH_PHASES: the whole call in one launch, for which `number` may be 0. ticket=SEND_PHASE: the
    # send phase, which returns the call's ticket; with that and the same arguments the receive phase. At most two
    # calls may be open. Counters live on the device, so a CUDA graph may hold any of them.
    SEND_PHASE: int
    BOTH_PHASES: int

    def low_latency_dispatch(self, args: LowLatencyDispatchArgs, ticket: int, stream: int) -> int: ...
    def low_latency_combine(self, args: LowLatencyCombineArgs, ticket: int, stream: int) -> int: ...
    def clean_low_latency(self, stream: int) -> None:
        """A barrier of the group, on the device; no call may be open."""

    @property
    def wait_cells_ptr(self) -> int:
        """int64 [operations, stages, R, 3] on the device, where `wait_names` names the first two. Of each: the last
        call that is counted with its longest wait, calls in which the rank was late, nanoseconds waited in them."""
    def read_waits(self) -> Tuple[bytearray, int, int]:
        """The same at this moment, and the calls of the high-throughput and of the low-latency mode. Waits for no
        kernel."""

    @property
    def low_latency_data_ptr(self) -> int: ...
    @property
    def masked_ranks_ptr(self) -> int:
        """int32 [R] on the device; not zero: this rank is left out of low-latency calls."""
