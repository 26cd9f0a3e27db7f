"""What docs/benchmarks.md shows of the recorded runs."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def render() -> Any:
    spec = importlib.util.spec_from_file_location("render_benchmarks", ROOT / "tools" / "render_benchmarks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_row(**changes: Any) -> dict[str, Any]:
    row = {
        "operation": "dispatch BF16",
        "num_tokens": 4096,
        "hidden": 7168,
        "num_topk": 8,
        "num_experts": 256,
        "routing": "uniform",
        "num_sms": 16,
        "chained_us": 200.0,
        "fresh_us": 230.4,
        "queued_us": 190.0,
        "remote_bytes": 58_000_000,
        "remote_gb_per_s": 305.0,
        "ceiling_gb_per_s": 340.0,
        "share_of_ceiling": 0.897
    }
    return row | changes


def make_report(**changes: Any) -> dict[str, Any]:
    report = {
        "benchmark":
        "intranode",
        "date":
        "2026-01-02T03:04:05+00:00",
        "commit":
        "abc",
        "command":
        "python -m deep_ep.bench intranode",
        "machine": {
            "gpu": "NVIDIA H200",
            "torch": "2.11"
        },
        "num_ranks":
        2,
        "num_devices":
        2,
        "ranks_as_threads":
        False,
        "notices": [],
        "rows": [make_row()],
        "host": [{
            "operation": "combine BF16",
            "cpu_us": 10.0,
            "wall_us": 12.0,
            "waited_us": 0.0
        }],
        "profiles": [{
            "operation": "dispatch BF16 cached",
            "num_tokens": 4096,
            "routing": "uniform",
            "num_sms": 16,
            "span_us": 185.0,
            "kernels": [{
                "name": "dispatch",
                "num_blocks": 16,
                "us": 185.0
            }]
        }]
    }
    return report | changes


def test_the_newest_run_of_each_kind_is_shown(render: Any) -> None:
    old, new = make_report(commit="old"), make_report(commit="new", date="2026-02-02T03:04:05+00:00")
    four, threads = make_report(num_ranks=4, num_devices=4), make_report(ranks_as_threads=True, num_devices=1)
    lending = make_report(environment={"DEEP_EP_LEND_BYTES": "1024", "NCCL_DEBUG": "WARN"})
    shown = render.newest([("d", new), ("a", old), ("b", four), ("c", threads), ("e", lending)])
    assert sorted(name for name, _ in shown) == ["b", "c", "d", "e"]
    page = render.render_report("e", lending, has_plot=False)
    assert "    DEEP_EP_LEND_BYTES=1024 python -m deep_ep.bench intranode" in page


def test_a_page_has_the_figures_of_a_short_run(render: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(make_report(notices=["mind this"])), encoding="utf-8")
    page = render.render_results(tmp_path)
    assert "| dispatch BF16 | 4096 | 16 | 200 | 230 | 190 | 58 | 305 | 340 | 0.90 |" in page
    assert "| combine BF16 | 10.0 | 12.0 | \u2013 |" in page
    assert "dispatch: 16 SMs 185.0" in page
    assert "**mind this**" in page
    assert "run.png" not in page
    (tmp_path / "run.png").touch()
    assert "(../benchmarks/results/run.png)" in render.render_results(tmp_path)


def test_a_sweep_is_cut_to_what_can_be_read(render: Any, tmp_path: Path) -> None:
    rows = [
        make_row(num_tokens=tokens, num_sms=sms, routing=routing, operation=f"operation {i}")
        for tokens in (1, 512, 4096, 8192) for sms in (4, 8, 16, 24) for routing in ("uniform", "hot-rank")
        for i in range(10)
    ]
    report = make_report(rows=rows)
    shown = render.select_rows(report)
    assert len(shown) <= render.MOST_ROWS
    assert {row["num_tokens"] for row in shown} == {4096}
    assert {row["num_sms"] for row in shown} == {4, 8, 16, 24}
    assert {row["num_sms"] for row in shown if row["routing"] == "hot-rank"} == {16}
    (tmp_path / "run.json").write_text(json.dumps(report), encoding="utf-8")
    assert f"{len(shown)} of {len(rows)} rows" in render.render_results(tmp_path)


def test_checks_are_shown_with_what_their_programs_said(render: Any, tmp_path: Path) -> None:
    steps = [{"step": "pytest", "seconds": 9, "result": "FAIL: exit status 1", "verdicts": ["1 failed in 8 s"]},
             {"step": "pressure", "seconds": None, "result": "not run: no time left", "verdicts": []}]  # yapf: disable
    record = make_report(steps=steps, command="first; second", machine={"gpu": "NVIDIA H200", "num_gpus": 1})
    (tmp_path / "checks").mkdir()
    (tmp_path / "checks" / "a.json").write_text(json.dumps(record), encoding="utf-8")
    page = render.render_results(tmp_path)
    assert "- pytest (9 s): FAIL: exit status 1\n  - `1 failed in 8 s`\n- pressure: not run: no time left\n" in page
    assert "    first\n    second\n" in page
    assert "2 ranks, 1 x NVIDIA H200" in page


def test_older_files_are_still_read(render: Any) -> None:
    report = make_report()
    for name in ("host", "profiles"):
        del report[name]
    del report["rows"][0]["queued_us"]
    assert "| 200 | 230 | \u2013 |" in "\n".join(render.render_report("run.json", report, has_plot=False))


def test_the_page_says_what_the_files_say(render: Any) -> None:
    page = render.PAGE.read_text(encoding="utf-8")
    assert page == render.replace_between_markers(page, render.render_results(render.RESULTS))
