"""Calls in one native step return what the same calls return by way of Python; what they cannot judge is left to it."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from single_rank import single_rank_buffer
from utils import device

import deep_ep
import deep_ep_cpp
from deep_ep import Buffer

NUM_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK = 5, 512, 4, 2

pytestmark = pytest.mark.skipif(not deep_ep_cpp.has_tensor_exchange(), reason="this torch has no C exchange of DLPack")


class Noted:
    """The direct calls of a Buffer; notes which of them have been made."""

    def __init__(self, direct: Any) -> None:
        self._direct = direct
        self.made: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self._direct, name)

        def noted(**arguments: Any) -> Any:
            result = call(**arguments)
            if result is not None:
                self.made.append(name)
            return result

        return noted


@pytest.fixture
def buffer() -> Iterator[Buffer]:
    num_bytes = Buffer.get_low_latency_rdma_size_hint(8, HIDDEN, 1, NUM_EXPERTS)
    with single_rank_buffer(num_rdma_bytes=num_bytes, low_latency_mode=True) as made:
        yield made


def rows(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((NUM_TOKENS, HIDDEN), generator=generator).to(device(), torch.bfloat16)


def choices() -> tuple[torch.Tensor, torch.Tensor]:
    topk_idx = torch.tensor([[0, 3], [1, 2], [-1, 0], [2, 3], [1, -1]], device=device())
    return topk_idx, torch.rand((NUM_TOKENS, NUM_TOPK), device=device())


def payload(kind: str) -> Any:
    if kind == "bf16":
        return rows()
    if kind == "float32":
        return rows().float()
    x = (torch.arange(NUM_TOKENS * HIDDEN, device=device()) % 251).to(torch.uint8).view(NUM_TOKENS, HIDDEN)
    scales = torch.rand((NUM_TOKENS, HIDDEN // 128), device=device())
    return (x.view(torch.float8_e4m3fn), scales.t().contiguous().t() if kind == "fp8, column-major" else scales)


def fresh(buffer: Buffer, x: Any) -> Any:
    topk_idx, weights = choices()
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    return buffer.dispatch(x,
                           num_tokens_per_rank=per_rank,
                           is_token_in_rank=in_rank,
                           num_tokens_per_expert=per_expert,
                           topk_idx=topk_idx,
                           topk_weights=weights)


def bytes_of(found: Any) -> Any:
    """What a call returned, to be compared: tensors by their type, shape, strides and bytes."""
    if isinstance(found, torch.Tensor):
        data = found.contiguous().cpu().reshape(-1).view(torch.uint8).tolist()
        return found.dtype, tuple(found.shape), found.stride(), data
    if isinstance(found, (tuple, list)):
        return type(found), [bytes_of(part) for part in found]
    return type(found) if isinstance(found, deep_ep.EventOverlap) else found


def both_ways(buffer: Buffer, name: str, call: Callable[[], Any]) -> None:
    session = buffer._session
    assert session is not None and session.direct is not None
    direct, noted = session.direct, Noted(session.direct)
    session.direct = noted  # type: ignore[assignment]
    made = call()
    assert noted.made == [name]
    session.direct = None
    expected = call()
    session.direct = direct
    assert bytes_of(made) == bytes_of(expected)


@pytest.mark.parametrize("kind", ["bf16", "float32", "fp8", "fp8, column-major"])
def test_a_cached_dispatch(buffer: Buffer, kind: str) -> None:
    handle = fresh(buffer, rows())[4]
    x = payload(kind)
    both_ways(buffer, "dispatch_cached", lambda: buffer.dispatch(x, handle))


@pytest.mark.parametrize("has_weights", [False, True])
def test_a_combine(buffer: Buffer, has_weights: bool) -> None:
    recv_x, _, recv_weights, _, handle, _ = fresh(buffer, rows())
    weights = recv_weights if has_weights else None
    both_ways(buffer, "combine", lambda: buffer.combine(recv_x, handle, weights))


@pytest.mark.parametrize("form", [{"use_fp8": False}, {}, {"round_scale": True, "use_ue8m0": True}], ids=str)
def test_low_latency_calls(buffer: Buffer, form: dict[str, bool]) -> None:
    topk_idx, weights = choices()
    x, counts, out = rows(), torch.zeros(NUM_EXPERTS, dtype=torch.int32, device=device()), rows(1)

    def dispatch() -> Any:
        counts.zero_()
        recv_x, count, handle, event, hook = buffer.low_latency_dispatch(x, topk_idx, 8, NUM_EXPERTS, counts, **form)
        # What no token is in holds anything.
        received = [part[expert, :count[expert]] for part in (recv_x if isinstance(recv_x, tuple) else (recv_x, ))
                    for expert in range(NUM_EXPERTS)]  # yapf: disable
        sources = [handle[0][expert, :count[expert]] for expert in range(NUM_EXPERTS)]
        return received, sources, handle[1:], count, counts.clone(), event, hook

    buffer.low_latency_dispatch(x, topk_idx, 8, NUM_EXPERTS, **form)  # the first of its kind tells what it is
    both_ways(buffer, "low_latency_dispatch", dispatch)
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(x, topk_idx, 8, NUM_EXPERTS, use_fp8=False)
    both_ways(buffer, "low_latency_combine", lambda: buffer.low_latency_combine(recv_x, topk_idx, weights, handle))
    both_ways(buffer, "low_latency_combine",
              lambda: buffer.low_latency_combine(recv_x, topk_idx, weights, handle, out=out).__class__)


def test_what_is_not_usual_is_left_to_python(buffer: Buffer) -> None:
    session = buffer._session
    assert session is not None and session.direct is not None
    recv_x, _, weights, _, handle, _ = fresh(buffer, rows())
    parameter = torch.nn.Parameter(recv_x)
    for x, unusual_handle, topk_weights in ((recv_x.float(), handle, None), (recv_x[:-1], handle, None),
                                            (recv_x.t(), handle, None), (parameter, handle, None),
                                            (recv_x, handle[:5], None), (recv_x, list(handle), None), (recv_x, handle,
                                                                                                       weights[:, :1]),
                                            (recv_x, handle, weights.double()), (recv_x.to("meta"), handle, None),
                                            (None, handle, None), (recv_x.to_sparse(), handle, None)):
        assert session.direct.combine(x=x, handle=unusual_handle, topk_weights=topk_weights, num_sms=20) is None
    for num_sms in (20.0, 1 << 70, None):
        assert session.direct.combine(x=recv_x, handle=handle, topk_weights=weights, num_sms=num_sms) is None
    with pytest.raises(TypeError, match="takes the keywords x, handle, num_sms, in this order, got handle, x, num_sms"):
        session.direct.dispatch_cached(handle=handle, x=recv_x, num_sms=20)
    with pytest.raises(TypeError, match="in this order"):
        session.direct.dispatch_cached(recv_x, handle, 20)  # type: ignore[call-arg,misc]


def test_a_handle_of_another_top_k_is_not_taken(buffer: Buffer) -> None:
    topk_idx, weights = choices()
    recv_x, _, handle, _, _ = buffer.low_latency_dispatch(rows(), topk_idx, 8, NUM_EXPERTS, use_fp8=False)
    with pytest.raises(ValueError, match="the very tensor"):
        buffer.low_latency_combine(recv_x, topk_idx[:, :1].contiguous(), weights[:, :1].contiguous(), handle)
    copied = (handle[0].clone(), *handle[1:])
    with pytest.raises(ValueError, match="the very tensor"):
        buffer.low_latency_combine(recv_x, topk_idx, weights, copied)


def test_tensors_that_change_in_place_are_looked_at_anew(buffer: Buffer) -> None:
    recv_x, _, _, _, handle, _ = fresh(buffer, rows())
    buffer.combine(recv_x, handle)
    recv_x.data = recv_x[:-1].clone()
    with pytest.raises(ValueError, match="x must have"):
        buffer.combine(recv_x, handle)


def test_no_tensor_is_kept_alive(buffer: Buffer) -> None:
    topk_idx, weights = choices()
    for _ in range(2):
        recv_x, _, handle, _, _ = buffer.low_latency_dispatch(rows(), topk_idx, 8, NUM_EXPERTS, use_fp8=False)
        combined, _, _ = buffer.low_latency_combine(recv_x, topk_idx, weights, handle)
    received, _, _, _, ht_handle, _ = fresh(buffer, rows())
    summed, _, _ = buffer.combine(received, ht_handle)
    tensors = (recv_x, *handle[:2], combined, received, summed, *(ht_handle[i] for i in (0, 3, 4, 5)))
    alive = [weakref.ref(tensor) for tensor in tensors]
    del tensors, recv_x, handle, combined, received, ht_handle, summed
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


def test_a_destroyed_buffer_makes_none() -> None:
    buffer = single_rank_buffer()
    session = buffer._session
    assert session is not None and session.direct is not None
    recv_x, _, _, _, handle, _ = fresh(buffer, rows())
    buffer.destroy()
    assert session.direct is None
    with pytest.raises(deep_ep.Error, match="was destroyed"):
        buffer.combine(recv_x, handle)
