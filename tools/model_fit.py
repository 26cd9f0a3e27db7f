"""The model beside measurements inside a node: how far it is off, and what its constants would be for a machine."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deep_ep import calibrate, model
from deep_ep.model import COMBINE, DISPATCH, LOW_LATENCY, NVLINK_GB_PER_S, NodeCost


@dataclass(frozen=True)
class Comparison:
    """A measured figure beside the model's."""

    operation: str
    num_tokens: int
    num_sms: int
    measured_us: float
    model_us: float

    @property
    def error(self) -> float:
        return self.model_us / self.measured_us - 1


_HIGH_THROUGHPUT_ROWS = {"dispatch FP8 cached": DISPATCH, "dispatch BF16 cached": DISPATCH, "combine BF16": COMBINE}
_LOW_LATENCY_ROWS = {"dispatch FP8": DISPATCH, "dispatch BF16": DISPATCH, "combine BF16": COMBINE}


def lends_nothing(report: dict[str, Any]) -> bool:
    """Did its calls move rows through slots alone?"""
    return bool(report.get("environment", {}).get("DEEP_EP_LEND_BYTES") == "0")


def _lenders(report: dict[str, Any]) -> int:
    return 0 if lends_nothing(report) else int(report["num_ranks"])


def compare(report: dict[str, Any], nvlink_gb_per_s: float = NVLINK_GB_PER_S) -> list[Comparison]:
    """With a report of `python -m deep_ep bench intranode|low-latency --save`: calls whose counts are known, queued.
    With DEEP_EP_LEND_BYTES=0 combines alone: as in a group of more than two ranks."""
    is_low_latency, num_ranks, found = report["benchmark"] == LOW_LATENCY, report["num_ranks"], []
    names = _LOW_LATENCY_ROWS if is_low_latency else _HIGH_THROUGHPUT_ROWS
    for row in report["rows"]:
        operation = names.get(row["operation"])
        if operation is None or row["routing"] != "uniform" or (lends_nothing(report) and operation != COMBINE):
            continue
        measured = model.LOW_LATENCY_COSTS[operation] if is_low_latency else model.node_cost(
            operation, _lenders(report))
        cost = measured.cost(nvlink_gb_per_s)
        if is_low_latency:
            model_us = cost.latency_us + row["remote_bytes"] / cost.link_gb_per_s / 1e3
        else:
            model_us = cost.time_us(row["num_sms"], row["remote_bytes"] * num_ranks / (num_ranks - 1),
                                    row["remote_bytes"])
        found.append(Comparison(row["operation"], row["num_tokens"], row["num_sms"], row["queued_us"], model_us))
    return found


def measure(report: dict[str, Any], nvlink_gb_per_s: float = NVLINK_GB_PER_S) -> dict[str, NodeCost]:
    """What `node_cost` or LOW_LATENCY_COSTS say of such ranks, from a report that `compare` takes: the share of the
    link with which the largest relative error is least. Raises InvalidArgument where the high-throughput mode had fewer
    than two SM budgets or sizes."""
    fit = _fit_low_latency if report["benchmark"] == LOW_LATENCY else _fit_high_throughput
    shares = [percent / 100 for percent in range(50, 121)]
    return fit(report, [(share, share * nvlink_gb_per_s) for share in shares])


def _fit_high_throughput(report: dict[str, Any], links: Sequence[tuple[float, float]]) -> dict[str, NodeCost]:
    costs = {}
    for operation in (COMBINE, ) if lends_nothing(report) else (DISPATCH, COMBINE):
        samples = calibrate.samples_of(report["rows"], operation, report["num_ranks"])

        def fitted(share: float, gb_per_s: float, samples: list[calibrate.Sample] = samples) -> tuple[float, NodeCost]:
            cost = calibrate.fit(samples, gb_per_s)
            errors = [cost.time_us(s.num_sms, s.num_bytes, s.remote_bytes) / s.time_us - 1 for s in samples]
            return max(map(abs, errors)), NodeCost(cost.latency_us, share, cost.sm_gb_per_s)

        costs[operation] = min((fitted(*link) for link in links), key=lambda found: found[0])[1]
    return costs


def _fit_low_latency(report: dict[str, Any], links: Sequence[tuple[float, float]]) -> dict[str, NodeCost]:
    """All SMs take part, so there is no rate of one. Combine has one format, and the share of dispatch."""
    times = {DISPATCH: [], COMBINE: []}  # type: dict[str, list[tuple[float, float]]]
    for row in report["rows"]:
        if row["operation"] in _LOW_LATENCY_ROWS and row["routing"] == "uniform":
            times[_LOW_LATENCY_ROWS[row["operation"]]].append((row["queued_us"], row["remote_bytes"] / 1e3))

    def fitted(operation: str, share: float, gb_per_s: float) -> tuple[float, NodeCost]:
        rests = [time_us - kilobytes / gb_per_s for time_us, kilobytes in times[operation]]
        latency_us = sum(rests) / len(rests)
        errors = [(latency_us - rest) / time_us for rest, (time_us, _) in zip(rests, times[operation])]
        return max(map(abs, errors)), NodeCost(latency_us, share, 0.0)

    dispatch = min((fitted(DISPATCH, *link) for link in links), key=lambda found: found[0])[1]
    shared = next(link for link in links if link[0] == dispatch.link_share)
    return {DISPATCH: dispatch, COMBINE: fitted(COMBINE, *shared)[1]}
