"""A picture of a saved report, beside its JSON."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Callable

NO_MATPLOTLIB = (
    "no plot: matplotlib is not installed here; where it is, `tools/render_benchmarks.py --plots` makes it "
    "from the JSON")
WIDTH, HEIGHT, DPI = 14.0, 6.0, 110
BAR_HEIGHT, LEGEND_ROW_HEIGHT, LEGEND_COLUMNS = 0.26, 0.17, 3
# Up to as many places bars are drawn: a line through two points shows a course that nobody measured.
MOST_BARS = 2
COLORS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf",
          "#000080", "#ffbb78", "#006400", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#444444")
LINE_STYLES = ("-", "--", "-.", ":")
OTHERS = ("nccl", "gloo")
# Variants that would hide the others.
LEFT_OUT = ("bias", "weights", "graph", "send", "receive")

Row = dict[str, Any]


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
    picture = path.with_suffix(".png")
    if report["benchmark"] == "model":
        figure = draw_scaling(plt, report)
        figure.savefig(picture, dpi=DPI)
        plt.close(figure)
        return f"plotted {picture}"
    figure, (times, rates) = plt.subplots(1, 2, figsize=(WIDTH, height_of(report)), layout="constrained")
    draw_times(times, report)
    draw_rates(rates, report)
    for axes in (times, rates):
        if axes.get_legend_handles_labels()[0]:  # one rank has no rates
            axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=LEGEND_COLUMNS, frameon=False)
    machine = report["machine"].get("gpu", "CPU executor")
    how = ", as threads of one GPU" if report["ranks_as_threads"] else ""
    figure.suptitle(f"{report['benchmark']}, {report['num_ranks']} ranks{how}, {machine}, {report['date'][:10]}")
    figure.savefig(picture, dpi=DPI)
    plt.close(figure)
    return f"plotted {picture}"


def draw_scaling(plt: Any, report: Row) -> Any:
    """Of `python -m deep_ep model --scaling`: time over ranks, a mark where another link bounds the call; and SMs, or,
    where all of them take part, what leaves a rank over the rail."""
    figure, (times, beside) = plt.subplots(1, 2, figsize=(WIDTH, HEIGHT), layout="constrained")
    names = list(dict.fromkeys(name_of(row) for row in report["rows"]))
    bounds = dict(zip(("NVLink", "SMs", "rail"), "osD"))
    has_budgets = any(row["num_sms"] for row in report["rows"])
    # Lines that lie on each other are seen through their gaps.
    for color, style, name in zip(COLORS, LINE_STYLES, names):
        rows = [row for row in report["rows"] if name_of(row) == name]
        places, look = [row["num_ranks"] for row in rows], {"color": color, "linestyle": style, "label": name}
        times.plot(places, [row["time_us"] for row in rows], **look)
        for row in rows:
            times.plot(row["num_ranks"], row["time_us"], marker=bounds[row["bottleneck"]], color=color)
        beside.plot(places, [row["num_sms"] if has_budgets else rail_mb(row) for row in rows], **look, marker="o",
                    markersize=3)  # yapf: disable
    for bound in sorted({row["bottleneck"] for row in report["rows"]}):
        times.plot([], [], marker=bounds[bound], color="black", linestyle="", label=f"bound by {bound}")
    places = sorted({row["num_ranks"] for row in report["rows"]})
    what = "SMs that are enough" if has_budgets else "MB over the rail"
    for axes, label in ((times, "µs (predicted)"), (beside, what)):
        axes.set_xscale("log", base=2)
        axes.set_xticks(places, [str(place) for place in places])
        axes.set(xlabel="ranks, 8 a node", ylabel=label)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    times.set_yscale("log")
    shape, links = report["shape"], report["links"]
    figure.suptitle(f"model, {report['mode']}: {shape['num_tokens']} tokens, hidden {shape['hidden']}, "
                    f"top-{shape['num_topk']} of {shape['num_experts']}, NIC {links['nic_gb_per_s']:g} GB/s, NVLink "
                    f"{links['nvlink_gb_per_s']:g} GB/s")  # yapf: disable
    return figure


def name_of(row: Row) -> str:
    """Of a prediction."""
    form = f", {row['form']}" if "form" in row else ""
    return f"{row['operation']} {row['kind'].upper()}{form}"


def rail_mb(row: Row) -> float:
    return float(sum(phase["num_bytes"] for phase in row["phases"] if phase["name"] == "rail")) / 1e6


def height_of(report: Row) -> float:
    """Room for every bar, or for the legend below the lines, in inches."""
    rows = [row for row in report["rows"] if is_drawn(row)]
    num_operations = len({row["operation"] for row in rows})
    num_bars = num_operations * min(len({row["num_tokens"] for row in rows}), MOST_BARS)
    return max(HEIGHT + num_operations // LEGEND_COLUMNS * LEGEND_ROW_HEIGHT, 2.0 + num_bars * BAR_HEIGHT)


def device_us(row: Row) -> float:
    return float(row.get("queued_us") or row["chained_us"])


def remote_rate(row: Row) -> float:
    return float(row["remote_gb_per_s"])


def is_drawn(row: Row) -> bool:
    return row["routing"] == "uniform" and not set(LEFT_OUT) & set(row["operation"].split())


def draw_times(axes: Any, report: Row) -> None:
    """Time over tokens, with the largest SM budget; of one size over SM budgets, if there are any."""
    rows = [row for row in report["rows"] if is_drawn(row)]
    over = "num_sms" if not is_swept(rows, "num_tokens") and any(row["num_sms"] for row in rows) else "num_tokens"
    title = f"time{at_largest(rows, 'num_sms')}" if over == "num_tokens" else f"time{at_largest(rows, 'num_tokens')}"
    axes.set_title(title)
    colors, rows = colors_of(report), of_largest(rows, over)
    if are_bars(rows, over):
        draw_bars(axes, rows, over, device_us)
        axes.set_xlabel("µs")
        return
    draw_lines(axes, rows, over, device_us, colors)
    axes.set_ylabel("µs")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(log_places())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def draw_rates(axes: Any, report: Row) -> None:
    """Remote GB/s over SM budgets, of the largest size; of one budget over tokens. The ceiling beside."""
    rows = [row for row in report["rows"] if is_drawn(row) and row["remote_bytes"]]
    over = "num_sms" if is_swept(rows, "num_sms") else "num_tokens"
    title = f"rate{at_largest(rows, 'num_tokens')}" if over == "num_sms" else f"rate{at_largest(rows, 'num_sms')}"
    axes.set_title(title)
    colors, rows = colors_of(report), of_largest(rows, over)
    ceilings = sorted({(row[over], row["ceiling_gb_per_s"]) for row in rows if row["ceiling_gb_per_s"]})
    if are_bars(rows, over):
        draw_bars(axes, rows, over, remote_rate)
        axes.set_xlabel("remote GB/s")
        if ceilings:
            axes.axvline(max(rate for _, rate in ceilings), color="black", linestyle="--", label="wire ceiling")
        return
    draw_lines(axes, rows, over, remote_rate, colors)
    if ceilings:
        axes.plot(*zip(*ceilings), color="black", linestyle="--", label="wire ceiling")
    axes.set(ylabel="remote GB/s", ylim=(0, None))


def is_swept(rows: list[Row], field: str) -> bool:
    return len({row[field] for row in rows if row[field]}) > 1


def are_bars(rows: list[Row], over: str) -> bool:
    return 0 < len({row[over] for row in rows}) <= MOST_BARS


def at_largest(rows: list[Row], field: str) -> str:
    most = max((row[field] for row in rows), default=0)
    return f", {named(most, field)}" if most else ""


def named(number: int, field: str) -> str:
    return f"{number} {'tokens per rank' if field == 'num_tokens' else 'SMs'}"


def of_largest(rows: list[Row], over: str) -> list[Row]:
    """What a picture over `over` shows: the largest of the other field. No budget (0): over tokens, beside the rest."""
    other = "num_sms" if over == "num_tokens" else "num_tokens"
    most = max((row[other] for row in rows), default=0)
    kept = (0, most) if other == "num_sms" else (most, )
    return [row for row in rows if row[other] in kept and (over == "num_tokens" or row["num_sms"])]


def colors_of(report: Row) -> dict[str, str]:
    """One color for an operation, in both halves of the picture."""
    names = dict.fromkeys(row["operation"] for row in report["rows"] if is_drawn(row))
    return {name: COLORS[i % len(COLORS)] for i, name in enumerate(names)}


def draw_bars(axes: Any, rows: list[Row], over: str, value: Callable[[Row], float]) -> None:
    """A horizontal bar with its figure for each operation and place; operations are named beside them."""
    names = list(dict.fromkeys(row["operation"] for row in rows))
    places = sorted({row[over] for row in rows})
    thickness = 0.8 / len(places)
    for i, place in enumerate(places):
        values = {row["operation"]: value(row) for row in rows if row[over] == place}
        offsets = [names.index(name) + (i - (len(places) - 1) / 2) * thickness for name in values]
        bars = axes.barh(offsets, list(values.values()), thickness, color=COLORS[i], label=named(place, over))
        axes.bar_label(bars, [figure_of(figure) for figure in values.values()], padding=3, fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_axisbelow(True)
    axes.grid(visible=True, axis="x", alpha=0.3)


def figure_of(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def draw_lines(axes: Any, rows: list[Row], over: str, value: Callable[[Row], float], colors: dict[str, str]) -> None:
    """A line for each operation."""
    for name in dict.fromkeys(row["operation"] for row in rows):
        line = sorted((row[over], value(row)) for row in rows if row["operation"] == name)
        axes.plot(*zip(*line),
                  color=colors[name],
                  marker="o",
                  markersize=3,
                  linestyle=":" if name.startswith(OTHERS) else "-",
                  label=name)
    places = sorted({row[over] for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places])
    axes.set_xlabel("tokens per rank" if over == "num_tokens" else "SMs")
    axes.grid(visible=True, alpha=0.3)


def log_places() -> Any:
    from matplotlib.ticker import LogLocator
    return LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
