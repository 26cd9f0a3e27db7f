"""The slowest obvious version of what the library does, on the CPU, for all ranks at once."""

from reference.internode import RailPlaces, positions, rail_places
from reference.low_latency import (
    Cast,
    ExpertRows,
    logfmt,
    low_latency_combine,
    low_latency_dispatch,
    low_latency_parts,
)
from reference.moe import Arrival, Layout, Sent, combine, dispatch, layout

__all__ = [
    "Arrival", "Cast", "ExpertRows", "Layout", "RailPlaces", "Sent", "combine", "dispatch", "layout", "logfmt",
    "low_latency_combine", "low_latency_dispatch", "low_latency_parts", "positions", "rail_places"
]
