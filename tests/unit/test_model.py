"""The model of calls: bytes by hand, what bounds a call, its errors, and who uses what it says."""

import json
import math
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import deep_ep_cpp
from deep_ep import _env, _high_throughput, _nvshmem, model
from deep_ep.__main__ import build_parser, main
from deep_ep.model import BF16, COMBINE, DISPATCH, FP8, Links, Nodes, Shape

ROOT = Path(__file__).resolve().parents[2]
TOKENS = Shape(4096, 7168, 8, 256)
FP8_TOKEN = 7168 + 56 * 4 + 4 + 8 * 4 + 8 * 4 + 8 * 4  # row, scales, index, ids, weights, positions of 8 ranks


@pytest.fixture(scope="module")
def page() -> Any:
    sys.path.insert(0, str(ROOT / "tools"))
    import render_model
    return render_model


def test_probabilities_by_hand() -> None:
    # Two of four experts: of the six pairs one misses the two that are asked for.
    assert model.share_reached(4, 2, 2) == pytest.approx(5 / 6)
    assert model.share_reached(4, 4, 1) == 1.0
    shape = Shape(1, 0, 2, 4)
    assert model.distinct_nodes(shape, Nodes(2, 1)) == pytest.approx(2 * 5 / 6)
    # Four ranks of one expert each: both are somewhere, and never on the same.
    assert model.distinct_ranks(shape, Nodes(2, 2)) == pytest.approx(2)
    # One node of two: its two experts are both chosen.
    limited = Shape(1, 0, 2, 4, limit_nodes=1)
    assert model.distinct_nodes(limited, Nodes(2, 2)) == pytest.approx(1)
    assert model.distinct_ranks(limited, Nodes(2, 2)) == pytest.approx(2)


@pytest.mark.parametrize(("num_nodes", "distinct", "payload_mb", "nvlink_mb"), [(2, 1.99, 30.6, 175),
                                                                                (4, 3.61, 83.2, 195),
                                                                                (8, 5.30, 142, 206)])
def test_bytes_are_those_of_the_design(num_nodes: int, distinct: float, payload_mb: float, nvlink_mb: float) -> None:
    """4096 tokens in FP8, uniform top-8 of 256 on nodes of eight: its table, which counts no padding."""
    nodes = Nodes(num_nodes, 8)
    moved = model.traffic(TOKENS, nodes, DISPATCH, FP8, 128 << 10)
    assert model.distinct_nodes(TOKENS, nodes) == pytest.approx(distinct, abs=0.006)
    assert moved.rail_tokens * FP8_TOKEN / 1e6 == pytest.approx(payload_mb, rel=0.002)
    assert moved.nvlink_bytes / 1e6 == pytest.approx(nvlink_mb, rel=0.003)


def test_rail_bytes_are_what_the_engine_is_asked_to_carry() -> None:
    """As tests/cpp/internode/internode_bytes_test.cc counts them, with a flag for each message that has one."""
    nodes, experts = Nodes(3, 8), 192
    moved = model.traffic(Shape(100, 7168, 8, experts), nodes, DISPATCH, FP8, 7552 * 10)
    tokens = 100 * 2 * (1 - math.comb(128, 8) / math.comb(192, 8))
    counts = 16 + 4 * 8 + 4 * 8 * 8
    assert moved.rail_slot == 7552 == -(-FP8_TOKEN // 128) * 128
    chunks = math.ceil(tokens / 10)
    assert moved.rail_bytes == pytest.approx(tokens * 7552 + 2 * (counts + 8) + 2 * 2 * 8 + chunks * 8)
    back = model.traffic(Shape(100, 7168, 8, experts), nodes, COMBINE, FP8, 1 << 20)
    assert back.rail_slot == 14464 == -(-(14336 + 32) // 128) * 128
    assert back.rail_bytes == pytest.approx(tokens * 14464 + 2 * 2 * 8 + math.ceil(tokens * 14464 / (1 << 20)) * 8)
    assert (moved.nvlink_slot, back.nvlink_slot) == (7472, 14368)


def test_one_node_has_no_rail() -> None:
    moved = model.traffic(TOKENS, Nodes(1, 2), DISPATCH, BF16, 1)
    assert moved.rail_bytes == moved.rail_tokens == 0
    # 1.99 ranks of two; one of them is the token's own.
    assert moved.nvlink_bytes / 1e6 == pytest.approx(4096 * 0.9965 * (14336 + 68 + 12) / 1e6, rel=0.001)


def test_a_call_is_bound_by_what_takes_longest() -> None:
    shape, nodes = TOKENS, Nodes(2, 8)
    rail = model.predict(shape, nodes, Links(50.0), DISPATCH, FP8)
    assert rail.bottleneck.name == "rail"
    assert rail.time_us == pytest.approx(30.83e6 / 45e3 + rail.fixed_us, rel=0.001)
    assert rail.fixed_us == pytest.approx(model.NODE_COSTS[DISPATCH].latency_us + 6.5 + 131072 / 45e3 + 131072 / 340e3)
    assert model.predict(shape, nodes, Links(200.0), DISPATCH, FP8, num_sms=20).bottleneck.name == "NVLink"
    few = model.predict(shape, nodes, Links(50.0), DISPATCH, FP8, num_sms=2)
    assert (few.bottleneck.name, few.num_sms) == ("SMs", 2)
    assert few.time_us > 2 * rail.time_us
    assert rail.time_us <= 1.05 * model.predict(shape, nodes, Links(50.0), DISPATCH, FP8,
                                                num_sms=model.MOST_SMS).time_us


def test_the_bound_of_others_is_that_of_the_design() -> None:
    """Section 4 of the design: V1 on H800 with four nodes to choose from, Hybrid-EP with eight experts a rank."""
    v1 = [
        model.two_terms_us(Shape(4096, 7168, 8, 256, 4), Nodes(n, 8), Links(50.0, 160.0), DISPATCH, FP8)
        for n in (2, 4, 8)
    ]
    assert v1 == pytest.approx([1080, 1824, 2137], rel=0.001)
    hybrid = [
        model.two_terms_us(Shape(4096, 7168, 8, 64 * n), Nodes(n, 8), Links(50.0), DISPATCH, FP8) for n in (2, 4, 8)
    ]
    assert hybrid == pytest.approx([671, 1824, 3104], rel=0.001)
    v2 = [model.two_terms_us(Shape(8192, 7168, 8, 256), Nodes(n, 8), Links(50.0), COMBINE, FP8) for n in (2, 4)]
    assert v2 == pytest.approx([2601, 7074], rel=0.001)


def test_low_latency_sends_a_copy_for_each_rank() -> None:
    """Eight far ranks of 16 and seven neighbours: a table with flag and farewell, and rows with flags."""
    shape, nodes = Shape(128, 7168, 8, 256), Nodes(2, 8)
    copies = 128 * model.distinct_ranks(shape, nodes)
    table = 16 + 4 * 256 + 4 * 128 * 8 + 8 + 8
    over_rail, over_nvlink = model.low_latency_bytes(shape, nodes, DISPATCH, FP8, False)
    assert over_rail == pytest.approx(copies / 2 * (7392 + 8) + 8 * table)
    assert over_rail / 1e6 == pytest.approx(3.13, abs=0.005)  # as the protocol's page has it
    assert over_nvlink == pytest.approx(copies * 7 / 16 * (7392 + 8) + 7 * table)
    back, _ = model.low_latency_bytes(shape, nodes, COMBINE, FP8, False)
    assert back == pytest.approx(copies / 2 * (14336 + 8) + 8 * (16 + 2 * 4 * 128 * 8 + 8 + 8))


@pytest.mark.parametrize(("num_nodes", "payload_mb"), [(2, 0.96), (4, 2.61), (8, 4.45)])
def test_low_latency_may_send_a_row_for_each_node(num_nodes: int, payload_mb: float) -> None:
    """As the protocol's page has it, which counts no flags and tables; the other ranks there load it over NVLink."""
    shape, nodes = Shape(128, 7168, 8, 256), Nodes(num_nodes, 8)
    num_far, words = nodes.num_ranks - 8, 16 + 4 * 256 + 4 * 128 * 8 + 8 + 8
    over_rail, over_nvlink = model.low_latency_bytes(shape, nodes, DISPATCH, FP8, True)
    rows = 128 * model.distinct_nodes(shape, nodes) * (num_nodes - 1) / num_nodes
    assert rows * 7492 / 1e6 == pytest.approx(payload_mb, abs=0.02)
    assert over_rail == pytest.approx(rows * 7400 + num_far * words)
    # Whatever a rank gets of others in another node's row, seven times of eight it comes from a neighbour's window.
    assert over_nvlink == pytest.approx(128 * model.distinct_ranks(shape, nodes) * 7 / 8 * 7400 + 7 * words)
    combine = [model.low_latency_bytes(shape, nodes, COMBINE, BF16, shares) for shares in (False, True)]
    assert combine[0] == combine[1]
    alone = [model.low_latency_bytes(shape, Nodes(16, 1), DISPATCH, FP8, shares) for shares in (False, True)]
    assert alone[0] == pytest.approx(alone[1])  # nodes of one rank


KINDS = ("as called", "low latency", "rows through slots")


@pytest.mark.parametrize("kind", KINDS)
def test_errors_inside_a_node_are_below_a_tenth(page: Any, kind: str) -> None:
    _, report = page.fitted(kind)
    compared = page.model_fit.compare(report)
    assert {one.operation for one in compared} >= {"combine BF16"}
    assert max(abs(one.error) for one in compared) <= 0.1, compared


def test_the_sums_of_a_pair_are_lent_where_the_library_does_so() -> None:
    least, most, sms = (_high_throughput.LEAST_SUMS_TOKENS, _high_throughput.MOST_SUMS_TOKENS,
                        _high_throughput.LEAST_SUMS_SMS)  # yapf: disable
    lent = {model.node_cost(COMBINE, 2, *call) for call in ((4096, 16), (least, sms), (most, sms))}
    assert lent == {model.PAIR_COMBINE_COST}
    beyond = {model.node_cost(COMBINE, 2, *call) for call in ((least - 1, sms), (most + 1, sms), (most, sms - 1))}
    assert beyond == {model.NODE_COSTS[COMBINE]}
    slots = {model.node_cost(COMBINE, *other) for other in ((2, 1024, 16), (2, 4096, 8), (2, 4097, 16), (4, 4096, 16))}
    assert slots == {model.NODE_COSTS[COMBINE]}


@pytest.mark.parametrize("kind", KINDS)
def test_constants_are_those_of_a_fit(page: Any, kind: str) -> None:
    assert page.newest(kind)[0] >= page.RECORDS[kind]
    _, report = page.fitted(kind)
    ranks = 0 if kind == "rows through slots" else report["num_ranks"]
    for operation, cost in page.model_fit.measure(report).items():
        used = model.LOW_LATENCY_COSTS[operation] if kind == "low latency" else model.node_cost(
            operation, ranks, 4096, 16)
        assert used.latency_us == pytest.approx(cost.latency_us, abs=0.1)
        assert used.link_share == pytest.approx(cost.link_share, abs=0.01)
        assert used.sm_gb_per_s == pytest.approx(cost.sm_gb_per_s, abs=0.1)


def test_the_page_says_what_the_model_says(page: Any) -> None:
    stale = [path.name for path, content in page.wanted_files().items() if path.read_text(encoding="utf-8") != content]
    assert not stale, "run tools/render_model.py, then tools/render_benchmarks.py --plots"
    assert all(picture.exists() for picture in page.PICTURES.values())


# The command


def parse(*arguments: str) -> Namespace:
    return build_parser().parse_args(["model", *arguments])


def test_the_command_prints_phases_and_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "model.json"
    assert main(["model", "--nic-gbps", "400", "--json", "--save", str(saved)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(saved.read_text())
    assert told["links"]["nic_gb_per_s"] == 50.0
    first = told["predictions"][0]
    assert (first["operation"], first["kind"], first["bottleneck"]) == ("dispatch", "fp8", "rail")
    assert {phase["name"] for phase in first["phases"]} == {"rail", "NVLink", "SMs"}
    assert main(["model", "--nodes", "1"]) == 0
    assert "bound by NVLink" in capsys.readouterr().out
    assert main(["model", "--mode", "low-latency", "--tokens", "128", "--nic-gbps", "400"]) == 0
    assert "all SMs; bound by rail" in capsys.readouterr().out
    whole = []
    for form in ([], ["--row-for-each-node"], ["--engine", "host"]):
        assert main(["model", "--mode", "low-latency", "--tokens", "128", "--nic-gbps", "400", "--json", *form]) == 0
        phases = json.loads(capsys.readouterr().out)["predictions"][0]["phases"]
        whole.append(next(phase["num_bytes"] for phase in phases if phase["name"] == "rail"))
    assert whole[1] == whole[2] < whole[0] / 3


def test_scaling_goes_from_2_to_512_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--scaling", "--nic-gbps", "400", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert sorted({row["num_ranks"] for row in rows}) == [2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert all(row["num_experts"] >= row["num_ranks"] for row in rows)


@pytest.mark.parametrize("arguments", [("--nic-gbps", "0"), ("--nodes", "-1"), ("--engine", "pigeon"),
                                       ("--tokens", "x")])
def test_bad_options_are_refused(arguments: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*arguments)
    assert ended.value.code == 2 and "usage:" in capsys.readouterr().err


def test_experts_must_divide(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "--nodes", "3", "--nic-gbps", "400"]) == 1
    assert "multiple of the 24 ranks" in capsys.readouterr().err
    assert main(["model", "--nodes", "3", "--nic-gbps", "400", "--scaling", "--experts", "384", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["num_experts"] % row["num_ranks"] == 0 and row["num_experts"] >= 384 for row in rows)


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("--nodes", "1", "--topk", "300"), "--topk must be at most the 256 experts"),
    (("--nic-gbps", "400", "--limit-nodes", "1", "--topk", "200"), "--topk must be at most the 128 experts"),
    (("--nodes", "1", "--hidden", "7"), "--hidden must be a multiple of 128"),
    (("--nodes", "1", "--save", "/nonexistent/model.json"), "--save: "),
])
def test_what_cannot_be_predicted_is_a_sentence(arguments: tuple[str, ...], sentence: str,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", *arguments]) == 1
    assert sentence in capsys.readouterr().err


def fake_port(root: Path, device: str, gbps: int, state: str = "4: ACTIVE", bond: str = "") -> None:
    port = root / "infiniband" / device / "ports" / "1"
    (port / "gid_attrs" / "ndevs").mkdir(parents=True)
    (port / "rate").write_text(f"{gbps} Gb/sec (4X NDR)\n")
    (port / "state").write_text(f"{state}\n")
    (port / "link_layer").write_text("Ethernet\n")
    if bond:
        (port / "gid_attrs" / "ndevs" / "0").write_text(f"{bond}\n")


def test_nic_rates_come_from_sysfs_and_bonds_count_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(_env, "RDMA_DEVICES", tmp_path / "infiniband")
    monkeypatch.setattr(_env, "INTERFACES", tmp_path / "net")
    assert _env.nic_gb_per_s() is None
    assert main(["model"]) == 1
    assert "give --nic-gbps" in capsys.readouterr().err
    fake_port(tmp_path, "mlx5_0", 400)
    fake_port(tmp_path, "mlx5_1", 400, state="1: DOWN")
    fake_port(tmp_path, "mlx5_bond_0", 200, bond="bond0")
    for link in ("eth0", "eth1"):
        (tmp_path / "net" / link).mkdir(parents=True)
        (tmp_path / "net" / link / "speed").write_text("200000\n")
    (tmp_path / "net" / "bond0" / "bonding").mkdir(parents=True)
    (tmp_path / "net" / "bond0" / "bonding" / "slaves").write_text("eth0 eth1\n")
    assert _env.nic_gb_per_s() == 100.0  # 400 of mlx5_0 and 2 x 200 of the bond
    assert _env.nic_gb_per_s(["mlx5_0"]) == 50.0
    assert model.links_of(parse("--ranks-per-node", "2")).nic_gb_per_s == 50.0
    assert model.links_of(parse("--ranks-per-node", "2", "--nics", "mlx5_0")).nic_gb_per_s == 25.0
    assert model.links_of(parse("--ranks-per-node", "2", "--nic-gbps", "80")).nic_gb_per_s == 10.0
    # Whose nodes are of eight.
    assert model.links_of(parse("--ranks-per-node", "2", "--scaling")).nic_gb_per_s == 12.5
    assert main(["model", "--nics", "mlx5_0,mlx5_7"]) == 1
    assert "--nics: no RDMA device 'mlx5_7' (this machine has: mlx5_0, mlx5_1, mlx5_bond_0)" in capsys.readouterr().err


# What Buffers take from it


def test_budgets_across_nodes_grow_with_the_call_and_stay_within_the_callers() -> None:
    costs = model.costs_across_nodes(2, 8, 50.0)
    large = round(4096 * model.distinct_ranks(TOKENS, Nodes(2, 8)) * 14336)
    assert model.LEAST_SMS <= costs.budget(COMBINE, 20, large, 16) <= 20
    assert costs.budget(COMBINE, 20, large, 16) == model.predict(TOKENS, Nodes(2, 8), Links(50.0), COMBINE,
                                                                 BF16).num_sms
    assert costs.budget(DISPATCH, 20, large // 4096, 16) == model.LEAST_SMS
    assert costs.budget(DISPATCH, 4, large, 16) == 4


def test_the_rate_of_a_rank_is_that_of_the_slowest_machine() -> None:
    assert _nvshmem.rail_rate("nvshmem", [400.0, 200.0], 8) == 25.0
    assert _nvshmem.rail_rate("nvshmem", [400.0, None], 8) == 0.0
    assert _nvshmem.rail_rate("host", [400.0, 400.0], 8) == 0.0


def test_chunks_of_the_engine_host_have_one_size() -> None:
    assert Links(12.5, engine="host").chunk_bytes == Links(200.0, engine="host").chunk_bytes == 256 << 10
    assert Links(12.5, engine="gpu").chunk_bytes == 64 << 10


def test_chunks_grow_with_the_square_root_of_the_rate() -> None:
    plan = deep_ep_cpp.plan_chunk_bytes
    assert plan(128 << 10, 0.0) == 128 << 10  # unknown: as the engine likes it
    assert plan(128 << 10, 50.0) == 128 << 10
    assert plan(128 << 10, 12.5) == 64 << 10
    assert plan(128 << 10, 200.0) == 256 << 10
    assert plan(128 << 10, 0.01) == 32 << 10
    assert plan(1 << 20, 1e6) == 4 << 20
