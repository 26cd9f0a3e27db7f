"""A picture of a saved report, beside its JSON."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NO_MATPLOTLIB = (
    "no plot: matplotlib is not installed here; where it is, `tools/render_benchmarks.py --plots` makes it "
    "from the JSON")
WIDTH, HEIGHT, DPI = 13.0, 5.2, 110
OTHERS = ("nccl", "gloo")
# Variants that would hide the others.
LEFT_OUT = ("bias", "weights", "graph", "send", "receive")


def plot_file(path: Path) -> str:
    """Writes PATH with .png for .json; says what it did, or why it could not."""
    try:
        import matplotlib as mpl
    except ImportError:
        return NO_MATPLOTLIB
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    report = json.loads(path.read_text(encoding="utf-8"))
    if not report["rows"]:
        return "no plot: there are no figures"
    figure, (times, rates) = plt.subplots(1, 2, figsize=(WIDTH, HEIGHT))
    draw_times(times, report)
    draw_rates(rates, report)
    machine = report["machine"].get("gpu", "CPU executor")
    how = ", as threads of one GPU" if report["ranks_as_threads"] else ""
    figure.suptitle(f"{report['benchmark']}, {report['num_ranks']} ranks{how}, {machine}, {report['date'][:10]}")
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=DPI)
    plt.close(figure)
    return f"plotted {picture}"


def device_us(row: dict[str, Any]) -> float:
    return float(row.get("queued_us") or row["chained_us"])


def is_drawn(row: dict[str, Any]) -> bool:
    return row["routing"] == "uniform" and not set(LEFT_OUT) & set(row["operation"].split())


def draw_times(axes: Any, report: dict[str, Any]) -> None:
    """Time over tokens, with the largest SM budget."""
    most_sms = max(row["num_sms"] for row in report["rows"])
    rows = [row for row in report["rows"] if is_drawn(row) and row["num_sms"] in (0, most_sms)]
    for name in dict.fromkeys(row["operation"] for row in rows):
        line = sorted((row["num_tokens"], device_us(row)) for row in rows if row["operation"] == name)
        axes.plot(*zip(*line), marker="o", markersize=3, linestyle=":" if name.startswith(OTHERS) else "-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens per rank", ylabel="µs")
    axes.set_title(f"time, {most_sms} SMs" if most_sms else "time")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=6)


def draw_rates(axes: Any, report: dict[str, Any]) -> None:
    """Remote GB/s, over SM budgets where there are several, else over tokens; the ceiling beside."""
    most_tokens = max(row["num_tokens"] for row in report["rows"])
    has_budgets = len({row["num_sms"] for row in report["rows"] if row["num_sms"]}) > 1
    over = "num_sms" if has_budgets else "num_tokens"
    rows = [
        row for row in report["rows"] if is_drawn(row) and row["remote_bytes"] and (
            not has_budgets or (row["num_tokens"] == most_tokens and row["num_sms"]))
    ]
    for name in dict.fromkeys(row["operation"] for row in rows):
        line = sorted((row[over], row["remote_gb_per_s"]) for row in rows if row["operation"] == name)
        axes.plot(*zip(*line), marker="o", markersize=3, label=name)
    ceiling = sorted({(row[over], row["ceiling_gb_per_s"]) for row in rows if row["ceiling_gb_per_s"]})
    if ceiling:
        axes.plot(*zip(*ceiling), color="black", linestyle="--", label="wire ceiling")
    axes.set(xlabel="SMs" if has_budgets else "tokens per rank", ylabel="remote GB/s", ylim=(0, None))
    if not has_budgets:
        axes.set_xscale("log")
    axes.set_title(f"rate, {most_tokens} tokens" if has_budgets else "rate")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=6)
