"""An expert-parallel Mixture-of-Experts layer on top of `deep_ep.Buffer`, and the same layer computed on one rank.

    x ──► router ──► dispatch ──► this rank's experts, weighted ──► combine ──► y
            top-k      bfloat16     float32                           bfloat16

Rank r owns the experts [r * E/R, (r + 1) * E/R). `dispatch` brings every token to the ranks that own at least one of
its experts, once per rank; each rank adds up the weighted outputs of its own experts; `combine` brings those partial
sums home and adds them. The library sums without weights, so the weights are applied where the experts are, which is
also why they travel with the tokens: their gradient is born at the experts and comes home with the backward combine.
"""
from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:  # the dense layer, which the tests and the reference use, must work where the library is not built
    import deep_ep

Handle = tuple[Tensor, ...]


# --- Communication with gradients -----------------------------------------------------------------------------------
def _behind(previous: deep_ep.EventOverlap) -> dict[str, Any]:
    """Options of a call on the communication stream, once `previous` is complete; the event that it returns says when
    its outputs are there."""
    return {"previous_event": previous, "async_finish": True, "allocate_on_comm_stream": True}


class _Dispatch(torch.autograd.Function):
    """Forward: dispatch. Backward: combine, for what was sent to several ranks gets the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, buffer: deep_ep.Buffer, x: Tensor, topk_idx: Tensor, topk_weights: Tensor,
                num_experts: int) -> tuple[Tensor, Tensor, Tensor, list[int], Handle]:
        per_rank, per_rdma_rank, per_expert, is_token_in_rank, counted = buffer.get_dispatch_layout(
            topk_idx, num_experts, **_behind(buffer.capture()))
        recv_x, recv_topk_idx, recv_topk_weights, counts, handle, done = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            **_behind(counted))
        done.current_stream_wait()
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)  # a handle is a tuple of tensors, made to be kept this way
        ctx.mark_non_differentiable(recv_topk_idx)
        return recv_x, recv_topk_idx, recv_topk_weights, counts, handle

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        grad_recv_x, _, grad_recv_topk_weights = grads[:3]
        grad_x, grad_topk_weights, done = ctx.buffer.combine(grad_recv_x.contiguous(),
                                                             ctx.saved_tensors,
                                                             topk_weights=grad_recv_topk_weights.contiguous(),
                                                             **_behind(ctx.buffer.capture()))
        done.current_stream_wait()
        return None, grad_x, None, grad_topk_weights, None


class _Combine(torch.autograd.Function):
    """Forward: combine. Backward: dispatch along the routes in the handle, for each summand gets the sum's gradient."""

    @staticmethod
    def forward(ctx: Any, buffer: deep_ep.Buffer, x: Tensor, *handle: Tensor) -> Tensor:
        combined_x, _, done = buffer.combine(x, handle, **_behind(buffer.capture()))
        done.current_stream_wait()
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        return combined_x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        handle = ctx.saved_tensors
        grad_x, _, _, _, _, done = ctx.buffer.dispatch(grads[0].contiguous(),
                                                       handle=handle,
                                                       **_behind(ctx.buffer.capture()))
        done.current_stream_wait()
        return None, grad_x, *(None for _ in handle)


@dataclasses.dataclass
class Received:
    """What dispatch brought to this rank: M rows, grouped by source rank, in token order."""

    x: Tensor  # bfloat16 [M, hidden]
    topk_idx: Tensor  # [M, K], index among this rank's experts; -1: another rank's
    topk_weights: Tensor  # float32 [M, K]; 0 where topk_idx is -1
    num_tokens_per_expert: list[int]  # of this rank's experts
    handle: Handle


def make_buffer(group: dist.ProcessGroup, hidden: int) -> deep_ep.Buffer:
    """A Buffer for bfloat16 tokens of this width. Collective."""
    from deep_ep import Buffer

    num_ranks, row_bytes = group.size(), hidden * torch.bfloat16.itemsize
    configs = Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)
    return Buffer(group,
                  num_nvl_bytes=max(config.get_nvl_buffer_size_hint(row_bytes, num_ranks) for config in configs),
                  num_rdma_bytes=max(config.get_rdma_buffer_size_hint(row_bytes, num_ranks) for config in configs),
                  explicitly_destroy=True)


class Dispatcher:
    """Brings tokens to their experts and back, with gradients. One serves all layers of a model with the same width.

    Both methods are collective, forward and backward: every rank calls them in the same order, also one without tokens.
    """

    def __init__(self, buffer: deep_ep.Buffer) -> None:
        self.buffer, self.num_ranks, self.rank = buffer, buffer.group_size, buffer.rank

    def dispatch(self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, num_experts: int) -> Received:
        """`x` [N, hidden] of any float type (sent as bfloat16); `topk_idx` int64 [N, K] over all experts, -1: none."""
        outputs = _Dispatch.apply(self.buffer, x.to(torch.bfloat16), topk_idx, topk_weights, num_experts)
        return Received(*outputs)

    def combine(self, x: Tensor, handle: Handle) -> Tensor:
        """`x` [M, hidden], a row for each received row (sent as bfloat16); returns bfloat16 [N, hidden], summed."""
        return _Combine.apply(self.buffer, x.to(torch.bfloat16), *handle)

    def destroy(self) -> None:
        """Gives the communication memory back. Call it before the process group is destroyed."""
        self.buffer.destroy()


# --- The parts of the layer, common to both ways of computing it ------------------------------------------------------
class Router(nn.Module):
    """Chooses `num_topk` experts for each token; their probabilities, made to add up to 1, are the weights."""

    def __init__(self, hidden: int, num_experts: int, num_topk: int) -> None:
        super().__init__()
        self.num_topk = num_topk
        self.weight = nn.Parameter(torch.empty(num_experts, hidden))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = functional.linear(x, self.weight).softmax(dim=-1)
        topk_weights, topk_idx = probabilities.topk(self.num_topk, dim=-1)
        return topk_idx, (topk_weights / topk_weights.sum(dim=-1, keepdim=True)).float()


class Expert(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, ffn_hidden: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(ffn_hidden, hidden))
        self.up = nn.Parameter(torch.empty(ffn_hidden, hidden))
        self.down = nn.Parameter(torch.empty(hidden, ffn_hidden))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(
            functional.silu(functional.linear(x, self.gate)) * functional.linear(x, self.up), self.down)


@dataclasses.dataclass
class Groups:
    """(row, k) pairs in the order of their experts, rows ascending within each."""

    rows: Tensor  # int64, which row
    slots: Tensor  # int64, which element of the flattened [M, K] arrays
    counts: list[int]  # pairs per expert


def group_by_expert(topk_idx: Tensor, num_experts: int) -> Groups:
    """Sorts the chosen (row, k) pairs of `topk_idx` [M, K] by expert; -1 chooses nothing."""
    flat = topk_idx.flatten()
    slots = (flat >= 0).nonzero().flatten()
    slots = slots[flat[slots].argsort(stable=True)]
    counts = torch.bincount(flat[slots], minlength=num_experts).tolist()
    return Groups(slots // topk_idx.shape[1], slots, counts)


def run_experts(x: Tensor, topk_idx: Tensor, topk_weights: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    """Weighted sum of each row's experts among `experts`, float32 [M, hidden].

    An expert without rows is run on none all the same: skipping it would cut the graph, so that a rank that received
    nothing would miss the collective calls of the backward pass, for which its peers wait.
    """
    groups = group_by_expert(topk_idx, len(experts))
    inputs = x[groups.rows].float().split(groups.counts)
    weights = topk_weights.flatten()[groups.slots].unsqueeze(1).split(groups.counts)
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert, rows, expert_in, weight in zip(experts, groups.rows.split(groups.counts), inputs, weights):
        # One expert has a row at most once, so that the order of the additions is fixed, on a GPU too.
        out.index_add_(0, rows, expert(expert_in) * weight)
    return out


def make_experts(expert_ids: Sequence[int], hidden: int, ffn_hidden: int) -> nn.ModuleDict:
    """Experts under their global number, so that a parameter has the same name however the experts are spread."""
    return nn.ModuleDict({str(i): Expert(hidden, ffn_hidden) for i in expert_ids})


@torch.no_grad()
def init_parameters(module: nn.Module, seed: int) -> None:
    """Fills each parameter from its name and `seed` alone: equal on every rank that has it. Norms (1-D) start at 1."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        values = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1]**-0.5
        parameter.copy_(values)


def is_expert_parameter(name: str) -> bool:
    """Whether the named parameter lives on one rank only; all others are replicated, their gradients summed."""
    return ".experts." in f".{name}"


# --- The two layers -------------------------------------------------------------------------------------------------
class ExpertParallelMoE(nn.Module):
    """A MoE layer whose experts are spread over the ranks of a `Dispatcher`. Input and output: [N, hidden]."""

    def __init__(self, dispatcher: Dispatcher, hidden: int, ffn_hidden: int, num_experts: int, num_topk: int) -> None:
        super().__init__()
        assert num_experts % dispatcher.num_ranks == 0, f"{num_experts} experts over {dispatcher.num_ranks} ranks"
        num_local = num_experts // dispatcher.num_ranks
        first = dispatcher.rank * num_local
        self.dispatcher, self.num_experts = dispatcher, num_experts
        self.router = Router(hidden, num_experts, num_topk)
        self.experts = make_experts(range(first, first + num_local), hidden, ffn_hidden)

    def forward(self, x: Tensor) -> Tensor:
        topk_idx, topk_weights = self.router(x)
        received = self.dispatcher.dispatch(x, topk_idx, topk_weights, self.num_experts)
        partial = run_experts(received.x, received.topk_idx, received.topk_weights, list(self.experts.values()))
        return self.dispatcher.combine(partial, received.handle).to(x.dtype)


class DenseMoE(nn.Module):
    """The same layer with all experts in one process, without the library.

    It rounds where the wire of `num_ranks` ranks would: tokens, per-rank partial sums and the two gradients that travel
    are bfloat16, everything else is float32. Per-rank sums are added in rank order, and every other node's sum is
    rounded as it comes. What is left to differ are float32 sums of another length or order, see `docs/training.md`.
    """

    def __init__(self,
                 num_ranks: int,
                 hidden: int,
                 ffn_hidden: int,
                 num_experts: int,
                 num_topk: int,
                 ranks_per_node: int | None = None) -> None:
        super().__init__()
        assert num_experts % num_ranks == 0, f"{num_experts} experts over {num_ranks} ranks"
        self.num_ranks, self.num_experts = num_ranks, num_experts
        self.wire = _Wire(ranks_per_node or num_ranks, num_owners=num_ranks)
        self.router = Router(hidden, num_experts, num_topk)
        self.experts = make_experts(range(num_experts), hidden, ffn_hidden)

    def forward(self, x: Tensor) -> Tensor:
        topk_idx, topk_weights = self.router(x)
        experts, num_local = list(self.experts.values()), self.num_experts // self.num_ranks
        partials = []
        for rank, sent in enumerate(_SendToAll.apply(x, self.num_ranks, self.wire)):
            first = rank * num_local
            is_local = (topk_idx >= first) & (topk_idx < first + num_local)
            local_idx = torch.where(is_local, topk_idx - first, -1)
            partials.append(run_experts(sent, local_idx, topk_weights, experts[first:first + num_local]))
        return _SumOfAll.apply(self.wire, *partials).to(x.dtype)


@dataclasses.dataclass
class _Wire:
    """How combine adds."""

    ranks_per_node: int
    num_owners: int  # ranks whose tokens these are: in equal shares, in rank order

    def combine(self, summands: Sequence[Tensor]) -> Tensor:
        """bfloat16 [N, hidden] of each rank, added as the owner of each token does it."""
        shares = zip(*(summand.to(torch.bfloat16).tensor_split(self.num_owners) for summand in summands))
        return torch.cat([self._add(share, owner // self.ranks_per_node) for owner, share in enumerate(shares)])

    def _add(self, summands: Sequence[Tensor], own_node: int) -> Tensor:
        """As float32: the own node's in rank order, then each other node's sum, rounded before; rounded once."""
        size = self.ranks_per_node
        nodes = [summands[first:first + size] for first in range(0, len(summands), size)]
        total = torch.zeros(summands[0].shape, device=summands[0].device)
        for summand in nodes[own_node]:
            total += summand
        for node, of_node in enumerate(nodes):
            if node != own_node:
                total += sum(of_node, torch.zeros_like(total)).to(torch.bfloat16)
        return total.to(torch.bfloat16)


class _SendToAll(torch.autograd.Function):
    """The roundings of dispatch and of its backward pass, without communication."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_ranks: int, wire: _Wire) -> tuple[Tensor, ...]:
        ctx.dtype, ctx.wire = x.dtype, wire
        return tuple(x.to(torch.bfloat16, copy=True) for _ in range(num_ranks))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return ctx.wire.combine(grads).to(ctx.dtype), None, None


class _SumOfAll(torch.autograd.Function):
    """The roundings of combine and of its backward pass, without communication."""

    @staticmethod
    def forward(ctx: Any, wire: _Wire, *partials: Tensor) -> Tensor:
        ctx.num_ranks = len(partials)
        return wire.combine(partials)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, *[grads[0].float()] * ctx.num_ranks
