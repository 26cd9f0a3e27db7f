"""The helpers of examples/: grouping, the dense layer against a plain loop, gradients through a one-rank Buffer."""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import expert_parallel as ep  # noqa: E402

HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK = 32, 48, 8, 3


class OneRankBuffer:
    """What `deep_ep.Buffer` does in a group of one: copies rows with an expert, in order. Handle: (row numbers, N)."""

    group_size, rank = 1, 0

    class _Done:

        def current_stream_wait(self) -> None:
            """There is no stream."""

    def capture(self) -> _Done:
        return self._Done()

    def get_dispatch_layout(self, topk_idx: torch.Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
        is_sent = (topk_idx >= 0).any(dim=1, keepdim=True)
        counts = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return is_sent.sum(dim=0), None, counts, is_sent, self._Done()

    def dispatch(self,
                 x: torch.Tensor,
                 handle: Any = None,
                 is_token_in_rank: Any = None,
                 num_tokens_per_expert: Any = None,
                 topk_idx: Any = None,
                 topk_weights: Any = None,
                 **_: Any) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        if handle is not None:
            assert isinstance(handle, tuple)
            return x[handle[0]], None, None, None, None, self._Done()
        rows = is_token_in_rank[:, 0].nonzero().flatten()
        counts = num_tokens_per_expert.tolist()
        handle = rows, torch.tensor(len(x))
        return x[rows], topk_idx[rows], topk_weights[rows], counts, handle, self._Done()

    def combine(self, x: torch.Tensor, handle: Any, topk_weights: Any = None, **_: Any) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()

        def place(values: torch.Tensor) -> torch.Tensor:
            return values.new_zeros(int(handle[1]), values.shape[1]).index_copy(0, handle[0], values)

        return place(x), None if topk_weights is None else place(topk_weights), self._Done()


def make_inputs(num_tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (torch.randn(num_tokens, HIDDEN, generator=generator) for _ in range(2))
    return x.requires_grad_(), grad_y


def make_dense(num_ranks: int) -> ep.DenseMoE:
    layer = ep.DenseMoE(num_ranks, HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK)
    ep.init_parameters(layer, seed=3)
    return layer


def run_loop(layer: ep.DenseMoE, x: torch.Tensor) -> torch.Tensor:
    """The layer as its definition reads, token by token, without any rounding."""
    topk_idx, topk_weights = layer.router(x)
    return torch.stack([
        sum(weight * layer.experts[str(int(i))](row) for i, weight in zip(chosen, weights))
        for row, chosen, weights in zip(x, topk_idx, topk_weights)
    ])


def relative_norm(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def test_group_by_expert_sorts_pairs_and_keeps_row_order() -> None:
    topk_idx = torch.tensor([[2, -1], [0, 2], [-1, -1], [2, 0]])
    groups = ep.group_by_expert(topk_idx, num_experts=4)
    assert groups.counts == [2, 0, 3, 0]
    assert groups.rows.tolist() == [1, 3, 0, 1, 3]
    assert topk_idx.flatten()[groups.slots].tolist() == [0, 0, 2, 2, 2]


@pytest.mark.parametrize("topk_idx", [torch.empty(0, 2, dtype=torch.int64), torch.full((3, 2), -1)])
def test_group_by_expert_without_choices(topk_idx: torch.Tensor) -> None:
    groups = ep.group_by_expert(topk_idx, num_experts=2)
    assert groups.counts == [0, 0]
    assert groups.rows.numel() == groups.slots.numel() == 0


def test_run_experts_leaves_rows_without_local_experts_zero() -> None:
    experts = list(make_dense(1).experts.values())
    out = ep.run_experts(torch.randn(2, HIDDEN), torch.tensor([[-1, -1], [1, -1]]), torch.ones(2, 2), experts)
    assert not out[0].any()
    assert out[1].any()


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_dense_layer_equals_a_loop_but_for_bfloat16(num_ranks: int) -> None:
    layer = make_dense(num_ranks)
    results = []
    for run in layer, lambda x: run_loop(layer, x):
        layer.zero_grad()
        x, grad_y = make_inputs()
        y = run(x)
        y.backward(grad_y)
        results.append({"y": y.detach(), "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}})
    for name, expected in results[1].items():
        # Each rounding to bfloat16 is off by 2**-9 at most. Gradients of the router are differences of such numbers.
        assert relative_norm(results[0][name], expected) < (2e-2 if "router" in name else 5e-3), name


def test_dense_layer_reports_and_receives_bfloat16_only() -> None:
    x, _ = make_inputs()
    layer = make_dense(4)
    y = layer(x)
    y.backward(torch.full_like(y, 1 / 3))
    assert torch.equal(y, y.to(torch.bfloat16).float())
    rounded = layer(x.detach().to(torch.bfloat16).float())  # same tokens on the wire; the router sees others
    assert relative_norm(rounded, y) < 2e-2


def test_one_rank_through_the_buffer_is_bitwise_the_dense_layer() -> None:
    dense = make_dense(1)
    spread = ep.ExpertParallelMoE(ep.Dispatcher(OneRankBuffer()), HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK)
    ep.init_parameters(spread, seed=3)
    results = []
    for layer in dense, spread:
        x, grad_y = make_inputs()
        y = layer(x)
        y.backward(grad_y)
        results.append({"y": y, "x": x.grad, **{name: p.grad for name, p in layer.named_parameters()}})
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_dropped_tokens_get_zeros_and_no_gradient() -> None:
    dispatcher = ep.Dispatcher(OneRankBuffer())
    x, grad_y = make_inputs(4)
    topk_idx = torch.tensor([[0, 1], [-1, -1], [2, -1], [-1, 3]])
    topk_weights = torch.full((4, 2), 0.5, requires_grad=True)
    received = dispatcher.dispatch(x, topk_idx, topk_weights, num_experts=4)
    y = dispatcher.combine(received.x.float() * received.topk_weights.sum(dim=1, keepdim=True), received.handle)
    y.backward(grad_y.to(torch.bfloat16))
    assert received.x.shape[0] == 3
    assert not y[1].any()
    assert not x.grad[1].any()
    assert not topk_weights.grad[1].any()
    assert topk_weights.grad[0].all()


def test_no_tokens_still_reach_every_parameter_with_a_zero_gradient() -> None:
    layer = ep.ExpertParallelMoE(ep.Dispatcher(OneRankBuffer()), HIDDEN, FFN_HIDDEN, NUM_EXPERTS, NUM_TOPK)
    ep.init_parameters(layer, seed=3)
    x, grad_y = make_inputs(0)
    layer(x).backward(grad_y)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, f"{name}: a rank without tokens would skip a collective backward call"
        assert not parameter.grad.any()


def test_parameters_depend_on_name_and_seed_alone() -> None:
    whole = make_dense(2)
    part = ep.make_experts([5], HIDDEN, FFN_HIDDEN)
    holder = torch.nn.Module()
    holder.experts = part
    ep.init_parameters(holder, seed=3)
    assert torch.equal(holder.experts["5"].gate, whole.experts["5"].gate)
    assert not torch.equal(whole.experts["4"].gate, whole.experts["5"].gate)


def test_expert_parameters_are_told_from_replicated_ones() -> None:
    names = [name for name, _ in make_dense(1).named_parameters() if not ep.is_expert_parameter(name)]
    assert names == ["router.weight"]
    assert ep.is_expert_parameter("blocks.0.moe.experts.3.up")
    assert not ep.is_expert_parameter("blocks.0.moe.router.weight")
