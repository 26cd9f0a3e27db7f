"""What the documents show of the recorded runs."""
from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

TOOLS = ROOT / "tools"


@pytest.fixture(scope="module")
def render() -> Any:
    sys.path.insert(0, str(TOOLS))  # its neighbours
    spec = importlib.util.spec_from_file_location("render_benchmarks", TOOLS / "render_benchmarks.py")
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
    assert "(../../benchmarks/results/run.png)" in render.render_results(tmp_path)


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


def test_the_list_of_runs_leads_to_their_records(render: Any, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(make_report()), encoding="utf-8")
    (tmp_path / "checks").mkdir()
    record = make_report(machine={"gpu": "NVIDIA H200", "num_gpus": 1})
    (tmp_path / "checks" / "a.json").write_text(json.dumps(record), encoding="utf-8")
    index = render.render_index(tmp_path)
    link = "[JSON](../../benchmarks/results/run.json)"
    assert f"| intranode: 2 ranks, NVIDIA H200 | 2026-01-02 | {link} |" in index
    assert "| check: 2 ranks, 1 x NVIDIA H200 | 2026-01-02 | [JSON](../../benchmarks/results/checks/a.json) |" in index


def test_older_files_are_still_read(render: Any) -> None:
    report = make_report()
    for name in ("host", "profiles"):
        del report[name]
    del report["rows"][0]["queued_us"]
    assert "| 200 | 230 | \u2013 |" in "\n".join(render.render_report("run.json", report, has_plot=False))


def test_the_documents_say_what_the_files_say(render: Any) -> None:
    wanted = render.wanted_files()
    assert [path.name for path in wanted] == ["figures.md", "README.md", "side_by_side.svg"]
    stale = [path.name for path, content in wanted.items() if path.read_text(encoding="utf-8") != content]
    assert not stale, "run tools/render_benchmarks.py"


@pytest.mark.parametrize(("name", "figure"), [("FIGURES", "349"), ("README", "349"), ("PICTURE", "349")])
def test_an_edited_figure_is_noticed_and_mended(render: Any, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str], name: str, figure: str,
                                                tmp_path: Path) -> None:
    monkeypatch.setattr(render, "ROOT", tmp_path)
    for kind in ("FIGURES", "README", "PICTURE"):
        original: Path = getattr(render, kind)
        monkeypatch.setattr(render, kind, tmp_path / original.name)
        (tmp_path / original.name).write_text(original.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(render, "RESULTS", tmp_path / "benchmarks" / "results")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "results").symlink_to(ROOT / "benchmarks" / "results")
    edited = tmp_path / getattr(render, name).name
    content = edited.read_text(encoding="utf-8")
    assert figure in content
    edited.write_text(content.replace(figure, "350"), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["render_benchmarks.py", "--check"])
    assert render.main() == 1
    assert f"{edited.name} is out of date" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["render_benchmarks.py"])
    assert render.main() == 0
    assert edited.read_text(encoding="utf-8") == content


# Beside other libraries


def make_libraries() -> dict[str, Any]:
    fields = ("library", "op", "sms", "kernel_us", "event_us")
    figures = [
        ("v1", "dispatch_bf16_cached", 16, 500.0, 510.0),
        ("v1", "dispatch_bf16_cached", 16, 520.0, 530.0),
        ("v2", "dispatch_bf16_cached", 16, 150.0, 160.0),
        ("ncclep", "dispatch_bf16_worst", 16, 1.0, 523.0),
        ("ncclep", "dispatch_bf16_cached", 24, 9.0, 9.0),
    ]
    return {
        "date": "2026-01-03",
        "machine": "2 x NVIDIA H200, NVLink",
        "work": "as ours",
        "columns": "kernel_us: kernels",
        "libraries": {"v1": "built so", "ours": "not shown"},
        "figures": [{"mode": "ht"} | dict(zip(fields, figure)) for figure in figures]
    }  # yapf: disable


@pytest.fixture
def beside(render: Any, tmp_path: Path) -> Any:
    """What is found beside `make_libraries` among the given reports."""
    (tmp_path / "libraries").mkdir()
    (tmp_path / "libraries" / "others.json").write_text(json.dumps(make_libraries()), encoding="utf-8")
    return lambda *reports: render.find_sources(tmp_path / "libraries", [(f"{i}.json", report)
                                                                         for i, report in enumerate(reports)])


def profile(us: float) -> dict[str, Any]:
    return {"operation": "dispatch BF16 cached", "num_tokens": 4096, "routing": "uniform", "num_sms": 16, "span_us": us,
            "kernels": []}  # yapf: disable


def test_our_newest_runs_on_that_machine_stand_beside_the_others(render: Any, beside: Any) -> None:
    lending = {
        "environment": {
            "DEEP_EP_LEND_BYTES": "1024"
        },
        "profiles": [profile(140.0)],
        "rows": [make_row(operation="layout")]
    }
    row = make_row(operation="dispatch BF16 cached", remote_bytes=60_000_000, ceiling_gb_per_s=400.0)
    fresh = make_row(chained_us=390.0)
    old, new = make_report(profiles=[profile(170.0)]), make_report(profiles=[profile(185.0)],
                                                                   rows=[row, fresh],
                                                                   environment={"DEEP_EP_LEND_BYTES": "automatic"},
                                                                   date="2026-02-02",
                                                                   commit="abcdef123456")
    elsewhere = make_report(profiles=[profile(1.0)], date="2026-03-03", machine={"gpu": "NVIDIA H100"})
    threads = make_report(profiles=[profile(1.0)], date="2026-03-03", ranks_as_threads=True, num_devices=1)
    otherwise = make_report(profiles=[profile(1.0)], date="2026-03-03", environment={"DEEP_EP_NUM_SMS": "16"})
    reports = (new, old, elsewhere, threads, make_report(**lending), otherwise)
    page = render.render_readme(beside(*reports), "results")
    assert "| BF16 dispatch, cached | 16 | 510 | 150 | \u2013 | 185 | **140** | 150 |" in page
    assert "| BF16 dispatch, fresh | 16 | \u2013 | \u2013 | 523 | **390** | \u2013 | \u2013 |" in page
    assert "[as callers get it](results/0.json) (2026-02-02, commit abcdef1)" in page
    assert "[the others](results/libraries/others.json) (2026-01-03)" in page
    assert "2 x NVIDIA H200" in page


def test_newer_runs_elsewhere_have_a_table_of_their_own(render: Any, beside: Any) -> None:
    ours = make_report(profiles=[profile(170.0)])
    newer = make_report(profiles=[profile(1.5)], date="2026-03-03", machine={"gpu": "NVIDIA H100"})
    table, _, rest = render.render_readme(beside(ours, newer), "results").partition("Newer kernels")
    assert "on 2 x NVIDIA H100" in rest
    assert "| BF16 dispatch, cached | 16 | 1.5 | \u2013 |" in rest
    assert "(results/1.json) (2026-03-03" in rest
    assert "| 1.5 |" not in table
    older = newer | {"date": "2025-03-03"}
    threads = make_report(profiles=[profile(1.5)], date="2026-03-03", ranks_as_threads=True, num_devices=1)
    assert "Newer kernels" not in render.render_readme(beside(ours, older, threads), "results")


def test_the_best_figure_is_bold_also_when_another_library_has_it(render: Any, beside: Any) -> None:
    page = render.render_readme(beside(make_report(profiles=[profile(185.0)])), "results")
    assert "| 510 | **150** | \u2013 | 185 | \u2013 |" in page


def test_what_was_not_measured_is_not_made_up(render: Any, beside: Any) -> None:
    page = render.render_readme(beside(), "results")
    assert "| BF16 combine | 16 | \u2013 | \u2013 | \u2013 | \u2013 | \u2013 | \u2013 |" in page
    assert render.find_sources(Path("nowhere"), []) is None


def test_the_page_has_every_figure_of_the_others(render: Any, beside: Any) -> None:
    section = "\n".join(render.render_section(beside(make_report())))
    assert "- `v1`: built so" in section
    assert "| dispatch_bf16_cached | 16 | 510 |" in section
    assert "| dispatch_bf16_worst | 16 | \u2013 |" in section


def test_the_plot_has_the_figures_of_the_table(render: Any) -> None:
    sources = render.find_sources(render.RESULTS / "libraries", render.read_reports(render.RESULTS))
    table, plot = render.render_readme(sources, "").partition("Newer kernels")[0], render.draw(sources)
    rows = [
        line for line in table.splitlines() if line.startswith(("| FP8 dispatch, cached | 16", "| BF16 combine | 16"))
    ]
    assert len(rows) == 2
    for cell in (cell.strip(" *") for row in rows for cell in row.split("|")[3:-1]):
        assert f">{cell}<" in plot or f"wire floor {cell}<" in plot
