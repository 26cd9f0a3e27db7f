"""Low-latency dispatch and combine, one token at a time. Checked by hand in tests/unit/test_reference.py."""

from dataclasses import dataclass
from typing import Callable, Optional

import torch

from reference.moe import Sent

GROUP = 128  # channels with one scale
FP8_MAX = torch.tensor(448.0)  # number / tensor would round twice
SMALLEST_AMAX = 1e-4  # a group of zeros is not divided by zero

Row = tuple[int, int]  # (source rank, token at the source)


@dataclass
class ExpertRows:
    """What one local expert gets."""

    rows: list[Row]
    x: torch.Tensor  # [len(rows), hidden], bfloat16 or FP8
    scales: Optional[torch.Tensor]  # [len(rows), hidden / 128], or packed / 512
    layout_range: torch.Tensor  # int64 [R]


@dataclass(frozen=True)
class Cast:
    """How rows travel in a dispatch."""

    use_fp8: bool = False
    round_scale: bool = False
    use_ue8m0: bool = False

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, Optional[torch.Tensor]]:
        if not self.use_fp8:
            return x, None
        groups = x.float().reshape(x.shape[0], x.shape[1] // GROUP, GROUP)
        amax = groups.abs().amax(2, keepdim=True).clamp(min=SMALLEST_AMAX)
        scales, inverse = amax / FP8_MAX, FP8_MAX / amax
        if self.round_scale:
            scales = torch.exp2(torch.ceil(torch.log2(scales.double()))).float()
            inverse = torch.reciprocal(scales)
        rows = (groups * inverse).to(torch.float8_e4m3fn).reshape(x.shape)
        scales = scales.squeeze(2)
        if not self.use_ue8m0:
            return rows, scales
        exponents = (scales.view(torch.int32) >> 23).reshape(x.shape[0], x.shape[1] // GROUP // 4, 4)
        return rows, (exponents << torch.tensor([0, 8, 16, 24], dtype=torch.int32)).sum(2).to(torch.int32)


def logfmt(part: torch.Tensor) -> torch.Tensor:
    """What arrives of a float32 row that is sent in the logarithmic format: ten bits a channel, a scale per 128."""
    return torch.cat([_logfmt_group(group) for group in part.split(GROUP)])


def _logfmt_group(group: torch.Tensor) -> torch.Tensor:
    """A step is even in the bits of the float, which are its logarithm, drawn straight between powers of two."""
    size = group.abs().view(torch.int32).long()
    octave, infinity = 1 << 23, 0x7f800000
    counted = size[(size > 0) & (size < infinity)]
    if counted.numel() == 0:
        return torch.where(size >= infinity, torch.nan, group)
    highest = int(counted.max())
    lowest = max(int(counted.min()), highest - 12 * octave)
    step = max(1, -(-(highest - lowest) // 509))
    nearest = lowest + (size - lowest + step // 2).div(step, rounding_mode="floor") * step
    nearest = torch.where(size < lowest, torch.where(size + octave < lowest, 0, lowest), nearest)
    nearest = torch.where(size == 0, 0, nearest).clamp(max=infinity - 1)
    got = torch.copysign(nearest.to(torch.int32).view(torch.float32), group)
    return torch.where(size >= infinity, torch.nan, got)


def low_latency_dispatch(sent: list[Sent], rank: int, num_experts: int, cast: Cast) -> list[ExpertRows]:
    """What each local expert of `rank` receives when rank i sends `sent[i]`: by source rank, then by token."""
    num_local = num_experts // len(sent)
    return [_rows_of_expert(sent, rank * num_local + local, cast) for local in range(num_local)]


def _rows_of_expert(sent: list[Sent], expert: int, cast: Cast) -> ExpertRows:
    rows: list[Row] = []
    ranges = []
    for source, one in enumerate(sent):
        found = [token for token, experts in enumerate(one.topk_idx.tolist()) if expert in experts]
        ranges.append(len(rows) << 32 | len(found))
        rows += [(source, token) for token in found]
    x = torch.empty((len(rows), sent[0].x.shape[1]), dtype=sent[0].x.dtype)
    for i, (source, token) in enumerate(rows):
        x[i] = sent[source].x[token]
    return ExpertRows(rows, *cast(x), torch.tensor(ranges, dtype=torch.int64))


def multiply_add(total: torch.Tensor, weight: float, row: torch.Tensor, is_fused: bool) -> torch.Tensor:
    """float32. `is_fused`: rounded once, as a GPU does it; else the product is rounded too."""
    if is_fused:
        return (total.double() + weight * row.double()).float()
    return total + torch.tensor(weight, dtype=torch.float32) * row.float()


def low_latency_combine(answers: list[list[torch.Tensor]],
                        arrivals: list[list[ExpertRows]],
                        sent: Sent,
                        rank: int,
                        is_fused: bool = False,
                        wire: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.bfloat16) -> torch.Tensor:
    """What `rank` gets back for `sent` when expert e of rank r answers `answers[r][e]` to `arrivals[r][e]`.

    Each rank sums what its experts have for a token, and sends that through `wire`; the owner sums the parts.
    """
    parts = low_latency_parts(answers, arrivals, sent, rank, is_fused)
    combined = torch.zeros((len(parts), sent.x.shape[1]), dtype=torch.float32)
    for token, of_ranks in enumerate(parts):
        for part in of_ranks:
            combined[token] += wire(part).float()
    return combined.bfloat16()


def low_latency_parts(answers: list[list[torch.Tensor]],
                      arrivals: list[list[ExpertRows]],
                      sent: Sent,
                      rank: int,
                      is_fused: bool = False) -> list[list[torch.Tensor]]:
    """For every token the float32 sums of the ranks that have experts for it, in rank order."""
    weights = sent.topk_weights
    assert weights is not None
    places = [[{row: i for i, row in enumerate(expert.rows)} for expert in experts] for experts in arrivals]
    num_local = len(arrivals[0])
    parts: list[list[torch.Tensor]] = []
    for token, experts in enumerate(sent.topk_idx.tolist()):
        of_ranks: dict[int, torch.Tensor] = {}
        for k, expert in enumerate(experts):
            if not 0 <= expert < num_local * len(arrivals):
                continue
            worker, local = divmod(expert, num_local)
            row = answers[worker][local][places[worker][local][rank, token]]
            total = of_ranks.get(worker, torch.zeros(row.shape, dtype=torch.float32))
            of_ranks[worker] = multiply_add(total, float(weights[token, k]), row, is_fused)
        parts.append([of_ranks[worker] for worker in sorted(of_ranks)])
    return parts
