"""What all low-latency calls of one shape and format have in common: checked and worked out once."""

from typing import Any, NamedTuple, Optional

import torch

from deep_ep import _checks
from deep_ep._memory import EmptyTensors
from deep_ep_cpp import LowLatencyCombineArgs, LowLatencyDispatchArgs

MAX_TOKENS = 4096  # of one rank in one call; csrc/layout/low_latency.h
MAX_EXPERTS = 16384  # csrc/kernels/params_low_latency.h
BF16_ALIGNMENT = 8  # channels in 16 bytes
SCALE_GROUP = 128  # channels with one FP8 scale
PACKED_GROUP = 4 * SCALE_GROUP  # channels with one word of UE8M0 scales
INT32_BYTES = 4


class Shape(NamedTuple):
    """What every native call begins with."""

    num_max_tokens: int
    num_topk: int
    num_experts: int
    hidden: int


class Format(NamedTuple):
    """How rows travel in a dispatch."""

    use_fp8: bool
    round_scale: bool
    use_ue8m0: bool

    def check(self, hidden: int) -> None:
        if self.use_ue8m0 and not (self.round_scale and self.use_fp8):
            raise ValueError("use_ue8m0 needs use_fp8=True and round_scale=True: it packs exponents, and only then are "
                             f"the scales powers of two; got use_fp8={self.use_fp8}, round_scale={self.round_scale}")
        unit = PACKED_GROUP if self.use_ue8m0 else SCALE_GROUP if self.use_fp8 else BF16_ALIGNMENT
        if hidden <= 0 or hidden % unit:
            kind = "use_ue8m0" if self.use_ue8m0 else "use_fp8" if self.use_fp8 else "bfloat16 rows"
            raise ValueError(f"x must have a hidden size of a positive multiple of {unit} with {kind}, got {hidden}")


PLAIN = Format(use_fp8=False, round_scale=False, use_ue8m0=False)


def check_max_tokens(value: Any) -> int:
    return _checks.check_int("num_max_dispatch_tokens_per_rank", value, 1, maximum=MAX_TOKENS)


def check_num_experts(name: str, value: Any, num_ranks: int) -> int:
    return _checks.check_num_experts(name, _checks.check_int(name, value, 1, maximum=MAX_EXPERTS), num_ranks)


# recv_x; scales, if there are any; src_info; layout_range; recv_count
DispatchOutputs = tuple[torch.Tensor, Optional[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]


class Plan:
    """Sizes of the tensors of a call, and records with the arguments that are the same in every call of its kind.

    R ranks, El experts on each, T tokens of a rank at most, K experts of a token. One allocation holds four things,
    because each allocation costs the host more than a view: src_info, int32 [El, R * T], the index of the row's token
    at its source; row_of_entry, int32 [R, T, K], the row of each top-k entry that has its expert here, which only
    combine needs; recv_count, int32 [El]; the number of the call, int64, which its receive phase needs.
    """

    __slots__ = ("_count_at", "_empty", "_has_scales", "_index_shapes", "_num_words", "_recv_dtype", "_scale_dtype",
                 "_scale_shape", "combine_args", "dispatch_args", "entries_at", "expert_rows", "handle_tail", "hidden",
                 "num_bytes_behind_src_info", "num_local", "num_max_tokens", "num_topk", "number_at")

    def __init__(self, shape: Shape, form: Format, num_ranks: int, empty: EmptyTensors) -> None:
        form.check(shape.hidden)
        self.num_max_tokens, self.num_topk, num_experts, self.hidden = shape
        self.num_local = num_local = num_experts // num_ranks
        num_rows = num_ranks * shape.num_max_tokens
        self.expert_rows = (num_local, num_rows, shape.hidden)
        self.handle_tail = (shape.num_max_tokens, shape.hidden, num_experts)
        self.dispatch_args = LowLatencyDispatchArgs(**shape._asdict(),
                                                    is_fp8=form.use_fp8,
                                                    rounds_scales=form.round_scale,
                                                    packs_scales=form.use_ue8m0)
        self.combine_args = LowLatencyCombineArgs(**shape._asdict())
        self._empty = empty
        self._recv_dtype = torch.float8_e4m3fn if form.use_fp8 else torch.bfloat16
        self._has_scales = form.use_fp8
        num_scales = shape.hidden // (PACKED_GROUP if form.use_ue8m0 else SCALE_GROUP)
        self._scale_shape = (num_local, num_rows, num_scales), (num_scales * num_rows, 1, num_rows)  # with strides
        self._scale_dtype = torch.int32 if form.use_ue8m0 else torch.float32
        self._index_shapes = (num_local, num_rows), (num_rows, 1), (num_local, num_ranks)
        num_indices, num_entries = num_local * num_rows, num_rows * shape.num_topk
        self._count_at = num_indices + num_entries
        end = self._count_at + num_local
        self._num_words = end + 3  # the number's two, one of which may have to be skipped to align them
        self.entries_at = num_indices * INT32_BYTES
        self.number_at = (end + 1) // 2 * 2 * INT32_BYTES
        self.num_bytes_behind_src_info = (self._num_words - num_indices) * INT32_BYTES

    def make_outputs(self) -> DispatchOutputs:
        empty, (num_local, num_rows, hidden) = self._empty, self.expert_rows
        recv_x, scales = empty[self._recv_dtype](num_local, num_rows, hidden), None
        if self._has_scales:
            scales = torch.empty_strided(*self._scale_shape, dtype=self._scale_dtype, device=empty.device)
        words = empty[torch.int32](self._num_words)
        shape, strides, (_, num_ranks) = self._index_shapes
        layout_range = empty[torch.int64](num_local, num_ranks)
        return recv_x, scales, words.as_strided(shape,
                                                strides), layout_range, words[self._count_at:self._count_at + num_local]
