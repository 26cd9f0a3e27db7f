"""What the worker processes do in tests/test_clients.py: the calls that frameworks make, spelled as they spell them.

Every function runs on all ranks of a group. `E` experts, top-`K`, `T` tokens of a rank at most.
"""

import gc
import weakref
from typing import Any, Optional

import torch
import torch.distributed as dist
from compare import bits, equal
from utils import Worker, wait_as_clients_do

from deep_ep import Buffer, Config
from deep_ep.utils import EventHandle, EventOverlap
from deep_ep_cpp import EventHandle as NativeEventHandle

E, K, T, HIDDEN = 24, 4, 8, 1024
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
CONFIG = {
    "num_sms": 20,
    "num_max_nvl_chunked_send_tokens": 24,
    "num_max_nvl_chunked_recv_tokens": 256,
    "num_max_rdma_chunked_send_tokens": 6,
    "num_max_rdma_chunked_recv_tokens": 128
}


class Batch:
    """Tokens of this rank and where they go; the last of several ranks has none."""

    def __init__(self, worker: Worker, seed: int = 0, hidden: int = HIDDEN, dtype: torch.dtype = torch.int64) -> None:
        random = torch.Generator().manual_seed(100 * seed + worker.rank)
        num_tokens = 0 if 0 < worker.rank == worker.num_ranks - 1 else T - worker.rank
        self.x = torch.randn(num_tokens, hidden, generator=random).to(BF16).to(worker.device)
        scores = torch.rand(num_tokens, E, generator=random).to(worker.device)
        self.topk_weights, topk_idx = scores.topk(K)
        self.topk_idx = topk_idx.to(dtype)

    def scaled(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x.to(FP8), scales

    def close_to(self, name: str, got: torch.Tensor, factor: torch.Tensor, tolerance: float = 0.02) -> None:
        """Every token is itself times its factor."""
        want = self.x.float() * factor.reshape(-1, 1)
        assert torch.allclose(got.float(), want, rtol=tolerance, atol=tolerance), (name, got.float() - want)


def vllm(worker: Worker) -> None:
    """Managers keep Buffers by their arguments, weakly; two micro-batches are dispatched before the first combine."""
    cache = weakref.WeakValueDictionary[str, Any]()
    buffer = Buffer(group=worker.group, num_nvl_bytes=1 << 26, num_rdma_bytes=0, low_latency_mode=False,
                    num_qps_per_rank=1, explicitly_destroy=True)  # yapf: disable
    cache["ht"] = buffer
    flying = []
    for seed in range(2):
        batch = Batch(worker, seed)
        previous = buffer.capture()
        per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(topk_idx=batch.topk_idx,
                                                                                         num_experts=E,
                                                                                         previous_event=previous,
                                                                                         async_finish=True,
                                                                                         allocate_on_comm_stream=False)
        result = buffer.dispatch(x=batch.x, handle=None, num_tokens_per_rank=per_rank,
                                 num_tokens_per_rdma_rank=per_rdma_rank, is_token_in_rank=in_rank,
                                 num_tokens_per_expert=per_expert, topk_idx=batch.topk_idx,
                                 topk_weights=batch.topk_weights, expert_alignment=1,
                                 config=Buffer.get_dispatch_config(worker.num_ranks), previous_event=event,
                                 async_finish=True, allocate_on_comm_stream=False)  # yapf: disable
        flying.append((batch, in_rank, result))
    for batch, in_rank, (recv_x, recv_topk_idx, _, per_expert_list, handle, event) in flying:
        if event.event is not None:
            event.current_stream_wait()
        assert torch.tensor(per_expert_list).sum() == (recv_topk_idx >= 0).sum()
        combined, _, done = buffer.combine(x=recv_x, handle=handle, topk_weights=None, config=None,
                                           previous_event=None, async_finish=True,
                                           allocate_on_comm_stream=False)  # yapf: disable
        done.current_stream_wait()
        batch.close_to("combined", combined, in_rank.sum(1))
    decoder = _vllm_decode(worker)
    cache["ll"] = decoder
    for key in list(cache):
        cache[key].destroy()
    del buffer, decoder
    gc.collect()
    assert not list(cache)


def _vllm_decode(worker: Worker) -> Any:
    num_bytes = Buffer.get_low_latency_rdma_size_hint(num_max_dispatch_tokens_per_rank=T,
                                                      hidden=HIDDEN,
                                                      num_ranks=worker.num_ranks,
                                                      num_experts=E)
    buffer = Buffer(group=worker.group, num_nvl_bytes=1 << 26, num_rdma_bytes=num_bytes, low_latency_mode=True,
                            num_qps_per_rank=E // worker.num_ranks, allow_nvlink_for_low_latency_mode=True,
                            allow_mnnvl=False, explicitly_destroy=True, enable_shrink=True)  # yapf: disable
    for seed in range(2):
        batch = Batch(worker, seed)
        (rows, scales), _, handle, _, hook = buffer.low_latency_dispatch(batch.x, batch.topk_idx, T, E, use_fp8=True,
                                                                         round_scale=False, use_ue8m0=False,
                                                                         async_finish=False,
                                                                         return_recv_hook=True)  # yapf: disable
        hook()
        num_local = E // worker.num_ranks
        answers = rows.float().view(num_local, -1, 128) * scales.contiguous().view(num_local, -1, 1)
        out = torch.empty_like(batch.x)
        _, _, hook = buffer.low_latency_combine(answers.view(rows.shape).to(BF16), batch.topk_idx, batch.topk_weights,
                                                handle, async_finish=False, zero_copy=False, return_recv_hook=True,
                                                out=out)  # yapf: disable
        hook()
        batch.close_to("out", out, batch.topk_weights.sum(1), 0.3)  # FP8 has three bits
        mask = torch.zeros(worker.num_ranks, dtype=torch.int32, device=worker.device)
        buffer.low_latency_query_mask_buffer(mask)
        assert not mask.any()
        if worker.device.type == "cuda":
            torch.cuda.synchronize()
        worker.barrier()
        buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
        buffer.low_latency_clean_mask_buffer()
        if worker.device.type == "cuda":
            torch.cuda.synchronize()
        worker.barrier()
    return buffer


def sglang(worker: Worker) -> None:
    """One Buffer, sized for both modes, cleaned on every switch; a Config from JSON; scales packed by columns."""
    num_nvl_bytes = num_rdma_bytes = 0
    for config in (Config(**CONFIG), Buffer.get_combine_config(worker.num_ranks)):
        num_nvl_bytes = max(config.get_nvl_buffer_size_hint(HIDDEN * 2, worker.num_ranks), num_nvl_bytes)
        num_rdma_bytes = max(config.get_rdma_buffer_size_hint(HIDDEN * 2, worker.num_ranks), num_rdma_bytes)
    num_rdma_bytes = max(Buffer.get_low_latency_rdma_size_hint(T, HIDDEN, worker.num_ranks, E), num_rdma_bytes)
    buffer = Buffer(worker.group, num_nvl_bytes, num_rdma_bytes, low_latency_mode=True,
                    num_qps_per_rank=max(Buffer.num_sms, E // worker.num_ranks), allow_mnnvl=True)  # yapf: disable
    assert buffer.low_latency_mode
    equal("group_size", buffer.group_size, worker.num_ranks)
    for seed in range(3):
        batch = Batch(worker, seed)
        num_tokens = len(batch.x)
        previous = Buffer.capture()
        per_rank, per_rdma_rank, per_expert, in_rank, previous = buffer.get_dispatch_layout(
            batch.topk_idx, E, previous_event=previous, async_finish=True, allocate_on_comm_stream=True)
        scales = torch.arange(HIDDEN // 512 * num_tokens, dtype=torch.int32, device=worker.device)
        received, recv_topk_idx, _, rows_per_expert, handle, event = buffer.dispatch(
            batch.scaled(scales.view(HIDDEN // 512, num_tokens).t()), topk_idx=batch.topk_idx,
            topk_weights=batch.topk_weights, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=in_rank, num_tokens_per_expert=per_expert, previous_event=previous, async_finish=True,
            allocate_on_comm_stream=True, expert_alignment=128, config=Config(**CONFIG))  # yapf: disable
        event.current_stream_wait()
        equal("dtype of the scales", received[1].dtype, torch.int32)
        assert all(count % 128 == 0 for count in rows_per_expert)
        answers = torch.ones(len(recv_topk_idx), HIDDEN, dtype=BF16, device=worker.device)
        combined, _, event = buffer.combine(answers, handle, async_finish=True, previous_event=Buffer.capture(),
                                            allocate_on_comm_stream=True, config=Config(**CONFIG))  # yapf: disable
        event.current_stream_wait()
        assert torch.equal(combined.float(), in_rank.sum(1, keepdim=True).float().expand_as(combined))
        buffer.clean_low_latency_buffer(T, HIDDEN, E)
        recv_x, _, handle, event, hook = buffer.low_latency_dispatch(batch.x,
                                                                     batch.topk_idx,
                                                                     T,
                                                                     E,
                                                                     use_fp8=False,
                                                                     async_finish=True,
                                                                     return_recv_hook=False)
        event.current_stream_wait()
        assert hook is None
        arguments = {"x": recv_x, "topk_idx": batch.topk_idx, "topk_weights": batch.topk_weights, "handle": handle,
                     "async_finish": True, "return_recv_hook": False}  # yapf: disable
        _refuses(buffer.low_latency_combine, **arguments, overlap=False)  # of a branch of the original
        combined, event, _ = buffer.low_latency_combine(**arguments)
        event.current_stream_wait()
        batch.close_to("low-latency combine", combined, batch.topk_weights.sum(1))


def _refuses(call: Any, **arguments: Any) -> None:
    try:
        call(**arguments)
    except TypeError:
        return
    raise AssertionError("no TypeError")


def megatron(worker: Worker) -> None:
    """Autograd functions around both; the Buffer is built again, and the old one dropped, when rows get longer."""
    held: list[Any] = []

    def get_buffer(x: torch.Tensor) -> Any:
        hidden_bytes = x.size(1) * max(x.element_size(), 2)
        num_nvl_bytes = num_rdma_bytes = 0
        for make in (Buffer.get_dispatch_config, Buffer.get_combine_config):
            config = make(worker.group.size())
            num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, worker.group.size()), num_nvl_bytes)
            num_rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, worker.group.size()), num_rdma_bytes)
        if (not held or held[0].group != worker.group or held[0].num_nvl_bytes < num_nvl_bytes
                or held[0].num_rdma_bytes < num_rdma_bytes):
            held[:] = [Buffer(worker.group, num_nvl_bytes, num_rdma_bytes)]
        return held[0]

    def overlapped(call: Any, *args: Any, **options: Any) -> Any:
        *results, event = call(*args, previous_event=EventOverlap(EventHandle()), async_finish=True,
                               allocate_on_comm_stream=True, **options)  # yapf: disable
        event.current_stream_wait()
        return results

    class Dispatch(torch.autograd.Function):

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, topk_idx: torch.Tensor, probs: torch.Tensor) -> Any:
            buffer = get_buffer(x)
            per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(
                topk_idx, E, previous_event=EventOverlap(EventHandle()), async_finish=True,
                allocate_on_comm_stream=True)  # yapf: disable
            recv_x, recv_idx, recv_probs, _, handle, event = buffer.dispatch(
                x, topk_idx=topk_idx, topk_weights=probs, num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
                previous_event=event, async_finish=True, allocate_on_comm_stream=True)  # yapf: disable
            event.current_stream_wait()
            ctx.handle = handle
            return recv_x, recv_idx, recv_probs, handle

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor, _: Any, grad_probs: torch.Tensor, __: Any) -> Any:
            grad, grad_probs = overlapped(get_buffer(grad).combine, grad.contiguous(), ctx.handle,
                                          topk_weights=grad_probs.float())  # yapf: disable
            return grad, None, grad_probs

    class Combine(torch.autograd.Function):

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, handle: Any) -> Any:
            ctx.handle = handle
            return overlapped(get_buffer(x).combine, x, handle=handle)[0]

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return overlapped(get_buffer(grad).dispatch, grad.contiguous(), handle=ctx.handle)[0], None

    built = []
    for seed, hidden in enumerate((256, 1024, 256)):
        batch = Batch(worker, seed, hidden)
        batch.topk_idx[:, 1] = -1  # dropped
        x, probs = batch.x.requires_grad_(), batch.topk_weights.requires_grad_()
        recv_x, recv_idx, recv_probs, handle = Dispatch.apply(x, batch.topk_idx, probs)
        weight = torch.where(recv_idx >= 0, recv_probs, 0).sum(1, keepdim=True)
        combined = Combine.apply((recv_x * weight).to(BF16), handle)
        combined.float().sum().backward()
        kept = torch.where(batch.topk_idx >= 0, probs, 0).detach()
        batch.close_to("combined", combined, kept.sum(1), 0.05)
        assert x.grad is not None
        assert torch.allclose(x.grad.float(), kept.sum(1, keepdim=True).expand(x.shape), atol=0.05)
        assert probs.grad is not None
        want = torch.where(batch.topk_idx >= 0, x.detach().float().sum(1, keepdim=True), 0)
        assert torch.allclose(probs.grad, want, atol=0.5), probs.grad - want
        built.append(held[0].num_nvl_bytes)
    assert worker.num_ranks == 1 or built[0] < built[1] == built[2]


def xtuner(worker: Worker) -> None:
    """High-throughput calls alone on a low-latency Buffer; the handle goes through save_for_backward."""
    batch = Batch(worker)
    buffer = Buffer(worker.group, 1 << 24, 1 << 20, low_latency_mode=True,
                    num_qps_per_rank=max(E // worker.num_ranks, Buffer.num_sms // 2))  # yapf: disable

    class Dispatch(torch.autograd.Function):

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> Any:
            layout = buffer.get_dispatch_layout(batch.topk_idx, E, previous_event=EventOverlap(NativeEventHandle()),
                                                async_finish=True, allocate_on_comm_stream=True)  # yapf: disable
            recv_x, _, _, _, handle, event = buffer.dispatch(
                x, topk_idx=batch.topk_idx, topk_weights=batch.topk_weights, num_tokens_per_rank=layout[0],
                num_tokens_per_rdma_rank=layout[1], num_tokens_per_expert=layout[2], is_token_in_rank=layout[3],
                previous_event=layout[4], async_finish=True, allocate_on_comm_stream=True)  # yapf: disable
            wait_as_clients_do(event)
            ctx.save_for_backward(*handle)
            return (recv_x, *handle)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor, *_: Any) -> Any:
            combined, _, event = buffer.combine(grad.contiguous(), ctx.saved_tensors, async_finish=True,
                                                previous_event=EventOverlap(NativeEventHandle()),
                                                allocate_on_comm_stream=True)  # yapf: disable
            event.current_stream_wait()
            return combined

    x = batch.x.requires_grad_()
    recv_x, *handle = Dispatch.apply(x)
    equal("tensors of the handle", [isinstance(part, torch.Tensor) for part in handle], [True] * 6)
    recv_x.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad[:, 0].float().cpu(), handle[4].sum(1).float().cpu())
    buffer.dispatch(x.detach(), handle=tuple(handle))[0].requires_grad_()


class MpiComm:
    """mpi4py's names."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def Get_rank(self) -> int:
        return self.worker.rank

    def Get_size(self) -> int:
        return self.worker.num_ranks

    def allgather(self, item: Any) -> list[Any]:
        gathered: list[Optional[Any]] = [None] * self.worker.num_ranks
        dist.all_gather_object(gathered, item, group=self.worker.group)
        return gathered


def tensorrt_llm(worker: Worker) -> None:
    """No group but a communicator, int32 ids, bytes that travel as bfloat16, one Buffer at a time."""
    comm, batch = MpiComm(worker), Batch(worker, dtype=torch.int32)
    buffer = Buffer(None, 1 << 24, 0, comm=comm)
    per_rank, per_rdma_rank, per_expert, in_rank, event = buffer.get_dispatch_layout(batch.topk_idx, E)
    assert event.event is None
    recv_x, recv_topk_idx, _, _, handle, event = buffer.dispatch(
        batch.x, topk_idx=batch.topk_idx, topk_weights=batch.topk_weights, num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank, is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert)  # yapf: disable
    assert event.event is None
    equal("dtype of the ids", recv_topk_idx.dtype, torch.int32)
    assert buffer.combine(recv_x, handle)[2].event is None
    del buffer
    num_bytes = Buffer.get_low_latency_rdma_size_hint(T, HIDDEN, worker.num_ranks, E)
    buffer = Buffer(None, 0, num_bytes, low_latency_mode=True, num_qps_per_rank=E // worker.num_ranks,
                    allow_nvlink_for_low_latency_mode=True, comm=comm)  # yapf: disable
    buffer.clean_low_latency_buffer(T, HIDDEN, E)
    noise = torch.randint(0, 256, (len(batch.x), 2 * HIDDEN), dtype=torch.uint8, device=worker.device).view(BF16)
    recv_x, recv_count, handle, event, hook = buffer.low_latency_dispatch(noise, batch.topk_idx, T, E, use_fp8=False)
    assert event.event is None
    assert hook is None
    if worker.num_ranks == 1:
        src_info = handle[0]
        for expert, count in enumerate(recv_count.tolist()):
            rows = src_info[expert, :count].long()
            assert torch.equal(bits(recv_x[expert, :count]), bits(noise[rows]))
    weights = torch.ones(batch.topk_idx.shape, device=worker.device)
    _, event, hook = buffer.low_latency_combine(recv_x, batch.topk_idx, weights, handle)
    assert event.event is None
    assert hook is None


def rtp_llm(worker: Worker) -> None:
    """Arguments by position; the number of queue pairs is a float; Buffers are dropped and collected."""
    batch = Batch(worker)
    buffer = Buffer(group=worker.group, num_nvl_bytes=int(2e9) // 8, num_rdma_bytes=0, low_latency_mode=False,
                    num_qps_per_rank=1, allow_mnnvl=True, use_fabric=True)  # yapf: disable
    per_rank, per_rdma_rank, per_expert, in_rank, _ = buffer.get_dispatch_layout(batch.topk_idx, E)
    recv_x, _, _, counts, handle, _ = buffer.dispatch(batch.x,
                                                      None,
                                                      per_rank,
                                                      per_rdma_rank,
                                                      in_rank,
                                                      per_expert,
                                                      batch.topk_idx,
                                                      batch.topk_weights,
                                                      expert_alignment=128)
    assert all(count % 128 == 0 for count in counts)
    batch.close_to("combined", buffer.combine(recv_x, handle)[0], in_rank.sum(1))
    num_bytes = Buffer.get_low_latency_rdma_size_hint(T, HIDDEN, worker.num_ranks, E)
    decoder = Buffer(group=worker.group, num_nvl_bytes=0, num_rdma_bytes=num_bytes, low_latency_mode=True,
                     num_qps_per_rank=E / worker.num_ranks, allow_nvlink_for_low_latency_mode=True)  # yapf: disable
    arguments = {"x": batch.x, "topk_idx": batch.topk_idx, "num_max_dispatch_tokens_per_rank": T, "num_experts": E,
                 "use_fp8": True, "async_finish": False, "return_recv_hook": False}  # yapf: disable
    _refuses(decoder.low_latency_dispatch, **arguments, pertoken_quant=True)
    decoder.low_latency_dispatch(**arguments)
    assert not hasattr(Buffer, "get_low_latency_rdma_size_hint_m2n")
    del buffer, decoder
    gc.collect()


def lmdeploy(worker: Worker) -> None:
    """The SM budget is set on the instance; unknown arguments are dropped after a TypeError."""
    before, batch = Buffer.num_sms, Batch(worker)
    options: dict[str, Any] = {"num_nvl_bytes": 1 << 24, "num_rdma_bytes": 1 << 20, "low_latency_mode": True,
                               "num_qps_per_rank": max(E // worker.num_ranks, Buffer.num_sms), "allow_mnnvl": True,
                               "explicitly_destroy": True}  # yapf: disable
    _refuses(Buffer, group=worker.group, **options, not_known=1)
    buffer = Buffer(worker.group, **options)
    buffer.set_num_sms(before + 4)
    equal("num_sms", (buffer.num_sms, Buffer.num_sms), (before + 4, before + 4))
    Buffer.set_num_sms(before)
    per_rank, per_rdma_rank, per_expert, in_rank, previous = buffer.get_dispatch_layout(batch.topk_idx,
                                                                                        E,
                                                                                        previous_event=buffer.capture(),
                                                                                        async_finish=True,
                                                                                        allocate_on_comm_stream=True)
    scales = torch.ones(len(batch.x), HIDDEN // 128, device=worker.device)
    (recv_x, _), _, _, _, handle, event = buffer.dispatch(
        batch.scaled(scales), topk_idx=batch.topk_idx, topk_weights=batch.topk_weights, num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_rdma_rank, is_token_in_rank=in_rank, num_tokens_per_expert=per_expert,
        previous_event=previous, async_finish=True, allocate_on_comm_stream=True,
        expert_alignment=128)  # yapf: disable
    event.current_stream_wait()
    combined, _, _ = buffer.combine(recv_x.to(BF16), handle)
    batch.close_to("combined", combined, in_rank.sum(1), 0.3)
    buffer.destroy()
