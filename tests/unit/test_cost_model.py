"""The cost model: what is fitted, what follows from it, and who has a say."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pending_call import PendingCall
from single_rank import single_rank_buffer, single_rank_dispatch
from utils import Pool, Worker, device
from workload import Workload

import deep_ep
from deep_ep import Buffer, Config, _env, calibrate
from deep_ep.__main__ import main
from deep_ep._high_throughput import copies_per_token
from deep_ep.calibrate import Cost, CostModel, Sample, default_path, find, fit, load, store

HIDDEN = 7168
LINK = 340.0


def planted(cost: Cost, noise: float, seed: int = 0) -> list[Sample]:
    generator = random.Random(seed)  # noqa: S311 - reproducible
    samples = []
    for num_sms in (4, 8, 16, 24):
        for num_tokens in (128, 1024, 8192):
            num_bytes = num_tokens * HIDDEN * 4
            time_us = cost.time_us(num_sms, num_bytes, num_bytes // 2) * (1 + generator.uniform(-noise, noise))
            samples.append(Sample(num_sms, num_bytes, num_bytes // 2, time_us))
    return samples


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize("planted_cost", [Cost(12.0, LINK, 45.0), Cost(3.0, LINK, 20.0), Cost(5000.0, 0.0, 0.01)])
def test_a_fit_finds_what_was_planted(planted_cost: Cost, noise: float) -> None:
    found = fit(planted(planted_cost, noise), planted_cost.link_gb_per_s)
    assert found.sm_gb_per_s == pytest.approx(planted_cost.sm_gb_per_s, rel=0.03 + noise)
    assert found.latency_us == pytest.approx(planted_cost.latency_us, rel=0.2, abs=2 + 100 * noise)


def test_a_fit_needs_two_budgets_and_two_sizes() -> None:
    with pytest.raises(deep_ep.InvalidArgument, match="two SM budgets and two sizes"):
        fit([Sample(4, 100, 50, 1.0), Sample(4, 200, 100, 2.0)], 0.0)


def test_budgets_are_enough_and_no_more() -> None:
    cost = Cost(10.0, LINK, 45.0)
    for num_tokens in (1, 16, 128, 512, 2048, 8192):
        num_bytes = num_tokens * HIDDEN * 4
        chosen = cost.enough_sms(24, num_bytes, num_bytes / 2)
        fastest = cost.time_us(24, num_bytes, num_bytes / 2)
        assert chosen % 2 == 0
        assert cost.time_us(chosen, num_bytes, num_bytes / 2) <= 1.05 * fastest
        assert chosen == 2 or cost.time_us(chosen - 2, num_bytes, num_bytes / 2) > 1.05 * fastest
    assert cost.enough_sms(24, HIDDEN, HIDDEN / 2) == 2, "one token needs no SMs to speak of"
    assert 14 <= cost.enough_sms(24, 1 << 30, 1 << 29) <= 16, "340 GB/s and as much for the own rank, at 45 GB/s an SM"
    assert cost.enough_sms(8, 1 << 30, 1 << 29) == 8, "never more than the caller allows"


def test_copies_per_token() -> None:
    assert copies_per_token(2, 8) == pytest.approx(1.99, abs=0.01)
    assert copies_per_token(8, 8) == pytest.approx(5.25, abs=0.01)
    assert copies_per_token(1, 8) == 1


def test_a_model_survives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "model.json"
    slots, lent = (CostModel({
        "dispatch": Cost(1.0, 2.0, rate),
        "combine": Cost(4.0, 5.0, rate)
    }) for rate in (3.0, 6.0))
    store(path, "slots", slots, {"commit": "abc"})
    store(path, "lent", lent, {})
    found = [load(path, way) for way in ("slots", "lent", "neither")]
    assert [model and model.costs for model in found] == [slots.costs, lent.costs, None]


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"format": 1}', '{"format": 9, "models": {}}',
    '{"format": 1, "models": {"slots": {"costs": {"dispatch": {"speed": 3}}}}}',
    '{"format": 1, "models": {"slots": {"costs": {"dispatch": {"latency_us": 1, "link_gb_per_s": 0,"sm_gb_per_s":0}}}}}'
])  # yapf: disable
def test_a_file_that_is_no_model_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(deep_ep.InvalidArgument, match=str(path)):
        load(path, "slots")


def test_where_a_model_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert find("NVIDIA H200", 4, "slots") is None
    model = CostModel({"dispatch": Cost(1.0, 2.0, 3.0)})
    path = default_path("NVIDIA H200", 4)
    assert path == tmp_path / "deep_ep" / "cost_model_nvidia-h200_x4.json"
    store(path, "slots", model, {})
    found = find("NVIDIA H200", 4, "slots")
    assert found is not None
    assert found.costs == model.costs
    assert find("NVIDIA H200", 2, "slots") is None
    assert find("NVIDIA B200", 4, "slots") is None


def report(cost: Cost, environment: dict[str, str]) -> dict[str, Any]:
    rows = [{
        "operation": operation,
        "routing": "uniform",
        "num_sms": sample.num_sms,
        "remote_bytes": sample.remote_bytes,
        "queued_us": sample.time_us,
        "chained_us": 2 * sample.time_us,
        "ceiling_gb_per_s": LINK
    } for sample in planted(cost, 0.0) for operation in ("dispatch BF16 cached", "combine BF16", "layout")]
    return {
        "benchmark": "intranode", "num_ranks": 2, "ranks_as_threads": False, "rows": rows, "environment": environment,
        "date": "today", "commit": "abc", "command": "bench", "machine": {"gpu": "NVIDIA H200"}
    }  # yapf: disable


@pytest.mark.parametrize(("environment", "way"), [({}, "slots"), ({"DEEP_EP_LEND_BYTES": "1024"}, "lent")])
def test_calibrate_stores_what_a_report_says(tmp_path: Path, environment: dict[str, str], way: str) -> None:
    (tmp_path / "report.json").write_text(json.dumps(report(Cost(12.0, LINK, 45.0), environment)))
    to = tmp_path / "model.json"
    assert main(["calibrate", str(tmp_path / "report.json"), "--to", str(to)]) == 0
    model = load(to, way)
    assert model is not None
    for operation in ("dispatch", "combine"):
        assert model.costs[operation].sm_gb_per_s == pytest.approx(45.0, rel=0.02)
        assert model.costs[operation].link_gb_per_s == LINK
    assert load(to, "lent" if way == "slots" else "slots") is None


@pytest.mark.parametrize(("heap", "environment"), [("host", {}), ("", {"DEEP_EP_HEAP": "host"})])
def test_a_heap_in_host_memory_has_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str], heap: str,
                                            environment: dict[str, str]) -> None:
    """Also where nobody asked for one: the GPUs do not reach each other."""
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report(Cost(12.0, LINK, 45.0), environment) | {"heap": heap}))
    assert main(["calibrate", str(path), "--to", str(tmp_path / "model.json")]) == 1
    assert "a heap in host memory (DEEP_EP_HEAP=host" in capsys.readouterr().err


def test_calibrate_names_a_report_that_will_not_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"benchmark": "low-latency"}))
    assert main(["calibrate", str(path)]) == 1
    assert f"{path}: expected figures of the intranode benchmark, got 'low-latency'" in capsys.readouterr().err


# What a Buffer does with it


def budgets(worker: Worker) -> list[int]:
    """The SMs that calls of growing size are launched with, then those of a call with a config."""
    with worker.new_buffer(1 << 20) as buffer:
        seen: list[int] = []
        native = buffer.runtime

        class Spy:

            def __getattr__(self, name: str) -> Any:
                return getattr(native, name)

            def dispatch(self, *args: Any) -> None:
                seen.append(args[-2])
                native.dispatch(*args)

            def combine(self, *args: Any) -> None:
                seen.append(args[-2])
                native.combine(*args)

        buffer._session.runtime, buffer._session.direct = Spy(), None
        for num_tokens, config in ((1, None), (64, None), (1024, None), (64, Config(6, 4, 8))):
            # Every token goes to all four experts, and so to both ranks.
            pending = PendingCall(worker, buffer, Workload((num_tokens, ) * 2,
                                                           hidden=64,
                                                           num_topk=4,
                                                           experts_per_rank=2))
            pending.config = config
            pending.whole_trip()
        buffer._session.runtime = native
    return seen


def model_file(folder: Path) -> str:
    # 64 tokens are 16 KiB of rows on two ranks: a microsecond on 16 SMs at 1 GB/s each, beside a latency of 16.
    store(folder / "model.json", "slots", CostModel(dict.fromkeys(("dispatch", "combine"), Cost(16.0, 0.0, 1.0))), {})
    return str(folder / "model.json")


def run_budgets(environment: dict[str, str]) -> list[list[int]]:
    pool = Pool(2, environment)
    try:
        return pool.run(budgets, 2)
    finally:
        pool.close()


def test_small_calls_take_fewer_sms(tmp_path: Path) -> None:
    for seen in run_budgets({"DEEP_EP_COST_MODEL": model_file(tmp_path)}):
        assert seen[0] == seen[1] == 2
        assert 2 < seen[2] < seen[4] <= Buffer.num_sms
        assert seen[6:] == [6, 6], "a config is the caller's word"


def test_without_a_model_the_budget_is_the_callers(tmp_path: Path) -> None:
    off = {"DEEP_EP_COST_MODEL": "off", "XDG_CACHE_HOME": str(tmp_path)}
    fixed = {"DEEP_EP_COST_MODEL": model_file(tmp_path), "DEEP_EP_NUM_SMS": "4"}
    assert run_budgets(off) == [[Buffer.num_sms] * 6 + [6, 6]] * 2
    assert run_budgets(fixed) == [[4] * 8] * 2


# A cache is no reason to fail

STRINGS = b'{"latency_us": "1", "link_gb_per_s": "1", "sm_gb_per_s": "1"}'
DAMAGED = [
    b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 1, "models": []}',
    b'{"format": 1, "models": {"slots": 3}}',
    b'{"format": 1, "models": {"slots": {"costs": {"dispatch": ' + STRINGS + b"}}}}",
]  # yapf: disable


def this_gpu() -> str:
    return torch.cuda.get_device_name() if device().type == "cuda" else ""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that a Buffer of one rank on this machine looks for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = default_path(this_gpu(), 1)
    assert path is not None
    path.parent.mkdir()
    return path


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_cache_costs_one_warning(cache: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    cache.write_bytes(content)
    for _ in range(2):
        single_rank_dispatch(single_rank_buffer())
    assert [str(cache) in record.getMessage() for record in caplog.records] == [True]


def test_a_damaged_file_that_the_caller_names_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("{")
    monkeypatch.setattr(_env, "cost_model", lambda: str(cache))
    with pytest.raises(deep_ep.InvalidArgument, match=str(cache)):
        single_rank_buffer()


def test_a_cache_that_may_not_be_read_costs_one_warning(cache: Path, monkeypatch: pytest.MonkeyPatch,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    """HOME=/root under another user. (Tests may run as root, whom nothing stops.)"""

    def refuse(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", refuse)
    for _ in range(2):
        assert find(this_gpu(), 1, "slots") is None
    assert [str(cache) in record.getMessage() for record in caplog.records] == [True]


HOMELESS = """
import os, sys
sys.path[:0] = sys.argv[1:]
import single_rank
os.setgroups([])
os.setuid(54321)
for home in ({}, {"HOME": "/root"}):
    os.environ.pop("HOME", None)
    os.environ.update(home)
    single_rank.single_rank_dispatch(single_rank.single_rank_buffer())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_a_user_without_a_home_builds_a_buffer(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    ended = subprocess.run(
        [sys.executable, "-c", HOMELESS, str(Path(__file__).parents[1]), *sys.path],
        env={
            **environment, "DEEP_EP_DEVICE": "cpu"
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_model_is_stored_by_rename(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that is cut off leaves the old file, and nothing beside it."""
    model = CostModel({"dispatch": Cost(1.0, 2.0, 3.0)})
    store(cache, "slots", model, {})

    def fail(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="no space"):
            store(cache, "lent", model, {})
    assert load(cache, "slots") is not None
    assert load(cache, "lent") is None
    assert list(cache.parent.iterdir()) == [cache]
    assert cache.stat().st_mode & 0o777 == 0o644


def test_calibrate_mends_the_cache_and_spares_other_files(cache: Path, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("notes")
    content = {**report(Cost(12.0, LINK, 45.0), {}), "num_ranks": 2}
    with pytest.raises(deep_ep.InvalidArgument, match=str(mine)):
        calibrate.calibrate(content, mine)
    assert mine.read_text() == "notes"
    damaged = default_path("NVIDIA H200", 2)
    assert damaged is not None
    damaged.write_text("{")
    assert calibrate.calibrate(content, None)[0] == damaged
    assert load(damaged, "slots") is not None
    monkeypatch.setattr(_env, "cache_folder", lambda: None)
    with pytest.raises(deep_ep.InvalidArgument, match="no home folder"):
        calibrate.calibrate(content, None)
