"""Every bad argument is refused with an error that names it, before anything is launched."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from single_rank import SingleRankComm, single_rank_buffer, single_rank_dispatch
from utils import device

import deep_ep
from deep_ep import Buffer

BF16, FP8, I32, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.int32, torch.float32


def zeros(*shape: int, dtype: torch.dtype = F32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device())


@pytest.fixture(scope="module")
def buffer() -> Iterator[Buffer]:
    with single_rank_buffer() as made:
        yield made


# argument, bad value (made when the test runs), error, what the message says besides the name


def case(name: str, make: Any, error: type[Exception], *parts: str, label: str = "") -> Any:
    return pytest.param(name, make, error, parts, id=f"{name}-{label or parts[0] if parts else 'bad'}")


BAD_CONSTRUCTOR = [
    case("num_nvl_bytes", lambda: 100, ValueError, "multiple of 128", "got 100"),
    case("num_nvl_bytes", lambda: -128, ValueError, "at least 0"),
    case("num_nvl_bytes", lambda: 1e6, TypeError, "int", "float"),
    case("num_nvl_bytes", lambda: 1 << 63, ValueError, "at most 9223372036854775807"),
    case("num_rdma_bytes", lambda: 130, ValueError, "multiple of 128"),
    case("num_qps_per_rank", lambda: 0, ValueError, "greater than 0"),
    case("num_qps_per_rank", lambda: "24", TypeError, "number", "str"),
    case("timeout_s", lambda: 0, ValueError, "greater than 0"),
    case("timeout_s", lambda: "1", TypeError, "number"),
]


@pytest.mark.parametrize(("name", "make", "error", "parts"), BAD_CONSTRUCTOR)
def test_constructor(name: str, make: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        single_rank_buffer(**{name: make()})
    assert all(part in str(caught.value) for part in (name, *parts)), caught.value


def test_constructor_needs_a_group() -> None:
    with pytest.raises(ValueError, match=r"^Either 'group' or 'comm' must be provided\.$"):
        Buffer(None, 128)


@pytest.mark.parametrize(("options", "error", "sentence"), [
    ({"group": "WORLD"}, TypeError, "group must be a torch.distributed ProcessGroup or None, got str"),
    ({"group": dist.GroupMember.NON_GROUP_MEMBER}, ValueError, "not a member"),
    ({"group": None, "comm": object()}, TypeError, "comm must be .* Get_rank, Get_size and allgather, got object"),
], ids=["group", "outside", "comm"])  # yapf: disable
def test_constructor_wants_one(options: dict[str, Any], error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        Buffer(num_nvl_bytes=128, **options)


def test_constructor_refuses_unknown_arguments() -> None:
    """Callers drop what a version does not know when they see a TypeError."""
    with pytest.raises(TypeError):
        Buffer(None, comm=SingleRankComm(), no_such_option=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("number", [2.5, np.float32(2.5), np.int64(2)])
def test_queue_pairs_may_be_any_number(number: Any) -> None:
    single_rank_buffer(num_qps_per_rank=number, timeout_s=number).destroy()


BAD_LAYOUT = [
    case("topk_idx", lambda: [[0]], TypeError, "torch.Tensor", "list"),
    case("topk_idx", lambda: zeros(4, 2), TypeError, "int64 or int32", "float32"),
    case("topk_idx", lambda: zeros(4, dtype=I32), ValueError, "[*, *]", "[4]"),
    case("topk_idx", lambda: zeros(2, 4, dtype=I32).t(), ValueError, "contiguous", "strides [1, 4]"),
    case("topk_idx", lambda: zeros(4, 0, dtype=I32), ValueError, "at least one column"),
    case("topk_idx", lambda: torch.zeros((4, 2), dtype=I32, device="meta"), ValueError, "meta"),
    case("num_experts", lambda: 0, ValueError, "at least 1"),
    case("num_experts", lambda: 4.0, TypeError, "int"),
    case("num_experts", lambda: 1 << 40, ValueError, "at most 1024"),
]


@pytest.mark.parametrize(("name", "make", "error", "parts"), BAD_LAYOUT)
def test_layout(buffer: Buffer, name: str, make: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    arguments: dict[str, Any] = {"topk_idx": zeros(4, 2, dtype=I32), "num_experts": 4}
    with pytest.raises(error) as caught:
        buffer.get_dispatch_layout(**{**arguments, name: make()})
    assert all(part in str(caught.value) for part in (name, *parts)), caught.value


def misaligned() -> torch.Tensor:
    return zeros(5 * 16 + 1, dtype=BF16)[1:].view(5, 16)


BAD_DISPATCH = [
    case("x", lambda: 3, TypeError, "torch.Tensor", "int"),
    case("x", lambda: [zeros(5, 16, dtype=FP8), zeros(5, 1)], TypeError, "tuple (data, scales)", "got list"),
    case("x", lambda: zeros(5, dtype=BF16), ValueError, "[*, *]"),
    case("x", lambda: zeros(16, 5, dtype=BF16).t(), ValueError, "contiguous"),
    case("x", lambda: zeros(5, 12, dtype=BF16), ValueError, "16 bytes", "24 bytes"),
    case("x", lambda: zeros(5, 0, dtype=BF16), ValueError, "positive multiple"),
    case("x", misaligned, ValueError, "start at a multiple of 16"),
    case("x", lambda: (zeros(5, 16, dtype=FP8), ), ValueError, "tuple of 1"),
    case("x[0]", lambda: (zeros(5, 16, dtype=BF16), zeros(5, 1)), TypeError, "1-byte dtype"),
    case("x[1]", lambda: (zeros(5, 16, dtype=FP8), zeros(4, 1)), ValueError, "[5, *]", "[4, 1]"),
    case("x[1]", lambda: (zeros(5, 16, dtype=FP8), zeros(5, 1, dtype=BF16)), TypeError, "float32 or int32"),
    case("x[1]", lambda: (zeros(5, 16, dtype=FP8), zeros(5)), ValueError, "[5, *]", "float32 [5]"),
    case("num_tokens_per_rank", lambda: None, ValueError, "get_dispatch_layout"),
    case("num_tokens_per_rank", lambda: zeros(2, dtype=I32), ValueError, "[1]", "[2]"),
    case("num_tokens_per_rank", lambda: zeros(1), TypeError, "int32"),
    case("is_token_in_rank", lambda: None, ValueError, "get_dispatch_layout"),
    case("is_token_in_rank", lambda: zeros(4, 1, dtype=torch.bool), ValueError, "[5, 1]"),
    case("is_token_in_rank", lambda: zeros(5, 1, dtype=torch.uint8), TypeError, "bool"),
    case("num_tokens_per_expert", lambda: None, ValueError, "get_dispatch_layout"),
    case("num_tokens_per_expert", lambda: zeros(0, dtype=I32), ValueError, "positive multiple"),
    case("num_tokens_per_expert", lambda: zeros(4, dtype=torch.int64), TypeError, "int32"),
    case("topk_idx", lambda: None, ValueError, "together"),
    case("topk_idx", lambda: zeros(4, 2, dtype=I32), ValueError, "[5, *]"),
    case("topk_weights", lambda: None, ValueError, "together"),
    case("topk_weights", lambda: zeros(5, 3), ValueError, "[5, 2]"),
    case("topk_weights", lambda: zeros(5, 2, dtype=BF16), TypeError, "float32"),
    case("expert_alignment", lambda: 0, ValueError, "at least 1"),
    case("expert_alignment", lambda: 1 << 31, ValueError, "at most 1048576"),
    case("num_worst_tokens", lambda: -1, ValueError, "at least 0"),
    case("num_worst_tokens", lambda: 1 << 31, ValueError, "at most 2147483647"),
    case("num_worst_tokens", lambda: True, TypeError, "int", "bool"),
    case("config", lambda: 20, TypeError, "deep_ep.Config", "int"),
]


@pytest.mark.parametrize(("name", "make", "error", "parts"), BAD_DISPATCH)
def test_dispatch(buffer: Buffer, name: str, make: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        single_rank_dispatch(buffer, **{name.partition("[")[0]: make()})
    assert all(part in str(caught.value) for part in (name, *parts)), caught.value


def test_dispatch_worst_case_needs_topk(buffer: Buffer) -> None:
    with pytest.raises(ValueError, match="num_worst_tokens needs topk_idx"):
        single_rank_dispatch(buffer, topk_idx=None, topk_weights=None, num_worst_tokens=8)


def test_cached_dispatch_refuses_topk(buffer: Buffer) -> None:
    handle = single_rank_dispatch(buffer)[4]
    with pytest.raises(ValueError, match="must be None when a handle is given"):
        buffer.dispatch(zeros(5, 16, dtype=BF16), handle, topk_idx=zeros(5, 2, dtype=I32), topk_weights=zeros(5, 2))


def test_cached_dispatch_refuses_other_token_counts(buffer: Buffer) -> None:
    handle = single_rank_dispatch(buffer)[4]
    with pytest.raises(ValueError, match="x must have 5 rows"):
        buffer.dispatch(zeros(6, 16, dtype=BF16), handle)


BAD_COMBINE = [
    case("x", lambda: zeros(5, 16), TypeError, "bfloat16", "float32"),
    case("x", lambda: zeros(4, 16, dtype=BF16), ValueError, "5 rows", "got 4"),
    case("x", lambda: zeros(5, 12, dtype=BF16), ValueError, "16 bytes"),
    case("topk_weights", lambda: zeros(4, 2), ValueError, "[5, *]"),
    case("topk_weights", lambda: zeros(5, 2, dtype=BF16), TypeError, "float32"),
    case("bias", lambda: zeros(5, 8, dtype=BF16), ValueError, "[5, 16]"),
    case("bias", lambda: zeros(5, 16), TypeError, "bfloat16"),
    case("bias[1]", lambda: (zeros(5, 16, dtype=BF16), zeros(4, 16, dtype=BF16)), ValueError, "[5, 16]"),
    case("bias", lambda: (zeros(5, 16, dtype=BF16), ) * 3, ValueError, "tuple of 3"),
    case("handle", lambda: None, TypeError, "NoneType"),
    case("handle", lambda: (zeros(1), ) * 5, ValueError, "6 tensors", "got 5"),
    case("handle[0]", lambda: (zeros(2, 2, dtype=I32), ) * 6, ValueError, "[1, 1]"),
    case("config", lambda: "fast", TypeError, "deep_ep.Config"),
]


@pytest.mark.parametrize(("name", "make", "error", "parts"), BAD_COMBINE)
def test_combine(buffer: Buffer, name: str, make: Any, error: type[Exception], parts: tuple[str, ...]) -> None:
    arguments = {"x": zeros(5, 16, dtype=BF16), "handle": single_rank_dispatch(buffer)[4]}
    with pytest.raises(error) as caught:
        buffer.combine(**{**arguments, name.partition("[")[0]: make()})
    assert all(part in str(caught.value) for part in (name, *parts)), caught.value


BAD_VIEW = [
    case("dtype", lambda: "int8", TypeError, "torch.dtype", "str"),
    case("size", lambda: 3, TypeError, "torch.Size", "int"),
    case("size[0]", lambda: (-1, 4), ValueError, "at least 0", "got -1"),
    case("size", lambda: (1 << 21, ), ValueError, "1048576 bytes of the buffer from byte 0 on", "2097152 elements"),
    case("offset", lambda: 1 << 21, ValueError, "at most 1048576"),
]


@pytest.mark.parametrize(("name", "make", "error", "parts"), BAD_VIEW)
def test_local_buffer_tensor(buffer: Buffer, name: str, make: Any, error: type[Exception], parts: tuple[str,
                                                                                                        ...]) -> None:
    with pytest.raises(error) as caught:
        buffer.get_local_buffer_tensor(**{"dtype": torch.int8, name.partition("[")[0]: make()})
    assert all(part in str(caught.value) for part in (name, *parts)), caught.value


def test_lend(buffer: Buffer) -> None:
    with pytest.raises(TypeError, match=r"shape must be a torch\.Size, or a tuple or list of ints, got int"):
        buffer.lend(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dtype must be a torch\.dtype, got NoneType"):
        buffer.lend((3, 4), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [
    {"async_finish": True},
    {"previous_event": deep_ep.EventOverlap(None), "async_finish": True},
    {"previous_event": Buffer.capture()},
], ids=["no event", "empty event", "synchronous"])  # yapf: disable
def test_comm_stream_allocation_needs_event_and_async(buffer: Buffer, options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="allocate_on_comm_stream needs"):
        single_rank_dispatch(buffer, allocate_on_comm_stream=True, **options)


@pytest.mark.parametrize("new_num_sms", [3, 0, -2, 1 << 40])
def test_set_num_sms_wants_even(new_num_sms: int) -> None:
    with pytest.raises(ValueError, match="new_num_sms"):
        Buffer.set_num_sms(new_num_sms)


def test_a_refused_call_leaves_the_buffer_usable(buffer: Buffer) -> None:
    with pytest.raises(TypeError):
        single_rank_dispatch(buffer, x=None)
    assert torch.equal(single_rank_dispatch(buffer)[0], torch.ones((5, 16), dtype=BF16, device=device()))
