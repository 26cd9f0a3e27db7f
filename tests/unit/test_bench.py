"""What the benchmark counts and writes. Its times are nobody's to check."""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from deep_ep.bench.__main__ import command_of, int_list
from deep_ep.bench.low_latency import row_bytes
from deep_ep.bench.results import Report, Row, format_table, save
from deep_ep.bench.routing import ROUTINGS, Shape, busiest_remote_copies, choose_experts, count_copies


def make_shape(routing: str = "uniform", num_ranks: int = 4) -> Shape:
    return Shape(num_ranks=num_ranks, num_tokens=50, hidden=128, num_topk=4, num_experts=16, routing=routing)


def make_row(**changes: object) -> Row:
    row = Row(operation="dispatch BF16",
              num_tokens=8,
              hidden=128,
              num_topk=2,
              num_experts=4,
              routing="uniform",
              num_sms=4,
              chained_us=10.0,
              fresh_us=20.0,
              chained_p95_us=11.0,
              fresh_p95_us=21.0,
              remote_bytes=1_000_000,
              ceiling_gb_per_s=200.0)
    return replace(row, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_copies_are_one_per_token_and_distinct_rank(routing: str) -> None:
    shape = make_shape(routing)
    copies = count_copies(shape, seed=3)
    for source in range(shape.num_ranks):
        expected = [0] * shape.num_ranks
        for experts in choose_experts(shape, source, seed=3).tolist():
            for rank in {expert // shape.num_local_experts for expert in experts if expert >= 0}:
                expected[rank] += 1
        assert copies[source].tolist() == expected


def test_routings_differ_in_what_they_are_named_for() -> None:
    hot = count_copies(make_shape("hot-rank"), seed=0).sum(0)
    assert hot.argmax() == 0
    assert hot[0] > 1.2 * hot[1:].max()
    assert (choose_experts(make_shape("dropped"), 0, seed=0) == -1).any()
    assert (choose_experts(make_shape("uniform"), 0, seed=0) >= 0).all()


def test_busiest_copies_look_at_both_directions_and_leave_out_a_rank_s_own() -> None:
    assert busiest_remote_copies(torch.tensor([[9, 1], [2, 9]])) == 2
    assert busiest_remote_copies(torch.tensor([[0, 5, 0], [0, 0, 0], [0, 5, 0]])) == 10
    assert busiest_remote_copies(torch.tensor([[7]])) == 0


def test_rates_follow_from_bytes_and_the_chained_time() -> None:
    row = make_row()
    assert row.remote_gb_per_s == pytest.approx(100.0)
    assert row.share_of_ceiling == pytest.approx(0.5)
    assert make_row(ceiling_gb_per_s=0.0).share_of_ceiling == 0
    assert "0.50" in format_table([row])


def test_the_recorded_command_does_not_say_where_the_figures_went() -> None:
    arguments = ["intranode", "--tokens", "8,16", "--save", "/somewhere", "--commit", "abc", "--graphs", "--save"]
    assert command_of(arguments) == "python -m deep_ep.bench intranode --tokens 8,16 --graphs"


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "1.5"])
def test_a_list_of_numbers_is_checked(text: str) -> None:
    with pytest.raises(Exception, match="expected"):
        int_list(text)


def test_a_saved_report_says_what_it_was(tmp_path: Path) -> None:
    report = Report("intranode", "python -m deep_ep.bench", "cpu", num_ranks=2, num_devices=0, rows=[make_row()])
    content = json.loads(save(report, tmp_path, commit="abc").read_text(encoding="utf-8"))
    assert content["commit"] == "abc"
    assert content["rows"][0]["share_of_ceiling"] == 0.5
    assert {"date", "command", "machine", "notices", "num_ranks"} <= content.keys()
    assert "nothing about the speed of a GPU" in content["notices"][0]


def test_ranks_that_share_a_gpu_are_pointed_out() -> None:
    report = Report("intranode", "", "cuda", num_ranks=4, num_devices=1)
    assert "share 1 GPU" in report.notices[0]
    assert Report("intranode", "", "cuda", num_ranks=4, num_devices=4).notices == []


def test_low_latency_rows_are_counted_as_they_are_sent() -> None:
    assert [row_bytes(name, 7168) for name in ("FP8", "BF16", "logfmt")] == [7392, 14336, 9408]


def test_the_low_latency_benchmark_runs_on_the_cpu(tmp_path: Path) -> None:
    sizes = [
        "--tokens", "1,4", "--hidden", "128", "--experts", "4", "--topk", "2", "--repeats", "1", "--input-sets", "1"
    ]
    command = [sys.executable, "-m", "deep_ep.bench", "low-latency", "--device", "cpu", "--num-processes", "2"]
    finished = subprocess.run([*command, *sizes, "--save", str(tmp_path)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    content = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    assert content["benchmark"] == "low-latency"
    names = [f"{call}{phase}" for call in ("dispatch FP8", "dispatch BF16", "combine BF16", "combine logfmt")
             for phase in ("", " send", " receive")]  # yapf: disable
    assert [(row["num_tokens"], row["operation"]) for row in content["rows"]] == [(t, n) for t in (1, 4) for n in names]
    assert all(row["chained_us"] > 0 for row in content["rows"])


@pytest.mark.slow
def test_the_benchmark_runs_on_the_cpu(tmp_path: Path) -> None:
    sizes = ["--tokens", "8", "--hidden", "128", "--experts", "4", "--topk", "2", "--repeats", "1", "--input-sets", "1"]
    command = [sys.executable, "-m", "deep_ep.bench", "intranode", "--device", "cpu", "--num-processes", "2"]
    finished = subprocess.run([*command, *sizes, "--save", str(tmp_path)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    content = json.loads(next(tmp_path.glob("*.json")).read_text(encoding="utf-8"))
    assert [row["operation"] for row in content["rows"]] == [
        "layout", "dispatch BF16", "dispatch BF16 cached", "dispatch BF16 worst case", "dispatch FP8",
        "dispatch FP8 cached", "dispatch FP8 worst case", "combine BF16"
    ]
    assert all(row["chained_us"] > 0 and row["fresh_us"] > 0 for row in content["rows"])
    assert "combine BF16" in finished.stdout
