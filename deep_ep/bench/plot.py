"""A picture of a saved report, beside its JSON."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

NO_MATPLOTLIB = (
    "no plot: matplotlib is not installed here; where it is, `tools/render_benchmarks.py --plots` makes it "
    "from the JSON")
WIDTH, HEIGHT, DPI = 13.0, 5.2, 110
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
          "#000080", "#ffbb78", "#006400", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#444444")
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
    for axes in (times, rates):
        if axes.get_legend_handles_labels()[0]:  # one rank has no rates
            axes.legend(fontsize=6)
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
    """Time over tokens, with the largest SM budget; of one size over SM budgets, if there are any."""
    rows = [row for row in report["rows"] if is_drawn(row)]
    over = "num_sms" if not is_swept(rows, "num_tokens") and any(row["num_sms"] for row in rows) else "num_tokens"
    title = f"time{at_largest(rows, 'num_sms')}" if over == "num_tokens" else f"time{at_largest(rows, 'num_tokens')}"
    draw(axes, of_largest(rows, over), over, device_us)
    axes.set(ylabel="µs", title=title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def draw_rates(axes: Any, report: dict[str, Any]) -> None:
    """Remote GB/s over SM budgets, of the largest size; of one budget over tokens. The ceiling beside."""
    rows = [row for row in report["rows"] if is_drawn(row) and row["remote_bytes"]]
    over = "num_sms" if is_swept(rows, "num_sms") else "num_tokens"
    title = f"rate{at_largest(rows, 'num_tokens')}" if over == "num_sms" else f"rate{at_largest(rows, 'num_sms')}"
    rows = of_largest(rows, over)
    draw(axes, rows, over, lambda row: float(row["remote_gb_per_s"]))
    ceiling = sorted({(row[over], row["ceiling_gb_per_s"]) for row in rows if row["ceiling_gb_per_s"]})
    if ceiling:
        axes.plot(*zip(*ceiling), color="black", linestyle="--", label="wire ceiling")
    axes.set(ylabel="remote GB/s", ylim=(0, None), title=title)


def is_swept(rows: list[dict[str, Any]], field: str) -> bool:
    return len({row[field] for row in rows if row[field]}) > 1


def at_largest(rows: list[dict[str, Any]], field: str) -> str:
    most = max((row[field] for row in rows), default=0)
    return f", {most} {'tokens' if field == 'num_tokens' else 'SMs'}" if most else ""


def of_largest(rows: list[dict[str, Any]], over: str) -> list[dict[str, Any]]:
    """What a picture over `over` shows: the largest of the other field. No budget (0): over tokens, beside the rest."""
    other = "num_sms" if over == "num_tokens" else "num_tokens"
    most = max((row[other] for row in rows), default=0)
    kept = (0, most) if other == "num_sms" else (most, )
    return [row for row in rows if row[other] in kept and (over == "num_tokens" or row["num_sms"])]


def draw(axes: Any, rows: list[dict[str, Any]], over: str, value: Callable[[dict[str, Any]], float]) -> None:
    """A line for each operation."""
    axes.set_prop_cycle(color=COLORS)
    for name in dict.fromkeys(row["operation"] for row in rows):
        line = sorted((row[over], value(row)) for row in rows if row["operation"] == name)
        axes.plot(*zip(*line), marker="o", markersize=3, linestyle=":" if name.startswith(OTHERS) else "-", label=name)
    places = sorted({row[over] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xlabel("tokens per rank" if over == "num_tokens" else "SMs")
    axes.grid(visible=True, alpha=0.3)
