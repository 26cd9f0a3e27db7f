"""The native extension. Addresses and streams are plain integers; 0 means "none". Nothing here knows torch.

Callers use `deep_ep.Buffer`; this is the seam below it. Python has validated every argument before a call arrives here;
the native code repeats the checks that guard memory only. Methods that wait for a device or for peers release the GIL
(connect, destroy, wait_counts, synchronize_*; lend for a graph). A launch takes microseconds and does not; where a GPU's
launch queue is full it holds the GIL until there is room. So does check(), which is in every call: it takes less than a
microsecond, and up to 0.3 s once, where it finds a failure whose reason another rank has yet to tell.
"""
from typing import Any, Callable, List, Tuple

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
def make_tensor(address: int, shape: List[int], dtype_code: int, dtype_bits: int, cuda_index: int,
                owner: object) -> Any:
    """A DLPack capsule over row-major memory (cuda_index < 0: of the host), for torch.from_dlpack. `owner` lives as
    long as any tensor made of it."""

def get_build() -> dict[str, Any]:
    """What the build variables have set: {'cuda': bool, 'architectures': '90-real 100', 'sm90_features': bool,
    'cache_hints': bool, 'topk_idx_bits': 32 or 64}. Features are of the CUDA half: False where there is none."""

def set_current_stream_function(function: Callable[[int], int]) -> None:
    """The handle of the stream that is current in the calling thread, on the GPU of that number."""

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

class LentMemory:
    """A piece of a heap, in use; keeps the heap allocated beyond `destroy`. Dropping it gives it back."""

    @property
    def address(self) -> int: ...
    def shrink(self, num_bytes: int) -> None:
        """Keeps so many bytes from its start; nobody has used the rest."""
    def tensor(self, shape: List[int], dtype_code: int, dtype_bits: int, cuda_index: int) -> object:
        """As make_tensor, over this memory, which is given back when the last tensor over it goes."""


class Buffer:
    LEND_PART_OF_DATA: int

    def __init__(self, device: Device, rank: int, num_ranks: int, num_data_bytes: int, timeout_s: float,
                 warn_s: float, num_low_latency_bytes: int = 0, is_shrinkable: bool = False,
                 num_lend_bytes: int = 0) -> None:
        """Allocates the local part of the symmetric heap: control words, `num_data_bytes` of data for the
        high-throughput mode, `num_low_latency_bytes` for the low-latency mode, and `num_lend_bytes` for tensors that
        peers reach in place (with a 64th more for copies of weights). LEND_PART_OF_DATA: these are a part
        of the data."""

    def export_handle(self) -> bytes: ...
    def connect(self, handles: List[bytes]) -> None:
        """Maps every peer's heap; `handles[rank]` is this rank's own."""

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

    def get_dispatch_layout(self, topk_idx: int, idx_bytes: int, num_tokens: int, num_topk: int, num_experts: int,
                            num_tokens_per_rank: int, num_tokens_per_expert: int, is_token_in_rank: int,
                            stream: int) -> None:
        """int32[R], int32[E], bool[N,R] outputs."""

    def notify_dispatch(self, num_tokens_per_rank: int, num_tokens_per_expert: int, num_experts: int,
                        expert_alignment: int, rank_prefix_matrix: int, num_tokens: int, row_bytes: int, num_topk: int,
                        num_scales: int, stream: int) -> None:
        """Exchanges counts. Writes rank_prefix_matrix int32[R,R] (inclusive over sources, [src][dst]).

        The four sizes are those of the dispatch that follows: what it would refuse is refused before it is known."""

    def wait_counts(self) -> Tuple[int, List[int]]:
        """After notify_dispatch: (received rows, aligned counts of the local experts)."""

    def dispatch(self, x: int, num_tokens: int, row_bytes: int, scales: int, num_scales: int,
                 scale_stride_token: int, scale_stride_scale: int, topk_idx: int, topk_weights: int, num_topk: int,
                 idx_bytes: int, num_experts: int, is_cached: bool, num_tokens_per_rank: int,
                 num_tokens_per_expert: int, is_token_in_rank: int, rank_prefix_matrix: int, send_head: int,
                 recv_x: int, recv_scales: int, recv_topk_idx: int, recv_topk_weights: int, recv_src_idx: int,
                 num_recv_rows: int, is_worst_case: bool, expert_alignment: int, num_sms: int, stream: int) -> None:
        """Moves the tokens to their rows. Scales are 4-byte elements, strides in elements. `num_recv_rows` is the
        number of rows the recv_* tensors hold; with `is_worst_case` fewer may arrive and the tail of recv_topk_idx is
        filled with -1, of recv_topk_weights with 0.

        `is_cached`: rank_prefix_matrix and send_head are those of an earlier call. Otherwise send_head int32[N,R] is
        written (position of the token among those this rank sends to that rank, -1: not sent). Counts that are not 0:
        no notify_dispatch came before; the call exchanges them itself and writes rank_prefix_matrix.

        `expert_alignment` > 0, where the call exchanges the counts: `num_recv_rows` is a guess, and wait_counts
        follows. Where it returns more rows, nothing has moved: the same call again, as after notify_dispatch."""

    def combine(self, x: int, num_rows: int, hidden: int, topk_weights: int, num_topk: int, bias_0: int, bias_1: int,
                rank_prefix_matrix: int, send_head: int, num_tokens: int, combined_x: int,
                combined_topk_weights: int, num_sms: int, stream: int) -> None:
        """bfloat16 rows; float32 weights [M,K] -> [N,K]."""

    def lend(self, sizes: List[int], stream: int, is_captured: bool) -> List[LentMemory]:
        """Memory for outputs of dispatch or inputs of combine that peers write or read in place, for later work on that
        stream: a piece of each size, or none where there is no room for all. The address tells the operations; all
        outputs of a dispatch are lent, or none. Work of one taker must come after that of the one before it.
        `is_captured`: the pieces belong to the graph."""
    def note_stream(self, stream: int, is_ours: bool) -> None:
        """What is lent may be in use on that stream when it comes back. `is_ours`: by kernels of this Buffer alone."""

    @property
    def num_lend_bytes(self) -> int: ...

    # Low latency (R ranks, El local experts, T = num_max_tokens, K = num_topk). ticket=BOTH_PHASES: the whole call
    # in one launch. ticket=SEND_PHASE: the send phase, which returns the call's ticket; with that ticket and the same
    # arguments the receive phase. At most two calls may be open. Counters live on the device, so a CUDA graph may hold
    # any of them.
    SEND_PHASE: int
    BOTH_PHASES: int

    def low_latency_dispatch(self, ticket: int, num_max_tokens: int, num_topk: int, num_experts: int, hidden: int,
                             is_fp8: bool, rounds_scales: bool, packs_scales: bool, x: int, topk_idx: int,
                             idx_bytes: int, num_tokens: int, recv_x: int, recv_scales: int, recv_count: int,
                             src_info: int, layout_range: int, row_of_entry: int, cumulative_stats: int,
                             wait_stats: int, number: int, stream: int) -> int:
        """recv_x [El, R*T, hidden] bfloat16 or FP8; recv_scales memory order [El, hidden/128 (or /512 packed), R*T];
        recv_count int32 [El]; src_info int32 [El, R*T]; layout_range int64 [El, R]; row_of_entry int32 [R, T, K]
        (flat row of each entry that has its expert here, -1 of the others), kept for combine;
        cumulative_stats int32 [El] or 0; wait_stats int64 [R] or 0, nanoseconds are added; number int64 [1] or, with
        BOTH_PHASES, 0: where the send phase leaves the call's number for the receive phase."""

    def low_latency_combine(self, ticket: int, num_max_tokens: int, num_topk: int, num_experts: int, hidden: int,
                            uses_logfmt: bool, x: int, topk_idx: int, idx_bytes: int, topk_weights: int,
                            num_tokens: int, row_of_entry: int, combined_x: int, wait_stats: int, number: int,
                            stream: int) -> int: ...
    def clean_low_latency(self, stream: int) -> None:
        """A barrier of the group, on the device; no call may be open."""

    @property
    def low_latency_data_ptr(self) -> int: ...
    @property
    def masked_ranks_ptr(self) -> int:
        """int32 [R] on the device; not zero: this rank is left out of low-latency calls."""
