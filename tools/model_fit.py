"""The model beside measurements inside a node: how far it is off, and what its constants would be for a machine."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deep_ep import InvalidArgument, calibrate, model
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
            operation, _lenders(report), row["num_tokens"], row["num_sms"])
        cost = measured.cost(nvlink_gb_per_s)
        if is_low_latency:
            model_us = cost.latency_us + row["remote_bytes"] / cost.link_gb_per_s / 1e3
        else:
            model_us = cost.time_us(row["num_sms"], row["remote_bytes"] * num_ranks / (num_ranks - 1),
                                    row["remote_bytes"])
        found.append(Comparison(row["operation"], row["num_tokens"], row["num_sms"], row["queued_us"], model_us))
    return found


def measure(report: dict[str, Any], nvlink_gb_per_s: float = NVLINK_GB_PER_S) -> dict[str, NodeCost]:
    """What `node_cost` or LOW_LATENCY_COSTS say of such ranks, from a report that `compare` takes: the constants with
    which the sum of squared relative errors is least. Raises InvalidArgument where the high-throughput mode had fewer
    than two SM budgets or sizes."""
    is_low_latency = report["benchmark"] == LOW_LATENCY
    shares, costs = [percent / 100 for percent in range(50, 121)], {}
    for operation in (COMBINE, ) if lends_nothing(report) else (DISPATCH, COMBINE):
        if is_low_latency:
            samples = _low_latency_samples(report, operation)
            # Combine has one format, and the share of dispatch.
            fit, among = _fit_latency, shares if operation == DISPATCH else [costs[DISPATCH].link_share]
        elif operation == COMBINE and _lenders(report) == model.LENDING_PAIR:
            samples = calibrate.samples_of(_rows_with_lent_sums(report), operation, report["num_ranks"])
            fit, among = _fit_rate, shares
        else:
            samples = calibrate.samples_of(report["rows"], operation, report["num_ranks"])
            fit, among = calibrate.fit, shares
        found = [(share, fit(samples, share * nvlink_gb_per_s)) for share in among]
        share, cost = min(found, key=lambda one, samples=samples: _error(samples, one[1]))  # type: ignore[misc]
        costs[operation] = NodeCost(cost.latency_us, share, 0.0 if is_low_latency else cost.sm_gb_per_s)
    return costs


def _error(samples: Sequence[calibrate.Sample], cost: calibrate.Cost) -> float:
    return sum((cost.time_us(one.num_sms, one.num_bytes, one.remote_bytes) / one.time_us - 1)**2 for one in samples)


def _low_latency_samples(report: dict[str, Any], operation: str) -> list[calibrate.Sample]:
    """All SMs take part, and what they do beside the link does not show."""
    return [
        calibrate.Sample(1, 0, row["remote_bytes"], row["queued_us"]) for row in report["rows"]
        if _LOW_LATENCY_ROWS.get(row["operation"]) == operation and row["routing"] == "uniform"
    ]


def _rows_with_lent_sums(report: dict[str, Any]) -> list[dict[str, Any]]:
    rows = (row for row in report["rows"] if row["operation"] == "combine BF16")
    return [row for row in rows if model.lends_sums(report["num_ranks"], row["num_tokens"], row["num_sms"])]


def _fit_rate(samples: Sequence[calibrate.Sample], link_gb_per_s: float) -> calibrate.Cost:
    """Sums are lent for a narrow range of sizes, which tells no latency: it is that of combines through slots."""
    latency_us = model.NODE_COSTS[COMBINE].latency_us
    rates = [one.num_bytes / (one.time_us - latency_us) / one.num_sms / 1e3 for one in samples]
    if not rates:
        raise InvalidArgument("no combine of these figures has lent sums")
    return min((calibrate.Cost(latency_us, link_gb_per_s, rate) for rate in rates),
               key=lambda cost: _error(samples, cost))


def _fit_latency(samples: Sequence[calibrate.Sample], link_gb_per_s: float) -> calibrate.Cost:
    bare = calibrate.Cost(0.0, link_gb_per_s, 1.0)
    weights = [1 / one.time_us**2 for one in samples]
    rests = [one.time_us - bare.time_us(one.num_sms, one.num_bytes, one.remote_bytes) for one in samples]
    latency_us = sum(weight * rest for weight, rest in zip(weights, rests)) / sum(weights)
    return calibrate.Cost(latency_us, link_gb_per_s, 1.0)
