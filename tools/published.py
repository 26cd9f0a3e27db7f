"""What others have published of calls across nodes, for the page of the model. All with 8 GPUs a node, hidden 7168,
top-8. Times are of the whole call; where a project prints GB/s, they are worked out from its bytes."""
from __future__ import annotations

from dataclasses import dataclass

H800_NVLINK, H100_NVLINK, B200_NVLINK = 160.0, 340.0, 680.0  # GB/s out of a GPU
V1_GROUPS = 4  # nodes that a token may choose, in V1's own tests


@dataclass(frozen=True)
class Published:
    """One figure."""

    source: str
    num_nodes: int
    num_tokens: int
    operation: str
    kind: str
    us: float
    num_experts: int = 256
    limit_nodes: int = 0
    nvlink_gb_per_s: float = H100_NVLINK
    nic_gb_per_s: float = 50.0


def _series(source: str, operation: str, kind: str, times: dict[int, float], **options: float) -> list[Published]:
    """The same call at several numbers of nodes."""
    num_tokens = int(options.pop("num_tokens", 4096))
    return [Published(source, num_nodes, num_tokens, operation, kind, us, **options)  # type: ignore[arg-type]
            for num_nodes, us in times.items()]  # yapf: disable


def _hybrid_ep(operation: str, kind: str, times: dict[int, float]) -> list[Published]:
    """Eight experts on each rank."""
    return [Published("Hybrid-EP, H100", num_nodes, 4096, operation, kind, us, num_experts=64 * num_nodes)
            for num_nodes, us in times.items()]  # yapf: disable


PUBLISHED = (
    *_series("DeepEP V1, H800", "dispatch", "fp8", {2: 1403, 4: 1887, 8: 2154}, limit_nodes=V1_GROUPS,
             nvlink_gb_per_s=H800_NVLINK),
    *_series("DeepEP V1, H800", "combine", "bf16", {2: 2722, 4: 3723, 8: 4262}, limit_nodes=V1_GROUPS,
             nvlink_gb_per_s=H800_NVLINK),
    *_series("DeepEP V2, SM90", "dispatch", "fp8", {2: 1341, 4: 3588}, num_tokens=8192),
    *_series("DeepEP V2, SM90", "combine", "bf16", {2: 2890, 4: 6958}, num_tokens=8192),
    *_hybrid_ep("dispatch", "fp8", {2: 882, 4: 1977, 8: 3424}),
    *_hybrid_ep("dispatch", "bf16", {2: 1524, 4: 3679, 8: 6125}),
    *_hybrid_ep("combine", "bf16", {2: 1722, 4: 3693, 8: 6067}),
    *_series("DeepEP V1, H200 (issue 493)", "dispatch", "bf16", {2: 2862}),
    *_series("DeepEP V1, H200 (issue 493)", "combine", "bf16", {2: 2638}),
    *_series("UCCL-EP, p5en", "dispatch", "fp8", {2: 1196, 4: 2022}),
    *_series("UCCL-EP, p5en", "combine", "bf16", {2: 6379, 4: 4899}),
    *_series("UCCL-EP, p6-b200", "dispatch", "fp8", {2: 1141, 4: 2072}, nvlink_gb_per_s=B200_NVLINK),
    *_series("UCCL-EP, p6-b200", "combine", "bf16", {2: 1965, 4: 3724}, nvlink_gb_per_s=B200_NVLINK),
)  # yapf: disable

# Low latency, 128 tokens: by source and number of nodes.
LOW_LATENCY = {
    "DeepEP V1, H800": {2: "118 / 195", 4: "155 / 273", 8: "173 / 314"},
    "pplx-garden, CX7": {2: "110 / 186", 4: "154 / 266", 8: "188 / 309"},
}  # yapf: disable
