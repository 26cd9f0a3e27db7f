"""Every bad argument of a low-latency call is refused with an error that names it, before anything is launched."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from single_rank import single_rank_buffer
from utils import device

import deep_ep
from deep_ep import Buffer

BF16, FP8, I32, I64, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.int64, torch.float32
NUM_BYTES = 1 << 20


def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device())


def ones(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device())


def single_rank_low_latency(**options: Any) -> Buffer:
    return single_rank_buffer(0, **{"num_rdma_bytes": NUM_BYTES, "low_latency_mode": True, **options})


@pytest.fixture(scope="module")
def buffer() -> Iterator[Buffer]:
    with single_rank_low_latency() as made:
        yield made


def dispatch(buffer: Buffer, **options: Any) -> Any:
    """5 tokens of ones among 4 experts, top-2, with options changed or added."""
    topk_idx = torch.arange(10, device=device()).reshape(5, 2) % 4
    return buffer.low_latency_dispatch(
        **{
            "x": ones(5, 512),
            "topk_idx": topk_idx,
            "num_max_dispatch_tokens_per_rank": 8,
            "num_experts": 4,
            "use_fp8": False,
            **options
        })


def combine(buffer: Buffer, handle: Any, **options: Any) -> Any:
    topk_idx = torch.arange(10, device=device()).reshape(5, 2) % 4
    return buffer.low_latency_combine(**{
        "x": ones(4, 8, 512),
        "topk_idx": topk_idx,
        "topk_weights": ones(5, 2, dtype=F32),
        "handle": handle,
        **options
    })


def case(name: str, make: Any, error: type[Exception], *parts: str) -> Any:
    return pytest.param(name, make, error, parts, id=f"{name}-{parts[0] if parts else 'bad'}")


def misaligned(*shape: int) -> torch.Tensor:
    return zeros(torch.Size(shape).numel() + 1, dtype=BF16)[1:].view(shape)


TOKENS = "num_max_dispatch_tokens_per_rank"
BAD_DISPATCH = [
    case("x", lambda: 3, TypeError, "torch.Tensor", "int"),
    case("x", lambda: zeros(5, 512), TypeError, "bfloat16", "float32"),
    case("x", lambda: ones(9, 512), ValueError, "at most", TOKENS, "(8)", "got 9"),
    case("x", lambda: ones(5, 12), ValueError, "16 bytes", "24 bytes"),
    case("x", lambda: ones(5, 0), ValueError, "positive multiple"),
    case("x", lambda: ones(512, 5).t(), ValueError, "contiguous"),
    case("x", lambda: misaligned(5, 512), ValueError, "start at a multiple of 16"),
    case("topk_idx", lambda: zeros(5, 2), TypeError, "int64 or int32"),
    case("topk_idx", lambda: zeros(4, 2, dtype=I64), ValueError, "[5, *]"),
    case("topk_idx", lambda: zeros(5, 0, dtype=I64), ValueError, "at least one column"),
    case(TOKENS, lambda: 0, ValueError, "at least 1"),
    case(TOKENS, lambda: 4097, ValueError, "at most 4096"),
    case(TOKENS, lambda: 8.0, TypeError, "int", "float"),
    case("num_experts", lambda: 0, ValueError, "at least 1"),
    case("num_experts", lambda: "4", TypeError, "int"),
    case("num_experts", lambda: 1 << 40, ValueError, "at most 16384"),
    case("cumulative_local_expert_recv_stats", lambda: zeros(4), TypeError, "int32"),
    case("cumulative_local_expert_recv_stats", lambda: zeros(3, dtype=I32), ValueError, "[4]", "[3]"),
    case("dispatch_wait_recv_cost_stats", lambda: zeros(1, dtype=I32), TypeError, "int64"),
    case("dispatch_wait_recv_cost_stats", lambda: zeros(4, dtype=I64), ValueError, "[1]", "[4]"),
]


@pytest.mark.parametrize(("name", "make", "error", "parts"), BAD_DISPATCH)
def test_dispatch(buffer: Buffer, name: str, make: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        dispatch(buffer, **{name: make()})
    assert all(part in str(caught.value) for part in (name, *parts)), caught.value


@pytest.mark.parametrize(("hidden", "options", "parts"), [
    (520, {"use_fp8": True}, ("128", "use_fp8", "got 520")),
    (640, {"use_fp8": True, "round_scale": True, "use_ue8m0": True}, ("512", "use_ue8m0", "got 640")),
    (512, {"use_fp8": True, "use_ue8m0": True}, ("round_scale=True", "round_scale=False")),
    (512, {"round_scale": True, "use_ue8m0": True}, ("use_fp8=True", "use_fp8=False")),
])  # yapf: disable
def test_fp8_options(buffer: Buffer, hidden: int, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"x must have a hidden|use_ue8m0 needs") as caught:
        dispatch(buffer, x=ones(5, hidden), **options)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_too_small_buffer_says_what_is_needed(buffer: Buffer) -> None:
    with pytest.raises(ValueError, match=r"num_rdma_bytes is too small for this call: expected at least [0-9]+, got"):
        dispatch(buffer, num_max_dispatch_tokens_per_rank=4096)


def test_hint_is_enough(buffer: Buffer) -> None:
    hint = Buffer.get_low_latency_rdma_size_hint(8, 512, 1, 4)
    assert hint % 128 == 0
    with single_rank_low_latency(num_rdma_bytes=hint) as small:
        combine(small, dispatch(small)[2])


@pytest.mark.parametrize(("arguments", "name"), [((0, 512, 1, 4), TOKENS), ((8, 100, 1, 4), "hidden"),
                                                 ((8, 512, 0, 4), "num_ranks"), ((8, 512, 3, 4), "num_experts")])
def test_hint(arguments: tuple[int, ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Buffer.get_low_latency_rdma_size_hint(*arguments)


def test_hints_are_at_most_half_of_the_original_s() -> None:
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 8, 288) <= 2146961792 // 2
    assert Buffer.get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank=64,
                                                 hidden=2560,
                                                 num_ranks=2,
                                                 num_experts=32) <= 42598784 // 2


BAD_COMBINE = [
    case("x", lambda: zeros(4, 8, 512), TypeError, "bfloat16", "float32"),
    case("x", lambda: ones(4, 7, 512), ValueError, "[4, 8, 512]", "[4, 7, 512]"),
    case("x", lambda: ones(4, 512, 8).transpose(1, 2), ValueError, "contiguous"),
    case("x", lambda: misaligned(4, 8, 512), ValueError, "start at a multiple of 16"),
    case("topk_idx", lambda: zeros(5, 2), TypeError, "int64 or int32"),
    case("topk_idx", lambda: zeros(9, 2, dtype=I64), ValueError, "at most", "(8)", "got 9"),
    case("topk_weights", lambda: ones(5, 2), TypeError, "float32", "bfloat16"),
    case("topk_weights", lambda: zeros(5, 3), ValueError, "[5, 2]", "[5, 3]"),
    case("handle", lambda: None, TypeError, "low_latency_dispatch", "NoneType"),
    case("handle", lambda: (1, 2, 3), ValueError, "5 elements", "got 3"),
    case("handle[0]", lambda: (zeros(4, 8), zeros(4, 1), 8, 512, 4), TypeError, "int32"),
    case("handle[0]", lambda: (zeros(4, 7, dtype=I32), zeros(4, 1), 8, 512, 4), ValueError, "[4, 8]"),
    case("handle[0]", lambda: (zeros(4, 8, dtype=I32), zeros(4, 1), 8, 512, 4), ValueError, "not a copy", "92 bytes"),
    case("out", lambda: zeros(5, 512), TypeError, "bfloat16"),
    case("out", lambda: ones(4, 512), ValueError, "[5, 512]"),
    case("out", lambda: ones(5, 1024)[:, ::2], ValueError, "contiguous"),
    case("combine_wait_recv_cost_stats", lambda: zeros(1, dtype=I32), TypeError, "int64"),
]


@pytest.mark.parametrize(("name", "make", "error", "parts"), BAD_COMBINE)
def test_combine(buffer: Buffer, name: str, make: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    handle = dispatch(buffer)[2]
    with pytest.raises(error) as caught:
        combine(buffer, **{"handle": handle, name.partition("[")[0]: make()})
    assert all(part in str(caught.value) for part in (name, *parts)), caught.value


def test_combine_wants_the_top_k_of_the_dispatch(buffer: Buffer) -> None:
    with pytest.raises(ValueError, match="topk_idx of 3 columns"):
        combine(buffer, dispatch(buffer)[2], topk_idx=zeros(5, 3, dtype=I64), topk_weights=zeros(5, 3))


def test_handle_may_be_a_list_and_outlive_other_calls(buffer: Buffer) -> None:
    handle = list(dispatch(buffer)[2])
    dispatch(buffer, x=ones(2, 512), topk_idx=zeros(2, 2, dtype=I64))
    assert (combine(buffer, handle)[0] == 2).all()


@pytest.mark.parametrize("bad", [{TOKENS: 8.0}, {"num_experts": 4.0}])
def test_a_shape_that_was_good_does_not_vouch_for_its_like(buffer: Buffer, bad: dict[str, Any]) -> None:
    dispatch(buffer)
    with pytest.raises(TypeError, match=f"{next(iter(bad))} must be an int, got float"):
        dispatch(buffer, **bad)


@pytest.mark.parametrize(("place", "value", "part"), [(2, 4, "src_info"), (3, 1024, "x"), (4, 8, "src_info")])
def test_a_known_handle_does_not_vouch_for_other_numbers(buffer: Buffer, place: int, value: Any, part: str) -> None:
    handle = list(dispatch(buffer)[2])
    combine(buffer, handle)
    handle[place] = value
    with pytest.raises((TypeError, ValueError), match=part):
        combine(buffer, handle)


@pytest.mark.parametrize("call", [
    lambda b: dispatch(b, async_finish=True, return_recv_hook=True),
    lambda b: combine(b, dispatch(b)[2], async_finish=True, return_recv_hook=True),
])
def test_event_and_hook_exclude_each_other(buffer: Buffer, call: Any) -> None:
    with pytest.raises(RuntimeError, match="async_finish and return_recv_hook exclude"):
        call(buffer)


def test_zero_copy(buffer: Buffer) -> None:
    handle = dispatch(buffer)[2]
    with pytest.raises(RuntimeError, match="use_logfmt and zero_copy exclude"):
        combine(buffer, handle, zero_copy=True, use_logfmt=True)
    with pytest.raises(RuntimeError, match="get_next_low_latency_combine_buffer"):
        combine(buffer, handle, zero_copy=True)
    lent = buffer.get_next_low_latency_combine_buffer(handle)
    assert (list(lent.shape), lent.dtype) == ([4, 8, 512], BF16)
    assert buffer.get_next_low_latency_combine_buffer(handle) is lent
    lent.fill_(3)
    assert (combine(buffer, handle, zero_copy=True)[0] == 6).all()
    assert buffer.get_next_low_latency_combine_buffer(handle) is not lent


CALLS = [
    dispatch,
    lambda b: combine(b, (zeros(4, 8, dtype=I32), None, 8, 512, 4)),
    lambda b: b.clean_low_latency_buffer(8, 512, 4),
    lambda b: b.get_next_low_latency_combine_buffer(()),
    lambda b: b.low_latency_update_mask_buffer(0),
    lambda b: b.low_latency_query_mask_buffer(zeros(1, dtype=I32)),
    lambda b: b.low_latency_clean_mask_buffer(),
]


@pytest.mark.parametrize("call", CALLS)
def test_needs_low_latency_mode(call: Any) -> None:
    with single_rank_buffer(1 << 12, num_rdma_bytes=NUM_BYTES) as other, pytest.raises(RuntimeError,
                                                                                       match="low_latency_mode"):
        call(other)


@pytest.mark.parametrize("call", CALLS[4:])
def test_masks_need_enable_shrink(buffer: Buffer, call: Any) -> None:
    with pytest.raises(RuntimeError, match="enable_shrink"):
        call(buffer)


def test_masks() -> None:
    with single_rank_low_latency(enable_shrink=True) as shrinkable:
        status = zeros(1, dtype=I32)
        shrinkable.low_latency_update_mask_buffer(0, True)
        shrinkable.low_latency_query_mask_buffer(status)
        assert status.tolist() == [1]
        assert dispatch(shrinkable)[1].tolist() == [0, 0, 0, 0]
        shrinkable.low_latency_update_mask_buffer(0)
        shrinkable.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0]
        assert dispatch(shrinkable)[1].tolist() == [3, 3, 2, 2]
        for bad, error in ((-1, ValueError), (1, ValueError), ("0", TypeError)):
            with pytest.raises(error, match="rank_to_mask"):
                shrinkable.low_latency_update_mask_buffer(bad, True)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="mask_status must have dtype int32"):
            shrinkable.low_latency_query_mask_buffer(zeros(1))
        with pytest.raises(ValueError, match="mask_status must have shape"):
            shrinkable.low_latency_query_mask_buffer(zeros(2, dtype=I32))


@pytest.mark.parametrize(("arguments", "name"), [((0, 512, 4), TOKENS), ((8, -8, 4), "hidden"),
                                                 ((8, 512, 0), "num_exp")])
def test_clean_checks_its_arguments(buffer: Buffer, arguments: tuple[int, ...], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        buffer.clean_low_latency_buffer(*arguments)


def test_out_must_not_overlap_x(buffer: Buffer) -> None:
    handle = dispatch(buffer)[2]
    rows = zeros(43, 512, dtype=BF16)
    x = rows[5:37].view(4, 8, 512)
    for first in (1, 5, 20, 36):
        with pytest.raises(ValueError, match="out must not overlap x"):
            combine(buffer, handle, x=x, out=rows[first:first + 5])
    for first in (0, 37):
        assert (combine(buffer, handle, x=x, out=rows[first:first + 5])[0] == 0).all()


def test_destroyed_buffer() -> None:
    gone = single_rank_low_latency()
    hook = dispatch(gone, return_recv_hook=True)[4]
    gone.destroy()
    for call in (*CALLS[:4], lambda _: hook()):
        with pytest.raises(deep_ep.Error, match="destroyed"):
            call(gone)
