"""Every tensor argument of every call, given as each kind of tensor that has no plain memory: refused by name.

The arguments come from the signatures, so one that is new, or in no table here, fails the first test.
"""

import inspect
import typing
from collections.abc import Callable, Iterator
from typing import Any, Optional

import pytest
import torch
import torch.distributed as dist
from single_rank import single_rank_buffer
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from utils import device

from deep_ep import Buffer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of the kinds that torch is giving up

NUM_TOKENS, HIDDEN, NUM_EXPERTS, NUM_TOPK, MAX_TOKENS = 5, 512, 4, 2, 8
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype, device=device())


@pytest.fixture(scope="module")
def buffer() -> Iterator[Buffer]:
    with single_rank_buffer(num_rdma_bytes=1 << 20, low_latency_mode=True, enable_shrink=True) as made:
        yield made


# How each method is called: good arguments, with every optional tensor given.


def topk_idx() -> torch.Tensor:
    return torch.arange(NUM_TOKENS * NUM_TOPK, device=device()).reshape(NUM_TOKENS, NUM_TOPK) % NUM_EXPERTS


def layout_arguments(_: Buffer) -> dict[str, Any]:
    return {"topk_idx": topk_idx(), "num_experts": NUM_EXPERTS}


def dispatch_arguments(buffer: Buffer) -> dict[str, Any]:
    per_rank, _, per_expert, in_rank, _ = buffer.get_dispatch_layout(topk_idx(), NUM_EXPERTS)
    return {
        "x": ones(NUM_TOKENS, HIDDEN, dtype=BF16),
        "num_tokens_per_rank": per_rank,
        "num_tokens_per_rdma_rank": ones(1, dtype=torch.int32),
        "is_token_in_rank": in_rank,
        "num_tokens_per_expert": per_expert,
        "topk_idx": topk_idx(),
        "topk_weights": ones(NUM_TOKENS, NUM_TOPK),
    }


def scaled_arguments(buffer: Buffer) -> dict[str, Any]:
    return {**dispatch_arguments(buffer), "x": (ones(NUM_TOKENS, HIDDEN).to(FP8), ones(NUM_TOKENS, 4))}


def cached_arguments(buffer: Buffer) -> dict[str, Any]:
    return {"x": ones(NUM_TOKENS, HIDDEN, dtype=BF16), "handle": buffer.dispatch(**dispatch_arguments(buffer))[4]}


def combine_arguments(buffer: Buffer) -> dict[str, Any]:
    rows = cached_arguments(buffer)
    return {**rows, "topk_weights": ones(NUM_TOKENS, NUM_TOPK), "bias": ones(NUM_TOKENS, HIDDEN, dtype=BF16)}


def two_biases_arguments(buffer: Buffer) -> dict[str, Any]:
    arguments = combine_arguments(buffer)
    return {**arguments, "bias": (arguments["bias"], arguments["bias"].clone())}


def low_latency_dispatch_arguments(_: Buffer) -> dict[str, Any]:
    return {
        "x": ones(NUM_TOKENS, HIDDEN, dtype=BF16),
        "topk_idx": topk_idx(),
        "num_max_dispatch_tokens_per_rank": MAX_TOKENS,
        "num_experts": NUM_EXPERTS,
        "cumulative_local_expert_recv_stats": ones(NUM_EXPERTS, dtype=torch.int32),
        "dispatch_wait_recv_cost_stats": ones(1, dtype=torch.int64),
        "use_fp8": False,
    }


def low_latency_combine_arguments(buffer: Buffer) -> dict[str, Any]:
    return {
        "x": ones(NUM_EXPERTS, MAX_TOKENS, HIDDEN, dtype=BF16),
        "topk_idx": topk_idx(),
        "topk_weights": ones(NUM_TOKENS, NUM_TOPK),
        "handle": buffer.low_latency_dispatch(**low_latency_dispatch_arguments(buffer))[2],
        "out": ones(NUM_TOKENS, HIDDEN, dtype=BF16),
        "combine_wait_recv_cost_stats": ones(1, dtype=torch.int64),
    }


def zero_copy_arguments(buffer: Buffer) -> dict[str, Any]:
    arguments = low_latency_combine_arguments(buffer)
    buffer.get_next_low_latency_combine_buffer(arguments["handle"]).fill_(1)
    return {**arguments, "zero_copy": True}


def next_buffer_arguments(buffer: Buffer) -> dict[str, Any]:
    return {"handle": low_latency_combine_arguments(buffer)["handle"]}


def query_arguments(_: Buffer) -> dict[str, Any]:
    return {"mask_status": ones(1, dtype=torch.int32)}


Make = Callable[[Buffer], dict[str, Any]]
HIGH_THROUGHPUT_HANDLE = ("handle[0]", "handle[3]", "handle[5]")
# Method, its arguments, the places of tensors that it reads, and of those that it only passes over.
CALLS: list[tuple[str, Make, tuple[str, ...], tuple[str, ...]]] = [
    ("get_dispatch_layout", layout_arguments, ("topk_idx", ), ()),
    ("dispatch", dispatch_arguments, ("x", "num_tokens_per_rank", "is_token_in_rank", "num_tokens_per_expert",
                                      "topk_idx", "topk_weights"), ("num_tokens_per_rdma_rank", )),
    ("dispatch", scaled_arguments, ("x[0]", "x[1]"), ()),
    ("dispatch", cached_arguments, ("x", *HIGH_THROUGHPUT_HANDLE), ("handle[1]", "handle[2]", "handle[4]")),
    ("combine", combine_arguments, ("x", "topk_weights", "bias", *HIGH_THROUGHPUT_HANDLE), ("handle[1]", "handle[2]",
                                                                                           "handle[4]")),
    ("combine", two_biases_arguments, ("bias[0]", "bias[1]"), ()),
    ("low_latency_dispatch", low_latency_dispatch_arguments, ("x", "topk_idx", "cumulative_local_expert_recv_stats",
                                                              "dispatch_wait_recv_cost_stats"), ()),
    ("low_latency_combine", low_latency_combine_arguments, ("x", "topk_idx", "topk_weights", "handle[0]", "out",
                                                            "combine_wait_recv_cost_stats"), ("handle[1]", )),
    ("low_latency_combine", zero_copy_arguments, ("x", ), ()),
    ("low_latency_query_mask_buffer", query_arguments, ("mask_status", ), ()),
    ("get_next_low_latency_combine_buffer", next_buffer_arguments, ("handle[0]", ), ("handle[1]", )),
]  # yapf: disable
OTHER_NAMES = {"internode_dispatch": Buffer.dispatch, "internode_combine": Buffer.combine}


def has_tensor(hint: Any) -> bool:
    return hint is torch.Tensor or any(has_tensor(part) for part in typing.get_args(hint))


def tensor_arguments() -> set[tuple[str, str]]:
    found = set()
    for name, method in inspect.getmembers(Buffer, callable):
        if name.startswith("_") or name in OTHER_NAMES:
            continue
        hints = typing.get_type_hints(method)
        found.update((name, argument) for argument in inspect.signature(method).parameters
                     if argument == "handle" or has_tensor(hints.get(argument)))
    return found


def test_the_table_has_every_tensor_argument() -> None:
    table = {(method, place.partition("[")[0]) for method, _, *places in CALLS for group in places for place in group}
    assert table == tensor_arguments()


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_names_are_the_same_calls(name: str) -> None:
    assert inspect.unwrap(getattr(Buffer, name)) is inspect.unwrap(OTHER_NAMES[name])


# Kinds of tensors. Each makes the call with its own version of a tensor.

Call = Callable[[torch.Tensor], Any]


class ScaledTensor(torch.Tensor):
    """Elements that mean something else than they are, as subclasses for small floats have them."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Optional[dict[str, Any]] = None) -> Any:
        return func(*args, **(kwargs or {}))


class NamedTensor(torch.Tensor):
    """A subclass with memory like any other's."""


def freed(tensor: torch.Tensor) -> torch.Tensor:
    copy = tensor.clone()
    copy.untyped_storage().resize_(0)
    return copy


def in_memory_elsewhere(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor, device="cpu" if device().type == "cuda" else "meta")


def as_dtensor(tensor: torch.Tensor) -> torch.Tensor:
    mesh = DeviceMesh(device().type, [0], _init_backend=False)
    return DTensor.from_local(tensor, mesh, [Replicate()], run_check=False)


def quantized(tensor: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def opaque(tensor: torch.Tensor) -> torch.Tensor:
    return torch.ones(tensor.shape).to_mkldnn()


def through_vmap(tensor: torch.Tensor, call: Call) -> Any:
    return torch.vmap(call)(tensor.unsqueeze(0))


def through_functionalize(tensor: torch.Tensor, call: Call) -> Any:
    return torch.func.functionalize(call)(tensor)


def through_vjp(tensor: torch.Tensor, call: Call) -> Any:
    return torch.func.vjp(call, tensor.float())


def given(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor, Call], Any]:
    return lambda tensor, call: call(make(tensor))


KINDS: dict[str, Callable[[torch.Tensor, Call], Any]] = {
    "FakeTensor": given(lambda t: FakeTensorMode().from_tensor(t)),
    "DTensor": given(as_dtensor),
    "subclass with a meaning": given(lambda t: t.as_subclass(ScaledTensor)),
    "meta": given(lambda t: t.to("meta")),
    "elsewhere": given(in_memory_elsewhere),
    "sparse": given(lambda t: t.float().to_sparse()),
    "sparse rows": given(lambda _: ones(4, 4).to_sparse_csr()),
    "nested": given(lambda t: torch.nested.nested_tensor([t.float()])),
    "jagged": given(lambda t: torch.nested.nested_tensor([t.float()], layout=torch.jagged)),
    "quantized": given(quantized),
    "opaque": given(opaque),
    "freed": given(freed),
    "zeros without memory": given(lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device)),
    "lazily negated": given(torch._neg_view),
    "lazily conjugated": given(lambda t: t.to(torch.complex64).conj()),
    "imaginary part of a conjugate": given(lambda t: t.to(torch.complex64).conj().imag),
    "in vmap": through_vmap,
    "in functionalize": through_functionalize,
    "in vjp": through_vjp,
}


def replaced(arguments: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    name, _, index = place.partition("[")
    if not index:
        return {**arguments, name: value}
    parts = list(arguments[name])
    parts[int(index[:-1])] = value
    return {**arguments, name: tuple(parts)}


def at(arguments: dict[str, Any], place: str) -> torch.Tensor:
    name, _, index = place.partition("[")
    found: torch.Tensor = arguments[name][int(index[:-1])] if index else arguments[name]
    return found


@pytest.fixture(scope="module", autouse=True)
def process_group() -> Iterator[None]:
    """DTensor needs one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


READ = [(method, make, place) for method, make, read, _ in CALLS for place in read]
PASSED_OVER = [(method, make, place) for method, make, _, unread in CALLS for place in unread]


def name_of(value: Any) -> Optional[str]:
    return value.__name__.replace("_arguments", "") if callable(value) else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "make", "place"), READ, ids=name_of)
def test_what_has_no_plain_memory_is_refused_by_name(buffer: Buffer, method: str, make: Make, place: str,
                                                     kind: str) -> None:
    arguments = make(buffer)

    def call(tensor: torch.Tensor) -> torch.Tensor:
        getattr(buffer, method)(**replaced(arguments, place, tensor))
        return torch.zeros(())

    with pytest.raises((TypeError, ValueError)) as caught:
        KINDS[kind](at(arguments, place), call)
    assert str(caught.value).startswith(place), caught.value
    getattr(buffer, method)(**arguments)  # nothing was begun


@pytest.mark.parametrize(("method", "make", "place"), PASSED_OVER, ids=name_of)
def test_what_no_call_reads_may_be_anything(buffer: Buffer, method: str, make: Make, place: str) -> None:
    arguments = make(buffer)
    fake = FakeTensorMode().from_tensor(at(arguments, place))
    getattr(buffer, method)(**replaced(arguments, place, fake))


@pytest.mark.parametrize("kind", [torch.nn.Parameter, lambda t, _: t.as_subclass(NamedTensor)],
                         ids=["Parameter", "sub"])
@pytest.mark.parametrize(("method", "make", "place"), READ, ids=name_of)
def test_subclasses_with_memory_are_tensors(buffer: Buffer, method: str, make: Make, place: str, kind: Any) -> None:
    arguments = make(buffer)
    getattr(buffer, method)(**replaced(arguments, place, kind(at(arguments, place), False)))
